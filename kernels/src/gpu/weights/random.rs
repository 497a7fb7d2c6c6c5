//! Weights drawn on the device, to measure the speed of shapes whose weights are not at hand.

use std::sync::Arc;

use super::{GpuFeedForward, GpuLayer, GpuOptions, GpuWeights, Heads, finish_matrix};
use crate::backend::RopeTable;
use crate::gpu::Gpu;
use crate::gpu::half_vec::HalfVec;
use crate::gpu::memory::DeviceVec;
use crate::gpu::ops::{Matrix, randomize};
use crate::models::weights::MatrixRole;
use crate::models::{ModelConfig, ModelError};

impl GpuWeights {
    /// Random weights of a dense model; answers are noise, but they cost what real ones do. Experts are not drawn.
    pub fn random(gpu: &Gpu, config: ModelConfig, options: GpuOptions) -> Result<Arc<Self>, ModelError> {
        assert!(config.experts.is_none(), "random weights are those of a dense model");
        let heads = Heads::of(&config)?;
        let device = &gpu.device;
        let dtype = options.dtype.unwrap_or_default();
        let mut seed = 0;
        let mut matrix = |role, num_outputs: usize, num_inputs: usize| -> Result<Matrix, ModelError> {
            seed += 1;
            let values = HalfVec::new(device, dtype, num_outputs * num_inputs)?;
            randomize(&**device, seed, (num_inputs as f32).powf(-0.5), &values)?;
            Ok(finish_matrix(device, role, options, num_outputs, num_inputs, values)?)
        };
        let ones = |len: usize| DeviceVec::from_slice(device, &vec![1.0; len]);
        let architecture = config.family.architecture();
        let [hidden, intermediate, vocab] =
            [config.hidden_size, config.intermediate_size, config.vocab_size].map(|size| size as usize);
        let (num_heads, num_kv_heads) = (config.num_heads as usize, config.num_kv_heads as usize);
        let norm = |part, len| architecture.has(part).then(|| ones(len)).transpose();
        let mut layers = Vec::new();
        for _ in 0..config.num_layers {
            let qkv_len = (num_heads + 2 * num_kv_heads) * heads.stride;
            let q_norm = norm("attn_q_norm.weight", heads.head_dim)?;
            let k_norm = norm("attn_k_norm.weight", heads.head_dim)?;
            layers.push(GpuLayer {
                attention_norm: ones(hidden)?,
                qkv: matrix(MatrixRole::Qkv, qkv_len, hidden)?,
                qkv_bias: norm("attn_q.bias", qkv_len)?,
                head_norms: q_norm.zip(k_norm).map(|(q, k)| [q, k]),
                attention_output: matrix(MatrixRole::AttentionOutput, hidden, num_heads * heads.stride)?,
                post_attention_norm: norm("post_attention_norm.weight", hidden)?,
                feed_forward_norm: ones(hidden)?,
                feed_forward: GpuFeedForward::Dense {
                    gate_up: matrix(MatrixRole::GateUp, 2 * intermediate, hidden)?,
                    down: matrix(MatrixRole::Down, hidden, intermediate)?,
                },
                post_feed_forward_norm: norm("post_ffw_norm.weight", hidden)?,
            });
        }
        let max_position = config.max_position as usize;
        let table = |frequencies| RopeTable::new(frequencies, max_position);
        let tied = config.tied_output;
        Ok(Arc::new(Self {
            stride: heads.stride,
            activation: architecture.activation,
            scaled_embedding: architecture.scaled_embedding,
            embedding: matrix(MatrixRole::Embedding, vocab, hidden)?,
            output: (!tied).then(|| matrix(MatrixRole::Output, vocab, hidden)).transpose()?,
            output_norm: ones(hidden)?,
            layers,
            rope: table(config.rope.frequencies(heads.head_dim)),
            window_rope: config.window_rope.map(|rope| table(rope.frequencies(heads.head_dim))),
            device: Arc::clone(device),
            config,
            dtype,
            options,
        }))
    }
}
