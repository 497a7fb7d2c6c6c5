//! The engine alone, in the shapes that real work is made of: prefill, decode over a shared prefix and over
//! distinct prompts, both at once, and the start.
//!
//! Prompts are arbitrary tokens, drawn anew for every repeat, so the prefix cache holds only what a shape means it
//! to hold. Every figure stands beside the most that the machine's peak allows: the time of the matrix products at
//! the peak of its int8 instructions, or that of reading a byte a weight once a step, whichever is longer.
//! Attention, norms and sampling count nothing in that limit.

use std::io::{Read, Write};
use std::process::{Command, Stdio};
use std::sync::Arc;

use serde::Serialize;
use tidemill_kernels::models::NumericPath;
use tidemill_kernels::step::SamplingParams;
use tidemill_operators::infer::engine::{Engine, EngineStats};
use tidemill_operators::infer::sequence::{SequenceId, SequenceRequest};

use super::linear::{self, LinearFigure};
use super::machine::Machine;
use super::{BenchError, EngineArgs, io_error, median, model, table};
use crate::clock::Clock;
use crate::cores::Cores;
use crate::models::load::{Compute, LoadedModel, load};
use crate::plan::device::Devices;
use crate::plan::engine::EnginePlan;
use crate::summary::peak_memory_bytes;

/// Tokens of a prefill in one step, as in the default of a definition.
const CHUNK_LEN: u32 = 512;
const PREFIX_LEN: u32 = 512;
/// Decodes that are timed; those before them, while the batch fills, are not.
const DECODE_STEPS: u32 = 32;
/// Enough for the largest batch to fill and for the steps that are timed.
const ANSWER_LEN: u32 = 96;
const MIXED_DECODES: u32 = 32;
/// Tokens the KV cache must hold for the largest shape, with room for page ends.
const KV_TOKENS: u64 = 16 * (PREFIX_LEN + ANSWER_LEN + 32) as u64;
const PROMPT: &str = "The capital of France is";
const FAST: Compute<'_> = Compute::Cpu(NumericPath::Fast);

#[derive(Clone, Copy, Debug)]
enum Shape {
    Prefill(u32),
    /// Decode of so many sequences that share a prefix.
    Shared(u32),
    /// Decode of so many sequences that share nothing.
    Distinct(u32),
    /// Decodes over a shared prefix while a prompt is computed.
    Mixed,
}

const SHAPES: [Shape; 10] = [
    Shape::Prefill(128),
    Shape::Prefill(512),
    Shape::Prefill(2048),
    Shape::Shared(1),
    Shape::Shared(8),
    Shape::Shared(32),
    Shape::Shared(64),
    Shape::Distinct(8),
    Shape::Distinct(16),
    Shape::Mixed,
];

#[derive(Debug, Serialize)]
pub(super) struct EngineReport {
    model: String,
    machine: Machine,
    figures: Vec<Figure>,
    linear: Vec<LinearFigure>,
    first_token_ms: f64,
    peak_memory_mib: u64,
}

#[derive(Debug, Serialize)]
struct Figure {
    name: String,
    tokens_per_second: f64,
    /// The most the machine's peak allows; 0 for a model without weights.
    limit: f64,
    samples: Vec<f64>,
}

pub(super) fn measure(args: &EngineArgs) -> Result<EngineReport, BenchError> {
    let clock = Clock::start();
    let num_threads = args.threads.map_or_else(|| Cores::available().num_cores(), usize::from);
    let repeat = usize::from(args.common.repeat);
    let loaded = load(&model(&args.model)?, &args.model, FAST, &|what| eprintln!("{what} …"))?;
    let mut samples = vec![Vec::new(); SHAPES.len()];
    for round in 0..repeat {
        for (shape, samples) in SHAPES.iter().zip(&mut samples) {
            eprintln!("{} ({} of {repeat}) …", shape.name(), round + 1);
            let mut bench = EngineBench::new(&loaded, num_threads, round, clock)?;
            samples.push(bench.run(*shape)?);
        }
    }
    // Before the machine is measured, since that takes memory of its own.
    let peak_memory_mib = peak_memory_bytes() >> 20;
    let machine = Machine::measure(num_threads, clock);
    let linear = linear::measure(&loaded, num_threads, clock)?;
    let first_token_ms = time_first_token(&args.model, repeat, clock)?;
    let figures = SHAPES
        .iter()
        .zip(samples)
        .map(|(shape, samples)| Figure {
            name: shape.name(),
            tokens_per_second: median(&samples),
            limit: shape.limit(loaded.num_products(), &machine),
            samples,
        })
        .collect();
    let model = args.model.clone();
    Ok(EngineReport { model, machine, figures, linear, first_token_ms, peak_memory_mib })
}

