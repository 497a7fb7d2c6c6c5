use std::collections::VecDeque;
use std::sync::{Arc, Mutex};

use tidemill_kernels::models::{FakeConfig, FakeModel};
use tidemill_kernels::step::{PageId, SamplingParams, TokenUse};

use super::super::scheduler::tests::learn_short;
use super::super::sequence::{FinishReason, Priority, SharedPrefix};
use super::*;

pub(super) const VOCAB_SIZE: u32 = 24;

pub(super) fn fake_config(num_pages: u32, page_size: u32) -> FakeConfig {
    FakeConfig {
        vocab_size: VOCAB_SIZE,
        eos_probability: 0.04,
        page_size,
        num_pages,
        ..FakeConfig::default()
    }
}

pub(super) fn fake_model(num_pages: u32, page_size: u32) -> FakeModel {
    FakeModel::new(fake_config(num_pages, page_size))
}

/// Returns what it was given instead of a step's outcome, as long as there is any.
struct ScriptedModel {
    model: FakeModel,
    outcomes: VecDeque<Result<StepOutput, StepError>>,
    started: VecDeque<Result<StepOutput, StepError>>,
}

impl Model for ScriptedModel {
    fn info(&self) -> &ModelInfo {
        self.model.info()
    }

    fn start(&mut self, batch: &StepBatch) -> Result<(), StepError> {
        let outcome = self.outcomes.pop_front().unwrap_or_else(|| self.model.step(batch));
        self.started.push_back(outcome);
        Ok(())
    }

    fn finish(&mut self) -> Result<StepOutput, StepError> {
        self.started.pop_front().expect("a step is started")
    }

    fn copies_pages(&self) -> bool {
        true
    }
}

/// One sequence alone, one token a step, without the engine.
pub(super) fn naive_answer(request: &SequenceRequest) -> (Vec<u32>, FinishReason) {
    let max_len = request.token_ids.len() as u32 + request.max_tokens;
    let mut model = fake_model(max_len, 1);
    let eos_token_id = model.info().eos_token_ids[0];
    let pages: Vec<PageId> = (0..max_len).map(PageId).collect();
    let mut token_ids = request.token_ids.to_vec();
    let mut position = 0;
    loop {
        let mut batch = StepBatch::default();
        let is_last = position + 1 == token_ids.len();
        batch.push(&[token_ids[position]], position as u32, &pages, is_last.then_some(request.sampling));
        if is_last {
            batch.push_uses(&naive_uses(request, &token_ids));
        }
        let output = model.step(&batch).unwrap();
        position += 1;
        let Some(token_id) = output.token_ids[0] else { continue };
        let reason = if token_id == eos_token_id {
            FinishReason::Stop
        } else {
            token_ids.push(token_id);
            if (token_ids.len() as u32) < max_len {
                continue;
            }
            FinishReason::Length
        };
        return (token_ids.split_off(request.token_ids.len()), reason);
    }
}

fn naive_uses(request: &SequenceRequest, token_ids: &[u32]) -> Vec<TokenUse> {
    let SamplingParams { repetition_penalty, presence_penalty, frequency_penalty, .. } = request.sampling;
    let answer = &token_ids[request.token_ids.len()..];
    let of = |token_id: u32| {
        let is_used = repetition_penalty != 1.0 && token_ids.contains(&token_id);
        let num_in_answer = answer.iter().filter(|&&other| other == token_id).count() as u32;
        (is_used || num_in_answer > 0).then_some(TokenUse { token_id, num_in_answer })
    };
    if (repetition_penalty, presence_penalty, frequency_penalty) == (1.0, 0.0, 0.0) {
        return Vec::new();
    }
    (0..VOCAB_SIZE).filter_map(of).collect()
}

pub(super) fn request(id: u64, token_ids: &[u32], max_tokens: u32) -> SequenceRequest {
    SequenceRequest::new(SequenceId(id), token_ids.into(), max_tokens, SamplingParams::GREEDY)
}

fn engine(num_pages: u32, outcomes: impl IntoIterator<Item = Result<StepOutput, StepError>>) -> Engine {
    let config = EngineConfig { max_num_seqs: 4, max_num_batched_tokens: 16, enable_prefix_cache: true };
    let outcomes = outcomes.into_iter().collect();
    let model = ScriptedModel { model: fake_model(num_pages, 4), outcomes, started: VecDeque::new() };
    Engine::new(Box::new(model), config)
}

