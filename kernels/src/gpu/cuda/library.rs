//! The libraries of CUDA, which may be there or not when the program starts.
//!
//! cudarc loads each when it is first called, and panics where it, or a function of it, is missing. So everything here
//! is asked before anything is called. Libraries off the search path are loaded by their path first; a later look-up
//! by name then finds them, unless the search path has one under the plain name (`libcublasLt.so`), which comes first. So
//! the version that is used is logged.

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use cudarc::driver::sys;
use cudarc::{cublaslt, nvrtc};

use super::open::CudaError;
use crate::cache::user_cache;

/// Folders to look into, between colons.
pub(super) const FOLDERS_VARIABLE: &str = "TIDEMILL_CUDA_LIBRARIES";
/// Where `scripts/cuda.sh libraries` puts them, below the cache.
const FETCHED: &str = "cuda/libraries/nvidia/cu13/lib";
/// Beginnings of file names; what a library needs comes before it.
const NAMES: [&str; 3] = ["libcublasLt.so", "libnvrtc-builtins.so", "libnvrtc.so"];

/// What is called of the driver. `tests.rs` sees that nothing is left out.
pub(super) const DRIVER_FUNCTIONS: [&str; 40] = [
    "cuCtxSetCurrent",
    "cuDeviceGet",
    "cuDeviceGetAttribute",
    "cuDeviceGetCount",
    "cuDeviceGetName",
    "cuDevicePrimaryCtxRelease_v2",
    "cuDevicePrimaryCtxRetain",
    "cuEventCreate",
    "cuEventDestroy_v2",
    "cuEventQuery",
    "cuEventRecord",
    "cuEventSynchronize",
    "cuFuncSetAttribute",
    "cuGetErrorName",
    "cuGetErrorString",
    "cuGraphDestroy",
    "cuGraphExecDestroy",
    "cuGraphInstantiateWithFlags",
    "cuGraphLaunch",
    "cuGraphUpload",
    "cuInit",
    "cuLaunchKernel",
    "cuMemAlloc_v2",
    "cuMemFreeHost",
    "cuMemFree_v2",
    "cuMemGetInfo_v2",
    "cuMemHostAlloc",
    "cuMemcpyDtoDAsync_v2",
    "cuMemcpyDtoHAsync_v2",
    "cuMemcpyHtoDAsync_v2",
    "cuModuleGetFunction",
    "cuModuleLoadData",
    "cuModuleUnload",
    "cuStreamBeginCapture_v2",
    "cuStreamCreate",
    "cuStreamDestroy_v2",
    "cuStreamEndCapture",
    "cuStreamSynchronize",
    "cuTensorMapEncodeTiled",
    "cuThreadExchangeStreamCaptureMode",
];
/// Asked before all others: what else is missing is missing for its age.
pub(super) const VERSION: &str = "cuDriverGetVersion";
/// Used where the driver has it.
pub(super) const PARAM_INFO: &str = "cuFuncGetParamInfo";

pub(super) fn has_driver() -> bool {
    // SAFETY: the library is only opened and closed.
    unsafe { sys::is_culib_present() }
}

/// Whether the driver, which is there, has a function.
pub(super) fn has_driver_function(name: &str) -> bool {
    // SAFETY: the symbol is looked up and not called.
    unsafe { sys::culib().get::<*const ()>(name.as_bytes()).is_ok() }
}

/// There is a driver that tells its version.
pub(super) fn check_driver() -> Result<(), CudaError> {
    match has_driver() {
        false => Err(CudaError::NoDriver),
        true if has_driver_function(VERSION) => Ok(()),
        true => Err(CudaError::NoFunction { name: VERSION }),
    }
}

/// The driver has all that is called.
pub(super) fn check_driver_functions() -> Result<(), CudaError> {
    match DRIVER_FUNCTIONS.iter().find(|name| !has_driver_function(name)) {
        Some(name) => Err(CudaError::NoFunction { name }),
        None => Ok(()),
    }
}

pub(super) fn has_cublas_lt() -> bool {
    // SAFETY: as above.
    has(|| unsafe { cublaslt::sys::is_culib_present() })
}

pub(super) fn has_nvrtc() -> bool {
    // SAFETY: as above.
    has(|| unsafe { nvrtc::sys::is_culib_present() })
}

/// Looks into the folders that were named, then where the system looks, then into the cache.
fn has(is_present: impl Fn() -> bool) -> bool {
    static NAMED: OnceLock<()> = OnceLock::new();
    static FETCHED_ONES: OnceLock<()> = OnceLock::new();
    NAMED.get_or_init(|| {
        let folders = std::env::var_os(FOLDERS_VARIABLE).unwrap_or_default();
        std::env::split_paths(&folders).for_each(|folder| load_from(&folder));
    });
    if is_present() {
        return true;
    }
    FETCHED_ONES.get_or_init(|| {
        user_cache().into_iter().for_each(|cache| load_from(&cache.join(FETCHED)));
    });
    is_present()
}

/// Loads what the folder has of CUDA, for good.
fn load_from(folder: &Path) {
    for path in NAMES.iter().filter_map(|name| newest(folder, name)) {
        // SAFETY: NVIDIA's libraries do nothing when they are loaded but set themselves up.
        match unsafe { libloading::Library::new(&path) } {
            Ok(library) => std::mem::forget(library),
            Err(error) => tracing::warn!(path = %path.display(), %error, "a CUDA library cannot be loaded"),
        }
    }
}

/// The last file in order of names that begins so.
fn newest(folder: &Path, name: &str) -> Option<PathBuf> {
    let files = std::fs::read_dir(folder).ok()?.filter_map(Result::ok).map(|entry| entry.path());
    files.filter(|path| path.file_name().is_some_and(|file| file.to_string_lossy().starts_with(name))).max()
}