impl Shape {
    fn name(self) -> String {
        match self {
            Self::Prefill(len) => format!("prefill {len}"),
            Self::Shared(batch) => format!("decode, shared {PREFIX_LEN}, batch {batch}"),
            Self::Distinct(batch) => format!("decode, distinct {PREFIX_LEN}, batch {batch}"),
            Self::Mixed => format!("{MIXED_DECODES} decodes and a prompt of {CHUNK_LEN}"),
        }
    }

    /// Tokens a second if nothing but the products of `(layers, head)` took time.
    fn limit(self, (layers, head): (u64, u64), machine: &Machine) -> f64 {
        if layers == 0 {
            return 0.0;
        }
        // Tokens, tokens that are sampled, steps.
        let (tokens, sampled, steps) = match self {
            Self::Prefill(len) => (len, 1, len.div_ceil(CHUNK_LEN)),
            Self::Shared(batch) | Self::Distinct(batch) => (batch, batch, 1),
            Self::Mixed => (CHUNK_LEN + MIXED_DECODES, 1 + MIXED_DECODES, 1),
        };
        let operations = 2 * (layers * u64::from(tokens) + head * u64::from(sampled));
        let bytes = (layers + head) * u64::from(steps);
        let seconds = (operations as f64 / (machine.int8_gops * 1e9))
            .max(bytes as f64 / (machine.read_gb_per_second * 1e9));
        f64::from(tokens) / seconds
    }
}

/// One engine that is used for one shape.
struct EngineBench {
    engine: Engine,
    clock: Clock,
    vocab_size: u32,
    /// Draws tokens; a linear congruential generator.
    state: u64,
    next_id: u64,
}

impl EngineBench {
    fn new(loaded: &LoadedModel, num_threads: usize, round: usize, clock: Clock) -> Result<Self, BenchError> {
        let plan = EnginePlan {
            max_num_seqs: Some(64),
            max_num_batched_tokens: Some(CHUNK_LEN + MIXED_DECODES),
            kv_cache_bytes: Some(KV_TOKENS * loaded.kv_bytes_per_token()),
            ..EnginePlan::default()
        };
        let engine = loaded.engine(&plan, 0, num_threads, 1)?;
        let vocab_size = engine.model_info().vocab_size;
        Ok(Self { engine, clock, vocab_size, state: round as u64, next_id: 0 })
    }

    /// Tokens a second.
    fn run(&mut self, shape: Shape) -> Result<f64, BenchError> {
        match shape {
            Shape::Prefill(len) => {
                // The first run of an engine also allocates.
                self.prefill(len)?;
                self.prefill(len)
            }
            Shape::Shared(batch) => {
                self.fill_shared(batch)?;
                self.decode(batch)
            }
            Shape::Distinct(batch) => {
                let prompts = (0..batch).map(|_| self.draw(PREFIX_LEN)).collect();
                self.fill(prompts)?;
                self.decode(batch)
            }
            Shape::Mixed => {
                self.fill_shared(MIXED_DECODES)?;
                self.prefill(CHUNK_LEN)
            }
        }
    }

    fn draw(&mut self, len: u32) -> Vec<u32> {
        let mut token = || {
            self.state = self.state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            ((self.state >> 33) % u64::from(self.vocab_size)) as u32
        };
        (0..len).map(|_| token()).collect()
    }

    fn submit(&mut self, token_ids: Vec<u32>, max_tokens: u32) -> Result<(), BenchError> {
        self.next_id += 1;
        let sampling = SamplingParams { ignore_eos: true, ..SamplingParams::GREEDY };
        let id = SequenceId(self.next_id);
        Ok(self.engine.submit(SequenceRequest::new(id, Arc::from(token_ids), max_tokens, sampling))?)
    }

    /// Computes a prompt to its first token; what else runs goes on and counts.
    fn prefill(&mut self, len: u32) -> Result<f64, BenchError> {
        let prompt = self.draw(len);
        self.submit(prompt, 1)?;
        let before = self.engine.stats();
        let start = self.clock.elapsed();
        // By chance it begins like another prompt, and then not all of it is computed.
        let wanted = known_tokens(&before) + u64::from(len);
        while known_tokens(&self.engine.stats()) < wanted {
            self.engine.step()?;
        }
        let seconds = (self.clock.elapsed() - start).as_secs_f64();
        Ok((self.engine.stats().step_tokens - before.step_tokens) as f64 / seconds)
    }

