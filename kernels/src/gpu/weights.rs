//! The weights of a model in the memory of a GPU.
//!
//! Rows go from the mapped file through pinned buffers, filled by all cores while the copy before is under way. Heads
//! are laid out for the attention kernel, which knows a few dimensions: narrower ones are padded with zeros here, and
//! nothing else sees it. Matrices are bf16 or f16, or e4m3 with a scale for each output; embedding and output head are never
//! rounded so.

mod dtype;
mod experts;
mod random;
mod upload;

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

pub(super) use self::experts::GpuExperts;
use self::upload::Uploader;
use super::device::{Device, DeviceError, GemmInput};
use super::half_vec::{HalfDtype, HalfVec};
use super::memory::DeviceVec;
use super::ops::{KvDtype, Matrix, MatrixValues, ROW_MULTIPLE, quantize};
use super::{Gpu, GpuError};
use crate::backend::RopeTable;
use crate::models::weights::{Dense, FeedForward, Layers, Matrices, MatrixRole, MatrixSource};
use crate::models::{Activation, Checkpoint, ModelConfig, ModelError};

/// Head dimensions of the attention kernels.
const HEAD_DIMS: [usize; 3] = [64, 128, 256];

/// Numbers of the large matrices.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum WeightDtype {
    /// As activations.
    #[default]
    Half,
    /// Rounded to 8 bits at load, activations as they come.
    E4m3,
}

/// How a model computes on a GPU.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GpuOptions {
    /// Of activations; if absent, as most weights are stored: f16 where they are f16, else bf16.
    pub dtype: Option<HalfDtype>,
    pub weight_dtype: WeightDtype,
    pub kv_dtype: KvDtype,
    /// Answers do not depend on what else is in the batch; costs speed.
    pub deterministic: bool,
}

/// The weights of one model on one GPU.
pub struct GpuWeights {
    pub config: ModelConfig,
    pub options: GpuOptions,
    /// Of activations.
    pub(super) dtype: HalfDtype,
    pub(super) device: Arc<dyn Device>,
    /// Numbers from one head to the next.
    pub(super) stride: usize,
    pub(super) activation: Activation,
    pub(super) scaled_embedding: bool,
    /// `[vocab, hidden_size]`
    pub(super) embedding: Matrix,
    /// None where the embedding is the output head too.
    pub(super) output: Option<Matrix>,
    pub(super) output_norm: DeviceVec<f32>,
    pub(super) layers: Vec<GpuLayer>,
    pub(super) rope: RopeTable,
    pub(super) window_rope: Option<RopeTable>,
}

pub(super) struct GpuLayer {
    pub(super) attention_norm: DeviceVec<f32>,
    pub(super) qkv: Matrix,
    pub(super) qkv_bias: Option<DeviceVec<f32>>,
    pub(super) head_norms: Option<[DeviceVec<f32>; 2]>,
    pub(super) attention_output: Matrix,
    pub(super) post_attention_norm: Option<DeviceVec<f32>>,
    pub(super) feed_forward_norm: DeviceVec<f32>,
    pub(super) feed_forward: GpuFeedForward,
    pub(super) post_feed_forward_norm: Option<DeviceVec<f32>>,
}

pub(super) enum GpuFeedForward {
    Dense {
        /// Gates, then ups.
        gate_up: Matrix,
        down: Matrix,
    },
    Experts(GpuExperts),
}

impl GpuWeights {
    pub fn load(gpu: &Gpu, checkpoint: &Checkpoint, options: GpuOptions) -> Result<Arc<Self>, ModelError> {
        let config = checkpoint.config()?;
        experts::check(&config, options)?;
        if options.weight_dtype == WeightDtype::E4m3 && !gpu.device.can_multiply(GemmInput::E4m3) {
            return Err(GpuError::NoE4m3.into());
        }
        let heads = Heads::of(&config)?;
        let dtype = dtype::choose(checkpoint, &config, options)?;
        check_memory(&*gpu.device, &config, heads, options)?;
        let maker = Maker {
            device: Arc::clone(&gpu.device),
            options,
            dtype,
            heads,
            uploader: Mutex::new(Uploader::new(&gpu.device)?),
        };
        let layers = Layers::load(checkpoint, &config, maker)?;
        Ok(Arc::new(Self::from_layers(layers, options)?))
    }

