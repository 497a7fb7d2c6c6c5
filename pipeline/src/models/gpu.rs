//! Models on GPUs: opening the devices, loading weights and making the model of an engine.
//!
//! The only place that turns the keys of a definition into what the kernels take. Each GPU has weights and a KV cache of
//! its own; they are loaded one after the other.

use std::fmt;
use std::sync::Arc;

use tidemill_kernels::gpu::{
    Gpu, GpuModel, GpuModelConfig, GpuOptions, GpuWeights, HalfDtype, KvDtype, KvMemory, WeightDtype,
};
use tidemill_kernels::models::{Checkpoint, ModelConfig, ModelError};

use super::load::{LoadError, pages_in, useful_pages};
use crate::plan::engine::{DeviceKind, EnginePlan};
use crate::spec::{Dtype, KvCacheDtype, Quantization};

/// Of pinned memory of the host, where preempted sequences keep their pages.
const HOST_KV_BYTES: u64 = 1 << 30;

/// Opened GPUs, and how a model computes on them.
#[derive(Debug)]
pub struct Gpus {
    gpus: Vec<(usize, Gpu)>,
    options: GpuOptions,
}

impl Gpus {
    /// Opens all of them, or none.
    pub fn open(ordinals: &[usize], plan: &EnginePlan) -> Result<Self, LoadError> {
        let open = |&ordinal: &usize| {
            let gpu = Gpu::open(ordinal).map_err(|source| LoadError::Gpu {
                name: format!("cuda:{ordinal}"),
                source: Box::new(source),
            })?;
            Ok::<_, LoadError>((ordinal, gpu))
        };
        Ok(Self { gpus: ordinals.iter().map(open).collect::<Result<_, _>>()?, options: options(plan) })
    }

    pub fn first(&self) -> &Gpu {
        &self.gpus[0].1
    }

    pub fn options(&self) -> GpuOptions {
        self.options
    }

    /// Random weights on the first.
    pub(super) fn random(&self, config: ModelConfig) -> Result<Arc<GpuWeights>, ModelError> {
        GpuWeights::random(self.first(), config, self.options)
    }

    /// The weights of a model on each of them.
    pub(super) fn load(
        &self,
        checkpoint: &Checkpoint,
        say: &dyn Fn(&str),
    ) -> Result<Vec<Arc<GpuWeights>>, ModelError> {
        let load = |(ordinal, gpu): &(usize, Gpu)| {
            say(&format!("loading weights to cuda:{ordinal}"));
            GpuWeights::load(gpu, checkpoint, self.options)
        };
        self.gpus.iter().map(load).collect()
    }
}

/// Their names.
impl fmt::Display for Gpus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, (ordinal, gpu)) in self.gpus.iter().enumerate() {
            write!(f, "{}cuda:{ordinal} ({})", if index == 0 { "" } else { ", " }, gpu.name())?;
        }
        Ok(())
    }
}

fn options(plan: &EnginePlan) -> GpuOptions {
    GpuOptions {
        dtype: match plan.dtype {
            Dtype::Auto => None,
            Dtype::Bfloat16 => Some(HalfDtype::Bf16),
            Dtype::Float16 => Some(HalfDtype::F16),
        },
        weight_dtype: match plan.quantization {
            None => WeightDtype::Half,
            Some(Quantization::Fp8) => WeightDtype::E4m3,
        },
        kv_dtype: match plan.kv_cache_dtype {
            KvCacheDtype::Auto => KvDtype::Half,
            KvCacheDtype::Fp8 => KvDtype::E4m3,
        },
        deterministic: plan.deterministic,
    }
}

/// The model of one of `num_engines` engines, each on a GPU of its own.
pub(super) fn model(
    weights: &Arc<GpuWeights>,
    plan: &EnginePlan,
    name: &str,
    digest: &str,
    num_engines: usize,
) -> Result<GpuModel, LoadError> {
    let bounds = plan.bounds(DeviceKind::Gpu);
    let bytes_per_token = weights.kv_bytes_per_token();
    let useful = useful_pages(plan.page_size, bounds.max_num_seqs, weights.config.max_position);
    let max_pages = match plan.kv_cache_bytes {
        Some(bytes) => pages_in(bytes, bytes_per_token, plan.page_size, num_engines)?.min(useful),
        None => useful,
    };
    let host_pages = HOST_KV_BYTES / (bytes_per_token * u64::from(plan.page_size));
    let config = GpuModelConfig {
        page_size: plan.page_size,
        kv_memory: KvMemory::Utilization { share: plan.gpu_memory_utilization(), max_pages },
        max_num_batched_tokens: bounds.max_num_batched_tokens,
        max_num_seqs: bounds.max_num_seqs,
        num_host_pages: u32::try_from(host_pages).unwrap_or(u32::MAX).min(max_pages),
    };
    GpuModel::new(Arc::clone(weights), config, name, digest)
        .map_err(|source| LoadError::Model { name: name.to_owned(), source: Box::new(source) })
}