    /// Runs sequences of one prefix, each with a token of its own behind it, until all of them decode.
    fn fill_shared(&mut self, batch: u32) -> Result<(), BenchError> {
        let prefix = self.draw(PREFIX_LEN);
        self.submit(prefix.clone(), 1)?;
        while self.engine.has_work() {
            self.engine.step()?;
        }
        let own = self.draw(batch);
        self.fill(own.into_iter().map(|token| [&prefix[..], &[token]].concat()).collect())
    }

    /// Runs sequences until all of them decode.
    fn fill(&mut self, prompts: Vec<Vec<u32>>) -> Result<(), BenchError> {
        let wanted =
            self.engine.stats().prompt_tokens + prompts.iter().map(|prompt| prompt.len() as u64).sum::<u64>();
        for prompt in prompts {
            self.submit(prompt, ANSWER_LEN)?;
        }
        while known_tokens(&self.engine.stats()) < wanted {
            self.engine.step()?;
        }
        Ok(())
    }

    fn decode(&mut self, batch: u32) -> Result<f64, BenchError> {
        let before = self.engine.stats();
        let start = self.clock.elapsed();
        for _ in 0..DECODE_STEPS {
            self.engine.step()?;
        }
        let seconds = (self.clock.elapsed() - start).as_secs_f64();
        let tokens = self.engine.stats().output_tokens - before.output_tokens;
        assert_eq!(tokens, u64::from(batch * DECODE_STEPS), "a step decodes the whole batch");
        Ok(tokens as f64 / seconds)
    }
}

/// Prompt tokens in the KV cache, however they came there.
fn known_tokens(stats: &EngineStats) -> u64 {
    stats.computed_tokens + stats.reused_tokens
}

/// Loads a model, answers a short prompt with one token and says so by a byte.
pub(super) fn first_token(name: &str) -> Result<(), BenchError> {
    let loaded = load(&model(name)?, name, FAST, &|_| ())?;
    let mut engines = loaded.engines(&EnginePlan::default(), &Devices::Cpu)?;
    let token_ids = engines.text.tokenizer.encode(PROMPT)?;
    let (engine, _) = engines.engines.first_mut().expect("one engine");
    let sampling = SamplingParams { ignore_eos: true, ..SamplingParams::GREEDY };
    engine.submit(SequenceRequest::new(SequenceId(0), token_ids.into(), 1, sampling))?;
    while engine.has_work() {
        engine.step()?;
    }
    let mut stdout = std::io::stdout();
    stdout
        .write_all(b"\n")
        .and_then(|()| stdout.flush())
        .map_err(io_error("write", "standard output".as_ref()))
}

/// Milliseconds from the start of a process of this program to its first token.
fn time_first_token(name: &str, repeat: usize, clock: Clock) -> Result<f64, BenchError> {
    let program = std::env::current_exe().map_err(io_error("find", "this program".as_ref()))?;
    let mut samples = Vec::new();
    // The first start, which warms the caches, is not counted.
    for _ in 0..=repeat {
        let start = clock.elapsed();
        let mut child = Command::new(&program)
            .args(["bench", "first-token", name])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .map_err(io_error("start", &program))?;
        let mut stdout = child.stdout.take().expect("the output is a pipe");
        let came = stdout.read_exact(&mut [0]);
        samples.push((clock.elapsed() - start).as_secs_f64() * 1000.0);
        child.wait().map_err(io_error("wait for", &program))?;
        came.map_err(|_| BenchError::NoToken)?;
    }
    Ok(median(&samples[1..]))
}

impl EngineReport {
    pub(super) fn render(&self) -> String {
        let rows = self.figures.iter().map(|figure| {
            let share =
                if figure.limit > 0.0 { 100.0 * figure.tokens_per_second / figure.limit } else { 0.0 };
            vec![
                figure.name.clone(),
                format!("{:.0}", figure.tokens_per_second),
                format!("{:.0}", figure.limit),
                format!("{share:.0} %"),
            ]
        });
        format!(
            "{}\n\n{}\n\n{}\n\nstart to first token {:.0} ms, peak memory {} MiB",
            table(&[&self.model, "tokens/s", "limit", "of it"], rows),
            linear::render(&self.linear, &self.machine),
            self.machine.render(),
            self.first_token_ms,
            self.peak_memory_mib
        )
    }
}
