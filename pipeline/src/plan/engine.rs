//! The bounds and the numbers of the engines that a definition asks for.
//!
//! What the device decides is `None` here until it is known; see [`EnginePlan::bounds`]. What only a GPU can do is
//! refused here for a device that is surely none.

use serde::Serialize;
use serde_json::{Value, json};

use super::device::Devices;
use super::{Result, at_least};
use crate::spec::{Definition, Dtype, KvCacheDtype, Quantization, Spanned};

const CPU_BOUNDS: Bounds = Bounds { max_num_seqs: 32, max_num_batched_tokens: 512 };
const GPU_BOUNDS: Bounds = Bounds { max_num_seqs: 256, max_num_batched_tokens: 8192 };
const DEFAULT_PAGE_SIZE: u32 = 64;
/// Of all engines on a CPU together.
const DEFAULT_KV_CACHE_MEMORY: u64 = 192 << 20;
const DEFAULT_GPU_MEMORY_UTILIZATION: f64 = 0.9;

/// The engines, as far as they are known before their devices.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct EnginePlan {
    /// What a device can fill, if not given.
    pub max_num_seqs: Option<u32>,
    /// The same.
    pub max_num_batched_tokens: Option<u32>,
    pub page_size: u32,
    /// Of all engines together; on a GPU all that is left, if not given.
    pub kv_cache_bytes: Option<u64>,
    pub gpu_memory_utilization: Option<f64>,
    pub deterministic: bool,
    pub dtype: Dtype,
    pub quantization: Option<Quantization>,
    pub kv_cache_dtype: KvCacheDtype,
}

impl Default for EnginePlan {
    fn default() -> Self {
        Self {
            max_num_seqs: None,
            max_num_batched_tokens: None,
            page_size: DEFAULT_PAGE_SIZE,
            kv_cache_bytes: None,
            gpu_memory_utilization: None,
            deterministic: false,
            dtype: Dtype::Auto,
            quantization: None,
            kv_cache_dtype: KvCacheDtype::Auto,
        }
    }
}

/// What decides how much an engine takes at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeviceKind {
    Cpu,
    Gpu,
}

/// The bounds of an engine whose device is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bounds {
    pub max_num_seqs: u32,
    pub max_num_batched_tokens: u32,
}

impl EnginePlan {
    pub fn bounds(&self, kind: DeviceKind) -> Bounds {
        let defaults = match kind {
            DeviceKind::Cpu => CPU_BOUNDS,
            DeviceKind::Gpu => GPU_BOUNDS,
        };
        Bounds {
            max_num_seqs: self.max_num_seqs.unwrap_or(defaults.max_num_seqs),
            max_num_batched_tokens: self.max_num_batched_tokens.unwrap_or(defaults.max_num_batched_tokens),
        }
    }

    /// Memory for keys and values of all engines on a CPU.
    pub fn cpu_kv_cache_bytes(&self) -> u64 {
        self.kv_cache_bytes.unwrap_or(DEFAULT_KV_CACHE_MEMORY)
    }

    pub fn gpu_memory_utilization(&self) -> f64 {
        self.gpu_memory_utilization.unwrap_or(DEFAULT_GPU_MEMORY_UTILIZATION)
    }

    /// Adds what changes answers, where it is not the default.
    pub(super) fn add_numbers(&self, fingerprint: &mut Value) {
        if self.dtype != Dtype::Auto {
            fingerprint["dtype"] = json!(self.dtype);
        }
        if let Some(quantization) = self.quantization {
            fingerprint["quantization"] = json!(quantization);
        }
        if self.kv_cache_dtype != KvCacheDtype::Auto {
            fingerprint["kv_cache_dtype"] = json!(self.kv_cache_dtype);
        }
        if self.deterministic {
            fingerprint["deterministic"] = json!(true);
        }
    }
}

