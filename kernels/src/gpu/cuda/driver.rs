//! Results of the driver as errors, and the few calls that several parts make.

use std::ffi::{CStr, c_char};
use std::ptr::null;

use cudarc::driver::sys::{self, CUresult};

use crate::gpu::device::DeviceError;

/// `what` completes "the device cannot …".
pub(super) fn check(what: &str, result: CUresult) -> Result<(), DeviceError> {
    if result == CUresult::CUDA_SUCCESS { Ok(()) } else { Err(failed(what, describe(result))) }
}

pub(super) fn failed(what: &str, reason: impl Into<String>) -> DeviceError {
    DeviceError::Failed { what: what.to_owned(), reason: reason.into() }
}

/// The driver's name for a result and what it says of it.
pub(super) fn describe(result: CUresult) -> String {
    type GetText = unsafe fn(CUresult, *mut *const c_char) -> CUresult;
    let text = |get: GetText| {
        let mut text = null();
        // SAFETY: the driver is there, since it gave the result; it sets the pointer to text that stays, or fails.
        unsafe {
            let is_known = get(result, &mut text) == CUresult::CUDA_SUCCESS && !text.is_null();
            is_known.then(|| CStr::from_ptr(text).to_string_lossy().into_owned())
        }
    };
    match (text(sys::cuGetErrorName), text(sys::cuGetErrorString)) {
        (Some(name), Some(text)) => format!("{text} ({name})"),
        _ => format!("{result:?}"),
    }
}

/// While it lives, calls of this thread that a capture forbids, such as loading a module, are allowed.
pub(super) struct Relaxed {
    before: sys::CUstreamCaptureMode,
}

impl Relaxed {
    pub(super) fn new() -> Self {
        let mut before = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
        // SAFETY: the pointer is to a mode, with which the driver exchanges the thread's.
        unsafe { sys::cuThreadExchangeStreamCaptureMode(&mut before) };
        Self { before }
    }
}

impl Drop for Relaxed {
    fn drop(&mut self) {
        // SAFETY: as above.
        unsafe { sys::cuThreadExchangeStreamCaptureMode(&mut self.before) };
    }
}
