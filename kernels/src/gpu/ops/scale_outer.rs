//! Scales a product of e4m3 numbers in place, by row of `x` and row of `weight`; see `scale_outer.cu`.

use super::launch;
use crate::gpu::device::{Address, Device, DeviceError, Gemm, GemmOutput, Kernel};
use crate::gpu::half_vec::half_kernels;

const HALF: [Kernel; 2] = half_kernels!("scale_outer", 256, 0);
const F32: Kernel = Kernel { name: "scale_outer_f32", source: "scale_outer", block: 256, shared_bytes: 0 };
/// What a product that is to become f16 must be multiplied by beforehand: as it is, it goes beyond 65504.
pub(crate) const UNSCALED_F16: f32 = 1.0 / (1u32 << 18) as f32;
/// Columns of a block.
const NUM_COLUMNS: usize = 2048;

#[derive(Clone, Copy)]
#[repr(C)]
struct Params {
    out: Address,
    x_scale: Address,
    weight_scale: Address,
    num_columns: u32,
}

/// For the device's own use, where its library does not apply scales.
///
/// # Safety
/// The output and the scales are of the shapes given and stay valid until the work is done.
pub(crate) unsafe fn scale_outer(device: &dyn Device, gemm: &Gemm) -> Result<(), DeviceError> {
    let (Some(x_scale), Some(weight_scale)) = (gemm.x_scale, gemm.weight_scale) else { return Ok(()) };
    let params = Params { out: gemm.out, x_scale, weight_scale, num_columns: gemm.n as u32 };
    let kernel = match gemm.output {
        GemmOutput::Bf16 => &HALF[0],
        GemmOutput::F16 => &HALF[1],
        GemmOutput::F32 => &F32,
    };
    let grid = [gemm.m as u32, gemm.n.div_ceil(NUM_COLUMNS) as u32, 1];
    // SAFETY: the struct is the kernel's, which stays within `m` rows of `n`; the caller answers for the rest.
    unsafe { launch(device, kernel, grid, &params) }
}
