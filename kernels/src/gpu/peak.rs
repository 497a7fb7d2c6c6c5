//! What a GPU can do at most, measured through the calls that a step is made of.
//!
//! A measured speed means little without the limit of the device it was measured on. Work is queued back to back and
//! waited for once, so launches cost nothing; the clock is the caller's. A peak is the best of a few tries, since other
//! work can only lower it. Operands are random: a device that multiplies zeros draws less power and runs faster.

mod attention;
mod loading;

use std::sync::Arc;
use std::time::Duration;

pub use self::attention::{Heads, attention_seconds};
pub use self::loading::{LoadingRates, loading_rates};
use super::device::{Address, Device, DeviceError, Gemm, GemmInput};
use super::half_vec::{HalfDtype, HalfVec};
use super::memory::DeviceVec;
use super::ops::{quantize, randomize};
use super::{Gpu, GpuError, WeightDtype};

const NUM_TRIES: usize = 5;
/// About so long is a try.
const TRY_TIME: Duration = Duration::from_millis(100);
const MAX_REPEATS: usize = 1000;

/// Time since some moment.
pub type ElapsedFn<'a> = &'a dyn Fn() -> Duration;

/// Operations of a product of matrices `[m, k]` and `[n, k]` in a second, two a product, in units of 10^12.
pub fn gemm_tflops(
    gpu: &Gpu,
    [m, n, k]: [usize; 3],
    (half, dtype): (HalfDtype, WeightDtype),
    elapsed: ElapsedFn<'_>,
) -> Result<f64, GpuError> {
    let device = &gpu.device;
    let (x, weight) =
        (Operand::new(device, m, k, (half, dtype), 1)?, Operand::new(device, n, k, (half, dtype), 2)?);
    let out = HalfVec::new(device, half, m * n)?;
    let gemm = Gemm {
        m,
        n,
        k,
        input: match dtype {
            WeightDtype::Half => half.into(),
            WeightDtype::E4m3 => GemmInput::E4m3,
        },
        output: half.into(),
        x: x.address(),
        weight: weight.address(),
        out: out.address(),
        x_scale: x.scale.as_ref().map(DeviceVec::address),
        weight_scale: weight.scale.as_ref().map(DeviceVec::address),
        batch_invariant: false,
    };
    // SAFETY: the operands were made for these lengths, and live until the last wait.
    let rate = best_rate(&**device, elapsed, || unsafe { device.gemm(&gemm) })?;
    Ok(rate * 2.0 * (m * n * k) as f64 / 1e12)
}

/// Bytes read and bytes written in a second of a copy within the device, together, in units of 10^9.
pub fn copy_gb_per_second(gpu: &Gpu, num_bytes: usize, elapsed: ElapsedFn<'_>) -> Result<f64, GpuError> {
    let device = &gpu.device;
    let (from, to) = (DeviceVec::<u8>::new(device, num_bytes)?, DeviceVec::<u8>::new(device, num_bytes)?);
    // SAFETY: both are of this length, and live until the last wait.
    let copy = || unsafe { device.copy(to.address(), from.address(), num_bytes) };
    Ok(best_rate(&**device, elapsed, copy)? * 2.0 * num_bytes as f64 / 1e9)
}

/// A matrix of random numbers.
struct Operand {
    values: HalfVec,
    rounded: Option<DeviceVec<u8>>,
    scale: Option<DeviceVec<f32>>,
}

impl Operand {
    fn new(
        device: &Arc<dyn Device>,
        num_rows: usize,
        size: usize,
        (half, dtype): (HalfDtype, WeightDtype),
        seed: u64,
    ) -> Result<Self, DeviceError> {
        let values = HalfVec::new(device, half, num_rows * size)?;
        randomize(&**device, seed, 1.0, &values)?;
        if dtype == WeightDtype::Half {
            return Ok(Self { values, rounded: None, scale: None });
        }
        let (rounded, scale) = (DeviceVec::new(device, num_rows * size)?, DeviceVec::new(device, num_rows)?);
        quantize(&**device, num_rows, size, &values, &rounded, &scale)?;
        Ok(Self { values, rounded: Some(rounded), scale: Some(scale) })
    }

    fn address(&self) -> Address {
        self.rounded.as_ref().map_or(self.values.address(), DeviceVec::address)
    }
}

/// How often a second the device does a piece of work.
fn best_rate(
    device: &dyn Device,
    elapsed: ElapsedFn<'_>,
    queue: impl Fn() -> Result<(), DeviceError>,
) -> Result<f64, DeviceError> {
    let time = |repeats: usize| {
        device.wait(device.record()?)?;
        let start = elapsed();
        (0..repeats).try_for_each(|_| queue())?;
        device.wait(device.record()?)?;
        Ok::<_, DeviceError>((elapsed() - start).max(Duration::from_nanos(1)))
    };
    // The first time also loads what there is to load.
    time(1)?;
    let repeats = (TRY_TIME.as_nanos() / time(1)?.as_nanos()).clamp(1, MAX_REPEATS as u128) as usize;
    let mut best: f64 = 0.0;
    for _ in 0..NUM_TRIES {
        best = best.max(repeats as f64 / time(repeats)?.as_secs_f64());
    }
    Ok(best)
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;
    use crate::gpu::emulated::EmulatedDevice;

    /// Every look at the clock takes a second, so a try is one repeat of one second.
    #[test]
    fn the_rates_are_those_of_the_work() {
        let gpu = Gpu { device: EmulatedDevice::new(0).shared() };
        let seconds = Cell::new(0);
        let elapsed = || {
            seconds.set(seconds.get() + 1);
            Duration::from_secs(seconds.get())
        };
        for dtype in [
            (HalfDtype::Bf16, WeightDtype::Half),
            (HalfDtype::F16, WeightDtype::Half),
            (HalfDtype::F16, WeightDtype::E4m3),
        ] {
            let tflops = gemm_tflops(&gpu, [4, 8, 16], dtype, &elapsed).unwrap();
            assert!((tflops * 1e12 - 1024.0).abs() < 1e-6, "{dtype:?}: {tflops}");
        }
        let copied = copy_gb_per_second(&gpu, 1000, &elapsed).unwrap();
        assert!((copied * 1e9 - 2000.0).abs() < 1e-6, "{copied}");
        assert_eq!(gpu.device.memory().unwrap().free, 1 << 32, "everything is freed");
    }
}
