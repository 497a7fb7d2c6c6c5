//! A device that runs the kernels on the CPU, for tests.
//!
//! Work is queued as on a GPU and done only when somebody waits for it, and no further, so a pinned buffer that the host changes too early, or
//! memory that is freed too early, changes the answer. Fresh memory is NaN.

use std::alloc::{Layout, alloc, alloc_zeroed, dealloc};
use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use half::{bf16, f16};
use tidemill_cuda_emulation as emulation;

use super::device::{
    Address, Device, DeviceError, DeviceMemory, Event, Gemm, GemmInput, GemmOutput, Graph, Kernel, TmaMap,
    TmaShape,
};
use super::e4m3;

/// The order of threads and the planted mistake are the process's, so one device at a time runs.
static RUNNING: Mutex<()> = Mutex::new(());

const ALIGN: usize = 256;

#[derive(Debug)]
pub(crate) struct EmulatedDevice {
    order: i32,
    mistake: String,
    is_hopper: bool,
    total_bytes: u64,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    queue: VecDeque<Work>,
    /// Pieces of work queued and done since the device was made: an event is a number of them.
    num_queued: u64,
    num_done: u64,
    recording: Option<Vec<Work>>,
    graphs: BTreeMap<u64, Vec<Work>>,
    num_graphs: u64,
    used_bytes: u64,
    /// Start and length of pinned memory.
    pinned: BTreeMap<usize, usize>,
}

/// Pointers are kept as numbers, so that the queue may go from thread to thread.
#[derive(Clone, Debug)]
enum Work {
    /// `data` where the source was not pinned.
    Upload {
        to: Address,
        from: usize,
        num_bytes: usize,
        data: Option<Vec<u8>>,
    },
    Download {
        to: usize,
        from: Address,
        num_bytes: usize,
    },
    Copy {
        to: Address,
        from: Address,
        num_bytes: usize,
    },
    Launch {
        kernel: Kernel,
        grid: [u32; 3],
        params: Vec<Chunk>,
    },
    Gemm(Gemm),
}

/// Keeps parameters aligned as their structs want.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(128))]
struct Chunk([u8; 128]);

/// What the emulation reads of a `TmaMap`; the same struct is in `hopper.cuh`.
#[repr(C, align(128))]
struct EmulatedMap {
    base: u64,
    columns: u64,
    rows: u64,
    row_bytes: u64,
    box_columns: u32,
    box_rows: u32,
    element_bytes: i32,
}

impl EmulatedDevice {
    /// Threads run in this order; see `tidemill_cuda_emulation::ORDERS`.
    pub(crate) fn new(order: i32) -> Self {
        Self::with_mistake(order, "")
    }

    /// Whose kernels make a mistake, to see that it is found.
    pub(crate) fn with_mistake(order: i32, mistake: &str) -> Self {
        let state = Mutex::default();
        Self { order, mistake: mistake.to_owned(), is_hopper: true, total_bytes: 1 << 32, state }
    }

    /// One that has no kernels for sm_90a, no products of e4m3, and as little shared memory as others have.
    pub(crate) fn before_hopper(self) -> Self {
        Self { is_hopper: false, ..self }
    }

    pub(crate) fn with_memory(self, total_bytes: u64) -> Self {
        Self { total_bytes, ..self }
    }

