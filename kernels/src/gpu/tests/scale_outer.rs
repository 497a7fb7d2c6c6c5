//! Scales of rows and columns, on outputs of all kinds and of more columns than a block has.

use super::*;
use crate::gpu::device::{Address, Gemm, GemmInput, GemmOutput};
use crate::gpu::ops::{UNSCALED_F16, scale_outer};

#[test]
fn scales_rows_and_columns() {
    for (m, n) in [(1, 1), (3, 2048), (2, 2100)] {
        let out: Vec<f32> = random(1, m * n);
        let (x_scale, weight_scale) = (random(2, m), random(3, n));
        let expected: Vec<f32> =
            out.iter().enumerate().map(|(i, x)| x * (x_scale[i / n] * weight_scale[i % n])).collect();
        for device in devices() {
            let full = put(&device, &out);
            let (x_scale, weight_scale) = (put(&device, &x_scale), put(&device, &weight_scale));
            let scale = |out, output| {
                let (x, weight, batch_invariant) = (Address::NULL, Address::NULL, false);
                let (input, k) = (GemmInput::E4m3, 0);
                let x_scale = Some(x_scale.address());
                let weight_scale = Some(weight_scale.address());
                let gemm =
                    Gemm { m, n, k, input, output, x, weight, out, x_scale, weight_scale, batch_invariant };
                // SAFETY: all have these shapes and live until they were read.
                unsafe { scale_outer(&*device, &gemm).unwrap() };
            };
            scale(full.address(), GemmOutput::F32);
            assert_close(&full.read().unwrap(), &expected, 1e-6, "f32");
            for dtype in HALF_DTYPES {
                let factor = if dtype == HalfDtype::F16 { UNSCALED_F16 } else { 1.0 };
                let before: Vec<f32> = out.iter().map(|x| x * factor * 4096.0).collect();
                let half = put_half(&device, dtype, &before);
                scale(half.address(), dtype.into());
                let after: Vec<f32> = half.read().unwrap().iter().map(|x| x / 4096.0).collect();
                // Rounded before, too.
                assert_close(&after, &expected, 2.0 * tolerance(dtype), dtype.name());
            }
        }
    }
}
