//! Causal attention over the paged cache, one query head after the other.

use super::KvCache;
use super::linear::dot;
use crate::backend::AttentionShape;
use crate::step::StepBatch;
use crate::team;

/// `qkv`: `[num_tokens, qkv_len]`, `out`: `[num_tokens, num_heads, head_dim]`
pub(super) fn attention(
    shape: &AttentionShape,
    window: Option<u32>,
    batch: &StepBatch,
    qkv: &[f32],
    cache: &KvCache,
    out: &mut [f32],
) {
    let seq_of_row: Vec<usize> =
        (0..batch.num_seqs()).flat_map(|seq| batch.rows(seq).map(move |_| seq)).collect();
    team::for_each_chunk(out, shape.q_len(), |row, out| {
        let num_positions = batch.positions[row] as usize + 1;
        let first = window.map_or(0, |window| num_positions.saturating_sub(window as usize));
        let slots: Vec<usize> =
            (first..num_positions).map(|position| shape.slot(batch, seq_of_row[row], position)).collect();
        let queries = &qkv[row * shape.qkv_len()..row * shape.qkv_len() + shape.q_len()];
        let heads = queries.chunks_exact(shape.head_dim).zip(out.chunks_exact_mut(shape.head_dim));
        for (head, (query, out)) in heads.enumerate() {
            attend(shape, head / shape.group_len(), query, &slots, cache, out);
        }
    });
}

/// `out = sum over slots of softmax(query · key) * value`
fn attend(
    shape: &AttentionShape,
    kv_head: usize,
    query: &[f32],
    slots: &[usize],
    cache: &KvCache,
    out: &mut [f32],
) {
    let range = |slot: usize| {
        let start = (slot * shape.num_kv_heads + kv_head) * shape.head_dim;
        start..start + shape.head_dim
    };
    let scores: Vec<f32> =
        slots.iter().map(|&slot| dot(query, &cache.keys[range(slot)]) * shape.scale).collect();
    let max = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let weights: Vec<f32> = scores.iter().map(|score| (score - max).exp()).collect();
    let total: f32 = weights.iter().sum();
    out.fill(0.0);
    for (&slot, weight) in slots.iter().zip(&weights) {
        for (out, value) in out.iter_mut().zip(&cache.values[range(slot)]) {
            *out += weight / total * value;
        }
    }
}
