//! The ops as calls: each checks the lengths of its operands and queues its kernel.
//!
//! One file an op, under the name of its kernel. The structs of parameters are the kernels' own, field by field.

mod attention;
mod combine;
mod copy_kv;
mod embed;
mod gated;
mod gather;
mod grouped_linear;
mod linear;
mod log_probs;
mod penalties;
mod quantize;
mod randomize;
mod rms_norm;
mod route;
mod sample;
mod scale_outer;
mod store_kv;

pub(crate) use self::attention::{AttentionArgs, AttentionParts, PagedKv, attention, attention_shared_bytes};
pub(crate) use self::combine::{Combine, combine};
pub(crate) use self::copy_kv::{CopyKv, copy_kv};
pub(crate) use self::embed::{Embed, embed};
pub(crate) use self::gated::{Gated, gated};
pub(crate) use self::gather::gather;
pub(crate) use self::grouped_linear::{GroupedLinear, grouped_linear};
pub(crate) use self::linear::{LinearOut, Matrix, MatrixValues, Rows, linear};
#[cfg(test)]
pub(crate) use self::log_probs::TopLogProbs;
pub(crate) use self::log_probs::{LogProbs, log_probs};
pub(crate) use self::penalties::{Penalties, RowPenalties, penalties};
pub(crate) use self::quantize::quantize;
pub(crate) use self::randomize::randomize;
pub(crate) use self::rms_norm::{RmsNorm, rms_norm};
pub(crate) use self::route::{Route, SortRoutes, route, sort_routes};
#[cfg(test)]
pub(crate) use self::sample::AllowedTokens;
pub(crate) use self::sample::{RowSampling, Sample, sample, sample_error};
pub(crate) use self::scale_outer::{UNSCALED_F16, scale_outer};
pub use self::store_kv::KvDtype;
pub(crate) use self::store_kv::{StoreKv, store_kv};
use super::device::{Address, Device, DeviceError, Kernel};
use super::half_vec::{HalfDtype, HalfVec};
use super::memory::DeviceVec;

/// Threads of a block that shares a row, and the shared memory for its sums.
const ROW_THREADS: u32 = 256;
const ROW_SHARED_BYTES: u32 = ROW_THREADS / 32 * size_of::<f32>() as u32;

/// Numbers that a kernel reads or writes at once.
pub(crate) const ROW_MULTIPLE: usize = 8;

/// Where an op writes rows that a matrix product reads.
#[derive(Clone, Copy)]
pub(crate) enum RowsOut<'a> {
    Half(&'a HalfVec),
    /// Numbers and a scale a row.
    E4m3(&'a DeviceVec<u8>, &'a DeviceVec<f32>),
}

impl RowsOut<'_> {
    /// The kind of 16-bit floats, where it is these.
    fn half(&self) -> Option<HalfDtype> {
        match self {
            Self::Half(out) => Some(out.dtype()),
            Self::E4m3(..) => None,
        }
    }

    /// Addresses of the numbers and of the scales, if there are `num_rows` of `size`.
    fn addresses(&self, num_rows: usize, size: usize) -> (Address, Address) {
        assert!(size > 0 && size.is_multiple_of(ROW_MULTIPLE), "rows of {size} numbers");
        match self {
            Self::Half(out) => {
                assert!(out.len() >= num_rows * size);
                (out.address(), Address::NULL)
            }
            Self::E4m3(out, scale) => {
                assert!(out.len() >= num_rows * size && scale.len() >= num_rows);
                (out.address(), scale.address())
            }
        }
    }
}

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
    let bytes = (&raw const *params).cast();
    // SAFETY: the bytes of the struct are copied as they are; its padding is never looked at.
    let bytes = unsafe { std::slice::from_raw_parts(bytes, size_of::<P>()) };
    // SAFETY: the caller says so.
    unsafe { device.launch(kernel, grid, bytes) }
}