    pub(crate) fn shared(self) -> Arc<dyn Device> {
        Arc::new(self)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn push(&self, work: Work) {
        let mut state = self.state();
        match &mut state.recording {
            Some(recording) => recording.push(work),
            None => {
                state.queue.push_back(work);
                state.num_queued += 1;
            }
        }
    }

    /// The next piece of work before the event.
    fn next(&self, event: Event) -> Option<Work> {
        let mut state = self.state();
        if state.num_done >= event.0 {
            return None;
        }
        state.num_done += 1;
        state.queue.pop_front()
    }

    fn run(&self, work: &Work) -> Result<(), DeviceError> {
        match work {
            Work::Upload { to, from, num_bytes, data } => {
                let from = data.as_ref().map_or(*from as *const u8, |data| data.as_ptr());
                // SAFETY: who queued it said that both ranges are valid.
                unsafe { std::ptr::copy_nonoverlapping(from, to.0 as *mut u8, *num_bytes) }
            }
            // SAFETY: as above.
            Work::Download { to, from, num_bytes } => unsafe {
                std::ptr::copy_nonoverlapping(from.0 as *const u8, *to as *mut u8, *num_bytes);
            },
            // SAFETY: as above.
            Work::Copy { to, from, num_bytes } => unsafe {
                std::ptr::copy_nonoverlapping(from.0 as *const u8, to.0 as *mut u8, *num_bytes);
            },
            Work::Launch { kernel, grid, params } => {
                let params = params.as_ptr().cast();
                // SAFETY: who queued it said that these are the kernel's parameters.
                unsafe { emulation::launch(kernel.name, *grid, kernel.block, kernel.shared_bytes, params) }
                    .map_err(|_| failed("launch", &format!("no kernel {}", kernel.name)))?;
            }
            // SAFETY: who queued it said that the operands are valid.
            Work::Gemm(gemm) => unsafe { multiply(gemm) },
        }
        Ok(())
    }
}

fn failed(what: &str, reason: &str) -> DeviceError {
    DeviceError::Failed { what: what.to_owned(), reason: reason.to_owned() }
}

fn layout(num_bytes: usize) -> Layout {
    Layout::from_size_align(num_bytes, ALIGN).expect("a size that a test asks for")
}

/// # Safety
/// The operands are of the shapes given.
unsafe fn multiply(gemm: &Gemm) {
    let Gemm { m, n, k, .. } = *gemm;
    // SAFETY: the caller says so, for each of these.
    unsafe {
        let read = |at: Address, len: usize| -> Vec<f32> {
            match gemm.input {
                GemmInput::Bf16 => {
                    std::slice::from_raw_parts(at.0 as *const bf16, len).iter().map(|x| x.to_f32()).collect()
                }
                GemmInput::F16 => {
                    std::slice::from_raw_parts(at.0 as *const f16, len).iter().map(|x| x.to_f32()).collect()
                }
                GemmInput::E4m3 => std::slice::from_raw_parts(at.0 as *const u8, len)
                    .iter()
                    .map(|&x| e4m3::to_f32(x))
                    .collect(),
            }
        };
        let scales = |at: Option<Address>, len: usize| {
            at.map_or(vec![1.0; len], |at| std::slice::from_raw_parts(at.0 as *const f32, len).to_vec())
        };
        let (x, weight) = (read(gemm.x, m * k), read(gemm.weight, n * k));
        let (x_scale, weight_scale) = (scales(gemm.x_scale, m), scales(gemm.weight_scale, n));
        for (row, x) in x.chunks_exact(k).enumerate() {
            for (column, weight) in weight.chunks_exact(k).enumerate() {
                let sum: f32 = x.iter().zip(weight).map(|(x, y)| x * y).sum();
                let value = sum * x_scale[row] * weight_scale[column];
                match gemm.output {
                    GemmOutput::Bf16 => {
                        (gemm.out.0 as *mut bf16).add(row * n + column).write(bf16::from_f32(value));
                    }
                    GemmOutput::F16 => {
                        (gemm.out.0 as *mut f16).add(row * n + column).write(f16::from_f32(value));
                    }
                    GemmOutput::F32 => (gemm.out.0 as *mut f32).add(row * n + column).write(value),
                }
            }
        }
    }
}

impl Device for EmulatedDevice {
    fn name(&self) -> &str {
        "emulation"
    }

    fn is_hopper(&self) -> bool {
        self.is_hopper
    }

    fn can_multiply(&self, input: GemmInput) -> bool {
        self.is_hopper || input != GemmInput::E4m3
    }

    fn max_shared_bytes(&self) -> u32 {
        if self.is_hopper { 227 << 10 } else { 99 << 10 }
    }

    fn memory(&self) -> Result<DeviceMemory, DeviceError> {
        let used = self.state().used_bytes;
        Ok(DeviceMemory { free: self.total_bytes - used, total: self.total_bytes })
    }

    fn alloc(&self, num_bytes: usize) -> Result<Address, DeviceError> {
        let DeviceMemory { free, total } = self.memory()?;
        if num_bytes as u64 > free {
            return Err(DeviceError::OutOfMemory { wanted: num_bytes as u64, free, total });
        }
        self.state().used_bytes += num_bytes as u64;
        // SAFETY: the size is not zero; every byte is written before the pointer is given away.
        unsafe {
            let pointer = alloc(layout(num_bytes));
            assert!(!pointer.is_null(), "out of memory");
            pointer.write_bytes(0xff, num_bytes);
            Ok(Address(pointer as u64))
        }
    }

    unsafe fn free(&self, address: Address, num_bytes: usize) {
        self.state().used_bytes -= num_bytes as u64;
        // SAFETY: the caller says that it came from `alloc` with this size.
        unsafe { dealloc(address.0 as *mut u8, layout(num_bytes)) }
    }

    fn alloc_pinned(&self, num_bytes: usize) -> Result<*mut u8, DeviceError> {
        // SAFETY: the size is not zero.
        let pointer = unsafe { alloc_zeroed(layout(num_bytes)) };
        assert!(!pointer.is_null(), "out of memory");
        self.state().pinned.insert(pointer as usize, num_bytes);
        Ok(pointer)
    }

