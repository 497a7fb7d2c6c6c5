//! Which 16-bit floats a model computes in.

use super::{GpuError, GpuOptions, HalfDtype};
use crate::models::checkpoint::TensorName;
use crate::models::{Checkpoint, Family, ModelConfig, ModelError};
use crate::quant::Dtype;

/// Has the numbers of most weights: there is one in each layer.
const TYPICAL: TensorName = TensorName { layer: Some(0), part: "attn_q.weight", expert: None };

/// What the options ask for, or what the weights were made for.
pub(super) fn choose(
    checkpoint: &Checkpoint,
    config: &ModelConfig,
    options: GpuOptions,
) -> Result<HalfDtype, ModelError> {
    // Its activations go up to hundreds of thousands.
    let needs_range = config.family == Family::Gemma3;
    match options.dtype {
        Some(HalfDtype::F16) if needs_range => Err(GpuError::NeedsRange.into()),
        Some(dtype) => Ok(dtype),
        None => {
            let stored = checkpoint.tensor(config.family.architecture(), TYPICAL)?.dtype;
            Ok(if stored == Dtype::F16 && !needs_range { HalfDtype::F16 } else { HalfDtype::Bf16 })
        }
    }
}
