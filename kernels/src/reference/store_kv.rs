//! Writes keys and values to their slots, and copies slots from page to page.

use super::KvCache;
use crate::backend::AttentionShape;
use crate::step::{PageCopy, StepBatch};

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

/// Copies the first slots of a page to another one.
pub(super) fn copy_kv(shape: &AttentionShape, copy: &PageCopy, cache: &mut KvCache) {
    let start = |page: u32| page as usize * shape.page_size * shape.kv_len();
    let (from, to) = (start(copy.from.0), start(copy.to.0));
    let len = copy.len as usize * shape.kv_len();
    cache.keys.copy_within(from..from + len, to);
    cache.values.copy_within(from..from + len, to);
}
