//! How many pages of keys and values fit beside the weights.

use crate::gpu::GpuError;
use crate::gpu::model::GpuModelConfig;
use crate::gpu::weights::GpuWeights;
use crate::models::ModelError;

const MIN_PAGE_SIZE: u32 = 16;
const MAX_PAGE_SIZE: u32 = 1 << 12;

/// Large allocations are multiples of this.
const ROUNDED_TO: u64 = 2 << 20;
/// Of all memory, this part is never for pages.
const RESERVED_PART: u64 = 256;

/// Memory for keys and values.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum KvMemory {
    Pages(u32),
    /// What weights and buffers leave of this share of the device's memory, but no more pages than this.
    Utilization {
        share: f64,
        max_pages: u32,
    },
}

pub(super) fn check_page_size(page_size: u32) -> Result<usize, ModelError> {
    if page_size.is_power_of_two() && (MIN_PAGE_SIZE..=MAX_PAGE_SIZE).contains(&page_size) {
        return Ok(page_size as usize);
    }
    Err(ModelError::PageSize { page_size, min: MIN_PAGE_SIZE, max: MAX_PAGE_SIZE })
}

/// All other memory was taken before.
pub(super) fn num_pages(weights: &GpuWeights, config: &GpuModelConfig) -> Result<u32, ModelError> {
    let page_bytes = weights.kv_bytes_per_token() * u64::from(config.page_size);
    let memory = weights.device.memory()?;
    let (room, wanted) = match config.kv_memory {
        KvMemory::Pages(num_pages) => (memory.free, num_pages),
        KvMemory::Utilization { share, max_pages } => {
            let used = memory.total - memory.free;
            let usable = (memory.total as f64 * share) as u64;
            // Each layer's pages are rounded up, and graphs and kernels that are loaded later want room, too.
            let reserve = u64::from(weights.config.num_layers) * ROUNDED_TO + memory.total / RESERVED_PART;
            (usable.saturating_sub(used).min(memory.free.saturating_sub(reserve)), max_pages)
        }
    };
    let fits = u32::try_from(room / page_bytes).unwrap_or(u32::MAX);
    let is_exact = matches!(config.kv_memory, KvMemory::Pages(_));
    if fits == 0 || wanted == 0 || (is_exact && fits < wanted) {
        return Err(GpuError::KvCache {
            wanted: if is_exact { wanted } else { 1 },
            fits,
            page_bytes,
            free: memory.free,
            total: memory.total,
        }
        .into());
    }
    Ok(fits.min(wanted))
}