    unsafe fn free_pinned(&self, pinned: *mut u8, num_bytes: usize) {
        self.state().pinned.remove(&(pinned as usize));
        // SAFETY: the caller says that it came from `alloc_pinned` with this size.
        unsafe { dealloc(pinned, layout(num_bytes)) }
    }

    unsafe fn upload(&self, to: Address, from: *const u8, num_bytes: usize) -> Result<(), DeviceError> {
        let before =
            self.state().pinned.range(..=from as usize).next_back().map(|(&start, &len)| start + len);
        let is_pinned = before.is_some_and(|end| from as usize + num_bytes <= end);
        // SAFETY: the caller says that the range is valid now.
        let data = || unsafe { std::slice::from_raw_parts(from, num_bytes) }.to_vec();
        let data = (!is_pinned).then(data);
        self.push(Work::Upload { to, from: from as usize, num_bytes, data });
        Ok(())
    }

    unsafe fn download(&self, to: *mut u8, from: Address, num_bytes: usize) -> Result<(), DeviceError> {
        self.push(Work::Download { to: to as usize, from, num_bytes });
        Ok(())
    }

    unsafe fn copy(&self, to: Address, from: Address, num_bytes: usize) -> Result<(), DeviceError> {
        self.push(Work::Copy { to, from, num_bytes });
        Ok(())
    }

    unsafe fn launch(&self, kernel: &Kernel, grid: [u32; 3], params: &[u8]) -> Result<(), DeviceError> {
        assert!(grid.iter().all(|&blocks| blocks > 0), "{}: a grid without blocks", kernel.name);
        assert!(grid[1] < 1 << 16 && grid[2] < 1 << 16, "{}: a grid of {grid:?}", kernel.name);
        let wanted = emulation::param_bytes(kernel.name);
        assert!(
            wanted.is_none_or(|bytes| bytes == params.len()),
            "{}: parameters of {wanted:?} bytes",
            kernel.name
        );
        let mut chunks = vec![Chunk([0; 128]); params.len().div_ceil(128)];
        for (chunk, bytes) in chunks.iter_mut().zip(params.chunks(128)) {
            chunk.0[..bytes.len()].copy_from_slice(bytes);
        }
        self.push(Work::Launch { kernel: *kernel, grid, params: chunks });
        Ok(())
    }

    unsafe fn gemm(&self, gemm: &Gemm) -> Result<(), DeviceError> {
        self.push(Work::Gemm(*gemm));
        Ok(())
    }

    fn tma_map(&self, shape: &TmaShape) -> Result<TmaMap, DeviceError> {
        let map = EmulatedMap {
            base: shape.base.0,
            columns: shape.columns,
            rows: shape.rows,
            row_bytes: shape.row_bytes,
            box_columns: 64,
            box_rows: shape.box_rows,
            element_bytes: 2,
        };
        // SAFETY: both are 128 bytes of plain numbers; the padding of the first means nothing.
        Ok(unsafe {
            let mut out = TmaMap([0; 16]);
            std::ptr::copy_nonoverlapping((&raw const map).cast::<u8>(), (&raw mut out).cast(), 48);
            out
        })
    }

    fn begin_graph(&self) -> Result<(), DeviceError> {
        let before = self.state().recording.replace(Vec::new());
        assert!(before.is_none(), "a graph is recorded already");
        Ok(())
    }

    fn end_graph(&self) -> Result<Graph, DeviceError> {
        let mut state = self.state();
        let recorded = state.recording.take().ok_or_else(|| failed("end a graph", "none was begun"))?;
        state.num_graphs += 1;
        let graph = state.num_graphs;
        state.graphs.insert(graph, recorded);
        Ok(Graph(graph))
    }

    unsafe fn launch_graph(&self, graph: Graph) -> Result<(), DeviceError> {
        let mut state = self.state();
        let work =
            state.graphs.get(&graph.0).cloned().ok_or_else(|| failed("launch a graph", "it was dropped"))?;
        state.num_queued += work.len() as u64;
        state.queue.extend(work);
        Ok(())
    }

    fn drop_graph(&self, graph: Graph) {
        self.state().graphs.remove(&graph.0);
    }

    fn record(&self) -> Result<Event, DeviceError> {
        Ok(Event(self.state().num_queued))
    }

    fn wait(&self, event: Event) -> Result<(), DeviceError> {
        let _running = RUNNING.lock().unwrap_or_else(PoisonError::into_inner);
        emulation::configure(self.order, &self.mistake);
        while let Some(work) = self.next(event) {
            self.run(&work)?;
        }
        Ok(())
    }
}
