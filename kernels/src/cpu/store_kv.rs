//! Writes keys and values to their slots, keys transposed in groups as [`KvCache`] tells.

use super::{KEY_GROUP_LEN, KvCache, to_f16};
use crate::backend::AttentionShape;
use crate::step::StepBatch;

/// `qkv`: `[num_tokens, qkv_len]`
pub(super) fn store_kv(shape: &AttentionShape, batch: &StepBatch, qkv: &[f32], cache: &mut KvCache) {
    for seq in 0..batch.num_seqs() {
        for row in batch.rows(seq) {
            let slot = shape.slot(batch, seq, batch.positions[row] as usize);
            let kv = &qkv[row * shape.qkv_len() + shape.q_len()..(row + 1) * shape.qkv_len()];
            let (keys, values) = kv.split_at(shape.kv_len());
            for kv_head in 0..shape.num_kv_heads {
                let range = kv_head * shape.head_dim..(kv_head + 1) * shape.head_dim;
                store_token(shape, slot, kv_head, &keys[range.clone()], &values[range], cache);
            }
        }
    }
}

/// `key`, `value`: `[head_dim]`
fn store_token(
    shape: &AttentionShape,
    slot: usize,
    kv_head: usize,
    key: &[f32],
    value: &[f32],
    cache: &mut KvCache,
) {
    let (page, offset) = (slot / shape.page_size, slot % shape.page_size);
    let start = (page * shape.num_kv_heads + kv_head) * shape.page_size;
    let group = start + offset / KEY_GROUP_LEN * KEY_GROUP_LEN;
    let group = &mut cache.keys[group * shape.head_dim..(group + KEY_GROUP_LEN) * shape.head_dim];
    for (key, lanes) in key.iter().zip(group.chunks_exact_mut(KEY_GROUP_LEN)) {
        lanes[offset % KEY_GROUP_LEN] = to_f16(*key);
    }
    let slot = start + offset;
    let stored = &mut cache.values[slot * shape.head_dim..(slot + 1) * shape.head_dim];
    for (value, stored) in value.iter().zip(stored) {
        *stored = to_f16(*value);
    }
}
