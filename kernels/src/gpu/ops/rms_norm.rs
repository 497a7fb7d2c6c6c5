//! `residual += delta`, then `out = norm(residual) * weight`; see `rms_norm.cu`.

use super::{ROW_SHARED_BYTES, ROW_THREADS, RowsOut, launch};
use crate::gpu::device::{Address, Device, DeviceError, Kernel};
use crate::gpu::half_vec::{HalfDtype, HalfVec, half_kernels};
use crate::gpu::memory::DeviceVec;

const KERNELS: [Kernel; 2] = half_kernels!("rms_norm", ROW_THREADS, ROW_SHARED_BYTES);

#[derive(Clone, Copy)]
pub(crate) struct RmsNorm<'a> {
    pub(crate) num_rows: usize,
    /// `[rows, size]`
    pub(crate) residual: &'a DeviceVec<f32>,
    /// `[rows, size]`
    pub(crate) delta: Option<&'a HalfVec>,
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
    let (delta, half) = (args.delta.map(HalfVec::dtype), args.out.half());
    assert!(delta.zip(half).is_none_or(|(delta, out)| delta == out), "{delta:?} and {half:?}");
    let (out, out_scale) = args.out.addresses(args.num_rows, size);
    let params = Params {
        residual: args.residual.address(),
        delta: args.delta.map_or(Address::NULL, HalfVec::address),
        weight: args.weight.address(),
        post_norm: Address::of(args.post_norm),
        out,
        out_scale,
        size: size as u32,
        epsilon: args.epsilon,
    };
    // Where there is neither, both forms are the same.
    let kernel = delta.or(half).unwrap_or(HalfDtype::Bf16).of(KERNELS);
    // SAFETY: the lengths were checked above.
    unsafe { launch(device, &kernel, [args.num_rows as u32, 1, 1], &params) }
}
