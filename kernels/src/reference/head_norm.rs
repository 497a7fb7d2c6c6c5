//! Scales some heads of each row to a mean square of one, then by the weights.

use std::ops::Range;

use crate::backend::AttentionShape;

/// `qkv`: `[num_tokens, qkv_len]`, `weight`: `[head_dim]`
pub(super) fn head_norm(
    weight: &[f32],
    epsilon: f32,
    shape: &AttentionShape,
    heads: Range<usize>,
    qkv: &mut [f32],
) {
    for row in qkv.chunks_exact_mut(shape.qkv_len()) {
        let heads = &mut row[heads.start * shape.head_dim..heads.end * shape.head_dim];
        for head in heads.chunks_exact_mut(shape.head_dim) {
            let mean_square = head.iter().map(|x| x * x).sum::<f32>() / head.len() as f32;
            let scale = 1.0 / (mean_square + epsilon).sqrt();
            for (x, weight) in head.iter_mut().zip(weight) {
                *x *= scale * weight;
            }
        }
    }
}
