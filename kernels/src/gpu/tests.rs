//! Every op on the emulation, under each order of threads, against a plain f32 loop on the same rounded numbers; with
//! the feature `cuda-tests` on a CUDA device instead, whose absence is a failure then.
//!
//! Fresh memory is NaN and comparisons let NaN stick, so a number that a kernel reads unwritten, or leaves unwritten,
//! fails. `mistakes` plants faults and sees that these tests would find them.

mod attention;
mod device;
mod experts;
pub(super) mod gemm;
mod host_time;
mod log_probs;
mod mistakes;
mod model;
mod penalties;
mod rms_norm;
mod rows;
mod sample;
mod scale_outer;
mod store_kv;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::device::Device;
use super::emulated::EmulatedDevice;
use super::half_vec::{HalfDtype, HalfVec};
use super::memory::{DeviceVec, Plain};

const HALF_DTYPES: [HalfDtype; 2] = [HalfDtype::Bf16, HalfDtype::F16];
/// One step of e4m3's mantissa.
const E4M3_TOLERANCE: f32 = 1.0 / 15.0;

/// Set where a fake driver stands for the real one; see `cuda/tests.rs`.
pub(super) const FAKE_DRIVER_VARIABLE: &str = "FAKE_DRIVER";

/// Devices for all orders of threads, or the CUDA device; one with a mistake in a process that is to find it.
fn devices() -> Vec<Arc<dyn Device>> {
    if let Some(device) = mistakes::planted() {
        return vec![device];
    }
    if is_cuda() { vec![cuda_device()] } else { emulated_devices() }
}

/// A device with threads in this order, or the CUDA device.
fn device(order: i32) -> Arc<dyn Device> {
    if is_cuda() { cuda_device() } else { EmulatedDevice::new(order).shared() }
}

fn is_cuda() -> bool {
    cfg!(feature = "cuda-tests") || std::env::var_os(FAKE_DRIVER_VARIABLE).is_some()
}

/// The folder of the workspace, also where only the program of the tests and some files were carried to.
pub(super) fn sources() -> PathBuf {
    let built = || Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    std::env::var_os("TIDEMILL_SOURCES").map_or_else(built, PathBuf::from)
}

/// One for each test, since tests run beside each other and a device is one queue.
fn cuda_device() -> Arc<dyn Device> {
    thread_local! {
        static DEVICE: std::cell::OnceCell<Arc<dyn Device>> = const { std::cell::OnceCell::new() };
    }
    let open = || match super::cuda::CudaDevice::open(0) {
        Ok(device) => device as Arc<dyn Device>,
        Err(error) => panic!("{error}: {}", error.help()),
    };
    DEVICE.with(|device| Arc::clone(device.get_or_init(open)))
}

fn emulated_devices() -> Vec<Arc<dyn Device>> {
    // One order is enough to find memory that is nobody's, and the checks of each access are slow (scripts/asan.sh).
    let num_orders = if std::env::var_os("TIDEMILL_EMULATION_ASAN").is_some() { 1 } else { usize::MAX };
    let orders = tidemill_cuda_emulation::ORDERS.iter().take(num_orders);
    orders.map(|&order| EmulatedDevice::new(order).shared()).collect()
}

/// Numbers between -1 and 1, the same for a seed.
fn random(seed: u64, len: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    };
    std::iter::repeat_with(next).take(len).collect()
}

/// Half a unit in the last place, and as much again for sums in another order.
fn tolerance(dtype: HalfDtype) -> f32 {
    dtype.of([1.0 / 128.0, 1.0 / 1024.0])
}

/// As the device will hold them.
fn rounded(dtype: HalfDtype, values: Vec<f32>) -> Vec<f32> {
    values.into_iter().map(|x| dtype.to_f32(dtype.round(x))).collect()
}

fn put<T: Plain>(device: &Arc<dyn Device>, values: &[T]) -> DeviceVec<T> {
    DeviceVec::from_slice(device, values).unwrap()
}

fn put_half(device: &Arc<dyn Device>, dtype: HalfDtype, values: &[f32]) -> HalfVec {
    HalfVec::from_slice(device, dtype, values).unwrap()
}

/// Unwritten.
fn fresh_half(device: &Arc<dyn Device>, dtype: HalfDtype, len: usize) -> HalfVec {
    HalfVec::new(device, dtype, len).unwrap()
}

/// Unwritten.
fn fresh<T: Plain>(device: &Arc<dyn Device>, len: usize) -> DeviceVec<T> {
    DeviceVec::new(device, len).unwrap()
}

/// Within the tolerance, relative to the largest number; NaN never is.
#[track_caller]
fn assert_close(actual: &[f32], expected: &[f32], tolerance: f32, what: &str) {
    assert_eq!(actual.len(), expected.len());
    let scale = expected.iter().fold(1e-6f32, |max, value| max.max(value.abs()));
    for (i, (actual, expected)) in actual.iter().zip(expected).enumerate() {
        let error = (actual - expected).abs();
        assert!(error <= tolerance * scale, "{what}: {actual} and {expected} at {i}");
    }
}
