//! Kernels by name: modules are loaded when a kernel of theirs is first launched, and stay.

use std::collections::BTreeMap;
use std::ffi::CString;
use std::ptr::null_mut;
use std::sync::{Mutex, PoisonError};

use cudarc::driver::sys::{self, CUfunction, CUmodule, CUresult};

use super::driver::{Relaxed, check, describe, failed};
use super::library::{PARAM_INFO, has_driver_function};
use super::nvrtc;
use crate::gpu::device::{DeviceError, Kernel};
use crate::gpu::image::{ImageCache, Source};

#[derive(Debug)]
pub(super) struct Modules {
    capability: (i32, i32),
    driver_version: i32,
    /// That a block may have.
    max_shared_bytes: u32,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    modules: BTreeMap<&'static str, CUmodule>,
    /// By source and name.
    functions: BTreeMap<(&'static str, &'static str), Function>,
}

#[derive(Clone, Copy, Debug)]
struct Function {
    handle: CUfunction,
    /// Of its struct of parameters, where the driver says it.
    param_bytes: Option<usize>,
    /// Dynamic shared memory that it was allowed.
    shared_bytes: u32,
}

impl Modules {
    pub(super) fn new(capability: (i32, i32), driver_version: i32, max_shared_bytes: u32) -> Self {
        Self { capability, driver_version, max_shared_bytes, state: Mutex::default() }
    }

    pub(super) fn max_shared_bytes(&self) -> u32 {
        self.max_shared_bytes
    }

    /// Ready for a launch. The context of the device is the thread's.
    pub(super) fn function(&self, kernel: &Kernel, param_bytes: usize) -> Result<CUfunction, DeviceError> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let key = (kernel.source, kernel.name);
        let function = match state.functions.get_mut(&key) {
            Some(function) => function,
            None => {
                let function = self.load_function(&mut state.modules, kernel)?;
                state.functions.entry(key).or_insert(function)
            }
        };
        assert!(
            function.param_bytes.is_none_or(|bytes| bytes == param_bytes),
            "{}: {param_bytes} bytes of parameters, the kernel takes {:?}",
            kernel.name,
            function.param_bytes
        );
        if kernel.shared_bytes > function.shared_bytes {
            self.allow_shared(function, kernel)?;
        }
        Ok(function.handle)
    }

    fn allow_shared(&self, function: &mut Function, kernel: &Kernel) -> Result<(), DeviceError> {
        let what = format!("launch {} with {} bytes of shared memory", kernel.name, kernel.shared_bytes);
        if kernel.shared_bytes > self.max_shared_bytes {
            return Err(failed(&what, format!("a block may have {}", self.max_shared_bytes)));
        }
        let attribute = sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        // SAFETY: the function is of a module that stays loaded.
        let result =
            unsafe { sys::cuFuncSetAttribute(function.handle, attribute, kernel.shared_bytes as i32) };
        check(&what, result)?;
        function.shared_bytes = kernel.shared_bytes;
        Ok(())
    }

    fn load_function(
        &self,
        modules: &mut BTreeMap<&'static str, CUmodule>,
        kernel: &Kernel,
    ) -> Result<Function, DeviceError> {
        let _relaxed = Relaxed::new();
        let module = match modules.get(kernel.source) {
            Some(&module) => module,
            None => {
                let module = self.load_module(kernel.source)?;
                modules.insert(kernel.source, module);
                module
            }
        };
        let what = format!("find the kernel {} in {}.cu", kernel.name, kernel.source);
        let name = CString::new(kernel.name).map_err(|_| failed(&what, "a zero in its name"))?;
        let mut handle = null_mut();
        // SAFETY: the module stays loaded, the name ends with a zero.
        check(&what, unsafe { sys::cuModuleGetFunction(&mut handle, module, name.as_ptr()) })?;
        Ok(Function { handle, param_bytes: param_bytes(handle), shared_bytes: 0 })
    }

    fn load_module(&self, name: &str) -> Result<CUmodule, DeviceError> {
        let what = format!("load the kernels of {name}.cu");
        let source = Source::named(name).ok_or_else(|| failed(&what, "there is no such source"))?;
        let mut refused = String::new();
        if let Some(image) = source.image {
            match load(image) {
                Ok(module) => return Ok(module),
                Err(result) if is_unfit(result) => refused = describe(result),
                Err(result) => return Err(failed(&what, describe(result))),
            }
        }
        let image = nvrtc::image(&ImageCache::of_user(), source, self.capability, self.driver_version);
        let image = image.map_err(|error| match refused.as_str() {
            "" => error,
            refused => failed(
                &what,
                format!(
                    "its driver refuses the embedded code, {refused}; update it to 580 or newer ({error})"
                ),
            ),
        })?;
        load(&image).map_err(|result| match refused.as_str() {
            "" => failed(&what, describe(result)),
            refused => failed(
                &what,
                format!(
                    "its driver refuses the embedded code, {refused}, and what was compiled here, {}; update it to 580 \
                     or newer",
                    describe(result)
                ),
            ),
        })
    }

    /// # Safety
    /// The context is the thread's, and nothing queued uses the modules.
    pub(super) unsafe fn unload(&mut self) {
        let state = self.state.get_mut().unwrap_or_else(PoisonError::into_inner);
        state.functions.clear();
        for module in std::mem::take(&mut state.modules).into_values() {
            // SAFETY: it was loaded and is unloaded once; the caller says that it is not used.
            unsafe { sys::cuModuleUnload(module) };
        }
    }
}

/// The image is not for this driver or device, another may be.
fn is_unfit(result: CUresult) -> bool {
    matches!(
        result,
        CUresult::CUDA_ERROR_NO_BINARY_FOR_GPU
            | CUresult::CUDA_ERROR_UNSUPPORTED_PTX_VERSION
            | CUresult::CUDA_ERROR_INVALID_PTX
            | CUresult::CUDA_ERROR_INVALID_IMAGE
            | CUresult::CUDA_ERROR_INVALID_SOURCE
            | CUresult::CUDA_ERROR_JIT_COMPILER_NOT_FOUND
    )
}

fn load(image: &[u8]) -> Result<CUmodule, CUresult> {
    // Aligned, and with the zero behind it that the driver wants of code in text.
    let mut words = vec![0u64; image.len() / 8 + 1];
    for (word, bytes) in words.iter_mut().zip(image.chunks(8)) {
        let mut padded = [0; 8];
        padded[..bytes.len()].copy_from_slice(bytes);
        *word = u64::from_ne_bytes(padded);
    }
    let mut module = null_mut();
    // SAFETY: the image is whole: it was embedded, or compared with its hash, or made just now.
    match unsafe { sys::cuModuleLoadData(&mut module, words.as_ptr().cast()) } {
        CUresult::CUDA_SUCCESS => Ok(module),
        result => Err(result),
    }
}

/// Bytes of the one parameter of a kernel, from CUDA 12.4 on.
fn param_bytes(function: CUfunction) -> Option<usize> {
    if !has_driver_function(PARAM_INFO) {
        return None;
    }
    let (mut offset, mut bytes) = (0, 0);
    // SAFETY: the driver has the function, the pointers are to numbers.
    let result = unsafe { sys::cuFuncGetParamInfo(function, 0, &mut offset, &mut bytes) };
    (result == CUresult::CUDA_SUCCESS).then_some(bytes)
}
