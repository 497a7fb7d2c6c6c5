//! Loads the weights of a Llama model by name, in the form its numeric path wants.
//!
//! Invariant: every tensor of the file was used, with the shape the config says, and every number is finite: a
//! tensor that the family does not know would otherwise be ignored and the answers be wrong without a sign.
//! Weights are immutable and shared: any number of models may hold one `Arc`.

use std::collections::BTreeSet;
use std::fmt;
use std::sync::Arc;

use crate::backend::{Backend, RopeTable};
use crate::cpu::packed::Packing;
use crate::cpu::{Cpu, Isa, LANES};
use crate::gguf::{Gguf, TensorView};
use crate::models::{LlamaConfig, ModelError};
use crate::quant::dequantize;
use crate::reference::Reference;

/// Which implementation of the ops computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NumericPath {
    /// Plain f32 loops; slow, to compare with.
    Reference,
    /// SIMD on f16 weights.
    Fast,
}

/// The weights of one model in memory.
pub struct LlamaWeights {
    pub config: LlamaConfig,
    pub path: NumericPath,
    pub(crate) layers: AnyLayers,
}

pub(crate) enum AnyLayers {
    Reference(Arc<Layers<Reference>>),
    Fast(Arc<Layers<Cpu>>),
}

/// All matrices, for one backend.
pub(crate) struct Layers<B: Backend> {
    pub(crate) config: LlamaConfig,
    pub(crate) backend: B,
    pub(crate) embedding: B::Matrix,
    pub(crate) layers: Vec<Layer<B>>,
    pub(crate) output_norm: Vec<f32>,
    /// None where the embedding is the output head too.
    output: Option<B::Matrix>,
    pub(crate) rope: RopeTable,
}

pub(crate) struct Layer<B: Backend> {
    pub(crate) attention_norm: Vec<f32>,
    /// Queries, keys and values of all heads in one matrix.
    pub(crate) qkv: B::Matrix,
    pub(crate) attention_output: B::Matrix,
    pub(crate) feed_forward_norm: Vec<f32>,
    /// Gates, then ups.
    pub(crate) gate_up: B::Matrix,
    pub(crate) down: B::Matrix,
}

impl LlamaWeights {
    pub fn load(gguf: &Gguf, path: NumericPath) -> Result<Arc<Self>, ModelError> {
        let config = LlamaConfig::from_gguf(gguf)?;
        let layers = match path {
            NumericPath::Reference => AnyLayers::Reference(Arc::new(Layers::load(gguf, &config, Reference)?)),
            NumericPath::Fast => {
                if !config.head_dim.is_multiple_of(LANES as u32) {
                    return Err(ModelError::HeadDim { head_dim: config.head_dim, multiple: LANES as u32 });
                }
                let backend = Cpu { isa: Isa::detect(), packing: Packing::in_memory() };
                tracing::debug!(isa = ?backend.isa, "loading weights for the fast path");
                AnyLayers::Fast(Arc::new(Layers::load(gguf, &config, backend)?))
            }
        };
        Ok(Arc::new(Self { config, path, layers }))
    }
}

impl fmt::Debug for LlamaWeights {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LlamaWeights")
            .field("config", &self.config)
            .field("path", &self.path)
            .finish_non_exhaustive()
    }
}

impl<B: Backend> Layers<B> {
    pub(crate) fn output(&self) -> &B::Matrix {
        self.output.as_ref().unwrap_or(&self.embedding)
    }

    fn load(gguf: &Gguf, config: &LlamaConfig, backend: B) -> Result<Self, ModelError> {
        let mut loader = Loader { gguf, backend: &backend, used: BTreeSet::new() };
        let hidden = config.hidden_size as usize;
        let vocab = config.vocab_size as usize;
        let rows = |name: &str| Rows { name: name.to_owned(), num_outputs: vocab, interleaved: None };
        let embedding = loader.matrix(hidden, vec![rows("token_embd.weight")])?;
        let output = match gguf.tensor("output.weight") {
            Ok(_) => Some(loader.matrix(hidden, vec![rows("output.weight")])?),
            Err(_) => None,
        };
        let output_norm = loader.vector("output_norm.weight", hidden)?;
        let layers =
            (0..config.num_layers).map(|index| loader.layer(config, index)).collect::<Result<_, _>>()?;
        if let Some(name) = gguf.tensor_names().find(|name| !loader.used.contains(*name)) {
            return Err(ModelError::UnknownTensor { path: gguf.path().to_owned(), name: name.to_owned() });
        }
        backend.finish_loading();
        let rope = RopeTable::new(config.head_dim as usize, config.rope_theta, config.max_position as usize);
        Ok(Self { config: config.clone(), backend, embedding, layers, output_norm, output, rope })
    }
}

