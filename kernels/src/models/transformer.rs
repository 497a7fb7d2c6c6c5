//! The forward pass of every family over paged keys and values, behind [`Model`].
//!
//! Invariant: a step writes only to the slots of the batch's rows, and its answers are those of computing every
//! sequence alone, one token at a time. Only the last row of a sequence whose next token is wanted meets the
//! output head, the largest matrix. Which pages belong to whom is the caller's business; what the families differ in
//! is said by `families` and done by the ops.

use std::sync::Arc;

use crate::backend::{AttentionShape, Backend};
use crate::models::buffers::{Buffers, FEED_FORWARD_ROWS};
use crate::models::experts::mix_experts;
use crate::models::families::Activation;
use crate::models::weights::{AnyLayers, Dense, FeedForward, Layer, Layers};
use crate::models::{ENGINE_VERSION, ModelError, ModelWeights, NumericPath};
use crate::sample::{penalize, sample};
use crate::step::{Model, ModelInfo, StepBatch, StepError, StepOutput};
use crate::team::{self, Team};

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

/// A model with its own cache and threads; the weights are shared.
pub struct Transformer {
    info: ModelInfo,
    runner: AnyRunner,
    team: Team,
    /// Of a step that is started and not finished.
    output: Option<StepOutput>,
}

enum AnyRunner {
    Reference(Box<Runner<crate::reference::Reference>>),
    Fast(Box<Runner<crate::cpu::Cpu>>),
}

/// The forward pass for one backend.
struct Runner<B: Backend> {
    weights: Arc<Layers<B>>,
    shape: AttentionShape,
    /// `[num_layers]`
    caches: Vec<B::KvCache>,
    buffers: Buffers<B>,
}

impl Transformer {
    /// `weights_digest` identifies the weights; with the numeric path it becomes the digest of the model.
    pub fn new(
        weights: Arc<ModelWeights>,
        kv: KvConfig,
        num_threads: usize,
        name: &str,
        weights_digest: &str,
    ) -> Result<Self, ModelError> {
        let config = &weights.config;
        let shape = attention_shape(&weights, kv)?;
        let team = Team::new(num_threads).map_err(|source| ModelError::Threads { num_threads, source })?;
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
            AnyLayers::Reference(layers) => {
                AnyRunner::Reference(Box::new(Runner::new(Arc::clone(layers), shape)))
            }
            AnyLayers::Fast(layers) => AnyRunner::Fast(Box::new(Runner::new(Arc::clone(layers), shape))),
        };
        Ok(Self { info, runner, team, output: None })
    }

    /// Runs a step and returns the logits after the last row of every sequence, `[num_seqs, vocab_size]`.
    pub fn logits(&mut self, batch: &StepBatch) -> Vec<f32> {
        batch.check(&self.info);
        let Self { runner, team, .. } = self;
        team.install(|| match runner {
            AnyRunner::Reference(runner) => runner.logits(batch),
            AnyRunner::Fast(runner) => runner.logits(batch),
        })
    }

    /// Runs a step and returns the natural logarithm of the probability of each token of the batch that has one before
    /// it there: what perplexity is made of.
    pub fn log_probabilities(&mut self, batch: &StepBatch) -> Vec<f64> {
        batch.check(&self.info);
        let Self { runner, team, .. } = self;
        team.install(|| match runner {
            AnyRunner::Reference(runner) => runner.log_probabilities(batch),
            AnyRunner::Fast(runner) => runner.log_probabilities(batch),
        })
    }
}

impl ModelWeights {
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

impl Model for Transformer {
    fn info(&self) -> &ModelInfo {
        &self.info
    }

    fn copies_pages(&self) -> bool {
        true
    }

    /// The caller's thread is one of the team, so the step is done when this returns.
    fn start(&mut self, batch: &StepBatch) -> Result<(), StepError> {
        batch.check(&self.info);
        assert!(self.output.is_none(), "a step is not finished");
        assert!(!batch.is_ahead(), "no step runs whose tokens could be taken");
        assert!(batch.swaps.is_empty(), "the cache is in the host's memory");
        let Self { runner, team, .. } = self;
        let output = team.install(|| match runner {
            AnyRunner::Reference(runner) => runner.step(batch),
            AnyRunner::Fast(runner) => runner.step(batch),
        })?;
        self.output = Some(output);
        Ok(())
    }

    fn finish(&mut self) -> Result<StepOutput, StepError> {
        Ok(self.output.take().expect("a step is started"))
    }
}

fn shape_of(weights: &ModelWeights, kv: KvConfig) -> AttentionShape {
    let config = &weights.config;
    AttentionShape {
        num_heads: config.num_heads as usize,
        num_kv_heads: config.num_kv_heads as usize,
        head_dim: config.head_dim as usize,
        page_size: kv.page_size as usize,
        num_pages: kv.num_pages as usize,
        scale: config.attention_scale,
    }
}

fn attention_shape(weights: &ModelWeights, kv: KvConfig) -> Result<AttentionShape, ModelError> {
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
        Self { weights, shape, caches, buffers: Buffers::default() }
    }