/// Steps until idle; the answers by id.
fn run(engine: &mut Engine) -> Vec<Finished> {
    let mut finished = Vec::new();
    while engine.has_work() {
        finished.extend(engine.step().unwrap());
    }
    finished.sort_by_key(|finished| finished.id);
    finished
}

#[track_caller]
fn check_answers(finished: &[Finished], requests: &[SequenceRequest]) {
    assert_eq!(finished.len(), requests.len());
    for (finished, request) in finished.iter().zip(requests) {
        assert_eq!(finished.id, request.id);
        assert_eq!((finished.token_ids.clone(), finished.reason), naive_answer(request));
    }
}

#[test]
fn bad_prompts_are_refused() {
    let mut engine = engine(4, []);
    assert_eq!(engine.max_seq_len(), 16);
    for (token_ids, max_tokens, error) in [
        (vec![], 1, "prompt is empty"),
        (vec![1], 0, "prompt asks for no answer tokens"),
        (vec![1; 16], 1, "prompt and answer need 17 tokens, the limit is 16"),
        (vec![1], u32::MAX, "prompt and answer need 4294967296 tokens, the limit is 16"),
        (vec![1, 24], 1, "prompt has token id 24, the vocabulary has 24 tokens"),
    ] {
        assert_eq!(engine.submit(request(0, &token_ids, max_tokens)).unwrap_err().to_string(), error);
    }
    assert!(!engine.has_work());
    let longest = request(1, &[1; 15], 1);
    engine.submit(longest.clone()).unwrap();
    check_answers(&run(&mut engine), &[longest]);
}

#[test]
fn a_step_without_work_does_nothing() {
    let mut engine = engine(4, []);
    assert_eq!(engine.step().unwrap(), []);
    assert_eq!(engine.stats(), EngineStats { kv_pages_total: 4, ..EngineStats::default() });
}

/// Notes how many steps are started when one is waited for.
struct WatchedModel {
    model: FakeModel,
    num_started: usize,
    at_finish: Arc<Mutex<Vec<usize>>>,
}

impl Model for WatchedModel {
    fn info(&self) -> &ModelInfo {
        self.model.info()
    }

    fn start(&mut self, batch: &StepBatch) -> Result<(), StepError> {
        self.num_started += 1;
        self.model.start(batch)
    }

    fn finish(&mut self) -> Result<StepOutput, StepError> {
        self.at_finish.lock().unwrap().push(self.num_started);
        self.num_started -= 1;
        self.model.finish()
    }

    fn max_started(&self) -> usize {
        self.model.max_started()
    }
}

#[test]
fn a_step_always_runs_until_the_last_prompt_ends() {
    let fake = FakeConfig { runs_ahead: true, ..fake_config(500, 4) };
    let at_finish = Arc::default();
    let model =
        WatchedModel { model: FakeModel::new(fake), num_started: 0, at_finish: Arc::clone(&at_finish) };
    let config = EngineConfig { max_num_seqs: 8, max_num_batched_tokens: 20, enable_prefix_cache: true };
    let mut engine = Engine::new(Box::new(model), config);
    let requests: Vec<_> = (0..60).map(|id| request(id, &[id as u32 % 24; 13], 1 + id as u32 % 17)).collect();
    requests.iter().for_each(|request| engine.submit(request.clone()).unwrap());
    check_answers(&run(&mut engine), &requests);
    let at_finish = at_finish.lock().unwrap();
    let (last, others) = at_finish.split_last().unwrap();
    assert_eq!((*last, others.iter().all(|&num_started| num_started == 2)), (1, true), "{at_finish:?}");
    assert_eq!(at_finish.len() as u64, engine.stats().steps);
}

