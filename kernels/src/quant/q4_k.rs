//! Q4_K: blocks of 256 numbers in 8 groups of 32, `value = (d * scale) * nibble - (d_min * min)`.
//!
//! A block: d (f16), d_min (f16), 12 bytes with a scale and a min of six bits for each group, then 128 bytes. Each 32
//! bytes are two groups: the low nibbles, then the high nibbles. Nothing here knows how the scales were chosen.

use super::f16_at;

pub(super) const BLOCK_LEN: usize = 256;
pub(super) const BLOCK_BYTES: usize = 4 + SCALES_BYTES + BLOCK_LEN / 2;
const SCALES_BYTES: usize = 12;

pub(super) fn dequantize(data: &[u8], out: &mut [f32]) {
    for (block, values) in data.as_chunks::<BLOCK_BYTES>().0.iter().zip(out.as_chunks_mut::<BLOCK_LEN>().0) {
        let groups = groups(block);
        let nibbles = block[4 + SCALES_BYTES..].as_chunks::<32>().0;
        for (group, (values, &(scale, min))) in
            values.as_chunks_mut::<32>().0.iter_mut().zip(&groups).enumerate()
        {
            let shift = group % 2 * 4;
            for (value, &byte) in values.iter_mut().zip(&nibbles[group / 2]) {
                *value = scale * f32::from(byte >> shift & 15) - min;
            }
        }
    }
}

/// Scale and min of each group of a block that begins as Q4_K and Q5_K do.
///
/// Bytes 0 to 3 hold the scales of groups 0 to 3 in their low six bits, bytes 4 to 7 the mins. Bytes 8 to 11 hold the
/// low four bits of the scales (low nibble) and mins (high nibble) of groups 4 to 7, whose upper two bits are the upper
/// two of bytes 0 to 7.
pub(super) fn groups(block: &[u8]) -> [(f32, f32); 8] {
    let (d, d_min) = (f16_at(block, 0), f16_at(block, 2));
    let packed = &block[4..4 + SCALES_BYTES];
    std::array::from_fn(|group| {
        let (scale, min) = match group {
            0..4 => (packed[group] & 63, packed[group + 4] & 63),
            _ => {
                let low = packed[group + 4];
                (low & 15 | packed[group - 4] >> 6 << 4, low >> 4 | packed[group] >> 6 << 4)
            }
        };
        (d * f32::from(scale), d_min * f32::from(min))
    })
}
