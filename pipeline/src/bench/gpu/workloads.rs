//! The shapes of work that are measured, and the loop that does one of them on an engine.
//!
//! Prompts are arbitrary tokens drawn anew each time, so the prefix cache holds only what a workload means it to hold.
//! Answers have their full length. Lengths are spread evenly and in no order, by one formula that
//! `scripts/peers/transformers_batch.py` has too, so that peers are given the same job.

use std::sync::Arc;

use serde::Serialize;
use tidemill_kernels::step::SamplingParams;
use tidemill_operators::infer::engine::Engine;
use tidemill_operators::infer::sequence::{SequenceId, SequenceRequest};

use super::super::BenchError;
use super::cost::{Ceilings, Least};
use super::timed::{Step, Steps};
use crate::bench::median;
use crate::clock::Clock;

/// A prime that no number of requests in use is a multiple of.
const STRIDE: u32 = 7919;
/// Decode steps before those that are timed, with the one in which a batch is complete.
const WARM_STEPS: usize = 4;

/// Some work, by numbers of tokens.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(super) enum Work {
    /// Requests that are all there at once; prompts are ragged around their mean, of which so many are common.
    Job { requests: u32, prompt_len: u32, is_ragged: bool, shared_len: u32, output_len: u32 },
    /// One prompt to its first token, and nothing else.
    Prefill { len: u32 },
    /// Steps of so many sequences that share nothing.
    Decode { batch: u32, context_len: u32, steps: u32 },
}

#[derive(Clone, Debug)]
pub(super) struct Workload {
    pub(super) name: String,
    pub(super) work: Work,
}

/// What was measured of one workload.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Row {
    pub(super) name: String,
    pub(super) work: Work,
    pub(super) prompt_tokens: u64,
    /// Those that went through the model: all but what is shared.
    pub(super) computed_tokens: u64,
    pub(super) output_tokens: u64,
    pub(super) seconds: f64,
    pub(super) prompt_tokens_per_second: f64,
    pub(super) output_tokens_per_second: f64,
    /// Products, two operations each, in units of 10^12 a second.
    pub(super) tflops: f64,
    /// The least that the ceilings allow.
    pub(super) predicted_seconds: f64,
    /// That by the seconds it took: 1 is the most.
    pub(super) fraction: f64,
    /// Which ceiling is met first, in most of the predicted time.
    pub(super) bound: &'static str,
    pub(super) steps: usize,
    /// Between two steps, microseconds of the host.
    pub(super) host_us_p50: f64,
    pub(super) host_us_p99: f64,
    pub(super) samples: Vec<f64>,
}

/// What is measured of a model that is not named otherwise.
pub(super) fn standard(requests: u32) -> Vec<Workload> {
    let job = |name: &str, prompt_len, is_ragged, shared_len, output_len| Workload {
        name: name.to_owned(),
        work: Work::Job { requests, prompt_len, is_ragged, shared_len, output_len },
    };
    let mut all = vec![
        job("summaries, 3000/200, distinct", 3000, true, 0, 200),
        job("summaries, 3000/200, 1000 shared", 3000, true, 1000, 200),
        job("128/2048", 128, false, 0, 2048),
        job("1000/1000", 1000, false, 0, 1000),
        job("2048/128", 2048, false, 0, 128),
    ];
    all.extend(
        [512, 1024, 2048, 4096, 8192]
            .map(|len| Workload { name: format!("prefill {len}"), work: Work::Prefill { len } }),
    );
    all.extend([1, 2, 4, 8, 16, 32, 64, 128, 256].map(|batch| Workload {
        name: format!("decode, batch {batch}"),
        work: Work::Decode { batch, context_len: 512, steps: 64 },
    }));
    all
}

impl Work {
    /// Tokens of the longest sequence.
    pub(super) fn longest(&self) -> u32 {
        match *self {
            Self::Job { prompt_len, is_ragged, output_len, .. } => {
                output_len + if is_ragged { prompt_len + prompt_len / 2 } else { prompt_len }
            }
            Self::Prefill { len } => len + 1,
            Self::Decode { context_len, steps, .. } => context_len + answer_len(steps),
        }
    }
}

