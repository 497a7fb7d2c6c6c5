//! The Llama family: its forward pass over paged keys and values, behind [`Model`].
//!
//! Invariant: a step writes only to the slots of the batch's rows, and its answers are those of computing every
//! sequence alone, one token at a time. Only the last row of a sequence whose next token is wanted meets the
//! output head, the largest matrix. Which pages belong to whom is the caller's business.

use std::sync::Arc;

use rayon::prelude::*;

use crate::backend::{AttentionShape, Backend};
use crate::models::weights::{AnyLayers, Layer, Layers};
use crate::models::{ENGINE_VERSION, LlamaWeights, ModelError, NumericPath};
use crate::sample::sample;
use crate::step::{Model, ModelInfo, StepBatch, StepError, StepOutput};

/// Pages hold whole groups of keys on every path, so that a definition does not depend on the path.
const MIN_PAGE_SIZE: u32 = crate::cpu::KEY_GROUP_LEN as u32;
const MAX_PAGE_SIZE: u32 = 1 << 12;

/// Rows that meet the output head at once: bounds the memory of the logits.
const MAX_HEAD_ROWS: usize = 32;

/// How the cache is cut.
#[derive(Clone, Copy, Debug)]
pub struct KvConfig {
    /// Tokens per page, a power of two from 16 on.
    pub page_size: u32,
    pub num_pages: u32,
}

/// A Llama model with its own cache and threads; the weights are shared.
pub struct Llama {
    info: ModelInfo,
    runner: AnyRunner,
    pool: rayon::ThreadPool,
}

enum AnyRunner {
    Reference(Runner<crate::reference::Reference>),
    Fast(Runner<crate::cpu::Cpu>),
}

/// The forward pass for one backend.
struct Runner<B: Backend> {
    weights: Arc<Layers<B>>,
    shape: AttentionShape,
    /// `[num_layers]`
    caches: Vec<B::KvCache>,
    buffers: Buffers,
    scratch: B::Scratch,
}

/// Activations, kept between steps: they grow to the largest step.
#[derive(Default)]
struct Buffers {
    /// `[num_tokens, hidden_size]`: the residual stream.
    hidden: Vec<f32>,
    /// `[num_tokens, hidden_size]`: input of a part, or its output.
    normed: Vec<f32>,
    /// `[num_tokens, qkv_len]`
    qkv: Vec<f32>,
    /// `[num_tokens, q_len]`
    attended: Vec<f32>,
    /// `[num_tokens, 2, intermediate_size]`
    gate_up: Vec<f32>,
    /// `[num_tokens, intermediate_size]`
    gated: Vec<f32>,
}

impl Llama {
    /// `weights_digest` identifies the weights; with the numeric path it becomes the digest of the model.
    pub fn new(
        weights: Arc<LlamaWeights>,
        kv: KvConfig,
        num_threads: usize,
        name: &str,
        weights_digest: &str,
    ) -> Result<Self, ModelError> {
        let config = &weights.config;
        let shape = attention_shape(&weights, kv)?;
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(num_threads.max(1))
            .thread_name(|index| format!("kernels-{index}"))
            .build()
            .map_err(|source| ModelError::Threads { num_threads, source })?;
        let path = match weights.path {
            NumericPath::Reference => "reference-f32",
            NumericPath::Fast => "cpu-int8",
        };
        let info = ModelInfo {
            name: name.to_owned(),
            digest: format!("{weights_digest}-{path}-v{ENGINE_VERSION}"),
            vocab_size: config.vocab_size,
            max_position: config.max_position,
            eos_token_ids: config.eos_token_ids.clone(),
            page_size: kv.page_size,
            num_pages: kv.num_pages,
        };
        let runner = match &weights.layers {
            AnyLayers::Reference(layers) => AnyRunner::Reference(Runner::new(Arc::clone(layers), shape)),
            AnyLayers::Fast(layers) => AnyRunner::Fast(Runner::new(Arc::clone(layers), shape)),
        };
        Ok(Self { info, runner, pool })
    }

