//! Q8_0: blocks of 32 numbers, `value = scale * i8`.
//!
//! A block: scale (f16), then 32 signed bytes.

use super::f16_at;

pub(super) const BLOCK_LEN: usize = 32;
pub(super) const BLOCK_BYTES: usize = 2 + BLOCK_LEN;

pub(super) fn dequantize(data: &[u8], out: &mut [f32]) {
    for (block, values) in data.as_chunks::<BLOCK_BYTES>().0.iter().zip(out.as_chunks_mut::<BLOCK_LEN>().0) {
        let scale = f16_at(block, 0);
        for (value, &byte) in values.iter_mut().zip(&block[2..]) {
            *value = scale * f32::from(byte as i8);
        }
    }
}
