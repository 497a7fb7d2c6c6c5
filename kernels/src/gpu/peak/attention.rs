//! Attention of one layer alone, planned as in a step: how near its kernels come to the peaks.

use std::sync::Arc;

use super::{ElapsedFn, best_rate};
use crate::backend::AttentionShape;
use crate::gpu::device::{Device, DeviceError};
use crate::gpu::half_vec::{HalfDtype, HalfVec};
use crate::gpu::memory::{DeviceSlice, DeviceVec};
use crate::gpu::ops::{AttentionArgs, AttentionParts, PagedKv, attention, quantize, randomize};
use crate::gpu::plan::{AttentionPlan, PlanLayout, PlanOptions};
use crate::gpu::weights::head_stride;
use crate::gpu::{Gpu, GpuError, GpuOptions, KvDtype};
use crate::step::{PageId, StepBatch};

const PAGE_SIZE: usize = 64;

/// The heads of a layer.
#[derive(Clone, Copy, Debug)]
pub struct Heads {
    pub num_heads: usize,
    pub num_kv_heads: usize,
    pub head_dim: usize,
}

/// Seconds that attention of a layer takes, where `num_seqs` sequences have `num_rows` rows each behind `num_before`
/// positions, in pages of their own.
pub fn attention_seconds(
    gpu: &Gpu,
    heads: Heads,
    options: GpuOptions,
    [num_seqs, num_before, num_rows]: [u32; 3],
    elapsed: ElapsedFn<'_>,
) -> Result<f64, GpuError> {
    let (device, dtype) = (&gpu.device, options.dtype.unwrap_or_default());
    let seq_pages = (num_before + num_rows).div_ceil(PAGE_SIZE as u32);
    let mut batch = StepBatch::default();
    for seq in 0..num_seqs {
        // In no order, as pages are after a while.
        let pages: Vec<PageId> = (0..seq_pages).map(|page| PageId(page * num_seqs + seq)).collect();
        batch.push(&vec![0; num_rows as usize], num_before, &pages, None);
    }
    let shape = AttentionShape {
        num_heads: heads.num_heads,
        num_kv_heads: heads.num_kv_heads,
        head_dim: head_stride(heads.head_dim)?,
        page_size: PAGE_SIZE,
        num_pages: (num_seqs * seq_pages) as usize,
        scale: (heads.head_dim as f32).powf(-0.5),
    };
    let kv = Kv::new(device, &shape, dtype, options.kv_dtype)?;
    let sizes = [batch.num_tokens(), batch.num_seqs()];
    let mut plan = AttentionPlan::new(PlanOptions::of_steps(&**device, &shape, options, sizes));
    plan.plan(&batch);
    let layout = PlanLayout::new(plan.size());
    let mut words = vec![0; layout.len];
    plan.write(&batch, &layout, &mut words);
    let words = DeviceVec::from_slice(device, &words)?;
    let positions = DeviceVec::from_slice(device, &batch.positions)?;
    let query = HalfVec::new(device, dtype, batch.num_tokens() * shape.q_len())?;
    randomize(&**device, 3, 1.0, &query)?;
    let out = HalfVec::new(device, dtype, query.len())?;
    let parts = AttentionParts::new(device, &shape, plan.size().part_rows)?;
    let args = AttentionArgs {
        shape: &shape,
        window: None,
        layout: &layout,
        plan: DeviceSlice::from(&words),
        positions: DeviceSlice::from(&positions),
        query: &query,
        kv: kv.paged(),
        parts: &parts,
        out: &out,
    };
    Ok(1.0 / best_rate(&**device, elapsed, || attention(&**device, &args))?)
}

/// Random keys and values.
enum Kv {
    Half(HalfVec),
    E4m3(DeviceVec<u8>),
}

impl Kv {
    fn new(
        device: &Arc<dyn Device>,
        shape: &AttentionShape,
        half: HalfDtype,
        dtype: KvDtype,
    ) -> Result<Self, DeviceError> {
        let num_rows = shape.num_slots() * 2 * shape.num_kv_heads;
        let values = HalfVec::new(device, half, num_rows * shape.head_dim)?;
        randomize(&**device, 4, 1.0, &values)?;
        if dtype == KvDtype::Half {
            return Ok(Self::Half(values));
        }
        let (rounded, scale) = (DeviceVec::new(device, values.len())?, DeviceVec::new(device, num_rows)?);
        quantize(&**device, num_rows, shape.head_dim, &values, &rounded, &scale)?;
        Ok(Self::E4m3(rounded))
    }

    fn paged(&self) -> PagedKv<'_> {
        match self {
            Self::Half(values) => PagedKv::Half(values.bits()),
            Self::E4m3(values) => PagedKv::E4m3(DeviceSlice::from(values)),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::time::Duration;

    use super::*;
    use crate::gpu::emulated::EmulatedDevice;

    #[test]
    fn prefills_and_decodes_run_in_every_setting() {
        let gpu = Gpu { device: EmulatedDevice::new(0).shared() };
        let heads = Heads { num_heads: 4, num_kv_heads: 2, head_dim: 64 };
        for (kv_dtype, deterministic) in
            [(KvDtype::Half, false), (KvDtype::Half, true), (KvDtype::E4m3, false)]
        {
            let options = GpuOptions { kv_dtype, deterministic, ..GpuOptions::default() };
            for seqs in [[1, 0, 200], [3, 70, 1]] {
                let seconds = Cell::new(0);
                let elapsed = || {
                    seconds.set(seconds.get() + 2);
                    Duration::from_secs(seconds.get())
                };
                let took = attention_seconds(&gpu, heads, options, seqs, &elapsed).unwrap();
                assert_eq!(took, 2.0, "{options:?}, {seqs:?}");
            }
        }
        assert_eq!(gpu.device.memory().unwrap().free, 1 << 32, "everything is freed");
    }
}