    /// Runs a step and returns the logits after the last row of every sequence, `[num_seqs, vocab_size]`.
    pub fn logits(&mut self, batch: &StepBatch) -> Vec<f32> {
        batch.check(&self.info);
        let rows: Vec<usize> = (0..batch.num_seqs()).map(|seq| batch.rows(seq).end - 1).collect();
        let Self { runner, pool, .. } = self;
        pool.install(|| match runner {
            AnyRunner::Reference(runner) => runner.logits_of(batch, &rows),
            AnyRunner::Fast(runner) => runner.logits_of(batch, &rows),
        })
    }
}

impl LlamaWeights {
    /// Bytes that one token takes in the cache.
    pub fn kv_bytes_per_token(&self) -> u64 {
        let shape = shape_of(self, KvConfig { page_size: MIN_PAGE_SIZE, num_pages: 1 });
        let layer_bytes = match &self.layers {
            AnyLayers::Reference(layers) => layers.backend.kv_bytes(&shape),
            AnyLayers::Fast(layers) => layers.backend.kv_bytes(&shape),
        };
        layer_bytes as u64 * u64::from(self.config.num_layers)
    }
}

impl Model for Llama {
    fn info(&self) -> &ModelInfo {
        &self.info
    }

    fn step(&mut self, batch: &StepBatch) -> Result<StepOutput, StepError> {
        batch.check(&self.info);
        let Self { runner, pool, .. } = self;
        pool.install(|| match runner {
            AnyRunner::Reference(runner) => runner.step(batch),
            AnyRunner::Fast(runner) => runner.step(batch),
        })
    }
}

fn shape_of(weights: &LlamaWeights, kv: KvConfig) -> AttentionShape {
    let config = &weights.config;
    AttentionShape {
        num_heads: config.num_heads as usize,
        num_kv_heads: config.num_kv_heads as usize,
        head_dim: config.head_dim as usize,
        page_size: kv.page_size as usize,
        num_pages: kv.num_pages as usize,
        scale: 1.0 / (config.head_dim as f32).sqrt(),
    }
}

fn attention_shape(weights: &LlamaWeights, kv: KvConfig) -> Result<AttentionShape, ModelError> {
    let KvConfig { page_size, num_pages } = kv;
    if !page_size.is_power_of_two() || !(MIN_PAGE_SIZE..=MAX_PAGE_SIZE).contains(&page_size) {
        return Err(ModelError::PageSize { page_size, min: MIN_PAGE_SIZE, max: MAX_PAGE_SIZE });
    }
    let num_slots = u64::from(page_size) * u64::from(num_pages);
    let bytes = weights.kv_bytes_per_token().checked_mul(num_slots);
    match bytes.map(isize::try_from) {
        Some(Ok(_)) if num_pages > 0 => Ok(shape_of(weights, kv)),
        _ => Err(ModelError::CacheSize { num_pages, page_size }),
    }
}

impl<B: Backend> Runner<B> {
    fn new(weights: Arc<Layers<B>>, shape: AttentionShape) -> Self {
        let caches = weights.layers.iter().map(|_| weights.backend.kv_cache(&shape)).collect();
        Self { weights, shape, caches, buffers: Buffers::default(), scratch: B::Scratch::default() }
    }

    fn step(&mut self, batch: &StepBatch) -> Result<StepOutput, StepError> {
        self.forward(batch);
        let wanted: Vec<usize> = (0..batch.num_seqs()).filter(|&seq| batch.sampling[seq].is_some()).collect();
        let vocab_size = self.weights.config.vocab_size as usize;
        let mut output = StepOutput { token_ids: vec![None; batch.num_seqs()] };
        for seqs in wanted.chunks(MAX_HEAD_ROWS) {
            let rows: Vec<usize> = seqs.iter().map(|&seq| batch.rows(seq).end - 1).collect();
            let logits = self.head(&rows);
            let sampled: Vec<Result<u32, StepError>> = seqs
                .par_iter()
                .zip(logits.par_chunks_exact(vocab_size))
                .map(|(&seq, logits)| {
                    let params = batch.sampling[seq].expect("only sequences with parameters are wanted");
                    let position = batch.positions[batch.rows(seq).end - 1] + 1;
                    sample(logits, &params, position).map_err(|error| StepError {
                        message: format!("sequence {seq} of the batch: {error}"),
                    })
                })
                .collect();
            for (&seq, token_id) in seqs.iter().zip(sampled) {
                output.token_ids[seq] = Some(token_id?);
            }
        }
        Ok(output)
    }