/// Some rows of a matrix to be, from one tensor.
struct Rows {
    name: String,
    num_outputs: usize,
    /// The dimension of the heads whose two halves the file stores interleaved.
    interleaved: Option<usize>,
}

struct Loader<'a, B> {
    gguf: &'a Gguf,
    backend: &'a B,
    used: BTreeSet<String>,
}

impl<'a, B: Backend> Loader<'a, B> {
    fn layer(&mut self, config: &LlamaConfig, index: u32) -> Result<Layer<B>, ModelError> {
        let hidden = config.hidden_size as usize;
        let intermediate = config.intermediate_size as usize;
        let head_dim = config.head_dim as usize;
        let q_len = config.num_heads as usize * head_dim;
        let kv_len = config.num_kv_heads as usize * head_dim;
        let name = |part: &str| format!("blk.{index}.{part}.weight");
        let rows = |part: &str, num_outputs| Rows { name: name(part), num_outputs, interleaved: None };
        let heads = |part: &str, num_outputs| Rows { interleaved: Some(head_dim), ..rows(part, num_outputs) };
        let qkv = vec![heads("attn_q", q_len), heads("attn_k", kv_len), rows("attn_v", kv_len)];
        let gate_up = vec![rows("ffn_gate", intermediate), rows("ffn_up", intermediate)];
        Ok(Layer {
            attention_norm: self.vector(&name("attn_norm"), hidden)?,
            qkv: self.matrix(hidden, qkv)?,
            attention_output: self.matrix(q_len, vec![rows("attn_output", hidden)])?,
            feed_forward_norm: self.vector(&name("ffn_norm"), hidden)?,
            gate_up: self.matrix(hidden, gate_up)?,
            down: self.matrix(intermediate, vec![rows("ffn_down", hidden)])?,
        })
    }

    fn vector(&mut self, name: &str, len: usize) -> Result<Vec<f32>, ModelError> {
        let tensor = self.tensor(name, &[len])?;
        let mut values = vec![0.0; len];
        dequantize(tensor.dtype, tensor.data, &mut values);
        self.check_finite(name, values.iter().all(|v| v.is_finite()))?;
        Ok(values)
    }

    /// One matrix from the rows of several tensors, one below the other.
    fn matrix(&mut self, num_inputs: usize, parts: Vec<Rows>) -> Result<B::Matrix, ModelError> {
        let mut sources = Vec::new();
        for part in &parts {
            let tensor = self.tensor(&part.name, &[part.num_outputs, num_inputs])?;
            // A matrix of the checked shape consists of whole rows.
            let row_bytes = tensor.data.len() / part.num_outputs;
            for row in 0..part.num_outputs {
                let row = part.interleaved.map_or(row, |head_dim| interleaved_row(row, head_dim));
                sources.push((tensor.dtype, &tensor.data[row * row_bytes..(row + 1) * row_bytes]));
            }
        }
        let mut finite = true;
        let matrix = self.backend.matrix(sources.len(), num_inputs, &mut |row, out| {
            let (dtype, data) = sources[row];
            dequantize(dtype, data, out);
            finite &= out.iter().all(|v| v.is_finite());
        });
        self.check_finite(&parts[0].name, finite)?;
        Ok(matrix)
    }

    fn tensor(&mut self, name: &str, expected: &[usize]) -> Result<TensorView<'a>, ModelError> {
        let tensor = self.gguf.tensor(name)?;
        if tensor.shape != expected {
            return Err(ModelError::Shape {
                path: self.gguf.path().to_owned(),
                name: name.to_owned(),
                expected: expected.to_vec(),
                actual: tensor.shape.to_vec(),
            });
        }
        self.used.insert(name.to_owned());
        Ok(tensor)
    }

    fn check_finite(&self, name: &str, finite: bool) -> Result<(), ModelError> {
        match finite {
            true => Ok(()),
            false => Err(ModelError::NotFinite { path: self.gguf.path().to_owned(), name: name.to_owned() }),
        }
    }
}

/// Where the file keeps a row of the queries or keys. Files store rows `i` and `i + head_dim / 2` of a head side by
/// side, for a rotation of neighbors; here the two halves of a head are rotated.
fn interleaved_row(row: usize, head_dim: usize) -> usize {
    let (head, row) = (row / head_dim, row % head_dim);
    let (half, row) = (row / (head_dim / 2), row % (head_dim / 2));
    head * head_dim + row * 2 + half
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn halves_are_interleaved_within_each_head() {
        let rows: Vec<usize> = (0..16).map(|row| interleaved_row(row, 8)).collect();
        assert_eq!(rows, [0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15]);
    }
}