    /// The numbers of a layer, padded heads and all, and of embedding and head.
    fn from_layers(layers: Layers<Maker>, options: GpuOptions) -> Result<Self, ModelError> {
        let device = Arc::clone(&layers.backend.device);
        let Maker { heads, dtype, .. } = layers.backend;
        let architecture = layers.architecture;
        let put = |values: &[f32]| DeviceVec::from_slice(&device, values);
        let put_option = |values: Option<Vec<f32>>| values.map(|values| put(&values)).transpose();
        let (config, parts) = (layers.config.clone(), layers.into_parts());
        let mut gpu_layers = Vec::with_capacity(parts.layers.len());
        for layer in parts.layers {
            let feed_forward = match layer.feed_forward {
                FeedForward::Dense(Dense { gate_up, down }) => GpuFeedForward::Dense { gate_up, down },
                FeedForward::Experts(experts) => {
                    GpuFeedForward::Experts(GpuExperts::stack(&device, experts)?)
                }
            };
            gpu_layers.push(GpuLayer {
                attention_norm: put(&layer.attention_norm)?,
                qkv: layer.qkv,
                qkv_bias: put_option(layer.qkv_bias.map(|bias| heads.spread(&bias)))?,
                head_norms: match layer.head_norms {
                    Some([q, k]) => Some([put(&q)?, put(&k)?]),
                    None => None,
                },
                attention_output: layer.attention_output,
                post_attention_norm: put_option(layer.post_attention_norm)?,
                feed_forward_norm: put(&layer.feed_forward_norm)?,
                feed_forward,
                post_feed_forward_norm: put_option(layer.post_feed_forward_norm)?,
            });
        }
        Ok(Self {
            stride: heads.stride,
            activation: architecture.activation,
            scaled_embedding: architecture.scaled_embedding,
            embedding: parts.embedding,
            output: parts.output,
            output_norm: put(&parts.output_norm)?,
            layers: gpu_layers,
            rope: parts.rope,
            window_rope: parts.window_rope,
            device: Arc::clone(&device),
            config,
            dtype,
            options,
        })
    }

    /// The numbers of the matrices, for the user.
    pub fn number_name(&self) -> &'static str {
        match self.options.weight_dtype {
            WeightDtype::Half => self.dtype.name(),
            WeightDtype::E4m3 => "fp8",
        }
    }

    pub(super) fn output(&self) -> &Matrix {
        self.output.as_ref().unwrap_or(&self.embedding)
    }

    /// Bytes that one token takes in the cache.
    pub fn kv_bytes_per_token(&self) -> u64 {
        let heads = 2 * u64::from(self.config.num_kv_heads) * self.stride as u64;
        heads * self.options.kv_dtype.size_bytes() as u64 * u64::from(self.config.num_layers)
    }
}

impl fmt::Debug for GpuWeights {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GpuWeights")
            .field("config", &self.config)
            .field("options", &self.options)
            .finish_non_exhaustive()
    }
}

/// Refuses what cannot fit before anything is copied.
fn check_memory(
    device: &dyn Device,
    config: &ModelConfig,
    heads: Heads,
    options: GpuOptions,
) -> Result<(), ModelError> {
    let wanted = matrix_bytes(config, heads.stride, options);
    let memory = device.memory()?;
    if wanted > memory.free {
        let (free, total) = (memory.free, memory.total);
        return Err(DeviceError::OutOfMemory { wanted, free, total }.into());
    }
    Ok(())
}

/// Bytes of all matrices.
fn matrix_bytes(config: &ModelConfig, stride: usize, options: GpuOptions) -> u64 {
    let [hidden, intermediate, num_layers, vocab_size] =
        [config.hidden_size, config.intermediate_size, config.num_layers, config.vocab_size].map(u64::from);
    let heads = (2 * u64::from(config.num_heads) + 2 * u64::from(config.num_kv_heads)) * stride as u64;
    let size = match options.weight_dtype {
        WeightDtype::Half => size_of::<u16>(),
        WeightDtype::E4m3 => 1,
    };
    let num_experts = config.experts.map_or(1, |experts| u64::from(experts.num_experts));
    let num_tables = if config.tied_output { 1 } else { 2 };
    num_layers * hidden * (heads + 3 * intermediate * num_experts) * size as u64
        + num_tables * vocab_size * hidden * size_of::<u16>() as u64
}

/// Numbers from one head to the next: the head dimension of the attention kernel.
pub(super) fn head_stride(head_dim: usize) -> Result<usize, GpuError> {
    let stride = HEAD_DIMS.into_iter().find(|&stride| stride >= head_dim && head_dim.is_multiple_of(4));
    stride.ok_or(GpuError::HeadDim { head_dim: head_dim as u32 })
}

/// How heads are laid out.
#[derive(Clone, Copy, Debug)]
struct Heads {
    head_dim: usize,
    stride: usize,
}

