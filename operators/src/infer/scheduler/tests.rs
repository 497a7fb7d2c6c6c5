use tidemill_kernels::step::SamplingParams;

use super::super::sequence::{SequenceId, SequenceRequest};
use super::*;

const CONFIG: EngineConfig =
    EngineConfig { max_num_seqs: 3, max_num_batched_tokens: 8, enable_prefix_cache: true };

/// Runs prompts named a, b, c, … with their `max_tokens`; one line a step: who computes how many tokens, then who waits.
#[track_caller]
fn check(config: EngineConfig, num_pages: u32, prompts: &[(&str, u32)], expect: &[&str]) {
    check_scheduler(Scheduler::new(config, num_pages, 4, true), prompts, expect);
}

/// Lets a scheduler expect short answers, so that longer ones run out of pages.
pub(in crate::infer) fn learn_short(scheduler: &mut Scheduler) {
    (0..200).for_each(|_| scheduler.learn(OwnerId(0), &"".into(), 1));
}

fn optimist(config: EngineConfig, num_pages: u32) -> Scheduler {
    let mut scheduler = Scheduler::new(config, num_pages, 4, true);
    learn_short(&mut scheduler);
    scheduler
}

#[track_caller]
fn check_scheduler(scheduler: Scheduler, prompts: &[(&str, u32)], expect: &[&str]) {
    let prompts: Vec<_> =
        prompts.iter().map(|&(prompt, max_tokens)| (0, Priority::Normal, prompt, max_tokens)).collect();
    check_arrivals(scheduler, &prompts, expect);
}

/// Each prompt comes before the step of this number, with its priority.
#[track_caller]
fn check_arrivals(mut scheduler: Scheduler, prompts: &[(usize, Priority, &str, u32)], expect: &[&str]) {
    let name = |sequence: &Sequence| char::from(b'a' + sequence.id.0 as u8);
    let mut lines = Vec::new();
    let mut id = 0;
    while id < prompts.len() || scheduler.num_waiting() + scheduler.num_running() > 0 {
        while let Some(&(_, priority, prompt, max_tokens)) =
            prompts.get(id).filter(|one| one.0 <= lines.len())
        {
            let token_ids = prompt.bytes().map(u32::from).collect();
            let sampling = SamplingParams::GREEDY;
            let request = SequenceRequest::new(SequenceId(id as u64), token_ids, max_tokens, sampling);
            scheduler.submit(&SequenceRequest { priority, ..request });
            id += 1;
        }
        scheduler.plan();
        let running = scheduler.running.iter().zip(&scheduler.plan.chunk_lens);
        let mut line: Vec<_> = running.map(|(sequence, len)| format!("{}{len}", name(sequence))).collect();
        if !scheduler.waiting.is_empty() {
            line.push(format!("| {}", scheduler.waiting.iter().map(name).collect::<String>()));
        }
        lines.push(line.join(" "));
        let mut batch = StepBatch::default();
        scheduler.fill(&mut batch);
        // Sampled tokens differ between sequences, so that answers are not shared.
        let token_ids =
            (0..batch.num_seqs()).map(|seq| batch.sampling[seq].map(|_| 1000 + batch.pages(seq)[0].0));
        scheduler.commit(&StepOutput { token_ids: token_ids.collect() }, &[]);
    }
    assert_eq!(lines, expect, "{lines:#?}");
}

#[test]
fn decodes_come_first_and_prompts_fill_the_rest() {
    check(
        CONFIG,
        64,
        &[("aaaaaa", 4), ("bbbbbbbbbbbb", 2), ("cc", 1)],
        &["a6 b2 | c", "a1 b7 | c", "a1 b3 c2", "a1 b1"],
    );
}

#[test]
fn max_num_seqs_bounds_the_batch() {
    check(
        EngineConfig { max_num_seqs: 2, ..CONFIG },
        64,
        &[("a", 2), ("b", 3), ("c", 1), ("d", 1)],
        &["a1 b1 | cd", "a1 b1 | cd", "b1 c1 | d", "d1"],
    );
}

#[test]
fn siblings_wait_for_a_page_on_its_way_and_others_overtake_them() {
    check(CONFIG, 64, &[("xxxxa", 1), ("xxxxb", 1), ("yy", 1), ("xxxxc", 1)], &["a5 c2 | bd", "b1 d1"]);
}

#[test]
fn siblings_follow_a_long_prefix_to_its_end() {
    check(CONFIG, 64, &[("xxxxxxxxxxxxa", 1), ("xxxxxxxxxxxxb", 1)], &["a8 | b", "a5 | b", "b1"]);
}

