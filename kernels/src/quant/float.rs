//! F32, F16 and BF16: plain little-endian numbers of four or two bytes.
//!
//! F16 is IEEE half precision, BF16 is the upper half of an f32; both are exact in f32.

pub(super) fn dequantize_f32(data: &[u8], out: &mut [f32]) {
    for (bytes, value) in data.as_chunks::<4>().0.iter().zip(out) {
        *value = f32::from_le_bytes(*bytes);
    }
}

pub(super) fn dequantize_f16(data: &[u8], out: &mut [f32]) {
    for (bytes, value) in data.as_chunks::<2>().0.iter().zip(out) {
        *value = half::f16::from_le_bytes(*bytes).to_f32();
    }
}

pub(super) fn dequantize_bf16(data: &[u8], out: &mut [f32]) {
    for (bytes, value) in data.as_chunks::<2>().0.iter().zip(out) {
        *value = half::bf16::from_le_bytes(*bytes).to_f32();
    }
}
