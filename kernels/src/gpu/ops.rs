//! The ops as calls: each checks the lengths of its operands and queues its kernel.
//!
//! One file an op, under the name of its kernel. The structs of parameters are the kernels' own, field by field.

mod combine;
mod grouped_linear;
mod log_probs;
mod penalties;
mod rms_norm;
mod route;
mod sample;

pub(crate) use self::combine::{Combine, CombineOut, combine};
pub(crate) use self::grouped_linear::{GroupedLinear, grouped_linear};
pub(crate) use self::log_probs::{LogProbs, TopLogProbs, log_probs};
pub(crate) use self::penalties::{Penalties, RowPenalties, penalties};
pub(crate) use self::rms_norm::{NormOut, RmsNorm, rms_norm};
pub(crate) use self::route::{Route, SortRoutes, route, sort_routes};
pub(crate) use self::sample::{AllowedTokens, RowSampling, Sample, sample, sample_error};

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
