//! The norm that takes the residual along, in both forms of its output.

use super::*;
use crate::gpu::e4m3;
use crate::gpu::ops::{RmsNorm, RowsOut, rms_norm};

fn norm(x: &[f32], weight: &[f32], epsilon: f32) -> Vec<f32> {
    let squares: f32 = x.iter().map(|x| x * x).sum();
    let scale = 1.0 / (squares / x.len() as f32 + epsilon).sqrt();
    x.iter().zip(weight).map(|(x, weight)| x * scale * weight).collect()
}

#[test]
fn adds_and_normalizes() {
    const EPSILON: f32 = 1e-5;
    let shapes = [(1, 32), (3, 576), (5, 1000)];
    let cases = HALF_DTYPES.into_iter().flat_map(|dtype| shapes.map(|shape| (dtype, shape)));
    for (seed, (dtype, (num_rows, size))) in (0..).zip(cases) {
        let residual = random(seed, num_rows * size);
        let delta = rounded(dtype, random(seed + 10, num_rows * size));
        let weight = random(seed + 20, size);
        for has_post_norm in [false, true] {
            let post_norm = random(seed + 30, size);
            let sums: Vec<f32> = residual
                .chunks(size)
                .zip(delta.chunks(size))
                .flat_map(|(x, delta)| {
                    let delta = if has_post_norm { norm(delta, &post_norm, EPSILON) } else { delta.to_vec() };
                    x.iter().zip(delta).map(|(x, d)| x + d).collect::<Vec<_>>()
                })
                .collect();
            let expected: Vec<f32> = sums.chunks(size).flat_map(|x| norm(x, &weight, EPSILON)).collect();
            for device in devices() {
                let stream = put(&device, &residual);
                let (delta, weight) = (put_half(&device, dtype, &delta), put(&device, &weight));
                let post_norm = has_post_norm.then(|| put(&device, &post_norm));
                let out = fresh_half(&device, dtype, num_rows * size);
                let args = RmsNorm {
                    num_rows,
                    residual: &stream,
                    delta: Some(&delta),
                    weight: &weight,
                    post_norm: post_norm.as_ref(),
                    out: RowsOut::Half(&out),
                    epsilon: EPSILON,
                };
                rms_norm(&*device, &args).unwrap();
                assert_close(&stream.read().unwrap(), &sums, 1e-5, "stream");
                assert_close(&out.read().unwrap(), &expected, tolerance(dtype), "norm");
                let (bytes, scale) = (fresh(&device, num_rows * size), fresh(&device, num_rows));
                let args = RmsNorm { delta: None, out: RowsOut::E4m3(&bytes, &scale), ..args };
                rms_norm(&*device, &args).unwrap();
                let scale = scale.read().unwrap();
                let bytes = bytes.read().unwrap();
                let numbers: Vec<f32> =
                    bytes.iter().enumerate().map(|(i, &x)| e4m3::to_f32(x) * scale[i / size]).collect();
                assert_close(&numbers, &expected, E4M3_TOLERANCE, "norm in e4m3");
                assert!(
                    bytes.chunks(size).all(|row| row.iter().any(|x| x & 0x7f == 0x7e)),
                    "a scale is too large"
                );
            }
        }
    }
}