/// The next token depends on the last one, which the model counts before the host has seen it.
#[test]
fn penalties_wait_for_nobody() {
    let fake = FakeConfig { runs_ahead: true, eos_probability: 0.0, ..fake_config(500, 4) };
    let at_finish = Arc::default();
    let model =
        WatchedModel { model: FakeModel::new(fake), num_started: 0, at_finish: Arc::clone(&at_finish) };
    let config = EngineConfig { max_num_seqs: 8, max_num_batched_tokens: 20, enable_prefix_cache: true };
    let mut engine = Engine::new(Box::new(model), config);
    let sampling = SamplingParams { frequency_penalty: 0.5, ..SamplingParams::GREEDY };
    let requests = [
        SequenceRequest { sampling, ..request(0, &[1, 2, 3], 10) },
        SequenceRequest { sampling, ..request(1, &[1, 2, 4], 10) },
        request(2, &[7, 8, 9], 19),
    ];
    engine.submit(requests[0].clone()).unwrap();
    check_answers(&run(&mut engine), &requests[..1]);
    let at_finish = || std::mem::take(&mut *at_finish.lock().unwrap());
    assert_eq!((at_finish(), engine.stats().steps), ([vec![2; 9], vec![1]].concat(), 10));
    requests[1..].iter().for_each(|request| engine.submit(request.clone()).unwrap());
    check_answers(&run(&mut engine), &requests[1..]);
    assert_eq!((at_finish(), engine.stats().steps), ([vec![2; 18], vec![1]].concat(), 10 + 19));
}

#[test]
fn siblings_compute_their_prefix_once() {
    let mut engine = engine(64, []);
    // It ends within a page.
    let prefix = [7; 14];
    let requests: Vec<_> =
        (0..8).map(|id| request(u64::from(id), &[&prefix[..], &[id + 1, 5]].concat(), 3)).collect();
    requests.iter().for_each(|request| engine.submit(request.clone()).unwrap());
    check_answers(&run(&mut engine), &requests);
    let stats = engine.stats();
    assert_eq!(stats.prompt_tokens, 8 * 16);
    assert_eq!(stats.computed_tokens, 14 + 8 * 2, "each token of the prefix tree once");
    assert_eq!(stats.reused_tokens, 7 * 14);
}

#[test]
fn what_a_later_prompt_needs_outlives_what_none_needs() {
    let tokens = |token: u32, own: u32, len: usize| [vec![token; len], vec![own]].concat();
    for (num_later, reused_tokens) in [(0, 4), (1, 8)] {
        // Eight pages: the third prompt needs one that is in the cache, and the first prompt's are the oldest.
        let mut engine = engine(8, []);
        let first = request(0, &tokens(7, 1, 8), 1);
        let shared = [SharedPrefix { len: 8, num_later }].into_iter().filter(|prefix| prefix.num_later > 0);
        let first = SequenceRequest { shared: shared.collect(), ..first };
        let others = [
            request(1, &tokens(8, 1, 12), 1),
            request(2, &tokens(9, 1, 12), 1),
            request(3, &tokens(7, 2, 8), 1),
        ];
        for request in [&first].into_iter().chain(&others) {
            engine.submit(request.clone()).unwrap();
            check_answers(&run(&mut engine), std::slice::from_ref(request));
        }
        assert_eq!(engine.stats().reused_tokens, reused_tokens, "needed by {num_later}");
    }
}

#[test]
fn the_last_prompt_token_is_computed_even_if_all_are_cached() {
    let mut engine = engine(64, []);
    let requests = [request(0, &[3; 8], 2), request(1, &[3; 8], 2)];
    for request in &requests {
        engine.submit(request.clone()).unwrap();
        check_answers(&run(&mut engine), std::slice::from_ref(request));
    }
    assert_eq!((engine.stats().computed_tokens, engine.stats().reused_tokens), (8 + 1, 7));
}

#[test]
fn preempted_sequences_are_recomputed() {
    for enable_prefix_cache in [false, true] {
        let config = EngineConfig { max_num_seqs: 3, max_num_batched_tokens: 8, enable_prefix_cache };
        let mut engine = Engine::new(Box::new(fake_model(8, 2)), config);
        learn_short(&mut engine.scheduler);
        // Prompts whose answers do not end early.
        let requests = [5, 9, 11].map(|id| request(id, &[id as u32, 2], 12));
        requests.iter().for_each(|request| engine.submit(request.clone()).unwrap());
        check_answers(&run(&mut engine), &requests);
        let stats = engine.stats();
        assert!(stats.preemptions > 0, "{stats:?}");
        assert_eq!(
            stats.prompt_tokens + stats.recomputed_tokens,
            stats.computed_tokens + stats.reused_tokens
        );
        assert_eq!(stats.kv_pages_in_use, 0);
    }
}

