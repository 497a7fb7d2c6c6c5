//! Q5_0: blocks of 32 numbers, `value = scale * (q - 16)`.
//!
//! A block: scale (f16), the fifth bits of all 32 numbers (u32), then 16 bytes of lower bits. The low nibbles are
//! numbers 0 to 15, the high nibbles 16 to 31.

use super::{f16_at, fifth_bits};

pub(super) const BLOCK_LEN: usize = 32;
pub(super) const BLOCK_BYTES: usize = 2 + 4 + BLOCK_LEN / 2;

pub(super) fn dequantize(data: &[u8], out: &mut [f32]) {
    for (block, values) in data.as_chunks::<BLOCK_BYTES>().0.iter().zip(out.as_chunks_mut::<BLOCK_LEN>().0) {
        let scale = f16_at(block, 0);
        let high_bits = fifth_bits(block, 2);
        let (low, high) = values.split_at_mut(BLOCK_LEN / 2);
        for (i, ((&byte, low), high)) in block[6..].iter().zip(low).zip(high).enumerate() {
            *low = scale * (f32::from(byte & 15 | high_bits(i)) - 16.0);
            *high = scale * (f32::from(byte >> 4 | high_bits(i + 16)) - 16.0);
        }
    }
}
