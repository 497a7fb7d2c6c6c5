//! Reads the safetensors files of a Hugging Face folder, memory-mapped.
//!
//! Invariant: every range lies inside its file and is as long as its shape says. Numbers other than F32, F16 and BF16
//! are absent.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use memmap2::Mmap;

use crate::gguf::TensorView;
use crate::quant::Dtype;

#[derive(Debug, thiserror::Error)]
pub enum SafetensorsError {
    #[error("cannot read model file {path:?}")]
    Io {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("model file {path:?} is not a valid safetensors file: {what}")]
    Invalid { path: PathBuf, what: String },
    #[error("model folder {path:?} has no tensor {name:?}")]
    MissingTensor { path: PathBuf, name: String },
}

#[derive(Debug)]
pub struct Safetensors {
    path: PathBuf,
    maps: Vec<Mmap>,
    tensors: BTreeMap<String, Info>,
}

#[derive(Debug)]
struct Info {
    dtype: Dtype,
    shape: Vec<usize>,
    map: usize,
    range: std::ops::Range<usize>,
}

impl Safetensors {
    pub fn open(folder: &Path) -> Result<Self, SafetensorsError> {
        let mut files = vec!["model.safetensors".to_owned()];
        let index = folder.join("model.safetensors.index.json");
        if index.exists() {
            let bytes = std::fs::read(&index)
                .map_err(|source| SafetensorsError::Io { path: index.clone(), source })?;
            let json: serde_json::Value = serde_json::from_slice(&bytes).unwrap_or_default();
            let names = json["weight_map"].as_object().into_iter().flatten();
            files = names.filter_map(|(_, file)| Some(file.as_str()?.to_owned())).collect();
            files.sort();
            files.dedup();
        }
        let mut all = Self { path: folder.to_owned(), maps: Vec::new(), tensors: BTreeMap::new() };
        for file in files {
            all.add(&folder.join(file))?;
        }
        Ok(all)
    }

    fn add(&mut self, path: &Path) -> Result<(), SafetensorsError> {
        let io_error = |source| SafetensorsError::Io { path: path.to_owned(), source };
        let invalid = |what: &str| SafetensorsError::Invalid { path: path.to_owned(), what: what.to_owned() };
        // SAFETY: the mapping is private and read-only.
        let map = unsafe { Mmap::map(&File::open(path).map_err(io_error)?) }.map_err(io_error)?;
        let head = map.first_chunk::<8>().ok_or_else(|| invalid("no header"))?;
        let start = usize::try_from(u64::from_le_bytes(*head)).ok().and_then(|len| len.checked_add(8));
        let header = start.and_then(|start| map.get(8..start)).ok_or_else(|| invalid("no header"))?;
        let start = 8 + header.len();
        let json: serde_json::Value =
            serde_json::from_slice(header).map_err(|error| invalid(&error.to_string()))?;
        for (name, info) in json.as_object().into_iter().flatten().filter(|(name, _)| *name != "__metadata__")
        {
            let number = |value: &serde_json::Value| value.as_u64().and_then(|v| usize::try_from(v).ok());
            let dtype = match info["dtype"].as_str() {
                Some("F32") => Dtype::F32,
                Some("F16") => Dtype::F16,
                Some("BF16") => Dtype::Bf16,
                _ => return Err(invalid("unknown dtype")),
            };
            let shape: Option<Vec<usize>> =
                info["shape"].as_array().and_then(|dims| dims.iter().map(number).collect());
            let shape = shape.ok_or_else(|| invalid("no shape"))?;
            let offsets = number(&info["data_offsets"][0]).zip(number(&info["data_offsets"][1]));
            let (from, to) = offsets.ok_or_else(|| invalid("no offsets"))?;
            let range = start.saturating_add(from)..start.saturating_add(to);
            if map.get(range.clone()).map(<[u8]>::len) != dtype.size_bytes(&shape) {
                return Err(invalid("a tensor of another size"));
            }
            self.tensors.insert(name.clone(), Info { dtype, shape, map: self.maps.len(), range });
        }
        self.maps.push(map);
        Ok(())
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn tensor_names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    pub fn tensor(&self, name: &str) -> Result<TensorView<'_>, SafetensorsError> {
        let info = self.tensors.get(name).ok_or_else(|| SafetensorsError::MissingTensor {
            path: self.path.clone(),
            name: name.to_owned(),
        })?;
        Ok(TensorView {
            dtype: info.dtype,
            shape: &info.shape,
            data: &self.maps[info.map][info.range.clone()],
        })
    }
}
