//! Runs the kernels of `kernels/cuda` on the CPU, for tests.
//!
//! What the emulation shows and what it cannot is said in `emu.h`. Launches are synchronous; blocks run on all cores.

use std::ffi::{CString, c_char, c_int, c_uint, c_void};

unsafe extern "C" {
    fn cuda_emu_launch(
        name: *const c_char,
        grid_x: c_uint,
        grid_y: c_uint,
        grid_z: c_uint,
        block: c_uint,
        shared_bytes: c_uint,
        params: *mut *mut c_void,
    ) -> c_int;
    fn cuda_emu_param_bytes(name: *const c_char) -> usize;
    fn cuda_emu_configure(order: c_int, mistake: *const c_char);
    fn cuda_emu_sites(out: *mut c_char, len: usize) -> usize;
}

/// Orders of threads under which every kernel must give the same: forward, backward, shuffled, and one warp as far as it
/// goes before the next, from the first or from any.
pub const ORDERS: [i32; 5] = [0, 1, 2, 3, 4];

/// A library that stands for the CUDA driver, cuBLASLt and NVRTC where it is found under their names; see `driver.cpp`.
pub const FAKE_DRIVER: &str = concat!(env!("OUT_DIR"), "/libfakecuda.so");

/// There is no kernel of this name.
#[derive(Debug, PartialEq, Eq)]
pub struct UnknownKernel;

/// Runs a kernel that takes one struct to its end.
///
/// # Safety
/// `params` points to the struct that the kernel takes, and what is in it points to memory that the kernel may use.
pub unsafe fn launch(
    name: &str,
    grid: [u32; 3],
    block: u32,
    shared_bytes: u32,
    params: *const c_void,
) -> Result<(), UnknownKernel> {
    let name = CString::new(name).map_err(|_| UnknownKernel)?;
    let mut params = [params.cast_mut()];
    // SAFETY: the caller says that the parameters are those of the kernel; it reads them and no more.
    let code = unsafe {
        cuda_emu_launch(name.as_ptr(), grid[0], grid[1], grid[2], block, shared_bytes, params.as_mut_ptr())
    };
    if code == 0 { Ok(()) } else { Err(UnknownKernel) }
}

/// Bytes of the struct that a kernel takes.
pub fn param_bytes(name: &str) -> Option<usize> {
    let name = CString::new(name).ok()?;
    // SAFETY: the callee compares the name, which ends with a zero.
    let bytes = unsafe { cuda_emu_param_bytes(name.as_ptr()) };
    (bytes > 0).then_some(bytes)
}

/// Chooses the order of threads, and a mistake for kernels to make: a name that one asks for, `file.cu:line` of a
/// barrier to leave out, or nothing. Holds for the whole process.
pub fn configure(order: i32, mistake: &str) {
    let mistake = CString::new(mistake).expect("mistakes are plain names");
    // SAFETY: the callee copies the name.
    unsafe { cuda_emu_configure(order, mistake.as_ptr()) }
}

/// The barriers that kernels have met so far, as `file.cu:line`.
pub fn barriers() -> Vec<String> {
    let mut out = vec![0u8; 1 << 16];
    // SAFETY: the callee writes no more than the length and ends with a zero.
    let len = unsafe { cuda_emu_sites(out.as_mut_ptr().cast(), out.len()) };
    assert!(len < out.len(), "more barriers than there is room for");
    String::from_utf8_lossy(&out[..len]).split_whitespace().map(str::to_owned).collect()
}
