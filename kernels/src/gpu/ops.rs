//! The ops as calls: each checks the lengths of its operands and queues its kernel.
//!
//! One file an op, under the name of its kernel. The structs of parameters are the kernels' own, field by field.

mod rms_norm;
mod scale_outer;

pub(crate) use self::rms_norm::{NormOut, RmsNorm, rms_norm};
pub(crate) use self::scale_outer::scale_outer;

use super::device::{Device, DeviceError, Kernel};

/// Queues a kernel with its struct of parameters.
///
/// # Safety
/// The struct is that of the kernel, and the memory it points to stays valid until the work is done.
unsafe fn launch<P: Copy>(
    device: &dyn Device,
    kernel: &Kernel,
    grid: [u32; 3],
    params: &P,
) -> Result<(), DeviceError> {
    let bytes = (params as *const P).cast();
    // SAFETY: the bytes of the struct are copied as they are; its padding is never looked at.
    let bytes = unsafe { std::slice::from_raw_parts(bytes, size_of::<P>()) };
    // SAFETY: the caller says so.
    unsafe { device.launch(kernel, grid, bytes) }
}