    fn logits_of(&mut self, batch: &StepBatch, rows: &[usize]) -> Vec<f32> {
        self.forward(batch);
        self.head(rows)
    }

    /// All layers; leaves the residual stream in `buffers.hidden`.
    fn forward(&mut self, batch: &StepBatch) {
        let Self { weights, shape, caches, buffers, scratch } = self;
        let config = &weights.config;
        buffers.resize(
            batch.num_tokens(),
            config.hidden_size as usize,
            config.intermediate_size as usize,
            shape,
        );
        weights.backend.embed(&weights.embedding, &batch.token_ids, &mut buffers.hidden);
        for (layer, cache) in weights.layers.iter().zip(caches) {
            attention_part(weights, layer, shape, batch, cache, buffers, scratch);
            feed_forward_part(weights, layer, buffers, scratch);
        }
    }

    /// The output head for some rows, `[rows.len(), vocab_size]`.
    fn head(&mut self, rows: &[usize]) -> Vec<f32> {
        let weights = &*self.weights;
        let hidden_size = weights.config.hidden_size as usize;
        let mut hidden = Vec::with_capacity(rows.len() * hidden_size);
        for row in rows {
            hidden.extend_from_slice(&self.buffers.hidden[row * hidden_size..(row + 1) * hidden_size]);
        }
        let mut normed = vec![0.0; hidden.len()];
        let mut logits = vec![0.0; rows.len() * weights.config.vocab_size as usize];
        weights.backend.rms_norm(&hidden, &weights.output_norm, weights.config.rms_norm_epsilon, &mut normed);
        weights.backend.linear(&mut self.scratch, &normed, weights.output(), &mut logits);
        logits
    }
}

/// `hidden += attention(norm(hidden))`
fn attention_part<B: Backend>(
    weights: &Layers<B>,
    layer: &Layer<B>,
    shape: &AttentionShape,
    batch: &StepBatch,
    cache: &mut B::KvCache,
    buffers: &mut Buffers,
    scratch: &mut B::Scratch,
) {
    let Buffers { hidden, normed, qkv, attended, .. } = buffers;
    let ops = &weights.backend;
    ops.rms_norm(hidden, &layer.attention_norm, weights.config.rms_norm_epsilon, normed);
    ops.linear(scratch, normed, &layer.qkv, qkv);
    ops.rope(&weights.rope, shape, &batch.positions, qkv);
    ops.store_kv(shape, batch, qkv, cache);
    ops.attention(scratch, shape, None, batch, qkv, cache, attended);
    ops.linear(scratch, attended, &layer.attention_output, normed);
    ops.add(hidden, normed);
}

/// `hidden += down(silu(gate(x)) * up(x))`, where `x = norm(hidden)`
fn feed_forward_part<B: Backend>(
    weights: &Layers<B>,
    layer: &Layer<B>,
    buffers: &mut Buffers,
    scratch: &mut B::Scratch,
) {
    let Buffers { hidden, normed, gate_up, gated, .. } = buffers;
    let ops = &weights.backend;
    ops.rms_norm(hidden, &layer.feed_forward_norm, weights.config.rms_norm_epsilon, normed);
    ops.linear(scratch, normed, &layer.gate_up, gate_up);
    ops.silu_mul(weights.config.intermediate_size as usize, gate_up, gated);
    ops.linear(scratch, gated, &layer.down, normed);
    ops.add(hidden, normed);
}

impl Buffers {
    fn resize(
        &mut self,
        num_tokens: usize,
        hidden_size: usize,
        intermediate_size: usize,
        shape: &AttentionShape,
    ) {
        self.hidden.resize(num_tokens * hidden_size, 0.0);
        self.normed.resize(num_tokens * hidden_size, 0.0);
        self.qkv.resize(num_tokens * shape.qkv_len(), 0.0);
        self.attended.resize(num_tokens * shape.q_len(), 0.0);
        self.gate_up.resize(num_tokens * 2 * intermediate_size, 0.0);
        self.gated.resize(num_tokens * intermediate_size, 0.0);
    }
}