#[test]
fn preempted_sequences_come_back_from_the_host() {
    for (enable_prefix_cache, num_host_pages) in [(false, 100), (true, 100), (true, 1)] {
        let config = EngineConfig { max_num_seqs: 3, max_num_batched_tokens: 8, enable_prefix_cache };
        let fake = FakeConfig { num_host_pages, ..fake_config(8, 2) };
        let mut engine = Engine::new(Box::new(FakeModel::new(fake)), config);
        learn_short(&mut engine.scheduler);
        let requests = [5, 9, 11].map(|id| request(id, &[id as u32, 2], 12));
        requests.iter().for_each(|request| engine.submit(request.clone()).unwrap());
        check_answers(&run(&mut engine), &requests);
        let stats = engine.stats();
        assert!(stats.preemptions > 0, "{stats:?}");
        let num_recomputed = stats.recomputed_tokens + stats.recomputed_output_tokens;
        assert_eq!(num_recomputed == 0, num_host_pages == 100, "{stats:?}");
        assert_eq!(stats.swapped_in_pages > 0, num_host_pages == 100, "{stats:?}");
        assert!(stats.swapped_out_pages >= stats.swapped_in_pages, "{stats:?}");
    }
}

#[test]
fn a_prompt_of_high_priority_does_not_wait_for_a_thousand_of_low() {
    let mut engine = Engine::new(
        Box::new(fake_model(40, 4)),
        EngineConfig { max_num_seqs: 4, max_num_batched_tokens: 8, enable_prefix_cache: true },
    );
    let low: Vec<_> = (0..1000)
        .map(|id| SequenceRequest {
            priority: Priority::Low,
            ..request(id, &[id as u32 % 24, 1, 2, 3, 4, 5], 20)
        })
        .collect();
    low.iter().for_each(|request| engine.submit(request.clone()).unwrap());
    let mut finished = Vec::new();
    for _ in 0..100 {
        finished.extend(engine.step().unwrap());
    }
    // Two chunks, and a step for each further token of the answer.
    let high = SequenceRequest { priority: Priority::High, ..request(1000, &[7; 16], 20) };
    let most_steps = 2 + naive_answer(&high).0.len();
    engine.submit(high.clone()).unwrap();
    let before = finished.len();
    for _ in 0..most_steps {
        finished.extend(engine.step().unwrap());
    }
    assert!(finished[before..].iter().any(|one| one.id == high.id), "it waits for lower ones");
    finished.extend(run(&mut engine));
    finished.sort_by_key(|finished| finished.id);
    check_answers(&finished, &[low, vec![high]].concat());
}

#[test]
fn a_failed_step_can_be_tried_again() {
    let failure = || Err(StepError { message: "planned".to_owned() });
    let mut engine = engine(16, [failure(), failure()]);
    let request = request(0, &[1, 2, 3], 4);
    engine.submit(request.clone()).unwrap();
    assert_eq!(engine.step().unwrap_err().to_string(), "model step failed: planned");
    assert_eq!(engine.step().unwrap_err().to_string(), "model step failed: planned");
    check_answers(&run(&mut engine), &[request]);
}

#[test]
fn a_faulty_model_is_an_error() {
    for (token_ids, error) in [
        (vec![], "model step failed: model answered 0 of 1 sequences"),
        (vec![None], "model step failed: model sampled no token"),
        (vec![Some(24)], "model step failed: model sampled token id 24, the vocabulary has 24 tokens"),
    ] {
        let mut engine = engine(16, [Ok(StepOutput { token_ids })]);
        engine.submit(request(0, &[1], 1)).unwrap();
        assert_eq!(engine.step().unwrap_err().to_string(), error);
    }
}

#[test]
fn the_engine_can_move_to_its_own_thread() {
    let mut engine = engine(16, []);
    let request = request(0, &[1, 2, 3], 4);
    let finished = std::thread::spawn({
        let request = request.clone();
        move || {
            engine.submit(request).unwrap();
            run(&mut engine)
        }
    });
    check_answers(&finished.join().unwrap(), &[request]);
}
