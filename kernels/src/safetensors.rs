//! Reads the weights of a Hugging Face folder: `model.safetensors`, or the shards that its index names.
//!
//! Invariant: a [`Safetensors`] that opened is sound. Headers are bounded, the tensors of a shard fill its data without
//! gap or overlap, each is as large as its shape and type say, and no name stands in two shards. So
//! [`Safetensors::tensor`] fails only on a tensor that is missing or of a type that is not read.
//! Nothing is copied: tensors are views of mapped files. What they mean is known to the models.

#[cfg(test)]
mod fuzz;
mod parse;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use memmap2::Mmap;
use serde::Deserialize;

use self::parse::TensorInfo;
use crate::gguf::TensorView;

const SINGLE_FILE: &str = "model.safetensors";
const INDEX_FILE: &str = "model.safetensors.index.json";
/// The index of a model with a hundred thousand tensors has about ten megabytes.
const MAX_INDEX_BYTES: u64 = 64 << 20;
const MAX_SHARDS: usize = 4096;

/// Why a folder has no usable weights.
#[derive(Debug, thiserror::Error)]
pub enum SafetensorsError {
    #[error("cannot read weights {path:?}")]
    Io {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("weights {path:?} are not valid: {what}")]
    Invalid { path: PathBuf, what: String },
    #[error("weights {path:?} have no tensor {name:?}")]
    MissingTensor { path: PathBuf, name: String },
    #[error("tensor {name:?} of weights {path:?} has the type {dtype}, known are F32, F16 and BF16")]
    UnknownDtype { path: PathBuf, name: String, dtype: String },
}

/// The open weights of a folder.
#[derive(Debug)]
pub struct Safetensors {
    path: PathBuf,
    shards: Vec<Mmap>,
    /// By name: the shard's number, and where in it.
    tensors: BTreeMap<String, (usize, TensorInfo)>,
}

/// `model.safetensors.index.json`, as far as it is needed.
#[derive(Deserialize)]
struct Index {
    /// From a tensor's name to its shard's file name.
    weight_map: BTreeMap<String, String>,
}

impl Safetensors {
    /// Maps the files of a folder and checks all of their structure; the tensor data itself is not touched.
    pub fn open(folder: &Path) -> Result<Self, SafetensorsError> {
        let index_path = folder.join(INDEX_FILE);
        let mut weights = Self { path: folder.to_owned(), shards: Vec::new(), tensors: BTreeMap::new() };
        if folder.join(SINGLE_FILE).exists() || !index_path.exists() {
            weights.add(SINGLE_FILE)?;
            return Ok(weights);
        }
        let index = read_index(&index_path)?;
        let files: BTreeSet<&str> = index.weight_map.values().map(String::as_str).collect();
        if files.len() > MAX_SHARDS {
            let what = format!("{} shards, at most {MAX_SHARDS} are read", files.len());
            return Err(SafetensorsError::Invalid { path: index_path, what });
        }
        let mut numbers = BTreeMap::new();
        for file in files {
            if !is_plain_name(file) {
                let what = format!("shard {file:?} is not a plain file name");
                return Err(SafetensorsError::Invalid { path: index_path, what });
            }
            numbers.insert(file, weights.shards.len());
            weights.add(file)?;
        }
        for (name, file) in &index.weight_map {
            if weights.tensors.get(name).is_none_or(|(shard, _)| *shard != numbers[file.as_str()]) {
                let what = format!("tensor {name:?} is not in shard {file:?}");
                return Err(SafetensorsError::Invalid { path: index_path, what });
            }
        }
        Ok(weights)
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Names of all tensors, in order.
    pub fn tensor_names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    pub fn tensor(&self, name: &str) -> Result<TensorView<'_>, SafetensorsError> {
        let Some((shard, info)) = self.tensors.get(name) else {
            return Err(SafetensorsError::MissingTensor { path: self.path.clone(), name: name.to_owned() });
        };
        let dtype = info.dtype.as_ref().map_err(|dtype| SafetensorsError::UnknownDtype {
            path: self.path.clone(),
            name: name.to_owned(),
            dtype: dtype.clone(),
        })?;
        let data = &self.shards[*shard][info.range.clone()];
        Ok(TensorView { dtype: *dtype, shape: &info.shape, data })
    }

    fn add(&mut self, file: &str) -> Result<(), SafetensorsError> {
        let path = self.path.join(file);
        let map = map(&path)?;
        let invalid = |what| SafetensorsError::Invalid { path: path.clone(), what };
        let number = self.shards.len();
        for (name, info) in parse::parse(&map).map_err(invalid)? {
            if self.tensors.contains_key(&name) {
                return Err(invalid(format!("tensor {name:?} is in another shard too")));
            }
            self.tensors.insert(name, (number, info));
        }
        self.shards.push(map);
        Ok(())
    }
}

fn map(path: &Path) -> Result<Mmap, SafetensorsError> {
    let io_error = |source| SafetensorsError::Io { path: path.to_owned(), source };
    let file = File::open(path).map_err(io_error)?;
    if !file.metadata().map_err(io_error)?.is_file() {
        return Err(io_error(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file")));
    }
    // SAFETY: the mapping is private and read-only. Weights are never written in place: the hub's cache and ours put a
    // new file beside the old one and rename it.
    unsafe { Mmap::map(&file) }.map_err(io_error)
}

fn read_index(path: &Path) -> Result<Index, SafetensorsError> {
    let io_error = |source| SafetensorsError::Io { path: path.to_owned(), source };
    let mut text = Vec::new();
    let file = File::open(path).map_err(io_error)?;
    file.take(MAX_INDEX_BYTES + 1).read_to_end(&mut text).map_err(io_error)?;
    let invalid = |what| SafetensorsError::Invalid { path: path.to_owned(), what };
    if text.len() as u64 > MAX_INDEX_BYTES {
        return Err(invalid(format!("the index has more than {MAX_INDEX_BYTES} bytes")));
    }
    serde_json::from_slice(&text).map_err(|error| invalid(format!("the index is not readable: {error}")))
}

/// Whether a name stays within its folder.
fn is_plain_name(name: &str) -> bool {
    name.ends_with(".safetensors") && !name.starts_with('.') && !name.contains(['/', '\\', ':', '\0'])
}
