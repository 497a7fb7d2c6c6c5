//! `out[m, n] = sum over k of x[m, k] * weight[n, k]`, by the matrix library of the device.

use super::ROW_MULTIPLE;
use crate::gpu::device::{Device, DeviceError, Gemm, GemmInput, GemmOutput};
use crate::gpu::half_vec::HalfVec;
use crate::gpu::memory::DeviceVec;

/// Weights `[num_outputs, num_inputs]`.
#[derive(Debug)]
pub(crate) struct Matrix {
    pub(crate) num_outputs: usize,
    pub(crate) num_inputs: usize,
    pub(crate) values: MatrixValues,
}

#[derive(Debug)]
pub(crate) enum MatrixValues {
    Half(HalfVec),
    /// Numbers, and a scale for each row.
    E4m3(DeviceVec<u8>, DeviceVec<f32>),
}

impl Matrix {
    /// The numbers of a matrix that is never rounded.
    pub(crate) fn half(&self) -> &HalfVec {
        match &self.values {
            MatrixValues::Half(values) => values,
            MatrixValues::E4m3(..) => panic!("the matrix was rounded"),
        }
    }
}

/// Rows that meet a matrix, in its numbers.
#[derive(Clone, Copy)]
pub(crate) enum Rows<'a> {
    Half(&'a HalfVec),
    E4m3(&'a DeviceVec<u8>, &'a DeviceVec<f32>),
}

#[derive(Clone, Copy)]
pub(crate) enum LinearOut<'a> {
    Half(&'a HalfVec),
    F32(&'a DeviceVec<f32>),
}

pub(crate) fn linear(
    device: &dyn Device,
    num_rows: usize,
    x: Rows<'_>,
    weight: &Matrix,
    out: LinearOut<'_>,
    batch_invariant: bool,
) -> Result<(), DeviceError> {
    let (n, k) = (weight.num_outputs, weight.num_inputs);
    assert!(k.is_multiple_of(ROW_MULTIPLE), "a matrix of {n} by {k}");
    let (input, x, x_scale, x_len) = match x {
        Rows::Half(x) => (x.dtype().into(), x.address(), None, x.len()),
        Rows::E4m3(x, scale) => {
            assert!(scale.len() >= num_rows);
            (GemmInput::E4m3, x.address(), Some(scale.address()), x.len())
        }
    };
    let (weight, weight_scale) = match (&weight.values, input) {
        (MatrixValues::Half(values), input) if input == values.dtype().into() => (values.address(), None),
        (MatrixValues::E4m3(values, scale), GemmInput::E4m3) => (values.address(), Some(scale.address())),
        _ => panic!("rows and matrix are of different numbers"),
    };
    let (output, out, out_len) = match out {
        LinearOut::Half(out) => (out.dtype().into(), out.address(), out.len()),
        LinearOut::F32(out) => (GemmOutput::F32, out.address(), out.len()),
    };
    assert!(x_len >= num_rows * k && out_len >= num_rows * n);
    let gemm =
        Gemm { m: num_rows, n, k, input, output, x, weight, out, x_scale, weight_scale, batch_invariant };
    // SAFETY: the lengths were checked above, and that of the weights when they were made.
    unsafe { device.gemm(&gemm) }
}
