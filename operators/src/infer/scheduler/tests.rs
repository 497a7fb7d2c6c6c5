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
        scheduler.plan(0);
        let of = |sequence: &Sequence| format!("{}{}", name(sequence), sequence.chunk_lens[0]);
        let mut line: Vec<_> = scheduler.running.iter().map(of).collect();
        if !scheduler.waiting.is_empty() {
            line.push(format!("| {}", scheduler.waiting.iter().map(name).collect::<String>()));
        }
        lines.push(line.join(" "));
        let mut batch = StepBatch::default();
        scheduler.fill(0, &mut batch);
        // Sampled tokens differ between sequences, so that answers are not shared.
        let token_ids =
            (0..batch.num_seqs()).map(|seq| batch.sampling[seq].map(|_| 1000 + batch.pages(seq)[0].0));
        scheduler.commit(&StepOutput { token_ids: token_ids.collect() }, &[]);
    }
    assert_eq!(lines, expect, "{lines:#?}");
}

/// What each step computes, as [`check_arrivals`] shows it, if each is planned while the one before it runs. A capital
/// letter is a token that the step before samples. Each answer ends with the token after `answer_lens`.
#[track_caller]
fn check_ahead(mut scheduler: Scheduler, prompts: &[(&str, u32)], answer_lens: &[usize], expect: &[&str]) {
    for (id, &(prompt, max_tokens)) in prompts.iter().enumerate() {
        let token_ids = prompt.bytes().map(u32::from).collect();
        let sampling = SamplingParams::GREEDY;
        scheduler.submit(&SequenceRequest::new(SequenceId(id as u64), token_ids, max_tokens, sampling));
    }
    let mut batches = VecDeque::new();
    let mut lines = Vec::new();
    while scheduler.has_work() {
        while batches.len() < MAX_PLANNED && scheduler.plan(batches.len()) {
            let step = batches.len();
            let mut batch = StepBatch::default();
            scheduler.fill(step, &mut batch);
            let in_step = scheduler.running.iter().filter(|sequence| sequence.chunk_lens[step] > 0);
            let ids: Vec<_> = in_step.map(|sequence| sequence.id.0 as usize).collect();
            let part = |(&id, sampled_by): (&usize, &Option<u32>)| {
                let first = if sampled_by.is_some() { b'A' } else { b'a' };
                let chunk =
                    &scheduler.running.iter().find(|other| other.id.0 as usize == id).unwrap().chunk_lens;
                format!("{}{}", char::from(first + id as u8), chunk[step])
            };
            lines.push(ids.iter().zip(&batch.sampled_by).map(part).collect::<Vec<_>>().join(" "));
            batches.push_back((ids, batch));
        }
        let (ids, batch) = batches.pop_front().unwrap();
        let token_ids = ids.iter().zip(&batch.sampling).map(|(&id, sampling)| {
            let sequence = scheduler.running.iter().find(|other| other.id.0 as usize == id).unwrap();
            let is_end = sequence.fate == Fate::GoesOn
                && sequence.known_len_after(1) > sequence.prompt_len + answer_lens[id];
            sampling.map(|_| if is_end { 0 } else { 1000 + id as u32 })
        });
        scheduler.commit(&StepOutput { token_ids: token_ids.collect() }, &[0]);
    }
    assert_eq!(lines, expect, "{lines:#?}");
}

#[test]
fn steps_are_planned_while_others_run() {
    // The first ends by its length and is not planned again; the second ends early and has a row too many.
    check_ahead(
        Scheduler::new(CONFIG, 64, 4, true),
        &[("aaaaaa", 3), ("bbbbbbbbb", 9), ("cc", 2)],
        &[9, 2, 9],
        &["a6 b2", "A1 b7", "A1 B1 c2", "B1 C1", "B1"],
    );
}

#[test]
fn nobody_is_preempted_behind_a_step_that_runs() {
    // All pages are taken after two steps. Who needs another one is left out of the third and preempts when it is done.
    check_ahead(
        optimist(CONFIG, 3),
        &[("aaa", 5), ("bbbb", 4)],
        &[9, 9],
        &["a3 b4", "A1 B1", "B1", "a1", "A1", "A1", "b3"],
    );
}

#[test]
fn a_page_that_a_running_step_copies_is_not_given_away() {
    let mut scheduler = Scheduler::new(CONFIG, 64, 4, true);
    let submit = |scheduler: &mut Scheduler, id: u64, prompt: &[u32], max_tokens: u32| {
        let sampling = SamplingParams::GREEDY;
        scheduler.submit(&SequenceRequest::new(SequenceId(id), prompt.into(), max_tokens, sampling));
    };
    let plan = |scheduler: &mut Scheduler, step: usize| {
        assert!(scheduler.plan(step));
        let mut batch = StepBatch::default();
        scheduler.fill(step, &mut batch);
        batch
    };
    let output = || StepOutput { token_ids: vec![Some(9)] };
    submit(&mut scheduler, 0, &[1, 1], 2);
    plan(&mut scheduler, 0);
    plan(&mut scheduler, 1);
    scheduler.commit(&output(), &[]);
    // It takes its beginning from one that ends with the step that runs.
    submit(&mut scheduler, 1, &[1, 1, 2], 2);
    let [copy] = plan(&mut scheduler, 1).copies[..] else { panic!("nothing is copied") };
    assert_eq!(scheduler.commit(&output(), &[]).len(), 1);
    submit(&mut scheduler, 2, &[3; 7], 2);
    let batch = plan(&mut scheduler, 1);
    assert!(batch.num_seqs() == 2 && !batch.kv_page_indices.contains(&copy.from), "{batch:?}");
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
