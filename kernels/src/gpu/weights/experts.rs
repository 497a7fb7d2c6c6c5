//! The matrices of a layer's experts, one behind the other, as the grouped product reads them.

use std::sync::Arc;

use super::{GpuOptions, Maker, WeightDtype};
use crate::gpu::GpuError;
use crate::gpu::device::{Device, DeviceError};
use crate::gpu::half_vec::{HalfDtype, HalfVec};
use crate::gpu::ops::Matrix;
use crate::models::weights::{Dense, Experts};
use crate::models::{ExpertsConfig, ModelConfig, ModelError};

pub(in crate::gpu) struct GpuExperts {
    pub(in crate::gpu) config: ExpertsConfig,
    /// A score for each expert.
    pub(in crate::gpu) router: Matrix,
    /// `[num_experts, 2 * intermediate_size, hidden_size]`: gates, then ups.
    pub(in crate::gpu) gate_up: HalfVec,
    /// `[num_experts, hidden_size, intermediate_size]`
    pub(in crate::gpu) down: HalfVec,
}

impl GpuExperts {
    /// Copies matrix by matrix and frees what it copied: of one layer there is twice as much for a moment.
    pub(super) fn stack(device: &Arc<dyn Device>, experts: Experts<Maker>) -> Result<Self, DeviceError> {
        let (gate_ups, downs) =
            experts.experts.into_iter().map(|Dense { gate_up, down }| (gate_up, down)).unzip();
        let (gate_up, down) = (stack(device, gate_ups)?, stack(device, downs)?);
        Ok(Self { config: experts.config, router: experts.router, gate_up, down })
    }
}

fn stack(device: &Arc<dyn Device>, matrices: Vec<Matrix>) -> Result<HalfVec, DeviceError> {
    let dtype = matrices.first().map_or(HalfDtype::default(), |matrix| matrix.half().dtype());
    let len = matrices.iter().map(|matrix| matrix.half().len()).sum();
    let all = HalfVec::new(device, dtype, len)?;
    let mut first = 0;
    for matrix in matrices {
        let part = matrix.half();
        // SAFETY: the parts are of the length summed above, and each stays until it is dropped, behind a wait.
        unsafe { device.copy(all.at(first), part.address(), part.len() * size_of::<u16>())? };
        first += part.len();
    }
    Ok(all)
}

/// Experts are computed in 16 bits only.
pub(super) fn check(config: &ModelConfig, options: GpuOptions) -> Result<(), ModelError> {
    match (config.experts, options.weight_dtype) {
        (Some(_), WeightDtype::E4m3) => Err(GpuError::RoundedExperts.into()),
        _ => Ok(()),
    }
}
