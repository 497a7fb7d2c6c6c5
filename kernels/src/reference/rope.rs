//! Rotates queries and keys by their position; the two halves of a head are the two coordinates.

use crate::backend::{AttentionShape, RopeTable};

/// `qkv`: `[num_tokens, qkv_len]`; the values are left as they are.
pub(super) fn rope(table: &RopeTable, shape: &AttentionShape, positions: &[u32], qkv: &mut [f32]) {
    let rotated_len = shape.q_len() + shape.kv_len();
    for (&position, row) in positions.iter().zip(qkv.chunks_exact_mut(shape.qkv_len())) {
        let (cos, sin) = table.row(position);
        for head in row[..rotated_len].chunks_exact_mut(shape.head_dim) {
            let (first, second) = head.split_at_mut(shape.head_dim / 2);
            for i in 0..first.len() {
                let (a, b) = (first[i], second[i]);
                first[i] = a * cos[i] - b * sin[i];
                second[i] = b * cos[i] + a * sin[i];
            }
        }
    }
}
