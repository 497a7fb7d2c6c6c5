//! Working memory of a step on the device, allocated once for the largest step.
//!
//! Contents mean nothing between two steps.

use std::sync::Arc;

use crate::gpu::device::{Device, DeviceError};
use crate::gpu::half_vec::{HalfDtype, HalfVec};
use crate::gpu::memory::DeviceVec;
use crate::gpu::ops::{Rows, RowsOut};
use crate::gpu::weights::{GpuWeights, WeightDtype};
use crate::models::ExpertsConfig;

/// Rows that meet the output head at once: bounds the memory of the logits.
pub(super) const MAX_HEAD_ROWS: usize = 256;

pub(super) struct Buffers {
    /// `[rows, hidden_size]`: the residual stream.
    pub(super) hidden: DeviceVec<f32>,
    /// `[rows, hidden_size]`: what a matrix reads.
    pub(super) normed: Activations,
    /// `[rows, hidden_size]`: what a part adds to the stream.
    pub(super) part: HalfVec,
    /// `[rows, num_heads + 2 * num_kv_heads, stride]`
    pub(super) qkv: HalfVec,
    /// `[rows, num_heads, stride]`
    pub(super) queries: HalfVec,
    /// `[rows, num_heads, stride]`
    pub(super) attended: HalfVec,
    /// The same rounded; unused where weights are not rounded.
    pub(super) rounded: Option<(DeviceVec<u8>, DeviceVec<f32>)>,
    /// `[rows, 2, intermediate_size]`; with experts, for each of a row's.
    pub(super) gate_up: HalfVec,
    /// `[rows, intermediate_size]`, likewise.
    pub(super) gated: Activations,
    pub(super) experts: Option<ExpertBuffers>,
    /// `[rows, hidden_size]`: behind the last norm.
    pub(super) last: HalfVec,
    /// `[MAX_HEAD_ROWS, hidden_size]`
    pub(super) head: HalfVec,
    /// `[MAX_HEAD_ROWS, vocab_size]`
    pub(super) logits: DeviceVec<f32>,
}

/// Of a feed-forward part made of experts; a route is one row's use of one expert.
pub(super) struct ExpertBuffers {
    /// `[rows, num_experts]`
    pub(super) scores: DeviceVec<f32>,
    /// `[rows, num_experts_per_token]` each.
    pub(super) experts: DeviceVec<u32>,
    pub(super) weights: DeviceVec<f32>,
    pub(super) routes_of: DeviceVec<u32>,
    /// `[num_experts + 1]`
    pub(super) indptr: DeviceVec<u32>,
    /// `[routes]`
    pub(super) rows: DeviceVec<u32>,
    /// `[routes, hidden_size]`
    pub(super) answers: HalfVec,
}

impl ExpertBuffers {
    fn new(weights: &GpuWeights, config: ExpertsConfig, max_rows: usize) -> Result<Self, DeviceError> {
        let device = &weights.device;
        let num_routes = max_rows * config.num_experts_per_token as usize;
        Ok(Self {
            scores: DeviceVec::new(device, max_rows * config.num_experts as usize)?,
            experts: DeviceVec::new(device, num_routes)?,
            weights: DeviceVec::new(device, num_routes)?,
            routes_of: DeviceVec::new(device, num_routes)?,
            indptr: DeviceVec::new(device, config.num_experts as usize + 1)?,
            rows: DeviceVec::new(device, num_routes)?,
            answers: HalfVec::new(device, weights.dtype, num_routes * weights.config.hidden_size as usize)?,
        })
    }
}

/// Rows in the numbers that the matrices of the model take.
pub(super) enum Activations {
    Half(HalfVec),
    /// Numbers and a scale a row.
    E4m3(DeviceVec<u8>, DeviceVec<f32>),
}

impl Activations {
    fn new(
        device: &Arc<dyn Device>,
        (half, dtype): (HalfDtype, WeightDtype),
        num_rows: usize,
        size: usize,
    ) -> Result<Self, DeviceError> {
        Ok(match dtype {
            WeightDtype::Half => Self::Half(HalfVec::new(device, half, num_rows * size)?),
            WeightDtype::E4m3 => {
                Self::E4m3(DeviceVec::new(device, num_rows * size)?, DeviceVec::new(device, num_rows)?)
            }
        })
    }

    pub(super) fn out(&self) -> RowsOut<'_> {
        match self {
            Self::Half(rows) => RowsOut::Half(rows),
            Self::E4m3(rows, scale) => RowsOut::E4m3(rows, scale),
        }
    }

    pub(super) fn rows(&self) -> Rows<'_> {
        match self {
            Self::Half(rows) => Rows::Half(rows),
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
        let halves = |len| HalfVec::new(device, weights.dtype, len);
        let activations = |rows, size| Activations::new(device, (weights.dtype, dtype), rows, size);
        let head_rows = max_seqs.min(MAX_HEAD_ROWS);
        let num_routes =
            max_rows * config.experts.map_or(1, |experts| experts.num_experts_per_token as usize);
        let experts = |experts| ExpertBuffers::new(weights, experts, max_rows);
        let rounded = || Ok((DeviceVec::new(device, max_rows * q_len)?, DeviceVec::new(device, max_rows)?));
        Ok(Self {
            hidden: DeviceVec::new(device, max_rows * hidden)?,
            normed: activations(max_rows, hidden)?,
            part: halves(max_rows * hidden)?,
            qkv: halves(max_rows * (q_len + 2 * kv_len))?,
            queries: halves(max_rows * q_len)?,
            attended: halves(max_rows * q_len)?,
            rounded: (dtype == WeightDtype::E4m3).then(rounded).transpose()?,
            gate_up: halves(num_routes * 2 * intermediate)?,
            gated: activations(num_routes, intermediate)?,
            experts: config.experts.map(experts).transpose()?,
            last: halves(max_rows * hidden)?,
            head: halves(head_rows * hidden)?,
            logits: DeviceVec::new(device, head_rows * config.vocab_size as usize)?,
        })
    }
}
