//! Reads GGUF model files (versions 2 and 3, little endian), memory-mapped.
//!
//! Invariant: a [`Gguf`] that opened is sound. Every count, length, shape and offset of the file was compared with
//! the bytes that are there before anything was allocated or sliced, so memory is bounded by a small multiple of
//! the size of the header, and [`Gguf::tensor`] cannot fail on a tensor that exists.
//! What the numbers of a tensor mean is known to [`quant`](crate::quant), what the keys mean to the models.

mod metadata;
mod parse;

#[cfg(test)]
pub(crate) mod build;
#[cfg(test)]
mod fuzz;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use memmap2::Mmap;

pub use self::metadata::{MetadataArray, MetadataValue};
use crate::quant::Dtype;

/// Why a file is not a usable GGUF file.
#[derive(Debug, thiserror::Error)]
pub enum GgufError {
    #[error("cannot read model file {path:?}")]
    Io {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("model file {path:?} is not a valid GGUF file: {what} at byte {offset}")]
    Invalid { path: PathBuf, what: String, offset: u64 },
    #[error("model file {path:?} has no metadata key {key:?}")]
    MissingKey { path: PathBuf, key: String },
    #[error("model file {path:?} has {actual} under metadata key {key:?}, expected {expected}")]
    WrongType { path: PathBuf, key: String, expected: &'static str, actual: String },
    #[error("model file {path:?} has no tensor {name:?}")]
    MissingTensor { path: PathBuf, name: String },
}

/// An open model file: its metadata, and its tensors by name.
#[derive(Debug)]
pub struct Gguf {
    path: PathBuf,
    pub version: u32,
    pub metadata: BTreeMap<String, MetadataValue>,
    tensors: BTreeMap<String, TensorInfo>,
    bytes: Bytes,
}

/// One tensor, in place.
#[derive(Clone, Copy, Debug)]
pub struct TensorView<'a> {
    pub dtype: Dtype,
    /// Outermost dimension first: `[num_outputs, num_inputs]` for a matrix. (GGUF stores it the other way around.)
    pub shape: &'a [usize],
    pub data: &'a [u8],
}

/// Where a tensor lies; checked against the file.
#[derive(Clone, Debug)]
struct TensorInfo {
    dtype: Dtype,
    shape: Vec<usize>,
    range: std::ops::Range<usize>,
}

#[derive(Debug)]
enum Bytes {
    Mapped(Mmap),
    #[cfg(test)]
    Owned(Vec<u8>),
}

impl Gguf {
    /// Maps the file and checks all of its structure; the tensor data itself is not touched.
    pub fn open(path: &Path) -> Result<Self, GgufError> {
        let io_error = |source| GgufError::Io { path: path.to_owned(), source };
        let file = File::open(path).map_err(io_error)?;
        if !file.metadata().map_err(io_error)?.is_file() {
            return Err(io_error(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file")));
        }
        // SAFETY: the mapping is private and read-only. Model files are verified by digest and never written in
        // place: a new one is put beside the old one and renamed.
        let map = unsafe { Mmap::map(&file) }.map_err(io_error)?;
        Self::parse(path, Bytes::Mapped(map))
    }

    fn parse(path: &Path, bytes: Bytes) -> Result<Self, GgufError> {
        match parse::parse(bytes.as_slice()) {
            Ok(header) => Ok(Self {
                path: path.to_owned(),
                version: header.version,
                metadata: header.metadata,
                tensors: header.tensors,
                bytes,
            }),
            Err(error) => Err(GgufError::Invalid {
                path: path.to_owned(),
                what: error.what,
                offset: error.offset as u64,
            }),
        }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Names of all tensors, in order.
    pub fn tensor_names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    pub fn tensor(&self, name: &str) -> Result<TensorView<'_>, GgufError> {
        let info = self
            .tensors
            .get(name)
            .ok_or_else(|| GgufError::MissingTensor { path: self.path.clone(), name: name.to_owned() })?;
        let data = &self.bytes.as_slice()[info.range.clone()];
        Ok(TensorView { dtype: info.dtype, shape: &info.shape, data })
    }

    pub fn has(&self, key: &str) -> bool {
        self.metadata.contains_key(key)
    }

    pub fn str(&self, key: &str) -> Result<&str, GgufError> {
        self.get(key, "a string", |value| match value {
            MetadataValue::Str(text) => Some(text.as_str()),
            _ => None,
        })
    }

    /// Any integer type that fits.
    pub fn u32(&self, key: &str) -> Result<u32, GgufError> {
        self.get(key, "an integer of 32 bits", |value| value.as_u64().and_then(|v| u32::try_from(v).ok()))
    }

    pub fn f32(&self, key: &str) -> Result<f32, GgufError> {
        self.get(key, "a float", |value| match value {
            MetadataValue::F32(v) => Some(*v),
            MetadataValue::F64(v) => Some(*v as f32),
            _ => None,
        })
    }

    pub fn bool(&self, key: &str) -> Result<bool, GgufError> {
        self.get(key, "a bool", |value| match value {
            MetadataValue::Bool(v) => Some(*v),
            _ => None,
        })
    }

    pub fn str_array(&self, key: &str) -> Result<&[String], GgufError> {
        self.get(key, "an array of strings", |value| match value {
            MetadataValue::Array(MetadataArray::Str(values)) => Some(values.as_slice()),
            _ => None,
        })
    }

    pub fn i32_array(&self, key: &str) -> Result<&[i32], GgufError> {
        self.get(key, "an array of i32", |value| match value {
            MetadataValue::Array(MetadataArray::I32(values)) => Some(values.as_slice()),
            _ => None,
        })
    }

    pub fn u32_array(&self, key: &str) -> Result<&[u32], GgufError> {
        self.get(key, "an array of u32", |value| match value {
            MetadataValue::Array(MetadataArray::U32(values)) => Some(values.as_slice()),
            _ => None,
        })
    }

    pub fn f32_array(&self, key: &str) -> Result<&[f32], GgufError> {
        self.get(key, "an array of f32", |value| match value {
            MetadataValue::Array(MetadataArray::F32(values)) => Some(values.as_slice()),
            _ => None,
        })
    }

    fn get<'a, T>(
        &'a self,
        key: &str,
        expected: &'static str,
        convert: impl FnOnce(&'a MetadataValue) -> Option<T>,
    ) -> Result<T, GgufError> {
        let value = self
            .metadata
            .get(key)
            .ok_or_else(|| GgufError::MissingKey { path: self.path.clone(), key: key.to_owned() })?;
        convert(value).ok_or_else(|| GgufError::WrongType {
            path: self.path.clone(),
            key: key.to_owned(),
            expected,
            actual: value.describe(),
        })
    }
}

impl TensorView<'_> {
    pub fn num_elements(&self) -> usize {
        self.shape.iter().product()
    }
}

impl Bytes {
    fn as_slice(&self) -> &[u8] {
        match self {
            Self::Mapped(map) => map,
            #[cfg(test)]
            Self::Owned(bytes) => bytes,
        }
    }
}
