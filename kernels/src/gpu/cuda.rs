//! A device behind NVIDIA's driver, which is loaded when the program runs.
//!
//! One stream, in whose order everything is done. The calls of a step go to the driver as they are: a kernel with one
//! pointer to its parameters, a matrix product with a plan made before. Invariant: the context is the calling thread's
//! before the driver is called, so any thread may use the device.

mod driver;
mod events;
mod gemm;
mod library;
mod modules;
mod nvrtc;
mod open;
#[cfg(test)]
mod tests;

use std::cell::Cell;
use std::collections::BTreeMap;
use std::ffi::c_void;
use std::ptr::null_mut;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cudarc::driver::sys::{self, CUcontext, CUdevice, CUgraphExec, CUresult, CUstream};

use self::driver::{check, describe, failed};
use self::events::Events;
use self::gemm::{Gemms, Scaling};
use self::modules::Modules;
pub use self::open::CudaError;
use super::device::{
    Address, Device, DeviceError, DeviceMemory, Event, Gemm, GemmInput, Graph, Kernel, TmaMap, TmaShape,
};
use super::ops;

/// A GPU.
#[derive(Debug)]
pub(crate) struct CudaDevice {
    /// Of this and no other device, ever.
    number: u64,
    handle: CUdevice,
    context: CUcontext,
    stream: CUstream,
    name: String,
    capability: (i32, i32),
    modules: Modules,
    events: Mutex<Events>,
    gemms: Mutex<Gemms>,
    graphs: Mutex<Graphs>,
    is_recording: AtomicBool,
    /// Start and length of pinned memory.
    pinned: Mutex<BTreeMap<usize, usize>>,
}

#[derive(Debug, Default)]
struct Graphs {
    num_made: u64,
    graphs: BTreeMap<u64, CUgraphExec>,
}

// SAFETY: handles of the driver may be used by every thread that has set the context, which each call does.
unsafe impl Send for CudaDevice {}
// SAFETY: as above; what changes is behind locks.
unsafe impl Sync for CudaDevice {}

