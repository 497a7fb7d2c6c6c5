//! Copies rows to stand one after the other; see `gather.cu`.

use super::{ROW_MULTIPLE, ROW_THREADS, launch};
use crate::gpu::device::{Address, Device, DeviceError, Kernel};
use crate::gpu::half_vec::HalfVec;
use crate::gpu::memory::DeviceSlice;

const KERNEL: Kernel = Kernel { name: "gather", source: "gather", block: ROW_THREADS, shared_bytes: 0 };

#[derive(Clone, Copy)]
#[repr(C)]
struct Params {
    rows: Address,
    row_of: Address,
    out: Address,
    size: u32,
}

/// `rows`: `[.., size]`, `row_of`: `[num_rows]`, `out`: `[num_rows, size]`
pub(crate) fn gather(
    device: &dyn Device,
    num_rows: usize,
    size: usize,
    rows: &HalfVec,
    row_of: DeviceSlice<'_, u32>,
    out: &HalfVec,
) -> Result<(), DeviceError> {
    assert!(size.is_multiple_of(ROW_MULTIPLE) && row_of.len() >= num_rows && out.len() >= num_rows * size);
    let params =
        Params { rows: rows.address(), row_of: row_of.address(), out: out.address(), size: size as u32 };
    // SAFETY: the lengths were checked above; rows of `row_of` are those of the batch.
    unsafe { launch(device, &KERNEL, [num_rows as u32, 1, 1], &params) }
}
