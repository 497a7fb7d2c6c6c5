//! How long an engine's steps and answers take: published after each step, read from any thread at any time.
//!
//! Invariant: a [`Reading`] is of one moment between two steps, and publishing takes one lock a step. The clock is handed
//! in. Gauges are in [`load`](super::load); what the figures are called outside is decided outside.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tidemill_kernels::step::SamplingParams;

use super::engine::Engine;
use super::runner::Work;
use super::sequence::{FinishReason, Finished, SequenceId};
use crate::document::Document;

/// Bounds of the histograms, those of vLLM, so that its dashboards fit.
const FIRST_TOKEN_SECONDS: [f64; 22] = [
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0,
    80.0, 160.0, 640.0, 2560.0,
];
const LATENCY_SECONDS: [f64; 21] = [
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0,
    960.0, 1920.0, 7680.0,
];
const STEP_TOKENS: [f64; 13] =
    [1.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0, 16384.0];
const STEP_SECONDS: [f64; 14] =
    [0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0, 2.5, 10.0];

/// Time since the run began.
pub type ElapsedFn = Arc<dyn Fn() -> Duration + Send + Sync>;

/// How often a value was how large; the bounds are fixed when it is made.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Histogram {
    /// Upper bounds, ascending; a bound belongs to its bucket.
    pub bounds: Vec<f64>,
    /// One a bound, and one for what is above the last.
    pub counts: Vec<u64>,
    pub sum: f64,
}

impl Histogram {
    pub fn new(bounds: &[f64]) -> Self {
        assert!(bounds.is_sorted_by(|a, b| a < b));
        Self { bounds: bounds.to_vec(), counts: vec![0; bounds.len() + 1], sum: 0.0 }
    }

    pub fn observe(&mut self, value: f64) {
        let bucket = self.bounds.partition_point(|&bound| bound < value);
        self.counts[bucket] += 1;
        self.sum += value;
    }

    pub fn count(&self) -> u64 {
        self.counts.iter().sum()
    }
}

/// What an engine's steps and answers took, since it was started.
#[derive(Clone, Debug, PartialEq)]
pub struct Reading {
    /// Sequences that the model ended, and that reached `max_tokens`.
    pub num_stop: u64,
    pub num_length: u64,
    /// From when the engine takes a prompt until its first token.
    pub time_to_first_token: Histogram,
    /// From when the engine takes a prompt until its answer is complete.
    pub e2e_latency: Histogram,
    pub step_seconds: Histogram,
    pub step_tokens: Histogram,
}

impl Default for Reading {
    fn default() -> Self {
        Self {
            num_stop: 0,
            num_length: 0,
            time_to_first_token: Histogram::new(&FIRST_TOKEN_SECONDS),
            e2e_latency: Histogram::new(&LATENCY_SECONDS),
            step_seconds: Histogram::new(&STEP_SECONDS),
            step_tokens: Histogram::new(&STEP_TOKENS),
        }
    }
}

/// Shared by an engine's thread, which writes, and those who look on.
pub struct EngineFigures {
    reading: Mutex<Reading>,
    elapsed: ElapsedFn,
}

impl fmt::Debug for EngineFigures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EngineFigures").field("reading", &self.reading).finish_non_exhaustive()
    }
}

impl EngineFigures {
    pub fn new(elapsed: ElapsedFn) -> Self {
        Self { reading: Mutex::default(), elapsed }
    }

    pub fn reading(&self) -> Reading {
        self.lock().clone()
    }

    fn lock(&self) -> MutexGuard<'_, Reading> {
        self.reading.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// An answer with its times, for traces.
#[derive(Clone, Debug)]
pub struct Answered<'a> {
    pub step: &'a str,
    /// W3C `traceparent` that came with the document.
    pub trace_parent: Option<&'a str>,
    pub prompt_len: u32,
    pub output_len: u32,
    pub reused_len: u32,
    pub max_tokens: u32,
    pub sampling: SamplingParams,
    pub reason: FinishReason,
    pub begun: Duration,
    pub first_token: Duration,
    pub ended: Duration,
}

/// What a pipeline wants to know of each of its answers.
#[derive(Clone)]
pub struct Tracing {
    /// Called on the engine's thread, so it must not block.
    pub on_answer: Arc<dyn Fn(&Answered<'_>) + Send + Sync>,
    /// The `traceparent` of a document, which is found where its source has put it.
    pub trace_parent: fn(&Document) -> Option<Arc<str>>,
}

/// When a sequence came, and when it had its first token.
#[derive(Clone, Copy, Debug)]
struct Times {
    begun: Duration,
    first_token: Option<Duration>,
}

/// The engine thread's side.
#[derive(Debug)]
pub(super) struct Watcher {
    figures: Arc<EngineFigures>,
    open: BTreeMap<SequenceId, Times>,
    /// When the step began, and the engine's count of tokens then.
    begun: Duration,
    step_tokens: u64,
}

impl Watcher {
    pub(super) fn new(figures: Arc<EngineFigures>) -> Self {
        Self { figures, open: BTreeMap::new(), begun: Duration::ZERO, step_tokens: 0 }
    }

