//! What the host does for a step, on a device that does nothing: decodes queue no kernel but in a graph, and their time is
//! printed, never judged (`--nocapture` shows it). The driver's own calls (two copies, a graph, an event) come on top.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use super::*;
use crate::gpu::device::{
    Address, DeviceError, DeviceMemory, Event, Gemm, GemmInput, Graph, Kernel, TmaMap, TmaShape,
};
use crate::gpu::model::{GpuModel, GpuModelConfig, KvMemory};
use crate::gpu::{Gpu, GpuOptions, GpuWeights};
use crate::models::Checkpoint;
use crate::step::{Model, PageId, SamplingParams, StepBatch};

/// Gives out addresses and forgets everything else; what is read back is zeros.
#[derive(Debug, Default)]
struct IdleDevice {
    next: AtomicU64,
    num_launches: AtomicU64,
}

impl Device for IdleDevice {
    fn name(&self) -> &str {
        "idle"
    }
    fn is_hopper(&self) -> bool {
        true
    }
    fn can_multiply(&self, _input: GemmInput) -> bool {
        true
    }
    fn max_shared_bytes(&self) -> u32 {
        227 << 10
    }
    fn memory(&self) -> Result<DeviceMemory, DeviceError> {
        Ok(DeviceMemory { free: 1 << 40, total: 1 << 40 })
    }
    fn alloc(&self, num_bytes: usize) -> Result<Address, DeviceError> {
        let num_bytes = (num_bytes as u64).next_multiple_of(256);
        Ok(Address(4096 + self.next.fetch_add(num_bytes, Ordering::Relaxed)))
    }
    unsafe fn free(&self, _address: Address, _num_bytes: usize) {}
    fn alloc_pinned(&self, num_bytes: usize) -> Result<*mut u8, DeviceError> {
        Ok(Box::leak(vec![0u64; num_bytes.div_ceil(8)].into_boxed_slice()).as_mut_ptr().cast())
    }
    unsafe fn free_pinned(&self, _pinned: *mut u8, _num_bytes: usize) {}
    unsafe fn upload(&self, _to: Address, _from: *const u8, _num_bytes: usize) -> Result<(), DeviceError> {
        Ok(())
    }
    unsafe fn download(&self, _to: *mut u8, _from: Address, _num_bytes: usize) -> Result<(), DeviceError> {
        Ok(())
    }
    unsafe fn copy(&self, _to: Address, _from: Address, _num_bytes: usize) -> Result<(), DeviceError> {
        Ok(())
    }
    unsafe fn launch(&self, _kernel: &Kernel, _grid: [u32; 3], _params: &[u8]) -> Result<(), DeviceError> {
        self.num_launches.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }
    unsafe fn gemm(&self, _gemm: &Gemm) -> Result<(), DeviceError> {
        Ok(())
    }
    fn tma_map(&self, _shape: &TmaShape) -> Result<TmaMap, DeviceError> {
        Ok(TmaMap([0; 16]))
    }
    fn begin_graph(&self) -> Result<(), DeviceError> {
        Ok(())
    }
    fn end_graph(&self) -> Result<Graph, DeviceError> {
        Ok(Graph(1))
    }
    unsafe fn launch_graph(&self, _graph: Graph) -> Result<(), DeviceError> {
        Ok(())
    }
    fn drop_graph(&self, _graph: Graph) {}
    fn record(&self) -> Result<Event, DeviceError> {
        Ok(Event(0))
    }
    fn wait(&self, _event: Event) -> Result<(), DeviceError> {
        Ok(())
    }
}

/// Sequences that decode, each this long.
const NUM_SEQS: u32 = 256;
const LEN: u32 = 1900;
const PAGE_SIZE: u32 = 16;
const NUM_STEPS: u32 = 100;

#[test]
fn decodes_are_one_graph() {
    let idle = Arc::new(IdleDevice::default());
    let gpu = Gpu { device: Arc::clone(&idle) as Arc<dyn Device> };
    let tiny = sources().join("tests/reference/tiny/qwen3");
    let weights = GpuWeights::load(&gpu, &Checkpoint::open(&tiny).unwrap(), GpuOptions::default()).unwrap();
    let pages_per_seq = (LEN + NUM_STEPS).div_ceil(PAGE_SIZE);
    let config = GpuModelConfig {
        page_size: PAGE_SIZE,
        kv_memory: KvMemory::Pages(NUM_SEQS * pages_per_seq),
        max_num_batched_tokens: 8192,
        max_num_seqs: NUM_SEQS,
        num_host_pages: 0,
    };
    let mut model = GpuModel::new(weights, config, "idle", "abc").unwrap();
    let (mut batch, mut micros) = (StepBatch::default(), Vec::new());
    for step in 0..NUM_STEPS {
        batch.clear();
        for seq in 0..NUM_SEQS {
            let pages: Vec<PageId> = (0..pages_per_seq).map(|i| PageId(seq * pages_per_seq + i)).collect();
            batch.push(&[7], LEN + step, &pages, Some(SamplingParams::GREEDY));
        }
        let launches = idle.num_launches.load(Ordering::Relaxed);
        #[expect(clippy::disallowed_methods, reason = "this is what the test prints")]
        let start = Instant::now();
        model.start(&batch).unwrap();
        model.finish().unwrap();
        micros.push(start.elapsed().as_micros());
        // The first such step runs as it is, the second is recorded.
        let is_one_graph = step < 2 || idle.num_launches.load(Ordering::Relaxed) == launches;
        assert!(is_one_graph, "step {step} queued kernels one by one");
    }
    micros.sort_unstable();
    println!("host time of a step of {NUM_SEQS} decodes: {} us (median)", micros[micros.len() / 2]);
}
