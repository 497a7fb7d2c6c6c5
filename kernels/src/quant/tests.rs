use half::{bf16, f16};

use super::*;

#[track_caller]
fn check(dtype: Dtype, data: &[u8], expected: &[f32]) {
    assert_eq!(dtype.size_bytes(&[expected.len()]), Some(data.len()));
    let mut out = vec![f32::NAN; expected.len()];
    dequantize(dtype, data, &mut out);
    assert_eq!(out, expected, "{dtype}");
}

/// A block's scale, or its minimum.
fn f16_bytes(value: f32) -> [u8; 2] {
    f16::from_f32(value).to_le_bytes()
}

#[test]
fn floats_are_read_as_they_are() {
    let values = [0.0, -0.0, 1.0, -2.5, 1024.0, 0.125];
    check(Dtype::F32, &values.map(f32::to_le_bytes).concat(), &values);
    check(Dtype::F16, &values.map(f16_bytes).concat(), &values);
    check(Dtype::Bf16, &values.map(|value| bf16::from_f32(value).to_le_bytes()).concat(), &values);
}

#[test]
fn q8_0_is_scale_times_byte() {
    let bytes: Vec<i8> = (0..32).map(|i| (i * 8 - 128) as i8).collect();
    let mut data = f16_bytes(0.5).to_vec();
    data.extend(bytes.iter().map(|&byte| byte as u8));
    let expected: Vec<f32> = bytes.iter().map(|&byte| 0.5 * f32::from(byte)).collect();
    check(Dtype::Q8_0, &data, &expected);
    assert_eq!((expected[0], expected[31]), (-64.0, 60.0));
}

#[test]
fn q4_blocks_hold_low_nibbles_first() {
    // Low nibbles count up, high nibbles down.
    let nibbles: Vec<u8> = (0..16).map(|i| i | (15 - i) << 4).collect();
    let up = (0..16u8).map(f32::from);
    let numbers: Vec<f32> = up.clone().chain(up.rev()).collect();

    let data = [f16_bytes(-0.25).to_vec(), nibbles.clone()].concat();
    check(Dtype::Q4_0, &data, &numbers.iter().map(|n| (n - 8.0) * -0.25).collect::<Vec<_>>());

    let data = [f16_bytes(0.5).to_vec(), f16_bytes(-3.0).to_vec(), nibbles].concat();
    check(Dtype::Q4_1, &data, &numbers.iter().map(|n| n * 0.5 - 3.0).collect::<Vec<_>>());
}

#[test]
fn blocks_follow_each_other() {
    let block = |scale: f32| [f16_bytes(scale).to_vec(), vec![1; 32]].concat();
    let expected: Vec<f32> = [[1.0; 32], [2.0; 32]].concat();
    check(Dtype::Q8_0, &[block(1.0), block(2.0)].concat(), &expected);
}

#[test]
fn sizes_are_checked() {
    assert_eq!(Dtype::Q4_1.size_bytes(&[576, 2]), Some(576 / 32 * 20 * 2));
    assert_eq!(Dtype::Q4_1.size_bytes(&[33]), None);
    assert_eq!(Dtype::Q6K.size_bytes(&[512, 3]), Some(2 * 210 * 3));
    assert_eq!(Dtype::Q4K.size_bytes(&[288]), None);
    assert_eq!(Dtype::F32.size_bytes(&[usize::MAX]), None);
    assert_eq!(Dtype::F16.size_bytes(&[usize::MAX / 4, 4]), None);
    assert_eq!(Dtype::F16.size_bytes(&[]), None);
}

#[test]
fn unknown_types_have_names() {
    assert_eq!(Dtype::from_ggml(10).unwrap_err().to_string(), "Q2_K (GGUF type 10)");
    assert_eq!(Dtype::from_ggml(999).unwrap_err().to_string(), "unknown (GGUF type 999)");
}
