//! The path of GPUs: kernels of `kernels/cuda` and a step made of them.
//!
//! A [`Device`](device::Device) has memory and runs kernels in order. There are two: a CUDA device through its driver,
//! and one that runs the same sources on the CPU, for tests. Everything above them (page tables, work plans,
//! parameters, graphs) is the same code on both. Activations are bf16 or f16, the residual stream, logits and sums f32.

mod cuda;
mod device;
mod half_vec;
mod image;
mod memory;
mod model;
mod ops;
pub mod peak;
mod plan;
mod weights;

#[cfg(test)]
mod e4m3;
#[cfg(test)]
mod emulated;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use self::cuda::CudaDevice;
pub use self::cuda::CudaError;
pub use self::device::DeviceError;
use self::device::{Device, DeviceMemory};
pub use self::half_vec::HalfDtype;
pub use self::model::{GpuModel, GpuModelConfig, KvMemory};
pub use self::ops::KvDtype;
pub use self::weights::{GpuOptions, GpuWeights, WeightDtype};

/// A GPU that models can use.
#[derive(Clone, Debug)]
pub struct Gpu {
    device: Arc<dyn Device>,
}

impl Gpu {
    /// The CUDA device of this number; what is missing is an error, and nothing else happens then.
    pub fn open(ordinal: usize) -> Result<Self, GpuError> {
        Ok(Self { device: CudaDevice::open(ordinal)? })
    }

    pub fn name(&self) -> &str {
        self.device.name()
    }

    /// Bytes that are free, and all of them.
    pub fn memory(&self) -> Result<(u64, u64), GpuError> {
        let DeviceMemory { free, total } = self.device.memory()?;
        Ok((free, total))
    }
}

/// Why a model cannot use a GPU.
#[derive(Debug, thiserror::Error)]
pub enum GpuError {
    #[error(transparent)]
    Cuda(#[from] CudaError),
    #[error(transparent)]
    Device(#[from] DeviceError),
    #[error("heads of dimension {head_dim} are not computed on a GPU: it must be a multiple of 4 up to 256")]
    HeadDim { head_dim: u32 },
    #[error("the {what} {size} is not a multiple of {multiple}, which GPUs need")]
    Size { what: &'static str, size: u32, multiple: u32 },
    #[error(
        "{wanted} KV pages of {page_bytes} bytes do not fit beside weights and buffers: {free} of {total} bytes are \
         free, which is room for {fits}"
    )]
    KvCache { wanted: u32, fits: u32, page_bytes: u64, free: u64, total: u64 },
    #[error("the activations of Gemma go beyond what float16 holds; they are computed in bfloat16")]
    NeedsRange,
    #[error("weights of 8 bits need a GPU of compute capability 8.9 or newer")]
    NoE4m3,
    #[error(
        "attention over heads of {head_dim} needs {wanted} bytes of shared memory with an fp8 KV cache, the GPU has {most}"
    )]
    SharedMemory { head_dim: usize, wanted: u32, most: u32 },
    #[error("mixtures of experts are not computed with weights of 8 bits")]
    RoundedExperts,
}