    pub(super) fn submitted(&mut self, id: SequenceId) {
        let begun = (self.figures.elapsed)();
        self.open.insert(id, Times { begun, first_token: None });
    }

    pub(super) fn canceled(&mut self, id: SequenceId) {
        self.open.remove(&id);
    }

    pub(super) fn begins_step(&mut self) {
        self.begun = (self.figures.elapsed)();
    }

    /// After a step, before its answers are [`finished`](Self::finished).
    pub(super) fn stepped(&mut self, engine: &Engine, finished: &[Finished]) {
        let now = (self.figures.elapsed)();
        let since = |begun: Duration| now.saturating_sub(begun).as_secs_f64();
        let before = std::mem::replace(&mut self.step_tokens, engine.stats().step_tokens);
        let mut reading = self.figures.lock();
        reading.step_tokens.observe((self.step_tokens - before) as f64);
        reading.step_seconds.observe(since(self.begun));
        for id in engine.first_tokens() {
            let Some(times) = self.open.get_mut(id) else { continue };
            times.first_token = Some(now);
            reading.time_to_first_token.observe(since(times.begun));
        }
        for finished in finished {
            match finished.reason {
                FinishReason::Stop => reading.num_stop += 1,
                FinishReason::Length => reading.num_length += 1,
            }
            if let Some(times) = self.open.get(&finished.id) {
                reading.e2e_latency.observe(since(times.begun));
            }
        }
    }

    /// Tells the pipeline of an answer, if it wants to know.
    pub(super) fn finished(&mut self, finished: &Finished, work: &Work) {
        let Some(times) = self.open.remove(&finished.id) else { return };
        let Some(tracing) = &work.context.tracing else { return };
        let ended = (self.figures.elapsed)();
        (tracing.on_answer)(&Answered {
            step: &work.step,
            trace_parent: work.trace_parent.as_deref(),
            prompt_len: finished.prompt_len,
            output_len: finished.token_ids.len() as u32,
            reused_len: finished.reused_len,
            max_tokens: work.max_tokens,
            sampling: work.sampling,
            reason: finished.reason,
            begun: times.begun,
            first_token: times.first_token.unwrap_or(ended),
            ended,
        });
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};

    use tidemill_kernels::models::{FakeConfig, FakeModel};

    use super::super::engine::EngineConfig;
    use super::super::sequence::SequenceRequest;
    use super::*;

    /// Every look at the clock takes a second; pages for two of the three, so one is preempted or waits.
    #[test]
    fn each_prompt_has_its_first_token_and_its_end_once() {
        let model = FakeModel::new(FakeConfig { num_pages: 8, page_size: 4, ..FakeConfig::default() });
        let config = EngineConfig { max_num_seqs: 3, max_num_batched_tokens: 6, enable_prefix_cache: true };
        let mut engine = Engine::new(Box::new(model), config);
        let seconds = AtomicU64::new(0);
        let elapsed: ElapsedFn =
            Arc::new(move || Duration::from_secs(seconds.fetch_add(1, Ordering::Relaxed)));
        let figures = Arc::new(EngineFigures::new(elapsed));
        let mut watcher = Watcher::new(Arc::clone(&figures));
        for id in 0..3 {
            let sampling = SamplingParams { ignore_eos: true, ..SamplingParams::GREEDY };
            let token_ids = [1, 2, 3, id as u32 + 4, 5, 6].into();
            engine.submit(SequenceRequest::new(SequenceId(id), token_ids, 8, sampling)).unwrap();
            watcher.submitted(SequenceId(id));
        }
        while engine.has_work() {
            watcher.begins_step();
            let finished = engine.step().unwrap();
            watcher.stepped(&engine, &finished);
        }
        let reading = figures.reading();
        assert_eq!((reading.num_length, reading.num_stop), (3, 0));
        assert_eq!(reading.time_to_first_token.count(), 3);
        assert_eq!(reading.e2e_latency.count(), 3);
        assert!(reading.time_to_first_token.sum < reading.e2e_latency.sum);
        assert_eq!(reading.step_tokens.sum, engine.stats().step_tokens as f64);
        assert_eq!(reading.step_seconds.sum, engine.stats().steps as f64);
    }

    #[test]
    fn a_bound_belongs_to_its_bucket() {
        let mut histogram = Histogram::new(&[1.0, 10.0]);
        for value in [0.5, 1.0, 1.5, 10.0, 11.0] {
            histogram.observe(value);
        }
        assert_eq!((histogram.counts.as_slice(), histogram.count()), ([2, 2, 1].as_slice(), 5));
        assert_eq!(histogram.sum, 24.0);
    }
}
