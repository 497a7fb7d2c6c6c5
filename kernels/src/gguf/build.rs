//! Writes small GGUF files, right and wrong ones, for tests.

use std::path::Path;

use super::{Bytes, Gguf, GgufError};
use crate::quant::Dtype;

const ALIGNMENT: usize = 32;

/// A file in the making; nothing keeps it from being wrong.
pub(crate) struct Builder {
    version: u32,
    num_pairs: u64,
    pairs: Vec<u8>,
    num_tensors: u64,
    tensors: Vec<u8>,
    data: Vec<u8>,
}

impl Builder {
    pub(crate) fn new() -> Self {
        let empty = Vec::new;
        Self { version: 3, num_pairs: 0, pairs: empty(), num_tensors: 0, tensors: empty(), data: empty() }
    }

    pub(crate) fn version(self, version: u32) -> Self {
        Self { version, ..self }
    }

    pub(crate) fn str(self, key: &str, value: &str) -> Self {
        let mut bytes = Vec::new();
        push_str(&mut bytes, value);
        self.pair(key, 8, &bytes)
    }

    pub(crate) fn u32(self, key: &str, value: u32) -> Self {
        self.pair(key, 4, &value.to_le_bytes())
    }

    pub(crate) fn f32(self, key: &str, value: f32) -> Self {
        self.pair(key, 6, &value.to_le_bytes())
    }

    pub(crate) fn str_array(self, key: &str, values: &[&str]) -> Self {
        let mut bytes = array_head(8, values.len() as u64);
        for value in values {
            push_str(&mut bytes, value);
        }
        self.pair(key, 9, &bytes)
    }

    pub(crate) fn i32_array(self, key: &str, values: &[i32]) -> Self {
        let mut bytes = array_head(5, values.len() as u64);
        bytes.extend(values.iter().flat_map(|value| value.to_le_bytes()));
        self.pair(key, 9, &bytes)
    }

    pub(crate) fn pair(mut self, key: &str, kind: u32, value: &[u8]) -> Self {
        push_str(&mut self.pairs, key);
        self.pairs.extend(kind.to_le_bytes());
        self.pairs.extend(value);
        self.num_pairs += 1;
        self
    }

    /// A tensor of F32, shape outermost dimension first.
    pub(crate) fn tensor(mut self, name: &str, shape: &[usize], values: &[f32]) -> Self {
        assert_eq!(shape.iter().product::<usize>(), values.len());
        self.data.resize(self.data.len().next_multiple_of(ALIGNMENT), 0);
        let dims: Vec<u64> = shape.iter().rev().map(|&dim| dim as u64).collect();
        let offset = self.data.len() as u64;
        self.data.extend(values.iter().flat_map(|value| value.to_le_bytes()));
        assert_eq!(Dtype::from_ggml(0), Ok(Dtype::F32));
        self.tensor_entry(name, &dims, 0, offset)
    }

    pub(crate) fn tensor_entry(mut self, name: &str, dims: &[u64], kind: u32, offset: u64) -> Self {
        push_str(&mut self.tensors, name);
        self.tensors.extend((dims.len() as u32).to_le_bytes());
        self.tensors.extend(dims.iter().flat_map(|dim| dim.to_le_bytes()));
        self.tensors.extend(kind.to_le_bytes());
        self.tensors.extend(offset.to_le_bytes());
        self.num_tensors += 1;
        self
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        let mut bytes = b"GGUF".to_vec();
        bytes.extend(self.version.to_le_bytes());
        bytes.extend(self.num_tensors.to_le_bytes());
        bytes.extend(self.num_pairs.to_le_bytes());
        bytes.extend(&self.pairs);
        bytes.extend(&self.tensors);
        bytes.resize(bytes.len().next_multiple_of(ALIGNMENT), 0);
        bytes.extend(&self.data);
        bytes
    }

    pub(crate) fn open(&self) -> Result<Gguf, GgufError> {
        open(self.bytes())
    }
}

/// Parses bytes as if they were a file.
pub(crate) fn open(bytes: Vec<u8>) -> Result<Gguf, GgufError> {
    Gguf::parse(Path::new("test.gguf"), Bytes::Owned(bytes))
}

pub(crate) fn array_head(kind: u32, count: u64) -> Vec<u8> {
    let mut bytes = kind.to_le_bytes().to_vec();
    bytes.extend(count.to_le_bytes());
    bytes
}

fn push_str(bytes: &mut Vec<u8>, text: &str) {
    bytes.extend((text.len() as u64).to_le_bytes());
    bytes.extend(text.as_bytes());
}
