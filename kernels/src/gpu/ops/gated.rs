//! `out = activation(gate) * up`; see `gated.cuh`.

use half::bf16;

use super::{RowsOut, launch, row_kernel};
use crate::gpu::device::{Address, Device, DeviceError, Kernel};
use crate::gpu::memory::DeviceVec;
use crate::models::Activation;

const SILU_MUL: Kernel = row_kernel("silu_mul");
const GELU_MUL: Kernel = row_kernel("gelu_mul");

pub(crate) struct Gated<'a> {
    pub(crate) activation: Activation,
    pub(crate) num_rows: usize,
    /// Numbers of a row of `out`.
    pub(crate) size: usize,
    /// `[num_rows, 2, size]`: gates, then ups.
    pub(crate) gate_up: &'a DeviceVec<bf16>,
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
    let kernel = match args.activation {
        Activation::Silu => &SILU_MUL,
        Activation::Gelu => &GELU_MUL,
    };
    // SAFETY: the lengths were checked above.
    unsafe { launch(device, kernel, [args.num_rows as u32, 1, 1], &params) }
}
