//! Attention of one layer alone, in long prefills and in decodes over long contexts.

use serde::Serialize;
use tidemill_kernels::gpu::peak::{Heads, attention_seconds};
use tidemill_kernels::gpu::{GpuError, KvDtype};
use tidemill_kernels::models::ModelConfig;

use super::cost::Ceilings;
use crate::clock::Clock;
use crate::models::gpu::Gpus;

/// Sequences, positions before, rows.
const SHAPES: [(&str, [u32; 3]); 4] = [
    ("attention, prefill 3000", [1, 0, 3000]),
    ("attention, prefill 8192", [1, 0, 8192]),
    ("attention, decode, 256 over 3000", [256, 3000, 1]),
    ("attention, decode, 16 over 30000", [16, 30_000, 1]),
];

#[derive(Clone, Debug, Serialize)]
pub(super) struct AttentionRow {
    pub(super) name: String,
    pub(super) seconds: f64,
    /// The products of positions that are seen, two operations each, in units of 10^12 a second.
    pub(super) tflops: f64,
    /// Of keys and values that must be read.
    pub(super) gb_per_second: f64,
    pub(super) predicted_seconds: f64,
    pub(super) fraction: f64,
    pub(super) bound: &'static str,
}

pub(super) fn measure(
    gpus: &Gpus,
    config: &ModelConfig,
    ceilings: &Ceilings,
    clock: Clock,
) -> Result<Vec<AttentionRow>, GpuError> {
    let (gpu, options) = (gpus.first(), gpus.options());
    let heads = Heads {
        num_heads: config.num_heads as usize,
        num_kv_heads: config.num_kv_heads as usize,
        head_dim: config.head_dim as usize,
    };
    let kv_size = if options.kv_dtype == KvDtype::E4m3 { 1.0 } else { 2.0 };
    let row = |&(name, shape): &(&str, [u32; 3])| {
        let seconds = attention_seconds(gpu, heads, options, shape, &|| clock.elapsed())?;
        Ok(AttentionRow::new(name, seconds, shape, heads, kv_size, ceilings))
    };
    SHAPES.iter().map(row).collect()
}

impl AttentionRow {
    pub(super) fn new(
        name: &str,
        seconds: f64,
        [num_seqs, num_before, num_rows]: [u32; 3],
        heads: Heads,
        kv_size: f64,
        ceilings: &Ceilings,
    ) -> Self {
        let [num_seqs, before, rows] = [num_seqs, num_before, num_rows].map(f64::from);
        let seen = num_seqs * rows * (before + (rows + 1.0) / 2.0);
        let flops = 4.0 * seen * (heads.num_heads * heads.head_dim) as f64;
        let kv_len = (heads.num_kv_heads * heads.head_dim) as f64;
        let bytes = 2.0 * num_seqs * (before + rows) * kv_len * kv_size;
        let compute = flops / (ceilings.half_tflops * 1e12);
        let memory = bytes / (ceilings.copy_gb_per_second * 1e9);
        let predicted_seconds = compute.max(memory);
        Self {
            name: name.to_owned(),
            seconds,
            tflops: flops / seconds / 1e12,
            gb_per_second: bytes / seconds / 1e9,
            predicted_seconds,
            fraction: predicted_seconds / seconds,
            bound: if compute > memory { "compute" } else { "memory" },
        }
    }
}