#[test]
fn without_a_cache_nobody_waits_for_siblings() {
    check(
        EngineConfig { enable_prefix_cache: false, ..CONFIG },
        64,
        &[("xxxxa", 1), ("xxxxb", 1)],
        &["a5 b3", "b2"],
    );
}

#[test]
fn a_long_prompt_is_not_overtaken_while_pages_are_short() {
    let config = EngineConfig { max_num_batched_tokens: 16, ..CONFIG };
    check(
        config,
        4,
        &[("aaaaaaaa", 3), ("bbbbbbbbb", 1), ("c", 1)],
        &["a8 | bc", "a1 | bc", "a1 | bc", "b9 c1"],
    );
}

#[test]
fn room_is_kept_for_the_answers_that_are_expected() {
    let prompts = [("aaa", 6), ("bbb", 6), ("ccc", 6)];
    check(
        CONFIG,
        6,
        &prompts,
        &[
            "a3 b3 | c",
            "a1 b1 | c",
            "a1 b1 | c",
            "a1 b1 | c",
            "a1 b1 | c",
            "a1 b1 | c",
            "c3",
            "c1",
            "c1",
            "c1",
            "c1",
            "c1",
        ],
    );
    check_scheduler(
        optimist(CONFIG, 6),
        &prompts,
        &["a3 b3 c2", "a1 b1 c1", "a1 b1 c1", "a1 b1 c1", "a1 b1 c1", "a1 b1 c1", "c1"],
    );
}

#[test]
fn the_cheapest_is_preempted_and_keeps_its_place() {
    let config = EngineConfig { max_num_batched_tokens: 24, ..CONFIG };
    let prompts = [("aaa", 12), ("bbb", 9), ("ccccccc", 3), ("d", 1)];
    check_scheduler(
        optimist(config, 5),
        &prompts,
        &[
            "a3 b3 c7 | d",
            "a1 b1 c1 | d",
            "a1 c1 | bd",
            "a1 b5 d1",
            "a1 b1",
            "a1 b1",
            "a1 b1",
            "a1 | b",
            "a1 | b",
            "a1 | b",
            "a1 | b",
            "a1 | b",
            "b5",
            "b1",
            "b1",
        ],
    );
}

#[test]
fn a_higher_priority_takes_the_budget_and_then_the_place_of_a_lower_one() {
    use Priority::{High, Low, Normal};
    let config = EngineConfig { max_num_seqs: 2, ..CONFIG };
    check_arrivals(
        Scheduler::new(config, 64, 4, true),
        &[(0, Low, "aaaaaaaaaaaa", 2), (0, Normal, "bbb", 4), (1, Low, "c", 1), (2, High, "ddddddddd", 1)],
        &["b3 a5", "b1 a7 | c", "d8 b0 | ac", "d1 b1 | ac", "b1 a1 | c", "c1"],
    );
}

#[test]
fn a_higher_priority_takes_the_pages_of_lower_ones_and_equals_wait() {
    use Priority::{High, Low, Normal};
    let config = EngineConfig { max_num_batched_tokens: 24, ..CONFIG };
    check_arrivals(
        Scheduler::new(config, 4, 4, true),
        &[
            (0, Normal, "aaa", 3),
            (0, Low, "bbb", 5),
            (1, Normal, "cccccccc", 2),
            (2, High, "ddddddddd", 2),
            (3, High, "ee", 1),
        ],
        &["a3 b3", "a1 b1 | c", "d9 | acb", "d1 e2 | acb", "a5 | cb", "c8 | b", "c1 | b", "b5", "b1", "b1"],
    );
}

#[test]
fn who_shares_a_prefix_is_cheap_to_preempt() {
    let config = EngineConfig { max_num_batched_tokens: 24, ..CONFIG };
    let prompts = [("xxxxxxxxa", 8), ("yyyyyy", 8), ("xxxxxxxxb", 8)];
    check_scheduler(
        optimist(config, 6),
        &prompts,
        &[
            "a9 b6 | c",
            "a1 b1 c1",
            "a1 b1 c1",
            "a1 b1 | c",
            "a1 | bc",
            "a1 | bc",
            "a1 | bc",
            "a1 | bc",
            "b2 | c",
            "b1 | c",
            "b1 | c",
            "b1 | c",
            "c3",
            "c1",
            "c1",
            "c1",
            "c1",
            "c1",
        ],
    );
}
