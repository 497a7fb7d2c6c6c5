//! The fast path: SIMD kernels on all cores, chosen at run time for the CPU at hand.
//!
//! Weights, activations, keys and values are bytes with f32 scales; products of bytes are summed exactly, scales and
//! everything between matrices are f32. Invariant: every lane of every instruction set does the same IEEE operations
//! in the same order (fused where written `fma`, nowhere else), so tiles, AVX-512, AVX2 and portable code give the
//! same bits, as do all shapes of blocks. No op splits a chain of f32 sums between threads.

mod add;
mod add_bias;
mod attention;
mod dots;
mod elementwise;
mod embed;
mod gelu_mul;
mod head_norm;
mod isa;
mod kv_cache;
mod linear;
mod matrix;
pub(crate) mod packed;
mod quantize;
mod rms_norm;
mod rope;
mod scratch;
mod silu_mul;
mod tiles;

#[cfg(test)]
mod tests;

use std::ops::Range;

pub(crate) use self::isa::Isa;
pub(crate) use self::kv_cache::KvCache;
pub(crate) use self::matrix::Matrix;
use self::packed::Packing;
pub(crate) use self::tiles::Tiles;
use crate::backend::{AttentionShape, Backend, RopeTable};
use crate::step::{PageCopy, StepBatch};

/// Numbers in one vector of every kernel, whatever the width of the registers.
pub(crate) const LANES: usize = 16;

/// Tokens whose keys are stored together, transposed: pages hold whole groups.
pub(crate) const KEY_GROUP_LEN: usize = LANES;

/// Added to bytes that are stored unsigned.
const OFFSET: i32 = 128;

pub(crate) struct Cpu {
    pub(crate) isa: Isa,
    /// Where matrices are packed to.
    pub(crate) packing: Packing,
}

/// Working memory of the ops.
#[derive(Default)]
pub(crate) struct Scratch {
    linear: linear::LinearScratch,
    attention: attention::AttentionScratch,
}

impl Backend for Cpu {
    type Matrix = Matrix;
    type KvCache = KvCache;
    type Scratch = Scratch;

    fn matrix(
        &self,
        num_outputs: usize,
        num_inputs: usize,
        fill_row: &mut dyn FnMut(usize, &mut [f32]),
    ) -> Matrix {
        Matrix::new(self.isa, &self.packing, num_outputs, num_inputs, fill_row)
    }

    fn finish_loading(&self) {
        self.packing.finish();
    }

    fn kv_cache(&self, shape: &AttentionShape) -> KvCache {
        KvCache::new(shape)
    }

    fn kv_bytes(&self, shape: &AttentionShape) -> usize {
        KvCache::bytes_per_token(shape)
    }

    fn embed(&self, table: &Matrix, token_ids: &[u32], out: &mut [f32]) {
        embed::embed(self.isa, table, token_ids, out);
    }

    fn rms_norm(&self, x: &[f32], weight: &[f32], epsilon: f32, out: &mut [f32]) {
        rms_norm::rms_norm(self.isa, x, weight, epsilon, out);
    }

    fn linear(&self, scratch: &mut Scratch, x: &[f32], weight: &Matrix, out: &mut [f32]) {
        linear::linear(self.isa, &mut scratch.linear, x, weight, out);
    }

    fn add_bias(&self, bias: &[f32], x: &mut [f32]) {
        add_bias::add_bias(self.isa, bias, x);
    }

    fn head_norm(
        &self,
        weight: &[f32],
        epsilon: f32,
        shape: &AttentionShape,
        heads: Range<usize>,
        qkv: &mut [f32],
    ) {
        head_norm::head_norm(self.isa, weight, epsilon, shape, heads, qkv);
    }

    fn rope(&self, table: &RopeTable, shape: &AttentionShape, positions: &[u32], qkv: &mut [f32]) {
        rope::rope(self.isa, table, shape, positions, qkv);
    }

    fn store_kv(&self, shape: &AttentionShape, batch: &StepBatch, qkv: &[f32], cache: &mut KvCache) {
        kv_cache::store_kv(self.isa, shape, batch, qkv, cache);
    }

    fn copy_kv(&self, shape: &AttentionShape, copy: &PageCopy, cache: &mut KvCache) {
        kv_cache::copy_kv(shape, copy, cache);
    }

    fn attention(
        &self,
        scratch: &mut Scratch,
        shape: &AttentionShape,
        window: Option<u32>,
        batch: &StepBatch,
        qkv: &[f32],
        cache: &KvCache,
        out: &mut [f32],
    ) {
        attention::attention(self.isa, &mut scratch.attention, shape, window, batch, qkv, cache, out);
    }

    fn silu_mul(&self, intermediate_size: usize, gate_up: &[f32], out: &mut [f32]) {
        silu_mul::silu_mul(self.isa, intermediate_size, gate_up, out);
    }

    fn gelu_mul(&self, intermediate_size: usize, gate_up: &[f32], out: &mut [f32]) {
        gelu_mul::gelu_mul(self.isa, intermediate_size, gate_up, out);
    }

    fn add(&self, x: &mut [f32], y: &[f32]) {
        add::add(self.isa, x, y);
    }
}
