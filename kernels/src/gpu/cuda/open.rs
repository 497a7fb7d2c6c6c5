//! Why a machine's CUDA device cannot be used, and what to do about it.

use super::library::FOLDERS_VARIABLE;
use crate::gpu::device::DeviceError;

/// Of the driver: TMA and the way graphs are made are of CUDA 12.
const OLDEST_DRIVER: (i32, i32) = (12, 0);
/// bf16 on tensor cores, copies into shared memory that do not wait.
const OLDEST_DEVICE: (i32, i32) = (8, 0);
/// For the context, the kernels and the working memory of matrix products.
const LEAST_FREE_BYTES: u64 = 1 << 30;

/// There is no CUDA device to work with.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CudaError {
    #[error("the CUDA driver is not installed: libcuda.so.1 is not there")]
    NoDriver,
    #[error("the CUDA driver has no function {name}")]
    NoFunction { name: &'static str },
    #[error("the CUDA driver does not start: {reason}")]
    DriverFailed { reason: String },
    #[error("the CUDA driver is of CUDA {major}.{minor}, 12.0 or newer is needed")]
    DriverTooOld { major: i32, minor: i32 },
    #[error("there is no CUDA device")]
    NoDevice,
    #[error("there is no CUDA device {ordinal}: there are {count}, counted from 0")]
    NoSuchDevice { ordinal: usize, count: usize },
    #[error("the CUDA device {name} has compute capability {major}.{minor}, 8.0 or newer is needed")]
    DeviceTooOld { name: String, major: i32, minor: i32 },
    #[error(
        "the CUDA device {name} has {free} of {total} bytes of memory free, {LEAST_FREE_BYTES} are needed"
    )]
    TooLittleMemory { name: String, free: u64, total: u64 },
    #[error("cuBLASLt is not installed: libcublasLt.so.13 is not there")]
    NoCublasLt,
    #[error(transparent)]
    Device(#[from] DeviceError),
}

impl CudaError {
    /// What to do.
    pub fn help(&self) -> String {
        match self {
            Self::NoDriver => {
                "install NVIDIA's driver, 580 or newer; in a container, give it the GPU".to_owned()
            }
            Self::NoFunction { .. } | Self::DriverTooOld { .. } => {
                "update NVIDIA's driver to 580 or newer".to_owned()
            }
            Self::DriverFailed { .. } => {
                "see whether `nvidia-smi` works; after an update of the driver, restart the machine"
                    .to_owned()
            }
            Self::NoDevice => {
                "see whether `nvidia-smi` lists a GPU and CUDA_VISIBLE_DEVICES hides none".to_owned()
            }
            Self::NoSuchDevice { .. } => "`nvidia-smi -L` lists the devices".to_owned(),
            Self::DeviceTooOld { .. } => "use an A100 or a newer GPU, or `device: cpu`".to_owned(),
            Self::TooLittleMemory { .. } => "`nvidia-smi` shows who uses it".to_owned(),
            Self::NoCublasLt => format!(
                "install it (the pip package nvidia-cublas, or libcublas-13-0 of NVIDIA's packages), or name the \
                 folder it is in with {FOLDERS_VARIABLE}"
            ),
            Self::Device(_) => "see whether `nvidia-smi` works".to_owned(),
        }
    }
}

/// CUDA writes 13.0 as 13000.
pub(super) fn check_driver_version(version: i32) -> Result<(), CudaError> {
    let (major, minor) = (version / 1000, version % 1000 / 10);
    if (major, minor) < OLDEST_DRIVER {
        return Err(CudaError::DriverTooOld { major, minor });
    }
    Ok(())
}

pub(super) fn check_ordinal(ordinal: usize, count: usize) -> Result<(), CudaError> {
    match count {
        0 => Err(CudaError::NoDevice),
        _ if ordinal >= count => Err(CudaError::NoSuchDevice { ordinal, count }),
        _ => Ok(()),
    }
}

pub(super) fn check_capability(name: &str, capability: (i32, i32)) -> Result<(), CudaError> {
    if capability < OLDEST_DEVICE {
        let (major, minor) = capability;
        return Err(CudaError::DeviceTooOld { name: name.to_owned(), major, minor });
    }
    Ok(())
}

pub(super) fn check_memory(name: &str, free: u64, total: u64) -> Result<(), CudaError> {
    if free < LEAST_FREE_BYTES {
        return Err(CudaError::TooLittleMemory { name: name.to_owned(), free, total });
    }
    Ok(())
}
