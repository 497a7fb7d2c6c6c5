//! Working memory of a step on the device, allocated once for the largest step.
//!
//! Contents mean nothing between two steps, but for `sampled`: the next step may read what this one sampled.

use std::sync::Arc;

use half::bf16;

use crate::gpu::device::{Device, DeviceError};
use crate::gpu::memory::DeviceVec;
use crate::gpu::ops::{Rows, RowsOut};
use crate::gpu::weights::{GpuWeights, WeightDtype};

/// Rows that meet the output head at once: bounds the memory of the logits.
pub(super) const MAX_HEAD_ROWS: usize = 256;

pub(super) struct Buffers {
    /// `[rows, hidden_size]`: the residual stream.
    pub(super) hidden: DeviceVec<f32>,
    /// `[rows, hidden_size]`: what a matrix reads.
    pub(super) normed: Activations,
    /// `[rows, hidden_size]`: what a part adds to the stream.
    pub(super) part: DeviceVec<bf16>,
    /// `[rows, num_heads + 2 * num_kv_heads, stride]`
    pub(super) qkv: DeviceVec<bf16>,
    /// `[rows, num_heads, stride]`
    pub(super) queries: DeviceVec<bf16>,
    /// `[rows, num_heads, stride]`
    pub(super) attended: DeviceVec<bf16>,
    /// The same rounded; unused with weights of bf16.
    pub(super) rounded: Option<(DeviceVec<u8>, DeviceVec<f32>)>,
    /// `[rows, 2, intermediate_size]`
    pub(super) gate_up: DeviceVec<bf16>,
    /// `[rows, intermediate_size]`
    pub(super) gated: Activations,
    /// `[rows, hidden_size]`: behind the last norm.
    pub(super) last: DeviceVec<bf16>,
    /// `[MAX_HEAD_ROWS, hidden_size]`
    pub(super) head: DeviceVec<bf16>,
    /// `[MAX_HEAD_ROWS, vocab_size]`
    pub(super) logits: DeviceVec<f32>,
}

/// Rows in the numbers that the matrices of the model take.
pub(super) enum Activations {
    Bf16(DeviceVec<bf16>),
    /// Numbers and a scale a row.
    E4m3(DeviceVec<u8>, DeviceVec<f32>),
}

impl Activations {
    fn new(
        device: &Arc<dyn Device>,
        dtype: WeightDtype,
        num_rows: usize,
        size: usize,
    ) -> Result<Self, DeviceError> {
        Ok(match dtype {
            WeightDtype::Bf16 => Self::Bf16(DeviceVec::new(device, num_rows * size)?),
            WeightDtype::E4m3 => {
                Self::E4m3(DeviceVec::new(device, num_rows * size)?, DeviceVec::new(device, num_rows)?)
            }
        })
    }

    pub(super) fn out(&self) -> RowsOut<'_> {
        match self {
            Self::Bf16(rows) => RowsOut::Bf16(rows),
            Self::E4m3(rows, scale) => RowsOut::E4m3(rows, scale),
        }
    }

    pub(super) fn rows(&self) -> Rows<'_> {
        match self {
            Self::Bf16(rows) => Rows::Bf16(rows),
            Self::E4m3(rows, scale) => Rows::E4m3(rows, scale),
        }
    }
}

impl Buffers {
    pub(super) fn new(weights: &GpuWeights, max_rows: usize, max_seqs: usize) -> Result<Self, DeviceError> {
        let (device, config) = (&weights.device, &weights.config);
        let (hidden, intermediate) = (config.hidden_size as usize, config.intermediate_size as usize);
        let q_len = config.num_heads as usize * weights.stride;
        let kv_len = config.num_kv_heads as usize * weights.stride;
        let dtype = weights.options.weight_dtype;
        let head_rows = max_seqs.min(MAX_HEAD_ROWS);
        let rounded = || Ok((DeviceVec::new(device, max_rows * q_len)?, DeviceVec::new(device, max_rows)?));
        Ok(Self {
            hidden: DeviceVec::new(device, max_rows * hidden)?,
            normed: Activations::new(device, dtype, max_rows, hidden)?,
            part: DeviceVec::new(device, max_rows * hidden)?,
            qkv: DeviceVec::new(device, max_rows * (q_len + 2 * kv_len))?,
            queries: DeviceVec::new(device, max_rows * q_len)?,
            attended: DeviceVec::new(device, max_rows * q_len)?,
            rounded: (dtype == WeightDtype::E4m3).then(rounded).transpose()?,
            gate_up: DeviceVec::new(device, max_rows * 2 * intermediate)?,
            gated: Activations::new(device, dtype, max_rows, intermediate)?,
            last: DeviceVec::new(device, max_rows * hidden)?,
            head: DeviceVec::new(device, head_rows * hidden)?,
            logits: DeviceVec::new(device, head_rows * config.vocab_size as usize)?,
        })
    }
}
