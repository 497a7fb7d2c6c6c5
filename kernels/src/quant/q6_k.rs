//! Q6_K: blocks of 256 numbers in 16 groups of 16, `value = (d * scale) * (q - 32)`.
//!
//! A block: 128 bytes of lower nibbles, 64 bytes of upper bit pairs, a signed byte of scale for each group, d (f16).
//! Each half of a block is four runs of 32 numbers: run `r` has its nibbles in the low (`r` of 0 and 1) or high half of
//! the bytes from `r % 2 * 32`, and its pairs at bit `2 * r`.

use super::f16_at;

pub(super) const BLOCK_LEN: usize = 256;
pub(super) const BLOCK_BYTES: usize = BLOCK_LEN / 2 + BLOCK_LEN / 4 + BLOCK_LEN / 16 + 2;

pub(super) fn dequantize(data: &[u8], out: &mut [f32]) {
    for (block, values) in data.as_chunks::<BLOCK_BYTES>().0.iter().zip(out.as_chunks_mut::<BLOCK_LEN>().0) {
        let (nibbles, pairs, scales) = (&block[..128], &block[128..192], &block[192..208]);
        let d = f16_at(block, 208);
        for (run, values) in values.as_chunks_mut::<32>().0.iter_mut().enumerate() {
            let (half, run_of_half) = (run / 4, run % 4);
            let nibbles = &nibbles[half * 64 + run_of_half % 2 * 32..][..32];
            let pairs = &pairs[half * 32..][..32];
            for (i, value) in values.iter_mut().enumerate() {
                let low = nibbles[i] >> (run_of_half / 2 * 4) & 15;
                let high = pairs[i] >> (run_of_half * 2) & 3;
                let scale = d * f32::from(scales[run * 2 + i / 16] as i8);
                *value = scale * (f32::from(low | high << 4) - 32.0);
            }
        }
    }
}
