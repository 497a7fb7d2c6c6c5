//! Holds both numeric paths to the golden logits and tokens of Hugging Face transformers, on the real model.
//!
//! The golden file is written by `tests/reference/make_golden.py`. Beyond it, the fast path must give the same bits
//! for every chunk size, page size, batch and number of threads. The tokenizer is absent: prompts are token ids.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::Deserialize;
use tidemill_kernels::gguf::Gguf;
use tidemill_kernels::models::{KvConfig, Llama, LlamaWeights, NumericPath};
use tidemill_kernels::step::{Model, PageId, SamplingParams, StepBatch};

/// Relative to the norm, and to the largest logit: f32 on both sides, summed in another order.
const REFERENCE_TOLERANCE: f64 = 1e-3;
/// Weights, keys and values rounded to f16.
const FAST_TOLERANCE: f64 = 2e-3;

const MODEL_FILE: &str = "models/smollm2-135m-instruct/SmolLM2-135M-Instruct.Q4_1.gguf";

#[derive(Deserialize)]
struct Golden {
    prompts: Vec<GoldenPrompt>,
}

#[derive(Deserialize)]
struct GoldenPrompt {
    token_ids: Vec<u32>,
    greedy: Vec<u32>,
    logits: Vec<GoldenLogits>,
}

/// Some logits of one step, and the norm of all.
#[derive(Deserialize)]
struct GoldenLogits {
    step: usize,
    token_ids: Vec<usize>,
    logits: Vec<f32>,
    norm: f64,
}

#[test]
fn reference_path_equals_transformers() {
    check_golden(NumericPath::Reference, REFERENCE_TOLERANCE);
}

#[test]
fn fast_path_equals_transformers() {
    check_golden(NumericPath::Fast, FAST_TOLERANCE);
}

#[test]
fn fast_path_gives_the_same_bits_for_every_schedule() {
    let golden = golden();
    let weights = load(NumericPath::Fast);
    let base = Schedule { chunk_len: 512, page_size: 16, num_seqs: 10, num_threads: 2 };
    let expected = run(&weights, &base, &golden.prompts);
    for schedule in [
        Schedule { chunk_len: 1, page_size: 64, num_seqs: 10, num_threads: 2 },
        Schedule { chunk_len: 7, page_size: 16, num_seqs: 10, num_threads: 1 },
        Schedule { chunk_len: 64, page_size: 64, num_seqs: 1, num_threads: 2 },
        Schedule { chunk_len: 512, page_size: 64, num_seqs: 3, num_threads: 1 },
    ] {
        let actual = run(&weights, &schedule, &golden.prompts);
        for (prompt, (actual, expected)) in actual.iter().zip(&expected).enumerate() {
            assert_eq!(actual.token_ids, expected.token_ids, "prompt {prompt}, {schedule:?}");
            assert!(actual.last_logits == expected.last_logits, "logits of prompt {prompt}, {schedule:?}");
        }
    }
}

/// How the work is cut into steps.
#[derive(Debug)]
struct Schedule {
    chunk_len: usize,
    page_size: u32,
    /// Sequences in one batch.
    num_seqs: usize,
    num_threads: usize,
}

struct Answer {
    token_ids: Vec<u32>,
    /// Bits of all logits after the last answer token.
    last_logits: Vec<u32>,
}

/// Answers all prompts greedily, with as many tokens as the golden answers.
fn run(weights: &Arc<LlamaWeights>, schedule: &Schedule, prompts: &[GoldenPrompt]) -> Vec<Answer> {
    let mut answers = Vec::new();
    for prompts in prompts.chunks(schedule.num_seqs) {
        let mut model = model(weights, schedule);
        let mut seqs: Vec<Seq> =
            prompts.iter().enumerate().map(|(i, prompt)| Seq::new(i, prompt, schedule)).collect();
        while seqs.iter().any(|seq| !seq.is_done()) {
            let mut batch = StepBatch::default();
            let active: Vec<usize> = (0..seqs.len()).filter(|&i| !seqs[i].is_done()).collect();
            for &i in &active {
                seqs[i].push_chunk(&mut batch, schedule.chunk_len);
            }
            let output = model.step(&batch).expect("the logits are finite");
            for (&i, token_id) in active.iter().zip(output.token_ids) {
                seqs[i].token_ids.extend(token_id);
            }
        }
        for seq in &mut seqs {
            let mut batch = StepBatch::default();
            seq.push_chunk(&mut batch, 1);
            let last_logits = model.logits(&batch).iter().map(|logit| logit.to_bits()).collect();
            answers.push(Answer { token_ids: seq.token_ids[seq.prompt_len..].to_vec(), last_logits });
        }
    }
    answers
}

struct Seq {
    /// Prompt and answer.
    token_ids: Vec<u32>,
    prompt_len: usize,
    wanted_len: usize,
    num_computed: usize,
    pages: Vec<PageId>,
}