    fn step(&mut self, batch: &StepBatch) -> Result<StepOutput, StepError> {
        self.forward(batch);
        let mut output = StepOutput { token_ids: vec![None; batch.num_seqs()] };
        let mut wanted = (0..batch.num_seqs()).filter(|&seq| batch.sampling[seq].is_some()).peekable();
        while wanted.peek().is_some() {
            self.buffers.head_seqs.clear();
            self.buffers.head_seqs.extend(wanted.by_ref().take(MAX_HEAD_ROWS));
            self.head_of_seqs(batch);
            let Buffers { head_seqs, logits, sampled, .. } = &mut self.buffers;
            let vocab_size = self.weights.config.vocab_size as usize;
            for (&seq, logits) in head_seqs.iter().zip(logits.chunks_exact_mut(vocab_size)) {
                if let Some(params) = &batch.sampling[seq] {
                    penalize(logits, params, batch.uses(seq));
                }
            }
            sampled.clear();
            sampled.resize_with(head_seqs.len(), || Ok(0));
            team::for_each_chunk(sampled, 1, |i, sampled| {
                sampled[0] = sample_for(batch, head_seqs[i], &logits[i * vocab_size..(i + 1) * vocab_size]);
            });
            for (&seq, token_id) in head_seqs.iter().zip(sampled.drain(..)) {
                output.token_ids[seq] = Some(token_id?);
            }
        }
        Ok(output)
    }

    fn logits(&mut self, batch: &StepBatch) -> Vec<f32> {
        self.forward(batch);
        self.buffers.head_seqs.clear();
        self.buffers.head_seqs.extend(0..batch.num_seqs());
        self.head_of_seqs(batch);
        self.buffers.logits.clone()
    }

    fn log_probabilities(&mut self, batch: &StepBatch) -> Vec<f64> {
        self.forward(batch);
        let vocab_size = self.weights.config.vocab_size as usize;
        let rows: Vec<usize> =
            (0..batch.num_seqs()).flat_map(|seq| batch.rows(seq).start..batch.rows(seq).end - 1).collect();
        let mut all = Vec::with_capacity(rows.len());
        for rows in rows.chunks(MAX_HEAD_ROWS) {
            self.buffers.head_rows.clear();
            self.buffers.head_rows.extend_from_slice(rows);
            self.head();
            let logits = self.buffers.logits.chunks_exact(vocab_size).zip(rows);
            all.extend(logits.map(|(logits, row)| log_softmax(logits, batch.token_ids[row + 1])));
        }
        all
    }

    /// All layers; leaves the residual stream in `buffers.hidden`.
    fn forward(&mut self, batch: &StepBatch) {
        let Self { weights, shape, caches, buffers } = self;
        buffers.resize(batch.num_tokens(), &weights.config, shape);
        for cache in &mut *caches {
            batch.copies.iter().for_each(|copy| weights.backend.copy_kv(shape, copy, cache));
        }
        weights.backend.embed(&weights.embedding, &batch.token_ids, &mut buffers.hidden);
        if weights.architecture.scaled_embedding {
            let scale = (weights.config.hidden_size as f32).sqrt();
            for x in &mut buffers.hidden {
                *x *= scale;
            }
        }
        let layers = weights.layers.iter().zip(&weights.config.windows);
        for ((layer, &window), cache) in layers.zip(caches) {
            attention_part(weights, layer, shape, window, batch, cache, buffers);
            feed_forward_part(weights, layer, buffers);
        }
    }

    /// The output head after the last row of each of `head_seqs`.
    fn head_of_seqs(&mut self, batch: &StepBatch) {
        let Buffers { head_seqs, head_rows, .. } = &mut self.buffers;
        head_rows.clear();
        head_rows.extend(head_seqs.iter().map(|&seq| batch.rows(seq).end - 1));
        self.head();
    }

    /// The output head after each of `head_rows`; leaves `[head_rows.len(), vocab_size]` in `logits`.
    fn head(&mut self) {
        let weights = &*self.weights;
        let Buffers { hidden, head_rows, head_hidden, head_normed, logits, scratch, .. } = &mut self.buffers;
        let hidden_size = weights.config.hidden_size as usize;
        head_hidden.clear();
        for &row in head_rows.iter() {
            head_hidden.extend_from_slice(&hidden[row * hidden_size..(row + 1) * hidden_size]);
        }
        head_normed.resize(head_hidden.len(), 0.0);
        logits.resize(head_rows.len() * weights.config.vocab_size as usize, 0.0);
        let epsilon = weights.config.rms_norm_epsilon;
        weights.backend.rms_norm(head_hidden, &weights.output_norm, epsilon, head_normed);
        weights.backend.linear(scratch, head_normed, weights.output(), logits);
    }
}

