//! Rows as e4m3 with a scale each; see `quantize.cu`.

use super::{ROW_MULTIPLE, ROW_SHARED_BYTES, ROW_THREADS, launch};
use crate::gpu::device::{Address, Device, DeviceError, Kernel};
use crate::gpu::half_vec::{HalfVec, half_kernels};
use crate::gpu::memory::DeviceVec;

const KERNELS: [Kernel; 2] = half_kernels!("quantize", ROW_THREADS, ROW_SHARED_BYTES);

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
    x: &HalfVec,
    out: &DeviceVec<u8>,
    out_scale: &DeviceVec<f32>,
) -> Result<(), DeviceError> {
    assert!(size.is_multiple_of(ROW_MULTIPLE));
    assert!(x.len() >= num_rows * size && out.len() >= num_rows * size && out_scale.len() >= num_rows);
    let params =
        Params { x: x.address(), out: out.address(), out_scale: out_scale.address(), size: size as u32 };
    // SAFETY: the lengths were checked above.
    unsafe { launch(device, &x.dtype().of(KERNELS), [num_rows as u32, 1, 1], &params) }
}
