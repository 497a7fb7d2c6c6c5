//! A step allocates nothing but the list it returns: everything else lives in buffers that an earlier step has grown.
//! On one thread, since each thread has buffers of its own, which grow when it first gets a task.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

use tidemill_kernels::models::{Checkpoint, KvConfig, ModelWeights, NumericPath, Transformer};
use tidemill_kernels::step::{Model, PageId, SamplingParams, StepBatch, TokenUse};
use tidemill_tests::default_model;

struct Counting;

static NUM_ALLOCATIONS: AtomicUsize = AtomicUsize::new(0);

// SAFETY: the system's allocator does the work; counting does not touch memory that is handed out.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        NUM_ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: promised by the caller.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: promised by the caller.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// A chunk of a prompt and three decodes, one with penalties, at the same positions each time.
fn batch() -> StepBatch {
    let mut batch = StepBatch::default();
    let token_ids: Vec<u32> = (0..200).map(|i| 1000 + i * 7).collect();
    batch.push(&token_ids, 0, &[PageId(0), PageId(1), PageId(2), PageId(3)], Some(SamplingParams::GREEDY));
    batch.push(&[17], 70, &[PageId(4), PageId(5)], Some(SamplingParams::GREEDY));
    batch.push(&[19], 64, &[PageId(4), PageId(6)], Some(SamplingParams::GREEDY));
    let penalties = SamplingParams { repetition_penalty: 1.1, min_p: 0.1, ..SamplingParams::GREEDY };
    batch.push(&[19], 66, &[PageId(4), PageId(7)], Some(SamplingParams { temperature: 0.5, ..penalties }));
    batch.push_uses(&[17, 19].map(|token_id| TokenUse { token_id, num_in_answer: 1 }));
    batch
}

#[test]
fn a_step_allocates_only_its_result() {
    let checkpoint = Checkpoint::open(&default_model()).unwrap();
    let weights = ModelWeights::load(&checkpoint, NumericPath::Fast).unwrap();
    let kv = KvConfig { page_size: 64, num_pages: 8 };
    let mut model = Transformer::new(weights, kv, 1, "smollm2", "test").unwrap();
    let batch = batch();
    for _ in 0..3 {
        model.step(&batch).unwrap();
    }
    let before = NUM_ALLOCATIONS.load(Ordering::Relaxed);
    let output = model.step(&batch).unwrap();
    let num_allocations = NUM_ALLOCATIONS.load(Ordering::Relaxed) - before;
    assert_eq!(output.token_ids.len(), 4);
    assert!(num_allocations <= 1, "{num_allocations} allocations in a step");
}
