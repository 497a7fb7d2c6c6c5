//! The main property: an answer depends on its prompt and parameters only. Not on how many sequences run at once, on
//! the token budget, the page size, the size or state of the cache, the order of arrival, steps that failed, or whether
//! steps are started while others run.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tidemill_kernels::models::{FakeConfig, FakeModel};
use tidemill_kernels::step::SamplingParams;

use super::super::page_pool::fuzz::Random;
use super::super::scheduler::tests::learn_short;
use super::super::sequence::{FinishReason, Priority, SharedPrefix};
use super::tests::{VOCAB_SIZE, fake_config, naive_answer};
use super::*;

/// What the models of all cases did.
#[derive(Debug, Default)]
struct Seen {
    num_copies: AtomicU64,
    /// Rows whose token was not known when they were started.
    num_ahead: AtomicU64,
    /// Of all sequences in all steps.
    num_uses: AtomicU64,
}

/// Fails one step in eight, before or after it wrote to the cache.
struct FlakyModel {
    seen: Arc<Seen>,
    model: FakeModel,
    copies_pages: bool,
    random: Random,
}

impl Model for FlakyModel {
    fn info(&self) -> &ModelInfo {
        self.model.info()
    }

    fn start(&mut self, batch: &StepBatch) -> Result<(), StepError> {
        self.seen.num_copies.fetch_add(batch.copies.len() as u64, Ordering::Relaxed);
        self.seen.num_ahead.fetch_add(batch.sampled_by.iter().flatten().count() as u64, Ordering::Relaxed);
        self.seen.num_uses.fetch_add(batch.token_uses.len() as u64, Ordering::Relaxed);
        if self.random.one_in(16) { planned_failure() } else { self.model.start(batch) }
    }

    fn finish(&mut self) -> Result<StepOutput, StepError> {
        let output = self.model.finish()?;
        if self.random.one_in(16) { planned_failure() } else { Ok(output) }
    }

    fn max_started(&self) -> usize {
        self.model.max_started()
    }

    fn copies_pages(&self) -> bool {
        self.copies_pages
    }

    fn num_host_pages(&self) -> u32 {
        self.model.num_host_pages()
    }
}

fn planned_failure<T>() -> Result<T, StepError> {
    Err(StepError { message: "planned".to_owned() })
}

type Answers = BTreeMap<SequenceId, (Vec<u32>, FinishReason)>;

/// Prompts which share prefixes of all lengths, some of them equal.
fn workload(random: &mut Random) -> Vec<SequenceRequest> {
    let mut requests: Vec<SequenceRequest> = Vec::new();
    let max_prompt_len = *random.pick(&[6, 20, 80]);
    let max_max_tokens = *random.pick(&[2, 12, 30]);
    for id in 0..random.between(1, 24) {
        let mut token_ids = Vec::new();
        if !requests.is_empty() && !random.one_in(5) {
            let earlier = &random.pick(&requests).token_ids;
            token_ids.extend_from_slice(&earlier[..random.between(0, earlier.len())]);
        }
        let len = random.between(token_ids.len().max(1), max_prompt_len);
        token_ids.resize_with(len, || random.below(VOCAB_SIZE as usize) as u32);
        let temperature = random.below(2) as f32;
        let sampling = SamplingParams {
            temperature,
            seed: random.below(3) as u64,
            min_p: *random.pick(&[0.0, 0.1]),
            repetition_penalty: *random.pick(&[1.0, 1.0, 1.0, 1.2]),
            presence_penalty: *random.pick(&[0.0, 0.0, 0.0, 0.5]),
            frequency_penalty: *random.pick(&[0.0, 0.0, 0.0, -0.5]),
            ..SamplingParams::GREEDY
        };
        let max_tokens = random.between(1, max_max_tokens) as u32;
        let request = SequenceRequest::new(SequenceId(id as u64), token_ids.into(), max_tokens, sampling);
        let priority = *random.pick(&Priority::ALL);
        requests.push(SequenceRequest { shared: hints(random, len), priority, ..request });
    }
    requests
}