thread_local! {
    /// Number of the device whose context is the thread's.
    static BOUND: Cell<u64> = const { Cell::new(0) };
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl CudaDevice {
    /// Device `ordinal` of those that the driver counts. Never panics, whatever the machine lacks.
    pub(crate) fn open(ordinal: usize) -> Result<Arc<Self>, CudaError> {
        library::check_driver()?;
        let number = |what, get: &dyn Fn(&mut i32) -> CUresult| {
            let mut number = 0;
            check(what, get(&mut number)).map(|()| number)
        };
        // SAFETY: the driver has this function, and all others below, that was checked; the pointers are to numbers.
        let version = number("tell its version", &|to| unsafe { sys::cuDriverGetVersion(to) })?;
        open::check_driver_version(version)?;
        library::check_driver_functions()?;
        // SAFETY: as above.
        match unsafe { sys::cuInit(0) } {
            CUresult::CUDA_SUCCESS => (),
            CUresult::CUDA_ERROR_NO_DEVICE => return Err(CudaError::NoDevice),
            result => return Err(CudaError::DriverFailed { reason: describe(result) }),
        }
        // SAFETY: as above.
        let count = number("count devices", &|to| unsafe { sys::cuDeviceGetCount(to) })?;
        open::check_ordinal(ordinal, count.max(0) as usize)?;
        // SAFETY: as above.
        let handle = number("be opened", &|to| unsafe { sys::cuDeviceGet(to, ordinal as i32) })?;
        // SAFETY: as above.
        let get = |of| number("describe itself", &|to| unsafe { sys::cuDeviceGetAttribute(to, of, handle) });
        use sys::CUdevice_attribute_enum::*;
        let capability = (
            get(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            get(CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        );
        let max_shared_bytes = get(CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?.max(0) as u32;
        let name = device_name(handle)?;
        open::check_capability(&name, capability)?;
        if !library::has_cublas_lt() {
            return Err(CudaError::NoCublasLt);
        }
        static NUM_OPENED: AtomicU64 = AtomicU64::new(0);
        // From here on, what was made is given back when `device` is dropped.
        let mut device = Self {
            number: NUM_OPENED.fetch_add(1, Ordering::Relaxed) + 1,
            handle,
            context: null_mut(),
            stream: null_mut(),
            name,
            capability,
            modules: Modules::new(capability, version, max_shared_bytes),
            events: Mutex::default(),
            gemms: Mutex::default(),
            graphs: Mutex::default(),
            is_recording: AtomicBool::new(false),
            pinned: Mutex::default(),
        };
        device.start()?;
        Ok(Arc::new(device))
    }

    fn start(&mut self) -> Result<(), CudaError> {
        // SAFETY: the pointer is to a handle.
        let result = unsafe { sys::cuDevicePrimaryCtxRetain(&mut self.context, self.handle) };
        check("make a context", result)?;
        self.bind()?;
        let DeviceMemory { free, total } = self.memory()?;
        open::check_memory(&self.name, free, total)?;
        let flags = sys::CUstream_flags_enum::CU_STREAM_NON_BLOCKING as u32;
        // SAFETY: as above.
        check("make a stream", unsafe { sys::cuStreamCreate(&mut self.stream, flags) })?;
        let workspace = self.alloc(gemm::WORKSPACE_BYTES)?;
        lock(&self.gemms).start(workspace)?;
        Ok(())
    }

    /// Makes the context the thread's.
    fn bind(&self) -> Result<(), DeviceError> {
        if BOUND.get() != self.number {
            // SAFETY: the context is retained as long as the device lives.
            check("be used by this thread", unsafe { sys::cuCtxSetCurrent(self.context) })?;
            BOUND.set(self.number);
        }
        Ok(())
    }

    /// A graph reads host memory when it is launched, so the memory must stay what it is until then.
    fn check_recordable(&self, host: *const u8, num_bytes: usize) -> Result<(), DeviceError> {
        if !self.is_recording.load(Ordering::Relaxed) {
            return Ok(());
        }
        let start = host as usize;
        let is_pinned = lock(&self.pinned)
            .range(..=start)
            .next_back()
            .is_some_and(|(from, len)| start + num_bytes <= from + len);
        if is_pinned { Ok(()) } else { Err(failed("record a copy", "its memory of the host is not pinned")) }
    }

    fn check_not_recording(&self, what: &str) -> Result<(), DeviceError> {
        match self.is_recording.load(Ordering::Relaxed) {
            true => Err(failed(what, "a graph is being recorded")),
            false => Ok(()),
        }
    }
}

fn device_name(handle: CUdevice) -> Result<String, DeviceError> {
    let mut name = [0u8; 256];
    // SAFETY: the array has the length given.
    let result = unsafe { sys::cuDeviceGetName(name.as_mut_ptr().cast(), name.len() as i32, handle) };
    check("tell its name", result)?;
    let len = name.iter().position(|&byte| byte == 0).unwrap_or(name.len());
    Ok(String::from_utf8_lossy(&name[..len]).into_owned())
}

impl Drop for CudaDevice {
    fn drop(&mut self) {
        if self.context.is_null() {
            return;
        }
        // SAFETY: nobody else has the device, all handles were made in this context and are given back once, after
        // what was queued is done. A driver that fails here has failed before.
        unsafe {
            sys::cuCtxSetCurrent(self.context);
            // Of the stream alone: other devices share the context, and to wait for it would break a recording of theirs.
            if !self.stream.is_null() {
                sys::cuStreamSynchronize(self.stream);
            }
            let gemms = self.gemms.get_mut().unwrap_or_else(PoisonError::into_inner);
            let workspace = gemms.stop();
            sys::cuMemFree_v2(workspace.0);
            let graphs = self.graphs.get_mut().unwrap_or_else(PoisonError::into_inner);
            for graph in std::mem::take(&mut graphs.graphs).into_values() {
                sys::cuGraphExecDestroy(graph);
            }
            self.events.get_mut().unwrap_or_else(PoisonError::into_inner).destroy();
            self.modules.unload();
            if !self.stream.is_null() {
                sys::cuStreamDestroy_v2(self.stream);
            }
            sys::cuCtxSetCurrent(null_mut());
            sys::cuDevicePrimaryCtxRelease_v2(self.handle);
        }
        BOUND.set(0);
    }
}

impl Device for CudaDevice {
    fn name(&self) -> &str {
        &self.name
    }

    fn is_hopper(&self) -> bool {
        self.capability == (9, 0)
    }

    fn can_multiply(&self, input: GemmInput) -> bool {
        match input {
            GemmInput::Bf16 | GemmInput::F16 => true,
            GemmInput::E4m3 => self.capability >= (8, 9),
        }
    }

    fn max_shared_bytes(&self) -> u32 {
        self.modules.max_shared_bytes()
    }

    fn memory(&self) -> Result<DeviceMemory, DeviceError> {
        self.bind()?;
        let (mut free, mut total) = (0, 0);
        // SAFETY: the pointers are to numbers.
        check("tell its memory", unsafe { sys::cuMemGetInfo_v2(&mut free, &mut total) })?;
        Ok(DeviceMemory { free: free as u64, total: total as u64 })
    }

    fn alloc(&self, num_bytes: usize) -> Result<Address, DeviceError> {
        self.check_not_recording("give memory")?;
        self.bind()?;
        let mut address = 0;
        // SAFETY: the pointer is to an address.
        match unsafe { sys::cuMemAlloc_v2(&mut address, num_bytes.max(1)) } {
            CUresult::CUDA_ERROR_OUT_OF_MEMORY => {
                let DeviceMemory { free, total } = self.memory()?;
                Err(DeviceError::OutOfMemory { wanted: num_bytes as u64, free, total })
            }
            result => check("give memory", result).map(|()| Address(address)),
        }
    }

    unsafe fn free(&self, address: Address, _num_bytes: usize) {
        if self.bind().is_ok() {
            // SAFETY: the caller says that it came from `alloc` and is not used. A driver that fails has failed before.
            unsafe { sys::cuMemFree_v2(address.0) };
        }
    }

    fn alloc_pinned(&self, num_bytes: usize) -> Result<*mut u8, DeviceError> {
        self.check_not_recording("pin memory")?;
        self.bind()?;
        let num_bytes = num_bytes.max(1);
        let mut pinned: *mut c_void = null_mut();
        // SAFETY: the pointer is to a pointer.
        let result = unsafe { sys::cuMemHostAlloc(&mut pinned, num_bytes, sys::CU_MEMHOSTALLOC_PORTABLE) };
        check(&format!("pin {num_bytes} bytes of the host's memory"), result)?;
        let pinned = pinned.cast::<u8>();
        // SAFETY: the driver gave so many bytes.
        unsafe { pinned.write_bytes(0, num_bytes) };
        lock(&self.pinned).insert(pinned as usize, num_bytes);
        Ok(pinned)
    }

    unsafe fn free_pinned(&self, pinned: *mut u8, _num_bytes: usize) {
        lock(&self.pinned).remove(&(pinned as usize));
        if self.bind().is_ok() {
            // SAFETY: the caller says that it came from `alloc_pinned` and is not used.
            unsafe { sys::cuMemFreeHost(pinned.cast()) };
        }
    }

    unsafe fn upload(&self, to: Address, from: *const u8, num_bytes: usize) -> Result<(), DeviceError> {
        self.bind()?;
        self.check_recordable(from, num_bytes)?;
        // SAFETY: the caller says that both ranges are valid.
        check("copy from the host", unsafe {
            sys::cuMemcpyHtoDAsync_v2(to.0, from.cast(), num_bytes, self.stream)
        })
    }

    unsafe fn download(&self, to: *mut u8, from: Address, num_bytes: usize) -> Result<(), DeviceError> {
        self.bind()?;
        self.check_recordable(to, num_bytes)?;
        // SAFETY: as above.
        check("copy to the host", unsafe {
            sys::cuMemcpyDtoHAsync_v2(to.cast(), from.0, num_bytes, self.stream)
        })
    }

    unsafe fn copy(&self, to: Address, from: Address, num_bytes: usize) -> Result<(), DeviceError> {
        self.bind()?;
        // SAFETY: as above.
        check("copy", unsafe { sys::cuMemcpyDtoDAsync_v2(to.0, from.0, num_bytes, self.stream) })
    }

    unsafe fn launch(&self, kernel: &Kernel, grid: [u32; 3], params: &[u8]) -> Result<(), DeviceError> {
        self.bind()?;
        let function = self.modules.function(kernel, params.len())?;
        let mut params = [params.as_ptr().cast_mut().cast::<c_void>()];
        let (stream, params) = (self.stream, params.as_mut_ptr());
        // SAFETY: the kernel takes one struct, of this size where the driver tells it, and the driver copies it now;
        // the caller says that it is of this type, and what it points to is valid.
        let result = unsafe {
            let [x, y, z] = grid;
            let (block, shared) = (kernel.block, kernel.shared_bytes);
            sys::cuLaunchKernel(function, x, y, z, block, 1, 1, shared, stream, params, null_mut())
        };
        match result {
            CUresult::CUDA_SUCCESS => Ok(()),
            result => Err(failed(&format!("launch {} over {grid:?}", kernel.name), describe(result))),
        }
    }

    unsafe fn gemm(&self, gemm: &Gemm) -> Result<(), DeviceError> {
        self.bind()?;
        // SAFETY: the caller says that the operands are valid.
        let scaling = unsafe { lock(&self.gemms).multiply(self.stream, gemm)? };
        match scaling {
            Scaling::Done => Ok(()),
            // SAFETY: as above.
            Scaling::Left => unsafe { ops::scale_outer(self, gemm) },
        }
    }

    fn tma_map(&self, shape: &TmaShape) -> Result<TmaMap, DeviceError> {
        let mut map = TmaMap([0; 16]);
        let &TmaShape { base, rows, columns, row_bytes, box_rows } = shape;
        // SAFETY: `TmaMap` has the size and the alignment of the driver's; the arrays have as many numbers as there
        // are dimensions, the strides one less. The driver checks what they hold.
        let result = unsafe {
            sys::cuTensorMapEncodeTiled(
                (&raw mut map).cast(),
                sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
                2,
                base.0 as *mut c_void,
                [columns, rows].as_ptr(),
                [row_bytes].as_ptr(),
                [64u32, box_rows].as_ptr(),
                [1u32, 1].as_ptr(),
                sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
                sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
                sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
        };
        match result {
            CUresult::CUDA_SUCCESS => Ok(map),
            result => Err(failed(&format!("describe {shape:?} to TMA"), describe(result))),
        }
    }

    fn begin_graph(&self) -> Result<(), DeviceError> {
        self.check_not_recording("record a graph")?;
        self.bind()?;
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream lives as long as the device.
        check("record a graph", unsafe { sys::cuStreamBeginCapture_v2(self.stream, mode) })?;
        self.is_recording.store(true, Ordering::Relaxed);
        Ok(())
    }

    fn end_graph(&self) -> Result<Graph, DeviceError> {
        self.bind()?;
        if !self.is_recording.swap(false, Ordering::Relaxed) {
            return Err(failed("end a graph", "none was begun"));
        }
        let (mut graph, mut executable) = (null_mut(), null_mut());
        // SAFETY: the stream lives as long as the device, and the handles come from the calls before; the graph is not
        // used after it was made executable.
        unsafe {
            check("end a graph", sys::cuStreamEndCapture(self.stream, &mut graph))?;
            let result = sys::cuGraphInstantiateWithFlags(&mut executable, graph, 0);
            sys::cuGraphDestroy(graph);
            check("make a graph", result)?;
            if let Err(error) = check("upload a graph", sys::cuGraphUpload(executable, self.stream)) {
                sys::cuGraphExecDestroy(executable);
                return Err(error);
            }
        }
        let mut graphs = lock(&self.graphs);
        graphs.num_made += 1;
        let number = graphs.num_made;
        graphs.graphs.insert(number, executable);
        Ok(Graph(number))
    }

    unsafe fn launch_graph(&self, graph: Graph) -> Result<(), DeviceError> {
        self.bind()?;
        let graphs = lock(&self.graphs);
        let executable =
            graphs.graphs.get(&graph.0).ok_or_else(|| failed("launch a graph", "it was dropped"))?;
        // SAFETY: the graph is alive while the lock is held; the caller says that its memory is valid.
        check("launch a graph", unsafe { sys::cuGraphLaunch(*executable, self.stream) })
    }

    fn drop_graph(&self, graph: Graph) {
        let executable = lock(&self.graphs).graphs.remove(&graph.0);
        if let Some(executable) = executable.filter(|_| self.bind().is_ok()) {
            // SAFETY: it was in the list once; the driver keeps what still runs.
            unsafe { sys::cuGraphExecDestroy(executable) };
        }
    }

    fn record(&self) -> Result<Event, DeviceError> {
        self.check_not_recording("record an event")?;
        self.bind()?;
        lock(&self.events).record(self.stream)
    }

    fn wait(&self, event: Event) -> Result<(), DeviceError> {
        self.bind()?;
        let Some(handle) = lock(&self.events).of(event) else { return Ok(()) };
        // SAFETY: the event lives as long as the device. If another thread has waited for it meanwhile and it stands
        // for a later point now, this waits longer.
        check("finish its work", unsafe { sys::cuEventSynchronize(handle) })?;
        lock(&self.events).retire(event);
        Ok(())
    }
}
