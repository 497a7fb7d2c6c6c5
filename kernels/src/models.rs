//! Model families behind [`Model`](crate::step::Model), and how their weights are found on disk.
//!
//! Metadata keys live in `config`, tensor names in `families` and `checkpoint` only. The forward pass is written once,
//! in [`transformer`] over the ops of `backend`; which numeric path computes it is chosen at load.

mod buffers;
pub mod checkpoint;
pub mod config;
mod experts;
pub mod fake;
mod families;
mod rope;
pub mod transformer;
pub mod weights;

#[cfg(test)]
mod tests;

use std::io;
use std::path::PathBuf;

use crate::gguf::GgufError;
use crate::gpu::GpuError;
use crate::safetensors::SafetensorsError;

pub use self::checkpoint::Checkpoint;
pub use self::config::{ExpertsConfig, ModelConfig};
pub use self::fake::{FakeConfig, FakeModel};
pub(crate) use self::families::Activation;
pub use self::families::Family;
pub use self::rope::{RopeConfig, RopeScaling};
pub use self::transformer::{KvConfig, Transformer};
pub use self::weights::{ModelWeights, NumericPath, PackedFile};

/// Part of every model digest: to be raised when answers change for the same weights.
pub const ENGINE_VERSION: u32 = 1;

/// Why a model cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    #[error(transparent)]
    Gguf(#[from] GgufError),
    #[error(transparent)]
    Safetensors(#[from] SafetensorsError),
    #[error("cannot read model configuration {path:?}")]
    Config {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("model file {path:?} is of the family {family:?}, known are {known}")]
    UnknownFamily { path: PathBuf, family: String, known: String },
    #[error("model file {path:?} has no metadata key {key:?}")]
    MissingKey { path: PathBuf, key: String },
    #[error("model file {path:?} has {value} under metadata key {key:?}, expected {expected}")]
    InvalidValue { path: PathBuf, key: String, value: String, expected: String },
    #[error("tensor {name:?} of model file {path:?} has the shape {actual:?}, expected {expected:?}")]
    Shape { path: PathBuf, name: String, expected: Vec<usize>, actual: Vec<usize> },
    #[error("tensor {name:?} of model file {path:?} is not part of the {family} family")]
    UnknownTensor { path: PathBuf, name: String, family: &'static str },
    #[error("tensor {name:?} of model file {path:?} holds a number that is not finite")]
    NotFinite { path: PathBuf, name: String },
    #[error("head dimension {head_dim} is not a multiple of {multiple}, which the fast path needs")]
    HeadDim { head_dim: u32, multiple: u32 },
    #[error(transparent)]
    Gpu(#[from] GpuError),
    #[error("page size {page_size} is not a power of two from {min} to {max}")]
    PageSize { page_size: u32, min: u32, max: u32 },
    #[error("a cache of {num_pages} pages of {page_size} tokens is too large or empty")]
    CacheSize { num_pages: u32, page_size: u32 },
    #[error("cannot start {num_threads} compute threads")]
    Threads {
        num_threads: usize,
        #[source]
        source: std::io::Error,
    },
}
