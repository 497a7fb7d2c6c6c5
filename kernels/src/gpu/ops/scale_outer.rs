//! Scales a product of e4m3 numbers in place, by row of `x` and row of `weight`; see `scale_outer.cu`.

use super::launch;
use crate::gpu::device::{Address, Device, DeviceError, Gemm, GemmOutput, Kernel};

const KERNEL: Kernel = Kernel { name: "scale_outer", source: "scale_outer", block: 256, shared_bytes: 0 };
/// Columns of a block.
const NUM_COLUMNS: usize = 2048;

#[derive(Clone, Copy)]
#[repr(C)]
struct Params {
    out: Address,
    x_scale: Address,
    weight_scale: Address,
    num_columns: u32,
    is_f32: u32,
}

/// For the device's own use, where its library does not apply scales.
///
/// # Safety
/// The output and the scales are of the shapes given and stay valid until the work is done.
pub(crate) unsafe fn scale_outer(device: &dyn Device, gemm: &Gemm) -> Result<(), DeviceError> {
    let (Some(x_scale), Some(weight_scale)) = (gemm.x_scale, gemm.weight_scale) else { return Ok(()) };
    let params = Params {
        out: gemm.out,
        x_scale,
        weight_scale,
        num_columns: gemm.n as u32,
        is_f32: u32::from(gemm.output == GemmOutput::F32),
    };
    let grid = [gemm.m as u32, gemm.n.div_ceil(NUM_COLUMNS) as u32, 1];
    // SAFETY: the struct is the kernel's, which stays within `m` rows of `n`; the caller answers for the rest.
    unsafe { launch(device, &KERNEL, grid, &params) }
}
