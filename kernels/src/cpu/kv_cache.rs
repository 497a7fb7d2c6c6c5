//! Keys and values as bytes, each token and head with a scale of its own, in the order the dot products read.
//!
//! Keys are rotated like activations (see [`quantize`](super::quantize)), queries alike, so scores stay what they
//! were while outliers of single dimensions, which keys are known for, are spread. What a slot holds depends on
//! its token's row alone.

use super::dots::QUAD_BYTES;
use super::elementwise::rows_per_task;
use super::isa::{Isa, Kernel, Lanes};
use super::packed::AlignedBytes;
use super::quantize::{quantize, rotate};
use super::{KEY_GROUP_LEN, OFFSET};
use crate::backend::AttentionShape;
use crate::shared::SharedMut;
use crate::step::{PageCopy, PageId, StepBatch};
use crate::team;

/// Longest head whose row is quantized on the stack.
pub(super) const MAX_HEAD_DIM: usize = 1024;

/// Keys and values of one layer.
pub(crate) struct KvCache {
    /// `[num_pages, num_kv_heads, page_size / KEY_GROUP_LEN, head_dim / 4, KEY_GROUP_LEN, 4]`, byte + 128
    pub(super) keys: AlignedBytes,
    /// `[num_pages, num_kv_heads, page_size / 4, head_dim, 4]`, signed
    pub(super) values: AlignedBytes,
    /// `[num_pages, num_kv_heads, page_size]`
    pub(super) key_scales: Vec<f32>,
    /// `[num_pages, num_kv_heads, page_size]`
    pub(super) value_scales: Vec<f32>,
}

impl KvCache {
    pub(super) fn new(shape: &AttentionShape) -> Self {
        assert_eq!(shape.page_size % KEY_GROUP_LEN, 0, "pages hold whole groups of keys");
        assert_eq!(shape.head_dim % KEY_GROUP_LEN, 0, "heads consist of whole vectors");
        assert!(shape.head_dim <= MAX_HEAD_DIM, "a head is longer than {MAX_HEAD_DIM}");
        // Zeroed memory costs nothing until a page is written.
        let len = shape.num_slots() * shape.kv_len();
        let num_scales = shape.num_slots() * shape.num_kv_heads;
        Self {
            keys: AlignedBytes::zeroed(len),
            values: AlignedBytes::zeroed(len),
            key_scales: vec![0.0; num_scales],
            value_scales: vec![0.0; num_scales],
        }
    }

    pub(super) fn bytes_per_token(shape: &AttentionShape) -> usize {
        2 * shape.kv_len() + 2 * shape.num_kv_heads * size_of::<f32>()
    }
}

/// Writes keys and values of `qkv`: `[num_tokens, qkv_len]` to their slots.
pub(super) fn store_kv(
    isa: Isa,
    shape: &AttentionShape,
    batch: &StepBatch,
    qkv: &[f32],
    cache: &mut KvCache,
) {
    assert_eq!(qkv.len(), batch.num_tokens() * shape.qkv_len());
    let keys = SharedMut::new(cache.keys.bytes_mut());
    let values = SharedMut::new(cache.values.bytes_mut());
    let key_scales = SharedMut::new(&mut cache.key_scales);
    let value_scales = SharedMut::new(&mut cache.value_scales);
    for seq in 0..batch.num_seqs() {
        let rows = batch.rows(seq);
        let per_task = rows_per_task(shape.kv_len(), rows.len());
        let store = |first: usize| {
            let rows = first..(first + per_task).min(rows.end);
            isa.run(Store { shape, batch, seq, rows, qkv, keys, values, key_scales, value_scales });
        };
        match rows.len() <= per_task {
            true => store(rows.start),
            false => {
                let num_tasks = rows.len().div_ceil(per_task);
                team::for_each(num_tasks, |task| store(rows.start + task * per_task));
            }
        }
    }
}

