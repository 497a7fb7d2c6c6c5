//! Holds a model to golden logits and tokens of Hugging Face transformers, and to itself under other schedules.
//!
//! Golden files are written by the scripts in `tests/reference/`. Prompts are token ids: tokenizers are tested elsewhere.

use std::sync::Arc;

use serde::Deserialize;
use tidemill_kernels::gpu::{GpuModel, GpuModelConfig, GpuWeights, KvMemory};
use tidemill_kernels::models::{KvConfig, ModelWeights, NumericPath, Transformer};
use tidemill_kernels::step::{Model, PageId, SamplingParams, StepBatch};

use crate::workspace;

/// Relative to the norm, and to the largest logit: f32 on both sides, summed in another order.
pub const REFERENCE_TOLERANCE: f64 = 1e-3;
/// The fast path rounds everything that meets in a product to bytes: single logits move by some percent of the
/// largest one, without a bias. What that costs in quality is held by the test of perplexity.
pub const FAST_TOLERANCE: f64 = 0.1;
/// Activations, keys and values keep 8 bits of mantissa between the ops.
pub const BF16_TOLERANCE: f64 = 0.05;
/// The same with 11 bits.
pub const F16_TOLERANCE: f64 = 0.005;

/// Tokens of the largest step on a GPU.
const MAX_GPU_TOKENS: u32 = 8192;

/// The weights of one numeric path, of which models are made.
pub trait GoldenWeights {
    /// Names the path.
    fn path(&self) -> String;
    fn vocab_size(&self) -> usize;
    /// Greedy tokens are those of the golden file.
    fn is_exact(&self) -> bool;
    fn model(&self, kv: KvConfig, schedule: &Schedule) -> Box<dyn GoldenModel>;
}

/// A model that shows its logits.
pub trait GoldenModel: Model {
    /// After the last row of every sequence.
    fn logits_of(&mut self, batch: &StepBatch) -> Vec<f32>;
}

impl GoldenWeights for Arc<ModelWeights> {
    fn path(&self) -> String {
        format!("{:?}", self.path)
    }

    fn vocab_size(&self) -> usize {
        self.config.vocab_size as usize
    }

    fn is_exact(&self) -> bool {
        self.path == NumericPath::Reference
    }

    fn model(&self, kv: KvConfig, schedule: &Schedule) -> Box<dyn GoldenModel> {
        let model = Transformer::new(Arc::clone(self), kv, schedule.num_threads, "golden", "golden");
        Box::new(model.expect("a small cache"))
    }
}

impl GoldenModel for Transformer {
    fn logits_of(&mut self, batch: &StepBatch) -> Vec<f32> {
        self.logits(batch)
    }
}

impl GoldenWeights for Arc<GpuWeights> {
    fn path(&self) -> String {
        format!("{:?}", self.options)
    }

    fn vocab_size(&self) -> usize {
        self.config.vocab_size as usize
    }

    fn is_exact(&self) -> bool {
        false
    }

    fn model(&self, kv: KvConfig, schedule: &Schedule) -> Box<dyn GoldenModel> {
        let config = GpuModelConfig {
            page_size: kv.page_size,
            kv_memory: KvMemory::Pages(kv.num_pages),
            max_num_batched_tokens: MAX_GPU_TOKENS,
            max_num_seqs: schedule.num_seqs as u32,
            num_host_pages: 0,
        };
        Box::new(GpuModel::new(Arc::clone(self), config, "golden", "golden").expect("a small cache"))
    }
}

impl GoldenModel for GpuModel {
    fn logits_of(&mut self, batch: &StepBatch) -> Vec<f32> {
        self.logits(batch).expect("the device works")
    }
}

#[derive(Deserialize)]
pub struct Golden {
    pub prompts: Vec<GoldenPrompt>,
}

#[derive(Clone, Deserialize)]
pub struct GoldenPrompt {
    token_ids: Vec<u32>,
    greedy: Vec<u32>,
    logits: Vec<GoldenLogits>,
}

/// Some logits of one step, and the norm of all.
#[derive(Clone, Deserialize)]
struct GoldenLogits {
    step: usize,
    token_ids: Vec<usize>,
    logits: Vec<f32>,
    norm: f64,
}

/// How the work is cut into steps.
#[derive(Debug)]
pub struct Schedule {
    pub chunk_len: usize,
    pub page_size: u32,
    /// Sequences in one batch.
    pub num_seqs: usize,
    pub num_threads: usize,
}

/// Everything at once, in chunks.
const BASE: Schedule = Schedule { chunk_len: 512, page_size: 16, num_seqs: 32, num_threads: 2 };

pub const OTHER_SCHEDULES: [Schedule; 4] = [
    Schedule { chunk_len: 1, page_size: 64, num_seqs: 32, num_threads: 2 },
    Schedule { chunk_len: 7, page_size: 16, num_seqs: 32, num_threads: 1 },
    Schedule { chunk_len: 1 << 20, page_size: 64, num_seqs: 1, num_threads: 2 },
    Schedule { chunk_len: 512, page_size: 64, num_seqs: 3, num_threads: 1 },
];

impl Golden {
    /// A file of `tests/reference/`.
    pub fn read(name: &str) -> Self {
        let path = workspace().join("tests/reference").join(name);
        let bytes = std::fs::read(path).expect("the golden file is committed");
        serde_json::from_slice(&bytes).expect("written by a script beside it")
    }

