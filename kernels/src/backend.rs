//! The ops a model family is made of, as one trait with one implementation a numeric path.
//!
//! Arrays are row-major f32 slices; `[num_tokens, qkv_len]` rows hold queries, then keys, then values of all heads.
//! Invariant of every implementation: a row of a result depends on that row's inputs alone and is computed in one
//! fixed order, so answers never depend on the batch, the chunking, the page size or the number of threads.

use std::ops::Range;
use std::sync::OnceLock;

use crate::step::StepBatch;

/// Ops over one kind of memory.
pub(crate) trait Backend: Send + Sync + 'static {
    /// Weights `[num_outputs, num_inputs]`, stored as the path likes.
    type Matrix: Send + Sync;
    /// Keys and values of one layer for all slots.
    type KvCache: Send + Sync;
    /// Working memory that a model keeps between steps.
    type Scratch: Default + Send;

    /// Builds a matrix row by row; `fill_row` writes the numbers of one output.
    fn matrix(
        &self,
        num_outputs: usize,
        num_inputs: usize,
        fill_row: &mut dyn FnMut(usize, &mut [f32]),
    ) -> Self::Matrix;
    fn kv_cache(&self, shape: &AttentionShape) -> Self::KvCache;
    /// Bytes of one token's keys and values in one layer.
    fn kv_bytes(&self, shape: &AttentionShape) -> usize;

    /// Copies row `token_ids[i]` of the table to row `i`.
    fn embed(&self, table: &Self::Matrix, token_ids: &[u32], out: &mut [f32]);
    /// Scales each row to a mean square of one, then by the weights.
    fn rms_norm(&self, x: &[f32], weight: &[f32], epsilon: f32, out: &mut [f32]);
    /// `out[m, n] = sum over k of x[m, k] * weight[n, k]`
    fn linear(&self, scratch: &mut Self::Scratch, x: &[f32], weight: &Self::Matrix, out: &mut [f32]);
    /// Adds the bias to each row.
    fn add_bias(&self, bias: &[f32], x: &mut [f32]);
    /// Scales each of some heads of a row to a mean square of one, then by the weights `[head_dim]`; heads count from
    /// the queries on, the keys come next.
    fn head_norm(
        &self,
        weight: &[f32],
        epsilon: f32,
        shape: &AttentionShape,
        heads: Range<usize>,
        qkv: &mut [f32],
    );
    /// Rotates queries and keys in place, by the position of their row.
    fn rope(&self, table: &RopeTable, shape: &AttentionShape, positions: &[u32], qkv: &mut [f32]);
    /// Writes keys and values to their slots.
    fn store_kv(&self, shape: &AttentionShape, batch: &StepBatch, qkv: &[f32], cache: &mut Self::KvCache);
    /// Attends from each row to the positions of its sequence up to its own: to the last `window` of them, its own
    /// included, or to all.
    #[expect(clippy::too_many_arguments, reason = "the op has these operands")]
    fn attention(
        &self,
        scratch: &mut Self::Scratch,
        shape: &AttentionShape,
        window: Option<u32>,
        batch: &StepBatch,
        qkv: &[f32],
        cache: &Self::KvCache,
        out: &mut [f32],
    );
    /// `out = silu(gate) * up`, where a row of `gate_up` holds all gates, then all ups.
    fn silu_mul(&self, intermediate_size: usize, gate_up: &[f32], out: &mut [f32]);
    /// `out = gelu(gate) * up`, laid out as for `silu_mul`; gelu in its tanh form.
    fn gelu_mul(&self, intermediate_size: usize, gate_up: &[f32], out: &mut [f32]);
    /// `x += y`
    fn add(&self, x: &mut [f32], y: &[f32]);
}

/// Heads, and how the cache is cut into pages.
#[derive(Clone, Copy, Debug)]
pub(crate) struct AttentionShape {
    pub(crate) num_heads: usize,
    /// Divides `num_heads`: neighboring query heads share a head of keys and values.
    pub(crate) num_kv_heads: usize,
    pub(crate) head_dim: usize,
    /// Tokens per page, a power of two.
    pub(crate) page_size: usize,
    pub(crate) num_pages: usize,
    /// Scores are multiplied by this.
    pub(crate) scale: f32,
}

impl AttentionShape {
    pub(crate) fn q_len(&self) -> usize {
        self.num_heads * self.head_dim
    }

    pub(crate) fn kv_len(&self) -> usize {
        self.num_kv_heads * self.head_dim
    }

    pub(crate) fn qkv_len(&self) -> usize {
        self.q_len() + 2 * self.kv_len()
    }

    /// Query heads that share one head of keys and values.
    pub(crate) fn group_len(&self) -> usize {
        self.num_heads / self.num_kv_heads
    }

    pub(crate) fn num_slots(&self) -> usize {
        self.num_pages * self.page_size
    }

    /// Slot of a position of sequence `seq`.
    pub(crate) fn slot(&self, batch: &StepBatch, seq: usize, position: usize) -> usize {
        let page = batch.pages(seq)[position / self.page_size].0 as usize;
        debug_assert!(page < self.num_pages);
        page * self.page_size + position % self.page_size
    }
}

/// Cosines and sines of all angles. Blocks of positions are computed when first asked for: few sequences are as long
/// as a model allows.
pub(crate) struct RopeTable {
    /// Radians per position, `[head_dim / 2]`.
    frequencies: Vec<f32>,
    /// `[max_position / BLOCK_POSITIONS]`, each `[BLOCK_POSITIONS, 2, head_dim / 2]`: cosines, then sines.
    blocks: Vec<OnceLock<Vec<f32>>>,
}

impl RopeTable {
    const BLOCK_POSITIONS: usize = 256;

    pub(crate) fn new(frequencies: Vec<f32>, max_position: usize) -> Self {
        let num_blocks = max_position.div_ceil(Self::BLOCK_POSITIONS);
        Self { frequencies, blocks: (0..num_blocks).map(|_| OnceLock::new()).collect() }
    }

    /// The frequencies of heads without any scaling, rounded to f32 as the models were trained with.
    pub(crate) fn frequencies(head_dim: usize, theta: f32) -> Vec<f32> {
        let frequency = |i: usize| (1.0 / f64::from(theta).powf(2.0 * i as f64 / head_dim as f64)) as f32;
        (0..head_dim / 2).map(frequency).collect()
    }

    /// Cosines and sines of one position, `[head_dim / 2]` each.
    pub(crate) fn row(&self, position: u32) -> (&[f32], &[f32]) {
        let half_dim = self.frequencies.len();
        let (block, row) =
            (position as usize / Self::BLOCK_POSITIONS, position as usize % Self::BLOCK_POSITIONS);
        let block = self.blocks[block].get_or_init(|| self.block(block));
        block[row * 2 * half_dim..(row + 1) * 2 * half_dim].split_at(half_dim)
    }

    fn block(&self, index: usize) -> Vec<f32> {
        let mut block = Vec::with_capacity(Self::BLOCK_POSITIONS * 2 * self.frequencies.len());
        for position in index * Self::BLOCK_POSITIONS..(index + 1) * Self::BLOCK_POSITIONS {
            // Angles are rounded to f32 as in training, too.
            let angles = self.frequencies.iter().map(|frequency| f64::from(position as f32 * frequency));
            block.extend(angles.clone().map(|angle| angle.cos() as f32));
            block.extend(angles.map(|angle| angle.sin() as f32));
        }
        block
    }
}