/// Enough for a batch to fill and for the steps that are timed.
fn answer_len(steps: u32) -> u32 {
    2 * steps + 256
}

/// Prompt `index` of `requests`: from half of the mean to half more than it.
pub(super) fn ragged_len(mean: u32, index: u32, requests: u32) -> u32 {
    let place = u64::from(index) * u64::from(STRIDE) % u64::from(requests);
    mean / 2 + (place * u64::from(mean) / u64::from(requests.max(2) - 1)) as u32
}

/// An engine that does one workload after the other.
pub(super) struct Bench {
    engine: Engine,
    steps: Steps,
    clock: Clock,
    /// Draws tokens; a linear congruential generator.
    state: u64,
    next_id: u64,
}

/// One run of a workload.
struct Sample {
    seconds: f64,
    prompt_tokens: u64,
    output_tokens: u64,
    steps: Vec<Step>,
}

impl Bench {
    pub(super) fn new(engine: Engine, steps: Steps, clock: Clock) -> Self {
        Self { engine, steps, clock, state: 1, next_id: 0 }
    }

    pub(super) fn max_seq_len(&self) -> u32 {
        self.engine.max_seq_len()
    }

    /// Does a workload, a short one `repeat` times after a first that is not counted.
    pub(super) fn run(
        &mut self,
        workload: &Workload,
        ceilings: &Ceilings,
        repeat: usize,
    ) -> Result<Row, BenchError> {
        let is_job = matches!(workload.work, Work::Job { .. });
        if !is_job {
            self.once(&workload.work)?;
        }
        let num_samples = if is_job { 1 } else { repeat };
        let mut samples =
            (0..num_samples).map(|_| self.once(&workload.work)).collect::<Result<Vec<_>, _>>()?;
        let seconds: Vec<f64> = samples.iter().map(|sample| sample.seconds).collect();
        let middle = median(&seconds);
        let nearest = |sample: &Sample| (sample.seconds - middle).abs();
        samples.sort_by(|one, other| nearest(one).total_cmp(&nearest(other)));
        let mut row = samples[0].row(workload, ceilings);
        row.samples = seconds;
        Ok(row)
    }

    fn once(&mut self, work: &Work) -> Result<Sample, BenchError> {
        match *work {
            Work::Job { requests, prompt_len, is_ragged, shared_len, output_len } => {
                let shared = self.draw(shared_len);
                let prompts: Vec<Vec<u32>> = (0..requests)
                    .map(|index| {
                        let len =
                            if is_ragged { ragged_len(prompt_len, index, requests) } else { prompt_len };
                        [&shared[..], &self.draw(len - shared_len)].concat()
                    })
                    .collect();
                self.finish_all(prompts, output_len)
            }
            Work::Prefill { len } => {
                let prompt = self.draw(len);
                self.finish_all(vec![prompt], 1)
            }
            Work::Decode { batch, context_len, steps } => self.decode(batch, context_len, steps),
        }
    }

    fn draw(&mut self, len: u32) -> Vec<u32> {
        let vocab_size = u64::from(self.engine.model_info().vocab_size);
        let mut token = || {
            self.state = self.state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            ((self.state >> 33) % vocab_size) as u32
        };
        (0..len).map(|_| token()).collect()
    }

    fn submit(&mut self, token_ids: Vec<u32>, max_tokens: u32) -> Result<SequenceId, BenchError> {
        self.next_id += 1;
        let id = SequenceId(self.next_id);
        let sampling = SamplingParams { ignore_eos: true, ..SamplingParams::GREEDY };
        self.engine.submit(SequenceRequest::new(id, Arc::from(token_ids), max_tokens, sampling))?;
        Ok(id)
    }

