//! Writes keys and values to their slots.

use super::KvCache;
use crate::backend::AttentionShape;
use crate::step::StepBatch;

/// `qkv`: `[num_tokens, qkv_len]`
pub(super) fn store_kv(shape: &AttentionShape, batch: &StepBatch, qkv: &[f32], cache: &mut KvCache) {
    let kv_len = shape.kv_len();
    for seq in 0..batch.num_seqs() {
        for row in batch.rows(seq) {
            let slot = shape.slot(batch, seq, batch.positions[row] as usize);
            let kv = &qkv[row * shape.qkv_len() + shape.q_len()..(row + 1) * shape.qkv_len()];
            cache.keys[slot * kv_len..(slot + 1) * kv_len].copy_from_slice(&kv[..kv_len]);
            cache.values[slot * kv_len..(slot + 1) * kv_len].copy_from_slice(&kv[kv_len..]);
        }
    }
}