impl Heads {
    fn of(config: &ModelConfig) -> Result<Self, ModelError> {
        let head_dim = config.head_dim as usize;
        let stride = head_stride(head_dim)?;
        for (what, size) in
            [("hidden size", config.hidden_size), ("intermediate size", config.intermediate_size)]
        {
            if !size.is_multiple_of(ROW_MULTIPLE as u32) {
                return Err(GpuError::Size { what, size, multiple: ROW_MULTIPLE as u32 }.into());
            }
        }
        Ok(Self { head_dim, stride })
    }

    /// Heads apart by the stride, zeros between.
    fn spread(&self, heads: &[f32]) -> Vec<f32> {
        let mut out = vec![0.0; heads.len() / self.head_dim * self.stride];
        for (head, out) in heads.chunks_exact(self.head_dim).zip(out.chunks_exact_mut(self.stride)) {
            out[..self.head_dim].copy_from_slice(head);
        }
        out
    }
}

/// Makes matrices on a GPU.
pub(super) struct Maker {
    device: Arc<dyn Device>,
    options: GpuOptions,
    dtype: HalfDtype,
    heads: Heads,
    uploader: Mutex<Uploader>,
}

impl Matrices for Maker {
    type Matrix = Matrix;

    fn make(&self, source: &MatrixSource<'_>) -> Result<Matrix, ModelError> {
        let Heads { head_dim, stride } = self.heads;
        let (mut num_outputs, mut num_inputs) = (source.num_outputs(), source.num_inputs);
        match source.role {
            MatrixRole::Qkv => num_outputs = num_outputs / head_dim * stride,
            MatrixRole::AttentionOutput => num_inputs = num_inputs / head_dim * stride,
            _ => {}
        }
        let values = HalfVec::new(&self.device, self.dtype, num_outputs * num_inputs)?;
        self.fill(source, num_inputs, &values)?;
        Ok(finish_matrix(&self.device, source.role, self.options, num_outputs, num_inputs, values)?)
    }

    fn finish(&self) -> Result<(), ModelError> {
        Ok(())
    }
}

impl Maker {
    /// For matrices in bf16 that have nothing to do with heads.
    pub(super) fn without_heads(device: &Arc<dyn Device>) -> Result<Self, DeviceError> {
        Ok(Self {
            device: Arc::clone(device),
            options: GpuOptions::default(),
            dtype: HalfDtype::Bf16,
            heads: Heads { head_dim: HEAD_DIMS[0], stride: HEAD_DIMS[0] },
            uploader: Mutex::new(Uploader::new(device)?),
        })
    }

    /// Brings the numbers of a matrix to the device, heads apart.
    pub(super) fn fill(
        &self,
        source: &MatrixSource<'_>,
        num_inputs: usize,
        values: &HalfVec,
    ) -> Result<(), DeviceError> {
        let Heads { head_dim, stride } = self.heads;
        let fill_row = |row: usize, wide: &mut [f32], out: &mut [u16]| match source.role {
            MatrixRole::Qkv if row % stride >= head_dim => out.fill(0),
            MatrixRole::Qkv => {
                source.fill_half(self.dtype, row / stride * head_dim + row % stride, wide, out)
            }
            MatrixRole::AttentionOutput => {
                // Heads are moved apart from the last on, each to a place that was read already.
                let (narrow, num_heads) = (source.num_inputs, source.num_inputs / head_dim);
                source.fill_half(self.dtype, row, wide, &mut out[..narrow]);
                for head in (0..num_heads).rev() {
                    out.copy_within(head * head_dim..(head + 1) * head_dim, head * stride);
                    out[head * stride + head_dim..(head + 1) * stride].fill(0);
                }
            }
            _ => source.fill_half(self.dtype, row, wide, out),
        };
        let mut uploader = self.uploader.lock().unwrap_or_else(PoisonError::into_inner);
        uploader.upload(num_inputs, source.num_inputs, &fill_row, values)
    }
}

/// Rounds a matrix, where the options ask for it.
fn finish_matrix(
    device: &Arc<dyn Device>,
    role: MatrixRole,
    options: GpuOptions,
    num_outputs: usize,
    num_inputs: usize,
    values: HalfVec,
) -> Result<Matrix, DeviceError> {
    let stays = matches!(role, MatrixRole::Embedding | MatrixRole::Output | MatrixRole::Router);
    let values = match options.weight_dtype {
        WeightDtype::E4m3 if !stays => {
            let rounded = DeviceVec::new(device, num_outputs * num_inputs)?;
            let scale = DeviceVec::new(device, num_outputs)?;
            quantize(&**device, num_outputs, num_inputs, &values, &rounded, &scale)?;
            MatrixValues::E4m3(rounded, scale)
        }
        _ => MatrixValues::Half(values),
    };
    Ok(Matrix { num_outputs, num_inputs, values })
}

impl From<DeviceError> for ModelError {
    fn from(error: DeviceError) -> Self {
        GpuError::Device(error).into()
    }
}