impl Seq {
    /// The pages of the sequences are interleaved, so that neighbors in a page table are not neighbors in memory.
    fn new(index: usize, prompt: &GoldenPrompt, schedule: &Schedule) -> Self {
        let wanted_len = prompt.token_ids.len() + prompt.greedy.len();
        let num_pages = (wanted_len + 1).div_ceil(schedule.page_size as usize);
        let page = |i| PageId((i * schedule.num_seqs + index) as u32);
        Self {
            token_ids: prompt.token_ids.clone(),
            prompt_len: prompt.token_ids.len(),
            wanted_len,
            num_computed: 0,
            pages: (0..num_pages).map(page).collect(),
        }
    }

    fn is_done(&self) -> bool {
        self.token_ids.len() == self.wanted_len
    }

    fn push_chunk(&mut self, batch: &mut StepBatch, chunk_len: usize) {
        let end = self.token_ids.len().min(self.num_computed + chunk_len);
        let sampling = (end == self.token_ids.len()).then_some(SamplingParams::GREEDY);
        batch.push(&self.token_ids[self.num_computed..end], self.num_computed as u32, &self.pages, sampling);
        self.num_computed = end;
    }
}

/// All prompts in one batch: prefill in one step, then decode; logits and tokens compared on the way.
fn check_golden(path: NumericPath, tolerance: f64) {
    let golden = golden();
    let weights = load(path);
    let vocab_size = weights.config.vocab_size as usize;
    let schedule = Schedule { chunk_len: 512, page_size: 16, num_seqs: golden.prompts.len(), num_threads: 2 };
    let mut model = model(&weights, &schedule);
    let mut seqs: Vec<Seq> =
        golden.prompts.iter().enumerate().map(|(i, prompt)| Seq::new(i, prompt, &schedule)).collect();
    let mut worst: f64 = 0.0;
    for step in 0..golden.prompts[0].greedy.len() {
        let mut batch = StepBatch::default();
        for seq in &mut seqs {
            seq.push_chunk(&mut batch, schedule.chunk_len);
        }
        let logits = model.logits(&batch);
        for ((seq, prompt), logits) in
            seqs.iter_mut().zip(&golden.prompts).zip(logits.chunks_exact(vocab_size))
        {
            seq.token_ids.push(argmax(logits));
            for expected in prompt.logits.iter().filter(|expected| expected.step == step) {
                worst = worst.max(relative_error(logits, expected));
            }
        }
    }
    for (i, (seq, prompt)) in seqs.iter().zip(&golden.prompts).enumerate() {
        assert_eq!(seq.token_ids[seq.prompt_len..], prompt.greedy, "prompt {i}, {path:?}");
    }
    println!("{path:?}: largest relative error of the logits {worst:.2e}");
    assert!(worst < tolerance, "the logits of {path:?} are off by {worst}");
}

/// The larger of the errors of the norm and of the listed logits, relative to the norm and the largest logit.
fn relative_error(logits: &[f32], expected: &GoldenLogits) -> f64 {
    let norm = logits.iter().map(|&logit| f64::from(logit).powi(2)).sum::<f64>().sqrt();
    let scale = expected.logits.iter().fold(0.0f64, |max, &logit| max.max(f64::from(logit).abs()));
    let listed = expected.token_ids.iter().zip(&expected.logits);
    let largest = listed.map(|(&id, &logit)| f64::from(logits[id] - logit).abs()).fold(0.0, f64::max);
    assert!(!norm.is_nan() && !largest.is_nan());
    ((norm - expected.norm).abs() / expected.norm).max(largest / scale)
}

fn argmax(logits: &[f32]) -> u32 {
    let best = (0..logits.len()).rev().max_by(|&a, &b| logits[a].total_cmp(&logits[b]));
    best.expect("a vocabulary is not empty") as u32
}

fn model(weights: &Arc<LlamaWeights>, schedule: &Schedule) -> Llama {
    let kv = KvConfig { page_size: schedule.page_size, num_pages: 20 * schedule.num_seqs as u32 };
    Llama::new(Arc::clone(weights), kv, schedule.num_threads, "smollm2-135m-instruct", "golden")
        .expect("a small cache")
}

fn load(path: NumericPath) -> Arc<LlamaWeights> {
    let file = model_file();
    assert!(file.exists(), "the test model is missing at {file:?}, run: make models");
    let gguf = Gguf::open(&file).expect("a whole GGUF file");
    LlamaWeights::load(&gguf, path).expect("a Llama model")
}

fn model_file() -> PathBuf {
    let var = |name: &str| std::env::var_os(name).map(PathBuf::from);
    if let Some(file) = var("TIDEMILL_TEST_MODEL") {
        return file;
    }
    let cache = var("TIDEMILL_CACHE").unwrap_or_else(|| {
        let home = || var("HOME").expect("a home directory, or TIDEMILL_CACHE").join(".cache");
        var("XDG_CACHE_HOME").unwrap_or_else(home).join("tidemill")
    });
    cache.join(MODEL_FILE)
}

fn golden() -> Golden {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("reference/smollm2-135m.json");
    let bytes = std::fs::read(path).expect("the golden file is committed");
    serde_json::from_slice(&bytes).expect("written by make_golden.py")
}
