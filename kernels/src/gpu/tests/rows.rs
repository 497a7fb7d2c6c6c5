//! The ops that take rows one by one.

use super::*;
use crate::backend::Backend;
use crate::gpu::e4m3;
use crate::gpu::ops::{Embed, Gated, RowsOut, embed, gated, gather, quantize};
use crate::models::Activation;
use crate::reference::Reference;

const SHAPES: [(usize, usize); 3] = [(1, 8), (3, 96), (2, 2056)];

/// All shapes in both kinds of numbers, with a seed each.
fn cases() -> impl Iterator<Item = (u64, HalfDtype, usize, usize)> {
    let shapes = |dtype| SHAPES.map(|(num_rows, size)| (dtype, num_rows, size));
    let cases = HALF_DTYPES.into_iter().flat_map(shapes);
    (1..).zip(cases).map(|(seed, (dtype, num_rows, size))| (seed, dtype, num_rows, size))
}

#[test]
fn gates_are_applied() {
    for (seed, dtype, num_rows, size) in cases() {
        let gate_up: Vec<f32> =
            rounded(dtype, random(seed, num_rows * 2 * size).into_iter().map(|x| x * 20.0).collect());
        for activation in [Activation::Silu, Activation::Gelu] {
            let mut expected = vec![0.0; num_rows * size];
            match activation {
                Activation::Silu => Reference.silu_mul(size, &gate_up, &mut expected),
                Activation::Gelu => Reference.gelu_mul(size, &gate_up, &mut expected),
            }
            for device in devices() {
                let out = fresh_half(&device, dtype, num_rows * size);
                let gate_up = put_half(&device, dtype, &gate_up);
                let args = Gated { activation, num_rows, size, gate_up: &gate_up, out: RowsOut::Half(&out) };
                gated(&*device, &args).unwrap();
                assert_close(&out.read().unwrap(), &expected, tolerance(dtype), "gated");
                let (out, scale) = (fresh(&device, num_rows * size), fresh(&device, num_rows));
                gated(&*device, &Gated { out: RowsOut::E4m3(&out, &scale), ..args }).unwrap();
                let numbers = numbers(&out, &scale, size);
                assert_close(&numbers, &expected, E4M3_TOLERANCE, "gated, in e4m3");
            }
        }
    }
}

fn numbers(bytes: &DeviceVec<u8>, scale: &DeviceVec<f32>, size: usize) -> Vec<f32> {
    let scale = scale.read().unwrap();
    bytes.read().unwrap().iter().enumerate().map(|(i, &x)| e4m3::to_f32(x) * scale[i / size]).collect()
}

#[test]
fn rows_are_quantized() {
    for (seed, dtype, num_rows, size) in cases() {
        let mut x = rounded(dtype, random(seed, num_rows * size));
        x[..size].fill(0.0);
        for device in devices() {
            let (out, scale) = (fresh(&device, num_rows * size), fresh(&device, num_rows));
            quantize(&*device, num_rows, size, &put_half(&device, dtype, &x), &out, &scale).unwrap();
            let steps = scale.read().unwrap();
            let bytes = out.read().unwrap();
            for (i, (&bits, &x)) in bytes.iter().zip(&x).enumerate() {
                // The reciprocal of a step is rounded, so a tie may go either way.
                let exact = x / steps[i / size];
                let near = [exact * (1.0 - 1e-6), exact, exact * (1.0 + 1e-6)].map(e4m3::from_f32);
                assert!(near.contains(&bits), "{x} became {}", e4m3::to_f32(bits));
            }
            assert_close(&numbers(&out, &scale, size), &x, E4M3_TOLERANCE, "quantized");
        }
    }
}

#[test]
fn ids_come_from_the_host_or_from_the_step_before() {
    let (vocab, size, scale) = (7, 40, 3.0);
    let (ids, from, sampled) = ([6u32, 0, 1, 2], [-1i32, 1, -1, 0], [5u32, 3]);
    for (device, dtype) in
        devices().into_iter().flat_map(|device| HALF_DTYPES.map(|dtype| (device.clone(), dtype)))
    {
        let table = rounded(dtype, random(20, vocab * size));
        let rows = [6, 3, 1, 5].iter().flat_map(|id| &table[id * size..(id + 1) * size]);
        let expected: Vec<f32> = rows.map(|x| x * scale).collect();
        let out = fresh(&device, ids.len() * size);
        let (ids_there, from_there) = (put(&device, &ids), put(&device, &from));
        let args = Embed {
            num_rows: ids.len(),
            size,
            table: &put_half(&device, dtype, &table),
            ids: (&ids_there).into(),
            from: (&from_there).into(),
            sampled: &put(&device, &sampled),
            out: &out,
            scale,
        };
        embed(&*device, &args).unwrap();
        assert_close(&out.read().unwrap(), &expected, 1e-6, "embedded");
    }
}

#[test]
fn rows_are_gathered() {
    let (size, row_of) = (72, [4u32, 0, 4]);
    let rows = random(30, 5 * size);
    for device in devices() {
        let dtype = HalfDtype::F16;
        let (rows, out) = (put_half(&device, dtype, &rows), fresh_half(&device, dtype, row_of.len() * size));
        gather(&*device, row_of.len(), size, &rows, (&put(&device, &row_of)).into(), &out).unwrap();
        let (rows, out) = (rows.read().unwrap(), out.read().unwrap());
        for (row, out) in row_of.iter().zip(out.chunks(size)) {
            assert_eq!(out, &rows[*row as usize * size..][..size]);
        }
    }
}
