//! Q5_K: blocks of 256 numbers in 8 groups of 32, `value = (d * scale) * q - (d_min * min)`.
//!
//! A block begins as in Q4_K; then 32 bytes whose bit `g` is the fifth bit of a number of group `g`, then the 128 bytes
//! of lower bits, laid out as in Q4_K.

use super::q4_k::groups;

pub(super) const BLOCK_LEN: usize = 256;
pub(super) const BLOCK_BYTES: usize = 16 + BLOCK_LEN / 8 + BLOCK_LEN / 2;

pub(super) fn dequantize(data: &[u8], out: &mut [f32]) {
    for (block, values) in data.as_chunks::<BLOCK_BYTES>().0.iter().zip(out.as_chunks_mut::<BLOCK_LEN>().0) {
        let groups = groups(block);
        let (fifth_bits, nibbles) = block[16..].split_at(BLOCK_LEN / 8);
        let nibbles = nibbles.as_chunks::<32>().0;
        for (group, (values, &(scale, min))) in
            values.as_chunks_mut::<32>().0.iter_mut().zip(&groups).enumerate()
        {
            let shift = group % 2 * 4;
            for ((value, &byte), &bits) in values.iter_mut().zip(&nibbles[group / 2]).zip(fifth_bits) {
                let q = byte >> shift & 15 | (bits >> group & 1) << 4;
                *value = scale * f32::from(q) - min;
            }
        }
    }
}
