//! How busy an engine is: written by its thread after each step, read from any other.
//!
//! The numbers are of one moment each, not all of the same one. Totals of tokens are a pipeline's and in its
//! [`Counters`](crate::counters::Counters).

use std::sync::atomic::{AtomicU64, Ordering};

use super::engine::Engine;

/// Gauges of one engine.
#[derive(Debug, Default)]
pub struct EngineLoad {
    pub kv_pages_total: AtomicU64,
    /// Pages that running sequences hold.
    pub kv_pages_in_use: AtomicU64,
    /// Pages that only the prefix cache holds.
    pub kv_pages_cached: AtomicU64,
    /// Tokens in a page.
    pub page_size: AtomicU64,
    pub running: AtomicU64,
    pub waiting: AtomicU64,
    /// Tokens of all running and waiting prompts and of the answers they may get.
    pub open_tokens: AtomicU64,
    /// Since the engine was started.
    pub steps: AtomicU64,
    pub preemptions: AtomicU64,
    /// Pages of preempted sequences that went to the host's memory, and that came back.
    pub swapped_out_pages: AtomicU64,
    pub swapped_in_pages: AtomicU64,
}

impl EngineLoad {
    pub(super) fn update(&self, engine: &Engine, open_tokens: u64) {
        let stats = engine.stats();
        let set = |gauge: &AtomicU64, value: u64| gauge.store(value, Ordering::Relaxed);
        set(&self.kv_pages_total, stats.kv_pages_total);
        set(&self.kv_pages_in_use, stats.kv_pages_in_use);
        set(&self.kv_pages_cached, stats.kv_pages_cached);
        set(&self.page_size, engine.model_info().page_size.into());
        set(&self.running, engine.num_running() as u64);
        set(&self.waiting, engine.num_waiting() as u64);
        set(&self.open_tokens, open_tokens);
        set(&self.steps, stats.steps);
        set(&self.preemptions, stats.preemptions);
        set(&self.swapped_out_pages, stats.swapped_out_pages);
        set(&self.swapped_in_pages, stats.swapped_in_pages);
    }

    /// Tokens that the KV cache can hold.
    pub fn kv_tokens(&self) -> u64 {
        self.kv_pages_total.load(Ordering::Relaxed) * self.page_size.load(Ordering::Relaxed)
    }

    /// Tokens for which no running sequence holds a page.
    pub fn kv_tokens_free(&self) -> u64 {
        let in_use = self.kv_pages_in_use.load(Ordering::Relaxed) * self.page_size.load(Ordering::Relaxed);
        self.kv_tokens().saturating_sub(in_use)
    }
}
