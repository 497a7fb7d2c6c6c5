//! `out = activation(gate) * up`; see `gated.cuh`.

use super::{ROW_SHARED_BYTES, ROW_THREADS, RowsOut, launch};
use crate::gpu::device::{Address, Device, DeviceError, Kernel};
use crate::gpu::half_vec::{HalfVec, half_kernels};
use crate::models::Activation;

const SILU_MUL: [Kernel; 2] = half_kernels!("silu_mul", ROW_THREADS, ROW_SHARED_BYTES);
const GELU_MUL: [Kernel; 2] = half_kernels!("gelu_mul", ROW_THREADS, ROW_SHARED_BYTES);

pub(crate) struct Gated<'a> {
    pub(crate) activation: Activation,
    pub(crate) num_rows: usize,
    /// Numbers of a row of `out`.
    pub(crate) size: usize,
    /// `[num_rows, 2, size]`: gates, then ups.
    pub(crate) gate_up: &'a HalfVec,
    pub(crate) out: RowsOut<'a>,
}

#[derive(Clone, Copy)]
#[repr(C)]
struct Params {
    gate_up: Address,
    out: Address,
    out_scale: Address,
    size: u32,
}

pub(crate) fn gated(device: &dyn Device, args: &Gated<'_>) -> Result<(), DeviceError> {
    assert!(args.gate_up.len() >= args.num_rows * 2 * args.size);
    let (out, out_scale) = args.out.addresses(args.num_rows, args.size);
    let params = Params { gate_up: args.gate_up.address(), out, out_scale, size: args.size as u32 };
    let dtype = args.gate_up.dtype();
    assert!(args.out.half().is_none_or(|out| out == dtype));
    let kernels = match args.activation {
        Activation::Silu => SILU_MUL,
        Activation::Gelu => GELU_MUL,
    };
    // SAFETY: the lengths were checked above.
    unsafe { launch(device, &dtype.of(kernels), [args.num_rows as u32, 1, 1], &params) }
}