/// Copies the first slots of a page to another one, in whole groups: what lies behind them is not read before it is
/// written.
pub(super) fn copy_kv(shape: &AttentionShape, copy: &PageCopy, cache: &mut KvCache) {
    let len = (copy.len as usize).next_multiple_of(KEY_GROUP_LEN);
    for kv_head in 0..shape.num_kv_heads {
        let start = |page: PageId| (page.0 as usize * shape.num_kv_heads + kv_head) * shape.page_size;
        let (from, to) = (start(copy.from), start(copy.to));
        let bytes = from * shape.head_dim..(from + len) * shape.head_dim;
        cache.keys.bytes_mut().copy_within(bytes.clone(), to * shape.head_dim);
        cache.values.bytes_mut().copy_within(bytes, to * shape.head_dim);
        cache.key_scales.copy_within(from..from + len, to);
        cache.value_scales.copy_within(from..from + len, to);
    }
}

struct Store<'a> {
    shape: &'a AttentionShape,
    batch: &'a StepBatch,
    seq: usize,
    rows: std::ops::Range<usize>,
    qkv: &'a [f32],
    keys: SharedMut<'a, u8>,
    values: SharedMut<'a, u8>,
    key_scales: SharedMut<'a, f32>,
    value_scales: SharedMut<'a, f32>,
}

impl Kernel for Store<'_> {
    #[inline(always)]
    fn run<V: Lanes>(self) {
        let shape = self.shape;
        for row in self.rows.clone() {
            let slot = shape.slot(self.batch, self.seq, self.batch.positions[row] as usize);
            let kv = &self.qkv[row * shape.qkv_len() + shape.q_len()..(row + 1) * shape.qkv_len()];
            let (keys, values) = kv.split_at(shape.kv_len());
            for kv_head in 0..shape.num_kv_heads {
                let range = kv_head * shape.head_dim..(kv_head + 1) * shape.head_dim;
                self.store_token::<V>(slot, kv_head, &keys[range.clone()], &values[range]);
            }
        }
    }
}

impl Store<'_> {
    /// `key`, `value`: `[head_dim]`
    #[inline(always)]
    fn store_token<V: Lanes>(&self, slot: usize, kv_head: usize, key: &[f32], value: &[f32]) {
        let head_dim = self.shape.head_dim;
        let (page, offset) = (slot / self.shape.page_size, slot % self.shape.page_size);
        let head_start = (page * self.shape.num_kv_heads + kv_head) * self.shape.page_size;
        let (mut numbers, mut bytes) = ([0.0; MAX_HEAD_DIM], [0; MAX_HEAD_DIM]);
        let (numbers, bytes) = (&mut numbers[..head_dim], &mut bytes[..head_dim]);

        numbers.copy_from_slice(key);
        rotate::<V>(head_rotation(head_dim), numbers);
        let (key_scale, _) = quantize::<V>(numbers, bytes);
        let group = (head_start + offset / KEY_GROUP_LEN * KEY_GROUP_LEN) * head_dim;
        let group = self.keys.at(group, KEY_GROUP_LEN * head_dim);
        for (quad, bytes) in bytes.as_chunks::<4>().0.iter().enumerate() {
            let bytes = bytes.map(|byte| (byte as u8).wrapping_add(OFFSET as u8));
            // SAFETY: the quads of a token lie within its group, and belong to this row alone.
            unsafe {
                group
                    .add(quad * QUAD_BYTES + offset % KEY_GROUP_LEN * 4)
                    .cast::<[u8; 4]>()
                    .write_unaligned(bytes);
            }
        }

        let (value_scale, _) = quantize::<V>(value, bytes);
        let quad = self.values.at((head_start + offset / 4 * 4) * head_dim, 4 * head_dim);
        for (dim, byte) in bytes.iter().enumerate() {
            // SAFETY: a byte of each four belongs to this row, and `head_dim` fours follow.
            unsafe { quad.add(4 * dim + offset % 4).write(*byte as u8) };
        }
        // SAFETY: `at` checked the bounds; the scales of a slot belong to this row alone.
        unsafe {
            self.key_scales.at(head_start + offset, 1).write(key_scale);
            self.value_scales.at(head_start + offset, 1).write(value_scale);
        }
    }
}

/// Numbers of a query or key that are rotated as one.
pub(super) fn head_rotation(head_dim: usize) -> usize {
    1 << head_dim.trailing_zeros()
}
