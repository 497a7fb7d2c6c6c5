//! `residual += delta`, then `out = norm(residual) * weight`; see `rms_norm.cu`.

use half::bf16;

use super::{RowsOut, launch, row_kernel};
use crate::gpu::device::{Address, Device, DeviceError, Kernel};
use crate::gpu::memory::DeviceVec;

const KERNEL: Kernel = row_kernel("rms_norm");

#[derive(Clone, Copy)]
pub(crate) struct RmsNorm<'a> {
    pub(crate) num_rows: usize,
    /// `[rows, size]`
    pub(crate) residual: &'a DeviceVec<f32>,
    /// `[rows, size]`
    pub(crate) delta: Option<&'a DeviceVec<bf16>>,
    /// `[size]`
    pub(crate) weight: &'a DeviceVec<f32>,
    /// `[size]`: `delta` is normalized and multiplied by this first.
    pub(crate) post_norm: Option<&'a DeviceVec<f32>>,
    pub(crate) out: RowsOut<'a>,
    pub(crate) epsilon: f32,
}

#[derive(Clone, Copy)]
#[repr(C)]
struct Params {
    residual: Address,
    delta: Address,
    weight: Address,
    post_norm: Address,
    out: Address,
    out_scale: Address,
    size: u32,
    epsilon: f32,
}

pub(crate) fn rms_norm(device: &dyn Device, args: &RmsNorm<'_>) -> Result<(), DeviceError> {
    let size = args.weight.len();
    let len = args.num_rows * size;
    assert!(args.residual.len() >= len);
    assert!(args.delta.is_none_or(|delta| delta.len() >= len));
    assert!(args.post_norm.is_none_or(|weight| weight.len() == size));
    let (out, out_scale) = args.out.addresses(args.num_rows, size);
    let params = Params {
        residual: args.residual.address(),
        delta: Address::of(args.delta),
        weight: args.weight.address(),
        post_norm: Address::of(args.post_norm),
        out,
        out_scale,
        size: size as u32,
        epsilon: args.epsilon,
    };
    // SAFETY: the lengths were checked above.
    unsafe { launch(device, &KERNEL, [args.num_rows as u32, 1, 1], &params) }
}
