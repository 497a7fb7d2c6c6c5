//! The reference path: every op as an f32 loop that can be read in a minute.
//!
//! Weights, keys and values are f32. Rows run on all threads of the pool, and that is all the speed there is: the
//! other paths are tested against this one, and this one against Hugging Face transformers.

mod add;
mod add_bias;
mod attention;
mod embed;
mod gelu_mul;
mod head_norm;
mod linear;
mod rms_norm;
mod rope;
mod silu_mul;
mod store_kv;

use std::ops::Range;

use crate::backend::{AttentionShape, Backend, RopeTable};
use crate::step::StepBatch;

pub(crate) struct Reference;

pub(crate) struct Matrix {
    pub(crate) num_inputs: usize,
    /// `[num_outputs, num_inputs]`
    pub(crate) values: Vec<f32>,
}

/// `[num_slots, num_kv_heads, head_dim]` each.
pub(crate) struct KvCache {
    keys: Vec<f32>,
    values: Vec<f32>,
}

impl Backend for Reference {
    type Matrix = Matrix;
    type KvCache = KvCache;
    type Scratch = ();

    fn matrix(
        &self,
        num_outputs: usize,
        num_inputs: usize,
        fill_row: &mut dyn FnMut(usize, &mut [f32]),
    ) -> Matrix {
        let mut values = vec![0.0; num_outputs * num_inputs];
        for (row, values) in values.chunks_exact_mut(num_inputs).enumerate() {
            fill_row(row, values);
        }
        Matrix { num_inputs, values }
    }

    fn kv_cache(&self, shape: &AttentionShape) -> KvCache {
        let len = shape.num_slots() * shape.kv_len();
        KvCache { keys: vec![0.0; len], values: vec![0.0; len] }
    }

    fn kv_bytes(&self, shape: &AttentionShape) -> usize {
        2 * shape.kv_len() * size_of::<f32>()
    }

    fn embed(&self, table: &Matrix, token_ids: &[u32], out: &mut [f32]) {
        embed::embed(table, token_ids, out);
    }

    fn rms_norm(&self, x: &[f32], weight: &[f32], epsilon: f32, out: &mut [f32]) {
        rms_norm::rms_norm(x, weight, epsilon, out);
    }

    fn linear(&self, (): &mut (), x: &[f32], weight: &Matrix, out: &mut [f32]) {
        linear::linear(x, weight, out);
    }

    fn add_bias(&self, bias: &[f32], x: &mut [f32]) {
        add_bias::add_bias(bias, x);
    }

    fn head_norm(
        &self,
        weight: &[f32],
        epsilon: f32,
        shape: &AttentionShape,
        heads: Range<usize>,
        qkv: &mut [f32],
    ) {
        head_norm::head_norm(weight, epsilon, shape, heads, qkv);
    }

    fn rope(&self, table: &RopeTable, shape: &AttentionShape, positions: &[u32], qkv: &mut [f32]) {
        rope::rope(table, shape, positions, qkv);
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
        attention::attention(shape, window, batch, qkv, cache, out);
    }

    fn silu_mul(&self, intermediate_size: usize, gate_up: &[f32], out: &mut [f32]) {
        silu_mul::silu_mul(intermediate_size, gate_up, out);
    }

    fn gelu_mul(&self, intermediate_size: usize, gate_up: &[f32], out: &mut [f32]) {
        gelu_mul::gelu_mul(intermediate_size, gate_up, out);
    }

    fn add(&self, x: &mut [f32], y: &[f32]) {
        add::add(x, y);
    }
}