/// What is said of later prompts, true or not: no answer may depend on it.
fn hints(random: &mut Random, prompt_len: usize) -> Arc<[SharedPrefix]> {
    let (mut len, mut num_later) = (0, random.below(6) as u32);
    let mut shared = Vec::new();
    while num_later > 0 && len < prompt_len as u32 {
        len += 1 + random.below(prompt_len) as u32;
        shared.push(SharedPrefix { len, num_later });
        num_later -= 1 + random.below(num_later as usize) as u32;
    }
    shared.into()
}

/// An engine in which each of the sequences fits alone; often not more than that.
fn random_engine(
    random: &mut Random,
    requests: &[SequenceRequest],
    runs_ahead: bool,
    seen: &Arc<Seen>,
) -> Engine {
    let seen = Arc::clone(seen);
    let page_size = *random.pick(&[1, 2, 4, 16, 64]);
    let longest = requests.iter().map(|request| request.token_ids.len() + request.max_tokens as usize).max();
    let least_pages = longest.expect("there are requests").div_ceil(page_size);
    let num_pages = least_pages + *random.pick(&[0, 0, 1, 2, 5, 20, 500]);
    let config = EngineConfig {
        max_num_seqs: *random.pick(&[1, 2, 3, 8, 64]),
        max_num_batched_tokens: *random.pick(&[1, 2, 3, 7, 16, 50, 1000]),
        enable_prefix_cache: !random.one_in(3),
    };
    let num_host_pages = *random.pick(&[0, 1, 3, 100]);
    println!("{config:?}, {num_pages} and {num_host_pages} pages of {page_size}, runs ahead: {runs_ahead}");
    let fake = FakeConfig { runs_ahead, num_host_pages, ..fake_config(num_pages as u32, page_size as u32) };
    let model = FakeModel::new(fake);
    let (copies_pages, flaky) = (!random.one_in(3), Random::new(random.next()));
    let mut engine = Engine::new(Box::new(FlakyModel { seen, model, copies_pages, random: flaky }), config);
    if random.one_in(2) {
        learn_short(&mut engine.scheduler);
    }
    engine
}

/// Submits in random order, some of it mid-flight, and steps until all is done.
fn run(random: &mut Random, engine: &mut Engine, requests: &[SequenceRequest]) -> Vec<Finished> {
    let mut to_submit = requests.to_vec();
    let mut finished = Vec::new();
    let patience = *random.pick(&[1, 2, 6]);
    while engine.has_work() || !to_submit.is_empty() {
        while !to_submit.is_empty() && random.one_in(patience) {
            let request = to_submit.swap_remove(random.below(to_submit.len()));
            engine.submit(request).expect("each sequence fits");
        }
        finished.extend(engine.step().unwrap_or_default());
        check_stats_in_flight(engine);
    }
    finished
}

fn check_stats_in_flight(engine: &Engine) {
    let stats = engine.stats();
    assert!(stats.kv_pages_in_use + stats.kv_pages_cached <= stats.kv_pages_total);
    assert!(stats.computed_tokens <= stats.step_tokens);
    assert!(stats.recomputed_tokens <= stats.computed_tokens + stats.reused_tokens);
}

fn check_stats_at_the_end(engine: &Engine, finished: &[Finished]) {
    let sum = |value: fn(&Finished) -> u32| finished.iter().map(|one| u64::from(value(one))).sum::<u64>();
    let stats = engine.stats();
    assert_eq!(stats.finished, finished.len() as u64);
    assert_eq!(stats.prompt_tokens, sum(|one| one.prompt_len));
    assert_eq!(stats.computed_tokens, sum(|one| one.computed_len));
    assert_eq!(stats.reused_tokens, sum(|one| one.reused_len));
    assert_eq!(stats.output_tokens, sum(|one| one.token_ids.len() as u32));
    assert_eq!(stats.prompt_tokens + stats.recomputed_tokens, stats.computed_tokens + stats.reused_tokens);
    assert_eq!(stats.kv_pages_in_use, 0);
    if stats.preemptions == 0 {
        assert_eq!(stats.recomputed_tokens, 0);
    }
}

