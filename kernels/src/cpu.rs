//! The fast path: SIMD kernels on all cores, chosen at run time for the CPU at hand.
//!
//! Weights, keys and values are f16 in memory and f32 in the arithmetic. Invariant: every lane of every instruction
//! set does the same IEEE operations in the same order (fused where written `fma`, nowhere else), so AVX-512, AVX2
//! and portable code give the same bits, as do all shapes of tiles: a number is always accumulated by one chain of
//! fused multiply-adds over increasing `k`. No op splits that chain between threads.

mod add;
mod add_bias;
mod attention;
mod elementwise;
mod embed;
mod gelu_mul;
mod gemm;
mod head_norm;
mod isa;
mod linear;
mod rms_norm;
mod rope;
mod shared;
mod silu_mul;
mod store_kv;

#[cfg(test)]
mod tests;

pub(crate) use self::isa::Isa;
use std::ops::Range;

use crate::backend::{AttentionShape, Backend, RopeTable};
use crate::step::StepBatch;

/// Numbers in one vector of every kernel, whatever the width of the registers.
pub(crate) const LANES: usize = 16;

/// Tokens whose keys are stored together, transposed: pages hold whole groups.
pub(crate) const KEY_GROUP_LEN: usize = LANES;

pub(crate) struct Cpu {
    pub(crate) isa: Isa,
}

/// Weights in panels of [`LANES`] outputs: `[num_panels, num_inputs, LANES]` as f16, the last panel padded with zeros.
pub(crate) struct Matrix {
    num_outputs: usize,
    num_inputs: usize,
    panels: Vec<u16>,
}

/// f16 keys and values of one layer.
pub(crate) struct KvCache {
    /// `[num_pages, num_kv_heads, page_size / KEY_GROUP_LEN, head_dim, KEY_GROUP_LEN]`
    keys: Vec<u16>,
    /// `[num_pages, num_kv_heads, page_size, head_dim]`
    values: Vec<u16>,
}

impl Matrix {
    fn num_panels(&self) -> usize {
        self.num_outputs.div_ceil(LANES)
    }

    /// Distance of two panels.
    fn panel_len(&self) -> usize {
        self.num_inputs * LANES
    }
}

impl Backend for Cpu {
    type Matrix = Matrix;
    type KvCache = KvCache;
    type Scratch = ();

    fn matrix(
        &self,
        num_outputs: usize,
        num_inputs: usize,
        fill_row: &mut dyn FnMut(usize, &mut [f32]),
    ) -> Matrix {
        let mut panels = vec![0u16; num_outputs.div_ceil(LANES) * num_inputs * LANES];
        let mut row = vec![0.0; num_inputs];
        for (index, panel) in panels.chunks_exact_mut(num_inputs * LANES).enumerate() {
            for lane in 0..LANES.min(num_outputs - index * LANES) {
                fill_row(index * LANES + lane, &mut row);
                for (value, packed) in row.iter().zip(panel.chunks_exact_mut(LANES)) {
                    packed[lane] = to_f16(*value);
                }
            }
        }
        Matrix { num_outputs, num_inputs, panels }
    }

    fn kv_cache(&self, shape: &AttentionShape) -> KvCache {
        assert_eq!(shape.page_size % KEY_GROUP_LEN, 0, "pages hold whole groups of keys");
        assert_eq!(shape.head_dim % LANES, 0, "heads consist of whole vectors");
        // Zeroed memory costs nothing until a page is written.
        let len = shape.num_slots() * shape.kv_len();
        KvCache { keys: vec![0; len], values: vec![0; len] }
    }

    fn kv_bytes(&self, shape: &AttentionShape) -> usize {
        2 * shape.kv_len() * size_of::<u16>()
    }

    fn embed(&self, table: &Matrix, token_ids: &[u32], out: &mut [f32]) {
        embed::embed(table, token_ids, out);
    }

    fn rms_norm(&self, x: &[f32], weight: &[f32], epsilon: f32, out: &mut [f32]) {
        rms_norm::rms_norm(self.isa, x, weight, epsilon, out);
    }

    fn linear(&self, (): &mut (), x: &[f32], weight: &Matrix, out: &mut [f32]) {
        linear::linear(self.isa, x, weight, out);
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
        store_kv::store_kv(shape, batch, qkv, cache);
    }

    fn attention(
        &self,
        (): &mut (),
        shape: &AttentionShape,
        window: Option<u32>,
        batch: &StepBatch,
        qkv: &[f32],
        cache: &KvCache,
        out: &mut [f32],
    ) {
        attention::attention(self.isa, shape, window, batch, qkv, cache, out);
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

/// Rounds to f16; what is too large becomes the largest number, so that no infinity enters a sum. NaN stays.
fn to_f16(value: f32) -> u16 {
    let max = half::f16::MAX.to_f32();
    half::f16::from_f32(value.clamp(-max, max)).to_bits()
}