    /// Some of the prompts, with shorter answers: where time counts.
    pub fn shortened(mut self, prompts: std::ops::Range<usize>, num_greedy: usize) -> Self {
        self.prompts = self.prompts[prompts].to_vec();
        for prompt in &mut self.prompts {
            prompt.greedy.truncate(num_greedy);
        }
        self
    }

    /// Logits within the tolerance; on the reference path the greedy tokens are the same, too.
    #[track_caller]
    pub fn check(&self, weights: &dyn GoldenWeights, tolerance: f64, what: &str) {
        let worst = self.worst_error(weights, what);
        println!("{what}, {}: largest relative error of the logits {worst:.2e}", weights.path());
        assert!(worst < tolerance, "{what}: the logits of {} are off by {worst}", weights.path());
    }

    /// The golden answers are forced, so that each step is compared on the same tokens.
    #[track_caller]
    fn worst_error(&self, weights: &dyn GoldenWeights, what: &str) -> f64 {
        let vocab_size = weights.vocab_size();
        let mut model = model(weights, &BASE, &self.prompts);
        let prompts = self.prompts.iter().enumerate();
        let mut seqs: Vec<Seq> = prompts.map(|(i, prompt)| Seq::new(i, prompt, &BASE)).collect();
        let mut worst: f64 = 0.0;
        while seqs.iter().any(|seq| !seq.is_done()) {
            let mut batch = StepBatch::default();
            let active: Vec<usize> = (0..seqs.len()).filter(|&i| !seqs[i].is_done()).collect();
            for &i in &active {
                seqs[i].push_chunk(&mut batch, BASE.chunk_len);
            }
            let logits = model.logits_of(&batch);
            for (&i, logits) in active.iter().zip(logits.chunks_exact(vocab_size)) {
                let (seq, prompt) = (&mut seqs[i], &self.prompts[i]);
                if seq.num_computed < seq.token_ids.len() {
                    continue;
                }
                let step = seq.token_ids.len() - prompt.token_ids.len();
                if weights.is_exact() {
                    assert_eq!(argmax(logits), prompt.greedy[step], "{what}: prompt {i}, token {step}");
                }
                for expected in prompt.logits.iter().filter(|expected| expected.step == step) {
                    worst = worst.max(relative_error(logits, expected));
                }
                seq.token_ids.push(prompt.greedy[step]);
            }
        }
        worst
    }

    /// The same bits for every schedule.
    #[track_caller]
    pub fn check_schedules(&self, weights: &dyn GoldenWeights, schedules: &[Schedule], what: &str) {
        let expected = self.run(weights, &BASE);
        for schedule in schedules {
            let actual = self.run(weights, schedule);
            for (prompt, (actual, expected)) in actual.iter().zip(&expected).enumerate() {
                assert_eq!(actual.token_ids, expected.token_ids, "{what}: prompt {prompt}, {schedule:?}");
                let same = actual.last_logits == expected.last_logits;
                assert!(same, "{what}: logits of prompt {prompt}, {schedule:?}");
            }
        }
    }

    /// Answers all prompts greedily, with as many tokens as the golden answers.
    fn run(&self, weights: &dyn GoldenWeights, schedule: &Schedule) -> Vec<Answer> {
        let mut answers = Vec::new();
        for prompts in self.prompts.chunks(schedule.num_seqs) {
            let mut model = model(weights, schedule, prompts);
            let prompts = prompts.iter().enumerate();
            let mut seqs: Vec<Seq> = prompts.map(|(i, prompt)| Seq::new(i, prompt, schedule)).collect();
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
                let last_logits = model.logits_of(&batch).iter().map(|logit| logit.to_bits()).collect();
                answers.push(Answer { token_ids: seq.token_ids.clone(), last_logits });
            }
        }
        answers
    }
}

struct Answer {
    token_ids: Vec<u32>,
    /// Bits of all logits after the last answer token.
    last_logits: Vec<u32>,
}

struct Seq {
    /// Prompt and answer.
    token_ids: Vec<u32>,
    wanted_len: usize,
    num_computed: usize,
    pages: Vec<PageId>,
}

impl Seq {
    /// The pages of the sequences are interleaved, so that neighbors in a page table are not neighbors in memory.
    fn new(index: usize, prompt: &GoldenPrompt, schedule: &Schedule) -> Self {
        let page = |i| PageId((i * schedule.num_seqs + index) as u32);
        Self {
            token_ids: prompt.token_ids.clone(),
            wanted_len: prompt.token_ids.len() + prompt.greedy.len(),
            num_computed: 0,
            pages: (0..prompt.num_pages(schedule)).map(page).collect(),
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

impl GoldenPrompt {
    fn num_pages(&self, schedule: &Schedule) -> usize {
        (self.token_ids.len() + self.greedy.len() + 1).div_ceil(schedule.page_size as usize)
    }
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

fn model(weights: &dyn GoldenWeights, schedule: &Schedule, prompts: &[GoldenPrompt]) -> Box<dyn GoldenModel> {
    let longest = prompts.iter().map(|prompt| prompt.num_pages(schedule)).max().unwrap_or(1);
    let kv = KvConfig { page_size: schedule.page_size, num_pages: (longest * schedule.num_seqs) as u32 };
    weights.model(kv, schedule)
}