#[test]
fn what_is_given_up_changes_no_other_answer() {
    let seen = Arc::new(Seen::default());
    let (mut num_aborted, mut num_finished) = (0, 0);
    for seed in 1000..1300 {
        let mut random = Random::new(seed);
        let requests = workload(&mut random);
        let mut engine = random_engine(&mut random, &requests, seed % 2 == 0, &seen);
        requests.iter().for_each(|request| engine.submit(request.clone()).expect("each sequence fits"));
        let mut open: BTreeMap<SequenceId, &SequenceRequest> =
            requests.iter().map(|request| (request.id, request)).collect();
        while engine.has_work() {
            if random.one_in(6) {
                let id = random.pick(&requests).id;
                let was_open = open.remove(&id).is_some();
                assert_eq!(engine.abort(id), was_open);
                num_aborted += u64::from(was_open);
            }
            for one in engine.step().unwrap_or_default() {
                let request = open.remove(&one.id).expect("neither given up nor finished before");
                assert_eq!((one.token_ids, one.reason), naive_answer(request));
                num_finished += 1;
            }
        }
        assert!(open.is_empty(), "a sequence was lost");
        let stats = engine.stats();
        assert_eq!(stats.kv_pages_in_use, 0);
        assert_eq!(
            stats.prompt_tokens + stats.recomputed_tokens,
            stats.computed_tokens + stats.reused_tokens + stats.aborted_tokens
        );
    }
    assert!(num_aborted > 200 && num_finished > 200, "{num_aborted} given up, {num_finished} finished");
}

#[test]
fn answers_depend_on_the_prompt_only() {
    let seen = Arc::new(Seen::default());
    let (mut preemptions, mut swapped_in_pages, mut reused_tokens, mut stops) = (0, 0, 0, 0);
    for seed in 0..150 {
        let mut random = Random::new(seed);
        let requests = workload(&mut random);
        let naive: Answers = requests.iter().map(|request| (request.id, naive_answer(request))).collect();
        // The second round finds what the first has left in the cache.
        for runs_ahead in [false, true, false, true] {
            let mut engine = random_engine(&mut random, &requests, runs_ahead, &seen);
            let mut finished = Vec::new();
            for _ in 0..2 {
                let round = run(&mut random, &mut engine, &requests);
                let answers: Answers =
                    round.iter().map(|one| (one.id, (one.token_ids.clone(), one.reason))).collect();
                assert_eq!(round.len(), requests.len());
                assert_eq!(answers, naive);
                finished.extend(round);
            }
            check_stats_at_the_end(&engine, &finished);
            preemptions += engine.stats().preemptions;
            swapped_in_pages += engine.stats().swapped_in_pages;
            reused_tokens += engine.stats().reused_tokens;
            stops += finished.iter().filter(|one| one.reason == FinishReason::Stop).count();
        }
    }
    println!(
        "{preemptions} preemptions, {swapped_in_pages} pages swapped in, {reused_tokens} tokens reused, {stops} stops"
    );
    assert!(preemptions > 100, "too few preemptions to show anything");
    assert!(swapped_in_pages > 100, "too few swaps to show anything");
    assert!(reused_tokens > 1000, "too little reuse to show anything");
    assert!(seen.num_copies.load(Ordering::Relaxed) > 1000, "too few copies to show anything");
    assert!(seen.num_ahead.load(Ordering::Relaxed) > 1000, "too few steps behind others to show anything");
    assert!(seen.num_uses.load(Ordering::Relaxed) > 1000, "too few penalties to show anything");
    assert!(stops > 100, "too few stops to show anything");
}
