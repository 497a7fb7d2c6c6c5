//! Matrix products of the device against plain loops.

use super::*;
use crate::gpu::device::{Address, Gemm, GemmInput, GemmOutput};
use crate::gpu::e4m3;

/// Numbers of one side, as the device has them and as they are.
struct Operand {
    bytes: DeviceVec<u8>,
    scale: Option<DeviceVec<f32>>,
    values: Vec<f32>,
}

fn operand(device: &Arc<dyn Device>, seed: u64, num_rows: usize, k: usize, input: GemmInput) -> Operand {
    let numbers = random(seed, num_rows * k);
    let half = |dtype: HalfDtype, numbers: Vec<f32>| {
        let bits: Vec<u8> = numbers.iter().flat_map(|&x| dtype.round(x).to_le_bytes()).collect();
        Operand { bytes: put(device, &bits), scale: None, values: rounded(dtype, numbers) }
    };
    match input {
        GemmInput::Bf16 => half(HalfDtype::Bf16, numbers),
        GemmInput::F16 => half(HalfDtype::F16, numbers),
        GemmInput::E4m3 => {
            let scales: Vec<f32> = (0..num_rows).map(|row| (0.25 + (row % 5) as f32) / 448.0).collect();
            let bytes: Vec<u8> = numbers.iter().map(|x| e4m3::from_f32(x * 448.0)).collect();
            let value = |(i, &x): (usize, &u8)| e4m3::to_f32(x) * scales[i / k];
            let values = bytes.iter().enumerate().map(value).collect();
            Operand { bytes: put(device, &bytes), scale: Some(put(device, &scales)), values }
        }
    }
}

fn multiply(
    device: &Arc<dyn Device>,
    (x, weight): (&Operand, &Operand),
    [m, n, k]: [usize; 3],
    (input, output): (GemmInput, GemmOutput),
    batch_invariant: bool,
) -> Vec<f32> {
    let product = |out: Address| {
        let scale = |operand: &Operand| operand.scale.as_ref().map(DeviceVec::address);
        let gemm = Gemm {
            m,
            n,
            k,
            input,
            output,
            x: x.bytes.address(),
            weight: weight.bytes.address(),
            out,
            x_scale: scale(x),
            weight_scale: scale(weight),
            batch_invariant,
        };
        // SAFETY: the operands have these shapes, or more rows of x, and live until the result was read.
        unsafe { device.gemm(&gemm).unwrap() };
    };
    let half = |dtype| {
        let out = fresh_half(device, dtype, m * n);
        product(out.address());
        out.read().unwrap()
    };
    match output {
        GemmOutput::Bf16 => half(HalfDtype::Bf16),
        GemmOutput::F16 => half(HalfDtype::F16),
        GemmOutput::F32 => {
            let out: DeviceVec<f32> = fresh(device, m * n);
            product(out.address());
            out.read().unwrap()
        }
    }
}

/// All that models ask for.
pub(in crate::gpu) const KINDS: [(GemmInput, GemmOutput); 7] = [
    (GemmInput::Bf16, GemmOutput::Bf16),
    (GemmInput::Bf16, GemmOutput::F32),
    (GemmInput::F16, GemmOutput::F16),
    (GemmInput::F16, GemmOutput::F32),
    (GemmInput::E4m3, GemmOutput::Bf16),
    (GemmInput::E4m3, GemmOutput::F16),
    (GemmInput::E4m3, GemmOutput::F32),
];

#[test]
fn products_are_right() {
    for (seed, [m, n, k]) in [[1, 16, 32], [3, 80, 64], [17, 48, 576], [130, 96, 128]].into_iter().enumerate()
    {
        for kind in KINDS {
            for device in devices().into_iter().filter(|device| device.can_multiply(kind.0)) {
                let x = operand(&device, seed as u64, m, k, kind.0);
                let weight = operand(&device, seed as u64 + 100, n, k, kind.0);
                let dot = |x: &[f32], y: &[f32]| -> f32 { x.iter().zip(y).map(|(x, y)| x * y).sum() };
                let expected: Vec<f32> = x
                    .values
                    .chunks(k)
                    .flat_map(|x| weight.values.chunks(k).map(move |weight| dot(x, weight)))
                    .collect();
                for batch_invariant in [false, true] {
                    let out = multiply(&device, (&x, &weight), [m, n, k], kind, batch_invariant);
                    // Products of e4m3 may be added up with fewer bits.
                    let tolerance = match kind {
                        (GemmInput::E4m3, GemmOutput::F32 | GemmOutput::F16) => 5e-3,
                        (_, GemmOutput::F32) => 1e-5,
                        (_, GemmOutput::Bf16) => tolerance(HalfDtype::Bf16),
                        (_, GemmOutput::F16) => tolerance(HalfDtype::F16),
                    };
                    assert_close(&out, &expected, tolerance, &format!("{kind:?} {m} {n} {k}"));
                }
            }
        }
    }
}

/// A row is the same bits in every batch.
#[test]
fn rows_do_not_depend_on_the_batch() {
    let (n, k, most) = (256, if cfg!(feature = "cuda-tests") { 1024 } else { 64 }, 300);
    for kind in KINDS {
        // The order of threads is nothing to a product.
        let device = device(0);
        if !device.can_multiply(kind.0) {
            continue;
        }
        let (x, weight) = (operand(&device, 1, most, k, kind.0), operand(&device, 2, n, k, kind.0));
        let num_rows: &[usize] =
            if cfg!(feature = "cuda-tests") { &[1, 2, 3, 8, 17, 64, 129, 300] } else { &[1, 3, 17] };
        let largest = *num_rows.last().unwrap();
        let all = multiply(&device, (&x, &weight), [largest, n, k], kind, true);
        for &m in num_rows {
            let some = multiply(&device, (&x, &weight), [m, n, k], kind, true);
            let bits = |values: &[f32]| values.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
            assert!(bits(&some) == bits(&all[..m * n]), "{kind:?}: {m} rows");
        }
    }
}
