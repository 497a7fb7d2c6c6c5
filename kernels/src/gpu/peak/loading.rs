//! How fast weights reach the device, beside how fast its bus is.

use super::{ElapsedFn, NUM_TRIES, best_rate};
use crate::gpu::half_vec::{HalfDtype, HalfVec};
use crate::gpu::memory::{DeviceVec, PinnedVec};
use crate::gpu::weights::Maker;
use crate::gpu::{Gpu, GpuError};
use crate::models::ModelError;
use crate::models::weights::{MatrixRole, MatrixSource};
use crate::quant::Dtype;

/// Of a copy from pinned memory.
const COPY_BYTES: usize = 32 << 20;

/// In units of 10^9 bytes a second.
#[derive(Clone, Copy, Debug)]
pub struct LoadingRates {
    /// Of copies from pinned memory, back to back.
    pub bus: f64,
    /// Of a matrix of bf16 that lies in the host's memory, as a mapped file does that was read before.
    pub weights: f64,
}

/// Of a matrix of eight times as many rows as it has columns: a gigabyte for `size` 8192, so that the first buffer, which
/// waits for nothing, weighs little.
pub fn loading_rates(gpu: &Gpu, size: usize, elapsed: ElapsedFn<'_>) -> Result<LoadingRates, ModelError> {
    let device = &gpu.device;
    let pinned = PinnedVec::<u8>::new(device, COPY_BYTES)?;
    let there = DeviceVec::<u8>::new(device, COPY_BYTES)?;
    // SAFETY: both are of this length, and live until the last wait.
    let copy = || unsafe { device.upload(there.address(), pinned.pointer(0, COPY_BYTES), COPY_BYTES) };
    let bus = best_rate(&**device, elapsed, copy).map_err(GpuError::from)? * COPY_BYTES as f64 / 1e9;
    let num_rows = 8 * size;
    let rows: Vec<u8> = (0..2 * num_rows * size).map(|i| i as u8 & 0x3f).collect();
    let mut source = MatrixSource::new(MatrixRole::Down, size);
    rows.chunks_exact(2 * size).for_each(|row| source.push(Dtype::Bf16, row));
    let maker = Maker::without_heads(device)?;
    let values = HalfVec::new(device, HalfDtype::Bf16, num_rows * size)?;
    let mut best: f64 = 0.0;
    for _ in 0..NUM_TRIES {
        let start = elapsed();
        maker.fill(&source, size, &values)?;
        device.wait(device.record()?)?;
        best = best.max(rows.len() as f64 / (elapsed() - start).as_secs_f64().max(1e-9));
    }
    Ok(LoadingRates { bus, weights: best / 1e9 })
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::time::Duration;

    use super::*;
    use crate::gpu::emulated::EmulatedDevice;

    /// Every look at the clock takes a second.
    #[test]
    fn the_rates_are_those_of_the_copies() {
        let gpu = Gpu { device: EmulatedDevice::new(0).shared() };
        let seconds = Cell::new(0);
        let elapsed = || {
            seconds.set(seconds.get() + 1);
            Duration::from_secs(seconds.get())
        };
        let LoadingRates { bus, weights } = loading_rates(&gpu, 64, &elapsed).unwrap();
        assert!((bus * 1e9 - COPY_BYTES as f64).abs() < 1.0, "{bus}");
        assert!((weights * 1e9 - 65536.0).abs() < 1e-3, "{weights}");
        assert_eq!(gpu.device.memory().unwrap().free, 1 << 32, "everything is freed");
    }
}
