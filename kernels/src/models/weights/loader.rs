//! Finds the tensors of a model by name and turns them into the vectors and matrices of its layers.
//!
//! Invariant: a tensor is used only with the shape the config says and with finite numbers, and [`Loader::check_all_used`]
//! fails if one was left over. What checkpoints store differently is undone here, and nowhere else.

use std::collections::BTreeSet;

use super::{Dense, Experts, FeedForward, Layer, Matrices, MatrixRole, MatrixSource};
use crate::gguf::TensorView;
use crate::models::checkpoint::{Checkpoint, TensorName};
use crate::models::families::Architecture;
use crate::models::{ModelConfig, ModelError};
use crate::quant::dequantize;

pub(super) struct Loader<'a, M> {
    checkpoint: &'a Checkpoint,
    config: &'a ModelConfig,
    architecture: &'static Architecture,
    backend: &'a M,
    used: BTreeSet<String>,
}

impl<'a, M: Matrices> Loader<'a, M> {
    pub(super) fn new(checkpoint: &'a Checkpoint, config: &'a ModelConfig, backend: &'a M) -> Self {
        let architecture = config.family.architecture();
        Self { checkpoint, config, architecture, backend, used: BTreeSet::new() }
    }

    pub(super) fn layer(&mut self, index: u32) -> Result<Layer<M>, ModelError> {
        let config = self.config;
        let [hidden, head_dim] = [config.hidden_size, config.head_dim].map(|size| size as usize);
        let q_len = config.num_heads as usize * head_dim;
        let kv_len = config.num_kv_heads as usize * head_dim;
        let name = |part| TensorName { layer: Some(index), part, expert: None };
        let qkv = |parts: [&'static str; 3]| {
            [(name(parts[0]), q_len), (name(parts[1]), kv_len), (name(parts[2]), kv_len)]
        };
        let q_norm = self.optional_norm(name("attn_q_norm.weight"), head_dim)?;
        let k_norm = self.optional_norm(name("attn_k_norm.weight"), head_dim)?;
        Ok(Layer {
            attention_norm: self.norm(name("attn_norm.weight"), hidden)?,
            qkv: self.matrix(
                MatrixRole::Qkv,
                hidden,
                &qkv(["attn_q.weight", "attn_k.weight", "attn_v.weight"]),
            )?,
            qkv_bias: match self.architecture.has("attn_q.bias") {
                true => Some(self.bias(&qkv(["attn_q.bias", "attn_k.bias", "attn_v.bias"]))?),
                false => None,
            },
            head_norms: q_norm.zip(k_norm).map(|(q, k)| [q, k]),
            attention_output: self.matrix(
                MatrixRole::AttentionOutput,
                q_len,
                &[(name("attn_output.weight"), hidden)],
            )?,
            post_attention_norm: self.optional_norm(name("post_attention_norm.weight"), hidden)?,
            feed_forward_norm: self.norm(name("ffn_norm.weight"), hidden)?,
            feed_forward: self.feed_forward(index)?,
            post_feed_forward_norm: self.optional_norm(name("post_ffw_norm.weight"), hidden)?,
        })
    }

    fn feed_forward(&mut self, layer: u32) -> Result<FeedForward<M>, ModelError> {
        let Some(experts) = self.config.experts else {
            let parts = ["ffn_gate.weight", "ffn_up.weight", "ffn_down.weight"];
            return Ok(FeedForward::Dense(self.dense(layer, parts, None)?));
        };
        let hidden = self.config.hidden_size as usize;
        let parts = ["ffn_gate_exps.weight", "ffn_up_exps.weight", "ffn_down_exps.weight"];
        for part in parts {
            let name = TensorName { layer: Some(layer), part, expert: None };
            let stored = self.checkpoint.num_stored_together(self.architecture, name)?;
            if stored.is_some_and(|stored| stored != experts.num_experts as usize) {
                let tensor = self.checkpoint.tensor(self.architecture, name)?;
                let expected = [&[experts.num_experts as usize], &tensor.shape[1..]].concat();
                return Err(self.shape_error(name, &expected, tensor));
            }
        }
        let router = TensorName { layer: Some(layer), part: "ffn_gate_inp.weight", expert: None };
        Ok(FeedForward::Experts(Experts {
            config: experts,
            router: self.matrix(MatrixRole::Router, hidden, &[(router, experts.num_experts as usize)])?,
            experts: (0..experts.num_experts)
                .map(|expert| self.dense(layer, parts, Some(expert)))
                .collect::<Result<_, _>>()?,
        }))
    }

