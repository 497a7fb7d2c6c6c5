//! Rows as e4m3 with a scale each; see `quantize.cu`.

use half::bf16;

use super::{ROW_MULTIPLE, launch, row_kernel};
use crate::gpu::device::{Address, Device, DeviceError, Kernel};
use crate::gpu::memory::DeviceVec;

const KERNEL: Kernel = row_kernel("quantize");

#[derive(Clone, Copy)]
#[repr(C)]
struct Params {
    x: Address,
    out: Address,
    out_scale: Address,
    size: u32,
}

/// `x` and `out`: `[num_rows, size]`, `out_scale`: `[num_rows]`
pub(crate) fn quantize(
    device: &dyn Device,
    num_rows: usize,
    size: usize,
    x: &DeviceVec<bf16>,
    out: &DeviceVec<u8>,
    out_scale: &DeviceVec<f32>,
) -> Result<(), DeviceError> {
    assert!(size.is_multiple_of(ROW_MULTIPLE));
    assert!(x.len() >= num_rows * size && out.len() >= num_rows * size && out_scale.len() >= num_rows);
    let params =
        Params { x: x.address(), out: out.address(), out_scale: out_scale.address(), size: size as u32 };
    // SAFETY: the lengths were checked above.
    unsafe { launch(device, &KERNEL, [num_rows as u32, 1, 1], &params) }
}
