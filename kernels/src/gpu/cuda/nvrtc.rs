//! Kernels compiled from their embedded sources at run time, where no embedded image fits.

use std::ffi::{CString, c_char, c_int};
use std::ptr::null_mut;

use cudarc::nvrtc::sys::{self, nvrtcProgram, nvrtcResult};

use super::driver::failed;
use super::library::has_nvrtc;
use crate::gpu::device::DeviceError;
use crate::gpu::image::{ImageCache, Source};

/// The image of a source for a device, from the cache if it is there. The version of the driver is in its key, since
/// drivers refuse what newer compilers made.
pub(super) fn image(
    cache: &ImageCache,
    source: &Source,
    capability: (i32, i32),
    driver_version: i32,
) -> Result<Vec<u8>, DeviceError> {
    if !has_nvrtc() {
        let reason = "NVRTC is not installed: install it (the pip package nvidia-cuda-nvrtc, or cuda-nvrtc-13-0 of \
                      NVIDIA's packages), or build with nvcc";
        return Err(failed(&what(source), reason));
    }
    let (mut major, mut minor) = (0, 0);
    // SAFETY: NVRTC is there; the pointers are to numbers.
    check(source, unsafe { sys::nvrtcVersion(&mut major, &mut minor) })?;
    let architecture = architecture(capability, &known_architectures(source)?);
    let headers = source.headers();
    let version = format!("NVRTC {major}.{minor}, driver {driver_version}");
    let mut parts = vec![version.as_str(), &architecture, source.name, source.text];
    parts.extend(headers.iter().flat_map(|header| [header.0, header.1]));
    cache.get_or_make(&parts, || compile(source, &headers, &architecture))
}

/// Machine code where the compiler knows the device, else code for the newest architecture it knows below that, which
/// the driver compiles further.
fn architecture(capability: (i32, i32), known: &[i32]) -> String {
    let wanted = capability.0 * 10 + capability.1;
    if known.contains(&wanted) {
        // Only with the suffix does Hopper have all of its instructions.
        let suffix = if wanted == 90 { "a" } else { "" };
        return format!("sm_{wanted}{suffix}");
    }
    let newest = known.iter().filter(|&&known| known <= wanted).max();
    format!("compute_{}", newest.copied().unwrap_or(wanted))
}

fn known_architectures(source: &Source) -> Result<Vec<i32>, DeviceError> {
    let mut count = 0;
    // SAFETY: NVRTC is there, the caller asked; the pointer is to a number.
    check(source, unsafe { sys::nvrtcGetNumSupportedArchs(&mut count) })?;
    let mut known: Vec<c_int> = vec![0; count.max(0) as usize];
    // SAFETY: the array has the length that was asked for.
    check(source, unsafe { sys::nvrtcGetSupportedArchs(known.as_mut_ptr()) })?;
    Ok(known)
}

fn what(source: &Source) -> String {
    format!("compile {}.cu", source.name)
}

fn check(source: &Source, result: nvrtcResult) -> Result<(), DeviceError> {
    match result {
        nvrtcResult::NVRTC_SUCCESS => Ok(()),
        _ => Err(failed(&what(source), format!("{result:?}"))),
    }
}

/// Is destroyed with this.
struct Program(nvrtcProgram);

impl Drop for Program {
    fn drop(&mut self) {
        // SAFETY: the program was created and is destroyed once.
        unsafe { sys::nvrtcDestroyProgram(&mut self.0) };
    }
}

fn c_strings(texts: impl Iterator<Item = String>) -> Vec<CString> {
    // None of our sources has a zero; one that had would end there.
    texts.map(|text| CString::new(text.replace('\0', " ")).unwrap_or_default()).collect()
}

fn pointers(texts: &[CString]) -> Vec<*const c_char> {
    texts.iter().map(|text| text.as_ptr()).collect()
}

fn compile(
    source: &Source,
    headers: &[(&'static str, &'static str)],
    architecture: &str,
) -> Result<Vec<u8>, DeviceError> {
    let main = c_strings([source.text.to_owned(), format!("{}.cu", source.name)].into_iter());
    let names = c_strings(headers.iter().map(|header| header.0.to_owned()));
    let texts = c_strings(headers.iter().map(|header| header.1.to_owned()));
    let options =
        c_strings([format!("--gpu-architecture={architecture}"), "--std=c++17".to_owned()].into_iter());
    let mut program = Program(null_mut());
    let (names, texts, options) = (pointers(&names), pointers(&texts), pointers(&options));
    // SAFETY: all are strings that end with a zero and live until the end of this function; the arrays have the
    // lengths given.
    let result = unsafe {
        let (text, name) = (main[0].as_ptr(), main[1].as_ptr());
        let num_headers = headers.len() as c_int;
        sys::nvrtcCreateProgram(&mut program.0, text, name, num_headers, texts.as_ptr(), names.as_ptr())
    };
    check(source, result)?;
    // SAFETY: the program was created just now, the options are as above.
    let result = unsafe { sys::nvrtcCompileProgram(program.0, options.len() as c_int, options.as_ptr()) };
    if result != nvrtcResult::NVRTC_SUCCESS {
        let log = read(source, &program, sys::nvrtcGetProgramLogSize, sys::nvrtcGetProgramLog)?;
        return Err(failed(
            &what(source),
            String::from_utf8_lossy(&log).trim_matches(['\0', '\n']).to_owned(),
        ));
    }
    if architecture.starts_with("sm_") {
        read(source, &program, sys::nvrtcGetCUBINSize, sys::nvrtcGetCUBIN)
    } else {
        read(source, &program, sys::nvrtcGetPTXSize, sys::nvrtcGetPTX)
    }
}

/// One of the outputs of a program.
fn read(
    source: &Source,
    program: &Program,
    size: unsafe fn(nvrtcProgram, *mut usize) -> nvrtcResult,
    get: unsafe fn(nvrtcProgram, *mut c_char) -> nvrtcResult,
) -> Result<Vec<u8>, DeviceError> {
    let mut num_bytes = 0;
    // SAFETY: the program is alive, the pointer is to a number.
    check(source, unsafe { size(program.0, &mut num_bytes) })?;
    let mut bytes = vec![0u8; num_bytes];
    // SAFETY: the array has the size that was asked for.
    check(source, unsafe { get(program.0, bytes.as_mut_ptr().cast()) })?;
    Ok(bytes)
}
