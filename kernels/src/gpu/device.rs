//! What the ops need of a device: memory, and work done in the order in which it was given.
//!
//! Everything is queued on one stream and returns before it is done; [`Device::wait`] waits. Invariant: memory that a
//! queued piece of work uses is freed, or changed by the host where it is pinned, only after a wait for that work.

use std::fmt;

use super::memory::{DeviceVec, Plain};

/// Where something lies in the memory of a device, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(transparent)]
pub(crate) struct Address(pub(crate) u64);

impl Address {
    /// No such operand.
    pub(crate) const NULL: Self = Self(0);

    /// Of an operand that may be absent.
    pub(crate) fn of<T: Plain>(operand: Option<&DeviceVec<T>>) -> Self {
        operand.map_or(Self::NULL, DeviceVec::address)
    }
}

/// A compiled kernel and how a block of it looks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Kernel {
    /// `extern "C"` in the source; it takes one struct.
    pub(crate) name: &'static str,
    /// The source in `kernels/cuda`, without its ending.
    pub(crate) source: &'static str,
    /// Threads of a block.
    pub(crate) block: u32,
    /// Bytes of dynamic shared memory.
    pub(crate) shared_bytes: u32,
}

/// A point in the queue that can be waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Event(pub(crate) u64);

/// A recorded piece of the queue that can be queued again as one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Graph(pub(crate) u64);

/// Numbers that a matrix product reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum GemmInput {
    Bf16,
    F16,
    /// With an f32 scale for each row of `x` and each row of `weight`.
    E4m3,
}

/// Numbers that a matrix product writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum GemmOutput {
    Bf16,
    F16,
    F32,
}

/// `out[m, n] = sum over k of x[m, k] * weight[n, k]`, all row-major.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Gemm {
    pub(crate) m: usize,
    pub(crate) n: usize,
    pub(crate) k: usize,
    pub(crate) input: GemmInput,
    pub(crate) output: GemmOutput,
    pub(crate) x: Address,
    pub(crate) weight: Address,
    pub(crate) out: Address,
    /// `[m]` and `[n]`, for e4m3.
    pub(crate) x_scale: Option<Address>,
    pub(crate) weight_scale: Option<Address>,
    /// A row of `out` must not depend on how many rows there are.
    pub(crate) batch_invariant: bool,
}

/// A matrix of 16-bit floats from which TMA reads boxes of 64 columns, in the swizzle of 128 bytes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct TmaShape {
    pub(crate) base: Address,
    pub(crate) rows: u64,
    pub(crate) columns: u64,
    pub(crate) row_bytes: u64,
    pub(crate) box_rows: u32,
}

/// As kernels take it (`CUtensorMap`).
#[derive(Clone, Copy)]
#[repr(C, align(128))]
pub(crate) struct TmaMap(pub(crate) [u64; 16]);

/// Of a device, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct DeviceMemory {
    pub(crate) free: u64,
    pub(crate) total: u64,
}

/// The device cannot do what it was asked to.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DeviceError {
    #[error("{wanted} bytes do not fit the memory of the device, {free} of {total} bytes are free")]
    OutOfMemory { wanted: u64, free: u64, total: u64 },
    #[error("the device cannot {what}: {reason}")]
    Failed { what: String, reason: String },
}

/// A GPU, or what stands for it. Work is queued by one thread at a time.
pub(crate) trait Device: Send + Sync + fmt::Debug {
    fn name(&self) -> &str;
    /// Whether kernels for sm_90a run.
    fn is_hopper(&self) -> bool;
    /// Whether there are products of such numbers.
    fn can_multiply(&self, input: GemmInput) -> bool;
    /// Shared memory that a block may have.
    fn max_shared_bytes(&self) -> u32;
    fn memory(&self) -> Result<DeviceMemory, DeviceError>;

    /// Memory with unknown contents, aligned to 256 bytes; NaN everywhere under emulation.
    fn alloc(&self, num_bytes: usize) -> Result<Address, DeviceError>;
    /// # Safety
    /// The memory came from `alloc` of this size, and no queued work uses it.
    unsafe fn free(&self, address: Address, num_bytes: usize);
    /// Memory of the host that the device reads and writes by itself; zeros.
    fn alloc_pinned(&self, num_bytes: usize) -> Result<*mut u8, DeviceError>;
    /// # Safety
    /// The memory came from `alloc_pinned` of this size, and no queued work uses it.
    unsafe fn free_pinned(&self, pinned: *mut u8, num_bytes: usize);

    /// Queues a copy to the device. Where `from` is pinned it is read when the work before is done, else at once.
    /// # Safety
    /// Both ranges are valid, and `from` until the copy is done.
    unsafe fn upload(&self, to: Address, from: *const u8, num_bytes: usize) -> Result<(), DeviceError>;
    /// Queues a copy to the host.
    /// # Safety
    /// As for `upload`.
    unsafe fn download(&self, to: *mut u8, from: Address, num_bytes: usize) -> Result<(), DeviceError>;
    /// Queues a copy within the device.
    /// # Safety
    /// Both ranges are valid and do not overlap.
    unsafe fn copy(&self, to: Address, from: Address, num_bytes: usize) -> Result<(), DeviceError>;

    /// Queues a kernel; `params` is copied.
    /// # Safety
    /// `params` is the struct of the kernel, and the memory it points to stays valid until the work is done.
    unsafe fn launch(&self, kernel: &Kernel, grid: [u32; 3], params: &[u8]) -> Result<(), DeviceError>;
    /// Queues a matrix product.
    /// # Safety
    /// The operands are of the shapes given and stay valid until the work is done.
    unsafe fn gemm(&self, gemm: &Gemm) -> Result<(), DeviceError>;
    /// Describes a matrix to TMA.
    fn tma_map(&self, shape: &TmaShape) -> Result<TmaMap, DeviceError>;

    /// Starts to record what is queued instead of doing it.
    fn begin_graph(&self) -> Result<(), DeviceError>;
    fn end_graph(&self) -> Result<Graph, DeviceError>;
    /// Queues a recorded graph.
    /// # Safety
    /// What it was recorded with is still valid.
    unsafe fn launch_graph(&self, graph: Graph) -> Result<(), DeviceError>;
    fn drop_graph(&self, graph: Graph);

    /// The end of what is queued so far.
    fn record(&self) -> Result<Event, DeviceError>;
    /// Waits until all that was queued before the event is done.
    fn wait(&self, event: Event) -> Result<(), DeviceError>;
}
