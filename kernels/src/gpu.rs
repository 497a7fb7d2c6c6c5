//! The path of GPUs: kernels of `kernels/cuda` and a step made of them.
//!
//! A [`Device`](device::Device) has memory and runs kernels in order. There are two: a CUDA device through its driver,
//! and one that runs the same sources on the CPU, for tests. Everything above them (page tables, work plans,
//! parameters, graphs) is the same code on both. Activations are bf16, the residual stream, logits and sums f32.

mod cuda;
mod device;
mod e4m3;
mod image;
mod memory;
mod ops;

#[cfg(test)]
mod emulated;
#[cfg(test)]
mod tests;

pub use self::cuda::CudaError;
pub use self::device::DeviceError;