    fn dense(
        &mut self,
        layer: u32,
        [gate, up, down]: [&'static str; 3],
        expert: Option<u32>,
    ) -> Result<Dense<M>, ModelError> {
        let hidden = self.config.hidden_size as usize;
        let intermediate = self.config.intermediate_size as usize;
        let name = |part| TensorName { layer: Some(layer), part, expert };
        Ok(Dense {
            gate_up: self.matrix(
                MatrixRole::GateUp,
                hidden,
                &[(name(gate), intermediate), (name(up), intermediate)],
            )?,
            down: self.matrix(MatrixRole::Down, intermediate, &[(name(down), hidden)])?,
        })
    }

    /// Those of the config, divided by the factors that GGUF files of Llama 3 carry instead of a rule.
    pub(super) fn frequencies(&mut self) -> Result<Vec<f32>, ModelError> {
        const FACTORS: TensorName = TensorName { layer: None, part: "rope_freqs.weight", expert: None };
        let mut frequencies = self.config.rope.frequencies(self.config.head_dim as usize);
        let Checkpoint::Gguf(gguf) = self.checkpoint else { return Ok(frequencies) };
        // Other families do not divide, so there the tensor stays unused, which is an error.
        if self.architecture.interleaved_in_gguf && gguf.tensor(FACTORS.part).is_ok() {
            let factors = self.vector(FACTORS, frequencies.len())?;
            for (frequency, factor) in frequencies.iter_mut().zip(factors) {
                *frequency /= factor;
            }
            self.check_finite(FACTORS, frequencies.iter().all(|frequency| frequency.is_finite()))?;
        }
        Ok(frequencies)
    }

    pub(super) fn norm(&mut self, name: TensorName, len: usize) -> Result<Vec<f32>, ModelError> {
        let mut weights = self.vector(name, len)?;
        if self.checkpoint.lacks_one(self.architecture) {
            for weight in &mut weights {
                *weight += 1.0;
            }
        }
        Ok(weights)
    }

    /// None where the family has none.
    fn optional_norm(&mut self, name: TensorName, len: usize) -> Result<Option<Vec<f32>>, ModelError> {
        self.architecture.has(name.part).then(|| self.norm(name, len)).transpose()
    }

    fn bias(&mut self, parts: &[(TensorName, usize)]) -> Result<Vec<f32>, ModelError> {
        let mut bias = Vec::new();
        for (name, len) in parts {
            bias.extend(self.vector(*name, *len)?);
        }
        Ok(bias)
    }

    fn vector(&mut self, name: TensorName, len: usize) -> Result<Vec<f32>, ModelError> {
        let tensor = self.tensor(name, &[len])?;
        let mut values = vec![0.0; len];
        dequantize(tensor.dtype, tensor.data, &mut values);
        self.check_finite(name, values.iter().all(|v| v.is_finite()))?;
        Ok(values)
    }

    /// One matrix from the rows of several tensors, one below the other.
    pub(super) fn matrix(
        &mut self,
        role: MatrixRole,
        num_inputs: usize,
        parts: &[(TensorName, usize)],
    ) -> Result<M::Matrix, ModelError> {
        let mut source = MatrixSource::new(role, num_inputs);
        for &(name, num_outputs) in parts {
            let tensor = self.tensor(name, &[num_outputs, num_inputs])?;
            let is_interleaved = ["attn_q.weight", "attn_k.weight"].contains(&name.part)
                && self.checkpoint.interleaves_halves(self.architecture);
            // A matrix of the checked shape consists of whole rows.
            let row_bytes = tensor.data.len() / num_outputs;
            for row in 0..num_outputs {
                let row =
                    if is_interleaved { interleaved_row(row, self.config.head_dim as usize) } else { row };
                source.push(tensor.dtype, &tensor.data[row * row_bytes..(row + 1) * row_bytes]);
            }
        }
        let matrix = self.backend.make(&source)?;
        self.check_finite(parts[0].0, source.was_finite())?;
        Ok(matrix)
    }

    fn tensor(&mut self, name: TensorName, expected: &[usize]) -> Result<TensorView<'a>, ModelError> {
        let tensor = self.checkpoint.tensor(self.architecture, name)?;
        if tensor.shape != expected {
            return Err(self.shape_error(name, expected, tensor));
        }
        self.used.insert(self.checkpoint.stored_name(self.architecture, name));
        Ok(tensor)
    }

    fn shape_error(&self, name: TensorName, expected: &[usize], tensor: TensorView<'_>) -> ModelError {
        ModelError::Shape {
            path: self.checkpoint.path().to_owned(),
            name: self.checkpoint.stored_name(self.architecture, name),
            expected: expected.to_vec(),
            actual: tensor.shape.to_vec(),
        }
    }

    fn check_finite(&self, name: TensorName, finite: bool) -> Result<(), ModelError> {
        match finite {
            true => Ok(()),
            false => Err(ModelError::NotFinite {
                path: self.checkpoint.path().to_owned(),
                name: self.checkpoint.stored_name(self.architecture, name),
            }),
        }
    }

    pub(super) fn check_all_used(&self) -> Result<(), ModelError> {
        // Folders of old keep the frequencies, and a copy of the embedding as the head.
        let is_spare = |name: &str| {
            let is_copy = self.config.tied_output && name == "lm_head.weight";
            matches!(self.checkpoint, Checkpoint::Folder(_))
                && (is_copy || name.ends_with("rotary_emb.inv_freq"))
        };
        match self.checkpoint.stored_names().find(|name| !self.used.contains(*name) && !is_spare(name)) {
            None => Ok(()),
            Some(name) => Err(ModelError::UnknownTensor {
                path: self.checkpoint.path().to_owned(),
                name: name.to_owned(),
                family: self.architecture.gguf_name,
            }),
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