fn log_softmax(logits: &[f32], token_id: u32) -> f64 {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let total: f64 = logits.iter().map(|logit| f64::from(logit - max).exp()).sum();
    f64::from(logits[token_id as usize] - max) - total.ln()
}

fn sample_for(batch: &StepBatch, seq: usize, logits: &[f32]) -> Result<u32, StepError> {
    let params = batch.sampling[seq].expect("only sequences with parameters are wanted");
    let position = batch.positions[batch.rows(seq).end - 1] + 1;
    sample(logits, &params, position)
        .map_err(|error| StepError { message: format!("sequence {seq} of the batch: {error}") })
}

/// `hidden += attention(norm(hidden))`
fn attention_part<B: Backend>(
    weights: &Layers<B>,
    layer: &Layer<B>,
    shape: &AttentionShape,
    window: Option<u32>,
    batch: &StepBatch,
    cache: &mut B::KvCache,
    buffers: &mut Buffers<B>,
) {
    let Buffers { hidden, normed, qkv, attended, scratch, .. } = buffers;
    let ops = &weights.backend;
    let epsilon = weights.config.rms_norm_epsilon;
    ops.rms_norm(hidden, &layer.attention_norm, epsilon, normed);
    ops.linear(scratch, normed, &layer.qkv, qkv);
    if let Some(bias) = &layer.qkv_bias {
        ops.add_bias(bias, qkv);
    }
    if let Some([q_norm, k_norm]) = &layer.head_norms {
        let num_heads = shape.num_heads;
        ops.head_norm(q_norm, epsilon, shape, 0..num_heads, qkv);
        ops.head_norm(k_norm, epsilon, shape, num_heads..num_heads + shape.num_kv_heads, qkv);
    }
    ops.rope(weights.rope(window), shape, &batch.positions, qkv);
    ops.store_kv(shape, batch, qkv, cache);
    ops.attention(scratch, shape, window, batch, qkv, cache, attended);
    ops.linear(scratch, attended, &layer.attention_output, normed);
    add_residual(weights, layer.post_attention_norm.as_deref(), buffers);
}

/// `hidden += feed_forward(norm(hidden))`
fn feed_forward_part<B: Backend>(weights: &Layers<B>, layer: &Layer<B>, buffers: &mut Buffers<B>) {
    let ops = &weights.backend;
    let epsilon = weights.config.rms_norm_epsilon;
    ops.rms_norm(&buffers.hidden, &layer.feed_forward_norm, epsilon, &mut buffers.normed);
    match &layer.feed_forward {
        FeedForward::Dense(dense) => {
            let Buffers { normed, part, gate_up, gated, scratch, .. } = buffers;
            feed_forward(weights, dense, scratch, normed, gate_up, gated, part);
            std::mem::swap(normed, part);
        }
        FeedForward::Experts(experts) => mix_experts(weights, experts, buffers),
    }
    add_residual(weights, layer.post_feed_forward_norm.as_deref(), buffers);
}

/// `out = down(activation(gate(x)) * up(x))`
pub(super) fn feed_forward<B: Backend>(
    weights: &Layers<B>,
    dense: &Dense<B>,
    scratch: &mut B::Scratch,
    x: &[f32],
    gate_up: &mut [f32],
    gated: &mut [f32],
    out: &mut [f32],
) {
    let ops = &weights.backend;
    let intermediate_size = weights.config.intermediate_size as usize;
    let block_len = FEED_FORWARD_ROWS * weights.config.hidden_size as usize;
    for (x, out) in x.chunks(block_len).zip(out.chunks_mut(block_len)) {
        let num_rows = x.len() / weights.config.hidden_size as usize;
        let gate_up = &mut gate_up[..num_rows * 2 * intermediate_size];
        let gated = &mut gated[..num_rows * intermediate_size];
        ops.linear(scratch, x, &dense.gate_up, gate_up);
        match weights.architecture.activation {
            Activation::Silu => ops.silu_mul(intermediate_size, gate_up, gated),
            Activation::Gelu => ops.gelu_mul(intermediate_size, gate_up, gated),
        }
        ops.linear(scratch, gated, &dense.down, out);
    }
}

/// Adds the output of a part, in `normed`, to the residual stream, behind a norm where the family has one.
fn add_residual<B: Backend>(weights: &Layers<B>, norm: Option<&[f32]>, buffers: &mut Buffers<B>) {
    let Buffers { hidden, normed, part, .. } = buffers;
    match norm {
        Some(norm) => {
            weights.backend.rms_norm(normed, norm, weights.config.rms_norm_epsilon, part);
            weights.backend.add(hidden, part);
        }
        None => weights.backend.add(hidden, normed),
    }
}