/// Checks the engines of a definition.
pub(super) fn engine(definition: &Definition, devices: &Devices) -> Result<EnginePlan> {
    let spec = &definition.spec.engine;
    let number = |value: Option<&Spanned<u32>>, key| -> Result<Option<u32>> {
        let number = at_least(definition, value, 1, key, |number| u64::from(*number))?;
        Ok(number.map(|number| number as u32))
    };
    let page_size = number(spec.page_size.as_ref(), "engine.page_size")?.unwrap_or(DEFAULT_PAGE_SIZE);
    if let Some(value) = &spec.page_size
        && !page_size.is_power_of_two()
    {
        let help = Some("16 is a good size".to_owned());
        return Err(definition.error(value, "engine.page_size", "the page size is no power of two", help));
    }
    let kv_cache_bytes =
        at_least(definition, spec.kv_cache_memory.as_ref(), 1, "engine.kv_cache_memory", |bytes| bytes.0)?;
    Ok(EnginePlan {
        max_num_seqs: number(spec.max_num_seqs.as_ref(), "engine.max_num_seqs")?,
        max_num_batched_tokens: number(
            spec.max_num_batched_tokens.as_ref(),
            "engine.max_num_batched_tokens",
        )?,
        page_size,
        kv_cache_bytes,
        gpu_memory_utilization: utilization(definition)?,
        deterministic: spec.deterministic.unwrap_or(false),
        dtype: dtype(definition, devices)?,
        quantization: quantization(definition, devices)?,
        kv_cache_dtype: kv_cache_dtype(definition, devices)?,
    })
}

fn utilization(definition: &Definition) -> Result<Option<f64>> {
    const KEY: &str = "engine.gpu_memory_utilization";
    let Some(value) = &definition.spec.engine.gpu_memory_utilization else { return Ok(None) };
    let share = value.value;
    if !(share > 0.0 && share <= 1.0) {
        let message = format!("{KEY} is {share}, it must be above 0 and at most 1");
        let help = Some("it is the share of a GPU's memory that may be filled, such as 0.9".to_owned());
        return Err(definition.error(value, KEY, message, help));
    }
    Ok(Some(share))
}

fn dtype(definition: &Definition, devices: &Devices) -> Result<Dtype> {
    let Some(value) = &definition.spec.engine.dtype else { return Ok(Dtype::Auto) };
    if value.value != Dtype::Auto {
        needs_gpu(definition, devices, value, "engine.dtype", value.value.name())?;
    }
    Ok(value.value)
}

fn quantization(definition: &Definition, devices: &Devices) -> Result<Option<Quantization>> {
    let spec = &definition.spec;
    let (key, value) = match (&spec.engine.quantization, &spec.model.quantization) {
        (Some(_), Some(value)) => {
            let help = Some("keep engine.quantization".to_owned());
            let message = "the quantization is given twice, with the model and with the engine";
            return Err(definition.error(value, "model.quantization", message, help));
        }
        (Some(value), None) => ("engine.quantization", value),
        (None, Some(value)) => ("model.quantization", value),
        (None, None) => return Ok(None),
    };
    needs_gpu(definition, devices, value, key, "fp8")?;
    Ok(Some(value.value))
}

fn kv_cache_dtype(definition: &Definition, devices: &Devices) -> Result<KvCacheDtype> {
    let Some(value) = &definition.spec.engine.kv_cache_dtype else { return Ok(KvCacheDtype::Auto) };
    if value.value == KvCacheDtype::Fp8 {
        needs_gpu(definition, devices, value, "engine.kv_cache_dtype", "fp8")?;
    }
    Ok(value.value)
}

/// Refuses numbers that are computed with on GPUs alone, for devices that are surely none.
fn needs_gpu<T>(
    definition: &Definition,
    devices: &Devices,
    value: &Spanned<T>,
    key: &str,
    number: &str,
) -> Result<()> {
    let instead = match devices {
        Devices::Auto | Devices::Cuda(_) => return Ok(()),
        Devices::Cpu | Devices::CpuShares(_) => "a CPU computes with int8",
        Devices::Reference => "the reference computes with f32",
    };
    let message = format!("{key} is {number}, which needs a GPU: {instead}");
    let help = Some("leave it out, or let the device be auto or cuda".to_owned());
    Err(definition.error(value, key, message, help))
}
