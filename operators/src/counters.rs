//! What a run has done so far: counted where it happens, read by the progress line and the summary.

use std::sync::atomic::{AtomicU64, Ordering};

/// Running totals. Every field only grows, except `documents_in_flight`.
#[derive(Debug, Default)]
pub struct Counters {
    pub documents_read: AtomicU64,
    pub documents_in_flight: AtomicU64,
    pub peak_in_flight: AtomicU64,
    /// Documents, answered or refused, that have reached the sink; their epoch may still be open.
    pub arrived: AtomicU64,
    /// Documents handed to the output.
    pub documents_done: AtomicU64,
    pub errors: AtomicU64,
    /// Answers taken from the journal instead of the model.
    pub recalled: AtomicU64,
    /// Prompt tokens known to the engines, computed or reused; none counts twice.
    pub prompt_tokens: AtomicU64,
    /// Prompt tokens that went through the model, recomputation counted.
    pub computed_tokens: AtomicU64,
    /// Prompt tokens among them that a sequence lost to a preemption.
    pub recomputed_tokens: AtomicU64,
    /// Different prefixes of the prompts handed to engines: what is computed if each is computed once. Estimated.
    pub distinct_tokens: AtomicU64,
    /// Prompt tokens taken from the prefix cache.
    pub reused_tokens: AtomicU64,
    pub output_tokens: AtomicU64,
    pub preemptions: AtomicU64,
}

impl Counters {
    pub fn add(counter: &AtomicU64, value: u64) {
        counter.fetch_add(value, Ordering::Relaxed);
    }

    /// Documents that were read and are not written yet, now.
    pub fn observe_in_flight(&self, documents: u64) {
        self.documents_in_flight.store(documents, Ordering::Relaxed);
        self.peak_in_flight.fetch_max(documents, Ordering::Relaxed);
    }

    pub fn get(counter: &AtomicU64) -> u64 {
        counter.load(Ordering::Relaxed)
    }
}
