//! Fills an array with random numbers; see `randomize.cu`.

use super::launch;
use crate::gpu::device::{Address, Device, DeviceError, Kernel};
use crate::gpu::half_vec::{HalfVec, half_kernels};

const BLOCK: u32 = 256;
const MAX_BLOCKS: usize = 4096;
const KERNELS: [Kernel; 2] = half_kernels!("randomize", BLOCK, 0);

#[derive(Clone, Copy)]
#[repr(C)]
struct Params {
    out: Address,
    len: u64,
    seed: u64,
    scale: f32,
}

/// Numbers between `-sqrt(3) * scale` and `sqrt(3) * scale`: `scale` is their standard deviation.
pub(crate) fn randomize(
    device: &dyn Device,
    seed: u64,
    scale: f32,
    out: &HalfVec,
) -> Result<(), DeviceError> {
    let params = Params { out: out.address(), len: out.len() as u64, seed, scale };
    let blocks = out.len().div_ceil(BLOCK as usize).clamp(1, MAX_BLOCKS);
    // SAFETY: the kernel writes `len` numbers.
    unsafe { launch(device, &out.dtype().of(KERNELS), [blocks as u32, 1, 1], &params) }
}
