//! The keys and values of [`TILE_LEN`] positions in one piece.
//!
//! A page of that many tokens or more is read where it lies; smaller pages are copied together, which costs little
//! next to the rows that read the copy. Positions beyond the last one hold arbitrary numbers.

use super::TILE_LEN;
use crate::backend::AttentionShape;
use crate::cpu::kv_cache::KvCache;
use crate::cpu::packed::AlignedBytes;
use crate::step::PageId;

pub(super) struct Tile<'a> {
    /// `[TILE_LEN / KEY_GROUP_LEN, head_dim / 4, KEY_GROUP_LEN, 4]`
    pub(super) keys: &'a [u8],
    /// `[TILE_LEN / 4, head_dim, 4]`
    pub(super) values: &'a [u8],
    pub(super) key_scales: &'a [f32; TILE_LEN],
    pub(super) value_scales: &'a [f32; TILE_LEN],
    /// The largest of the scales of values up to each position.
    pub(super) value_bounds: [f32; TILE_LEN],
}

/// Room for a tile.
pub(super) struct TileCopy {
    keys: AlignedBytes,
    values: AlignedBytes,
    key_scales: [f32; TILE_LEN],
    value_scales: [f32; TILE_LEN],
}

impl Default for TileCopy {
    fn default() -> Self {
        let empty = || AlignedBytes::zeroed(0);
        let scales = [0.0; TILE_LEN];
        Self { keys: empty(), values: empty(), key_scales: scales, value_scales: scales }
    }
}

impl<'a> Tile<'a> {
    /// Positions `first..first + len` of the sequence with these pages.
    #[inline(always)]
    pub(super) fn new(
        shape: &AttentionShape,
        cache: &'a KvCache,
        pages: &[PageId],
        kv_head: usize,
        first: usize,
        len: usize,
        copy: &'a mut TileCopy,
    ) -> Self {
        let (head_dim, page_size) = (shape.head_dim, shape.page_size);
        let slot = |position: usize| {
            let page = pages[position / page_size].0 as usize;
            (page * shape.num_kv_heads + kv_head) * page_size + position % page_size
        };
        if page_size >= TILE_LEN {
            let slots = slot(first)..slot(first) + TILE_LEN;
            let bytes = slots.start * head_dim..slots.end * head_dim;
            let value_scales = cache.value_scales[slots.clone()].try_into().expect("cut to a tile");
            return Self {
                keys: &cache.keys.bytes()[bytes.clone()],
                values: &cache.values.bytes()[bytes],
                key_scales: cache.key_scales[slots].try_into().expect("cut to a tile"),
                value_scales,
                value_bounds: running_max(value_scales),
            };
        }
        if copy.keys.bytes().len() != TILE_LEN * head_dim {
            copy.keys = AlignedBytes::zeroed(TILE_LEN * head_dim);
            copy.values = AlignedBytes::zeroed(TILE_LEN * head_dim);
        }
        for offset in (0..len).step_by(page_size) {
            let slots = slot(first + offset)..slot(first + offset) + page_size;
            let bytes = slots.start * head_dim..slots.end * head_dim;
            let to = offset..offset + page_size;
            let to_bytes = to.start * head_dim..to.end * head_dim;
            copy.keys.bytes_mut()[to_bytes.clone()].copy_from_slice(&cache.keys.bytes()[bytes.clone()]);
            copy.values.bytes_mut()[to_bytes].copy_from_slice(&cache.values.bytes()[bytes]);
            copy.key_scales[to.clone()].copy_from_slice(&cache.key_scales[slots.clone()]);
            copy.value_scales[to].copy_from_slice(&cache.value_scales[slots]);
        }
        Self {
            keys: copy.keys.bytes(),
            values: copy.values.bytes(),
            key_scales: &copy.key_scales,
            value_scales: &copy.value_scales,
            value_bounds: running_max(&copy.value_scales),
        }
    }
}

/// The largest number up to each one; a NaN, which no position before it sees, stands for all behind it.
#[inline(always)]
fn running_max(values: &[f32; TILE_LEN]) -> [f32; TILE_LEN] {
    let mut max = 0.0;
    values.map(|value| {
        max = if value > max || value.is_nan() { value } else { max };
        max
    })
}