    fn finish_all(&mut self, prompts: Vec<Vec<u32>>, output_len: u32) -> Result<Sample, BenchError> {
        self.steps.take();
        let prompt_tokens = prompts.iter().map(|prompt| prompt.len() as u64).sum();
        let start = self.clock.elapsed();
        let output_tokens = prompts.len() as u64 * u64::from(output_len);
        for prompt in prompts {
            self.submit(prompt, output_len)?;
        }
        while self.engine.has_work() {
            self.engine.step()?;
        }
        let seconds = (self.clock.elapsed() - start).as_secs_f64();
        Ok(Sample { seconds, prompt_tokens, output_tokens, steps: self.steps.take() })
    }

    fn decode(&mut self, batch: u32, context_len: u32, steps: u32) -> Result<Sample, BenchError> {
        let mut ids = Vec::new();
        for _ in 0..batch {
            let prompt = self.draw(context_len);
            ids.push(self.submit(prompt, answer_len(steps))?);
        }
        // Until each sequence has a row in a step of decodes alone, and a few steps on.
        let mut warm = 0;
        while warm < WARM_STEPS {
            self.steps.take();
            self.engine.step()?;
            let is_whole =
                |step: &Step| step.cost.sampled == step.cost.tokens && step.cost.tokens == u64::from(batch);
            let decodes = self.steps.take().iter().any(is_whole);
            warm += usize::from(decodes);
        }
        let start = self.clock.elapsed();
        for _ in 0..steps {
            self.engine.step()?;
        }
        let seconds = (self.clock.elapsed() - start).as_secs_f64();
        let timed = self.steps.take();
        for id in ids {
            self.engine.abort(id);
        }
        while self.engine.has_work() {
            self.engine.step()?;
        }
        let output_tokens = timed.iter().map(|step| step.cost.sampled).sum();
        assert_eq!(output_tokens, u64::from(batch * steps), "a step decodes the whole batch");
        Ok(Sample { seconds, prompt_tokens: 0, output_tokens, steps: timed })
    }
}

impl Sample {
    fn row(&self, workload: &Workload, ceilings: &Ceilings) -> Row {
        let least = self.steps.iter().fold(Least::default(), |sum, step| {
            let least = step.cost.least(ceilings);
            Least {
                seconds: sum.seconds + least.seconds,
                compute_seconds: sum.compute_seconds + least.compute_seconds,
            }
        });
        let flops: f64 = self.steps.iter().map(|step| step.cost.flops()).sum();
        let mut host: Vec<f64> = self.steps.iter().map(|step| step.host.as_secs_f64() * 1e6).collect();
        host.sort_by(f64::total_cmp);
        let seconds = self.seconds.max(1e-9);
        let is_decode = matches!(workload.work, Work::Decode { .. });
        let rows: u64 = self.steps.iter().map(|step| step.cost.tokens).sum();
        Row {
            name: workload.name.clone(),
            work: workload.work.clone(),
            prompt_tokens: self.prompt_tokens,
            // The last token of an answer meets the model no more, the first comes with the prompt.
            computed_tokens: if is_decode {
                0
            } else {
                rows - self.output_tokens + self.num_answers(workload)
            },
            output_tokens: self.output_tokens,
            seconds,
            prompt_tokens_per_second: self.prompt_tokens as f64 / seconds,
            output_tokens_per_second: self.output_tokens as f64 / seconds,
            tflops: flops / seconds / 1e12,
            predicted_seconds: least.seconds,
            fraction: least.seconds / seconds,
            bound: if 2.0 * least.compute_seconds > least.seconds { "compute" } else { "memory" },
            steps: self.steps.len(),
            host_us_p50: quantile(&host, 0.5),
            host_us_p99: quantile(&host, 0.99),
            samples: Vec::new(),
        }
    }

    fn num_answers(&self, workload: &Workload) -> u64 {
        match workload.work {
            Work::Job { requests, .. } => requests.into(),
            Work::Prefill { .. } => 1,
            Work::Decode { .. } => 0,
        }
    }
}

/// Of sorted numbers.
fn quantile(sorted: &[f64], share: f64) -> f64 {
    let last = sorted.len().saturating_sub(1);
    sorted.get((last as f64 * share).round() as usize).copied().unwrap_or(0.0)
}
