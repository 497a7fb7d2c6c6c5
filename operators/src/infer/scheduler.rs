//! Decides which sequences run in a step and for how many tokens, and moves their KV pages.
//!
//! The algorithm is that of the vLLM v1 scheduler: no prefill or decode phases, only tokens not yet computed. One
//! budget of tokens a step goes to sequences with a single uncomputed token first (decodes), then to running
//! prefills in order of admission, then to waiting sequences in order of submission; so a step mixes decodes with
//! chunks of prompts. A sequence is admitted with pages for all its known tokens, and needs another one only when its
//! answer crosses a page boundary. When there is none, the newest admitted sequence is preempted: it returns to the
//! front of the waiting queue, and later computes its tokens again, answer included. Nothing is ever dropped.
//!
//! Invariants: a page that a step writes has one holder. What is in the prefix cache was computed by an earlier
//! step. The oldest running sequence is never preempted for another one, and whoever fits the cache alone is
//! admitted when nothing else runs; so every sequence finishes.

use std::collections::VecDeque;

use tidemill_kernels::step::{PageId, StepBatch, StepOutput};

use super::engine::EngineConfig;
use super::page_pool::{PageHolder, PagePool};
use super::prefix_cache::PrefixCache;
use super::sequence::{Finished, Sequence};

/// How many waiting sequences are considered in a step while those before them wait for a shared prefix.
const MAX_LOOKAHEAD: usize = 32;

/// How many tokens of each running sequence the next step computes; 0 leaves it out.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StepPlan {
    /// Indexed as the running sequences.
    pub chunk_lens: Vec<usize>,
}

/// Counts since the scheduler was made; see [`EngineStats`](super::engine::EngineStats).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    pub finished: u64,
    pub prompt_tokens: u64,
    pub computed_tokens: u64,
    pub reused_tokens: u64,
    pub recomputed_tokens: u64,
    pub output_tokens: u64,
    pub preemptions: u64,
    pub peak_running: u64,
}

/// Queues, pages and the plan of the next step.
#[derive(Debug)]
pub struct Scheduler {
    config: EngineConfig,
    page_size: usize,
    pool: PagePool,
    /// Stays empty when the configuration says so.
    cache: PrefixCache,
    waiting: VecDeque<Sequence>,
    /// In order of admission.
    running: Vec<Sequence>,
    plan: StepPlan,
    counters: Counters,
}

/// What became of a waiting sequence.
enum Admission {
    Admitted,
    /// A running sequence computes its next page.
    AwaitsSibling,
    OutOfPages,
}

impl Scheduler {
    pub fn new(config: EngineConfig, num_pages: u32, page_size: u32) -> Self {
        assert!(config.max_num_seqs > 0, "max_num_seqs is 0");
        assert!(config.max_num_batched_tokens > 0, "max_num_batched_tokens is 0");
        Self {
            config,
            page_size: page_size as usize,
            pool: PagePool::new(num_pages),
            cache: PrefixCache::new(num_pages, page_size),
            waiting: VecDeque::new(),
            running: Vec::new(),
            plan: StepPlan::default(),
            counters: Counters::default(),
        }
    }

    /// Queues a sequence which fits the cache alone, prompt and answer together. The queue has no bound of its own.
    pub fn submit(&mut self, sequence: Sequence) {
        let max_len = sequence.prompt_len + sequence.max_tokens;
        assert!(max_len <= self.pool.num_pages() * self.page_size, "the sequence could never finish");
        self.counters.prompt_tokens += sequence.prompt_len as u64;
        self.waiting.push_back(sequence);
    }

    /// Plans the next step. Planning again without [`commit`](Self::commit) is harmless: nothing was computed.
    pub fn plan(&mut self) -> &StepPlan {
        let mut budget = self.config.max_num_batched_tokens;
        self.plan.chunk_lens.clear();
        self.plan.chunk_lens.resize(self.running.len(), 0);
        self.plan_decodes(&mut budget);
        self.plan_prefills(&mut budget);
        self.plan_admissions(&mut budget);
        self.counters.peak_running = self.counters.peak_running.max(self.running.len() as u64);
        self.check_plan();
        &self.plan
    }

    /// Adds the planned chunks to an empty batch.
    pub fn fill(&self, batch: &mut StepBatch) {
        for (sequence, &chunk_len) in self.running.iter().zip(&self.plan.chunk_lens) {
            if chunk_len == 0 {
                continue;
            }
            let (first, end) = (sequence.computed_len, sequence.computed_len + chunk_len);
            let pages = &sequence.pages[..end.div_ceil(self.page_size)];
            assert!(sequence.num_shared_pages <= first / self.page_size, "a shared page would be written");
            let written = &pages[first / self.page_size..];
            assert!(written.iter().all(|&page| self.pool.holder(page) == PageHolder::Sequence));
            let sampling = (end == sequence.known_len()).then_some(sequence.sampling);
            batch.push(&sequence.token_ids[first..end], first as u32, pages, sampling);
        }
    }

    /// Takes in the output of the planned step; returns the sequences it has finished.
    pub fn commit(&mut self, output: &StepOutput, eos_token_ids: &[u32]) -> Vec<Finished> {
        let mut finished = Vec::new();
        let mut sampled = output.token_ids.iter();
        let mut chunk_lens = std::mem::take(&mut self.plan.chunk_lens);
        assert_eq!(chunk_lens.len(), self.running.len(), "commit without a plan");
        let running = std::mem::take(&mut self.running);
        for (mut sequence, chunk_len) in running.into_iter().zip(chunk_lens.drain(..)) {
            if chunk_len == 0 {
                self.running.push(sequence);
                continue;
            }
            let token_id = *sampled.next().expect("the output has one entry a planned sequence");
            self.advance(&mut sequence, chunk_len);
            if sequence.computed_len < sequence.known_len() {
                self.running.push(sequence);
                continue;
            }
            let answer_len = sequence.known_len();
            let reason = sequence.push_sampled(token_id.expect("a token was sampled"), eos_token_ids);
            self.counters.output_tokens += (sequence.known_len() - answer_len) as u64;
            match reason {
                None => self.running.push(sequence),
                Some(reason) => {
                    self.release(&mut sequence);
                    self.counters.finished += 1;
                    finished.push(sequence.finish(reason));
                }
            }
        }
        assert!(sampled.next().is_none(), "the output has more entries than the plan");
        self.plan.chunk_lens = chunk_lens;
        finished
    }

    pub fn counters(&self) -> Counters {
        self.counters
    }

    pub fn num_waiting(&self) -> usize {
        self.waiting.len()
    }

    pub fn num_running(&self) -> usize {
        self.running.len()
    }

    pub fn num_pages(&self) -> usize {
        self.pool.num_pages()
    }

    /// Pages which no running sequence holds.
    pub fn num_available_pages(&self) -> usize {
        self.pool.num_free() + self.cache.num_idle()
    }

    /// Pages which only the prefix cache holds.
    pub fn num_idle_pages(&self) -> usize {
        self.cache.num_idle()
    }

    fn plan_decodes(&mut self, budget: &mut usize) {
        let mut index = 0;
        while index < self.running.len() && *budget > 0 {
            if self.running[index].uncomputed_len() == 1 && self.extend_pages(index) {
                self.plan.chunk_lens[index] = 1;
                *budget -= 1;
            }
            index += 1;
        }
    }

    fn plan_prefills(&mut self, budget: &mut usize) {
        for (sequence, chunk_len) in self.running.iter().zip(&mut self.plan.chunk_lens) {
            let uncomputed_len = sequence.uncomputed_len();
            if uncomputed_len > 1 {
                *chunk_len = uncomputed_len.min(*budget);
                *budget -= *chunk_len;
            }
        }
    }

    fn plan_admissions(&mut self, budget: &mut usize) {
        let mut index = 0;
        while *budget > 0 && self.running.len() < self.config.max_num_seqs {
            if index >= self.waiting.len().min(MAX_LOOKAHEAD) {
                break;
            }
            match self.admit(index) {
                Admission::Admitted => {
                    let sequence = self.running.last().expect("it was just admitted");
                    let chunk_len = sequence.uncomputed_len().min(*budget);
                    self.plan.chunk_lens.push(chunk_len);
                    *budget -= chunk_len;
                }
                Admission::AwaitsSibling => index += 1,
                // Overtaking would let short prompts keep a long one out for ever.
                Admission::OutOfPages => break,
            }
        }
    }

    /// Moves a waiting sequence to the running ones, with pages for all its tokens.
    fn admit(&mut self, index: usize) -> Admission {
        let sequence = &self.waiting[index];
        // The last token is always computed: its logits choose the next one.
        let path = match self.config.enable_prefix_cache {
            true => self.cache.lookup(&sequence.token_ids[..sequence.known_len() - 1]),
            false => Vec::new(),
        };
        if self.config.enable_prefix_cache && self.sibling_computes(sequence, path.len()) {
            return Admission::AwaitsSibling;
        }
        let num_new = sequence.known_len().div_ceil(self.page_size) - path.len();
        let num_available = self.num_available_pages() - self.cache.num_idle_in(&path);
        // A page for each running sequence to grow into, or they would soon push the new one out again. It
        // also keeps a sequence that was just preempted from coming back at once.
        let num_reserved = self.running.len();
        if num_available < num_new + num_reserved {
            assert!(!self.running.is_empty(), "a sequence that fits the cache alone is not admitted");
            return Admission::OutOfPages;
        }
        let mut sequence = self.waiting.remove(index).expect("the index is below the length");
        self.cache.lock(&path);
        self.reuse(&mut sequence, path.len());
        sequence.pages = path;
        for _ in 0..num_new {
            let page = self.take_page().expect("as many pages are available");
            sequence.pages.push(page);
        }
        self.running.push(sequence);
        Admission::Admitted
    }

    /// Whether the page after the `num_cached` ones is on its way: a running sequence has the same tokens up to
    /// the end of it, and has not finished it yet.
    fn sibling_computes(&self, sequence: &Sequence, num_cached: usize) -> bool {
        let end = (num_cached + 1) * self.page_size;
        if end > sequence.known_len() - 1 {
            return false;
        }
        self.running.iter().any(|sibling| {
            sibling.num_shared_pages <= num_cached
                && sibling.known_len() >= end
                && sibling.token_ids[..end] == sequence.token_ids[..end]
        })
    }

    /// Makes sure the next token of a running sequence has a page, at the cost of the newest ones; false when the
    /// sequence itself was preempted.
    fn extend_pages(&mut self, index: usize) -> bool {
        let sequence = &self.running[index];
        if sequence.computed_len < sequence.pages.len() * self.page_size {
            return true;
        }
        loop {
            if let Some(page) = self.take_page() {
                self.running[index].pages.push(page);
                return true;
            }
            assert!(self.running.len() > 1, "a sequence that fits the cache alone has no page");
            self.preempt_newest();
            if index == self.running.len() {
                return false;
            }
        }
    }

    fn preempt_newest(&mut self) {
        let mut sequence = self.running.pop().expect("someone runs");
        self.plan.chunk_lens.pop();
        self.release(&mut sequence);
        self.counters.preemptions += 1;
        self.waiting.push_front(sequence);
    }

    /// A free page, or one that the prefix cache gives up.
    fn take_page(&mut self) -> Option<PageId> {
        if self.pool.num_free() == 0 && !self.cache.evict(&mut self.pool) {
            return None;
        }
        self.pool.take()
    }

    fn reuse(&mut self, sequence: &mut Sequence, num_pages: usize) {
        assert_eq!(sequence.computed_len, 0);
        let end = num_pages * self.page_size;
        let num_new = sequence.num_prompt_tokens(sequence.seen_len, end);
        sequence.num_shared_pages = num_pages;
        sequence.computed_len = end;
        sequence.seen_len = sequence.seen_len.max(end);
        sequence.num_reused += num_new as u32;
        self.counters.reused_tokens += num_new as u64;
    }

    /// Counts a computed chunk, and hands the pages it has filled to the prefix cache.
    fn advance(&mut self, sequence: &mut Sequence, chunk_len: usize) {
        let (first, end) = (sequence.computed_len, sequence.computed_len + chunk_len);
        let num_computed = sequence.num_prompt_tokens(first, end);
        sequence.num_computed += num_computed as u32;
        self.counters.computed_tokens += num_computed as u64;
        let num_recomputed = sequence.num_prompt_tokens(first, end.min(sequence.seen_len));
        self.counters.recomputed_tokens += num_recomputed as u64;
        sequence.computed_len = end;
        sequence.seen_len = sequence.seen_len.max(end);
        if !self.config.enable_prefix_cache {
            return;
        }
        for index in sequence.num_shared_pages..end / self.page_size {
            let parent = index.checked_sub(1).map(|index| sequence.pages[index]);
            let token_ids = &sequence.token_ids[index * self.page_size..][..self.page_size];
            let page = self.cache.insert(parent, token_ids, sequence.pages[index], &mut self.pool);
            sequence.pages[index] = page;
            sequence.num_shared_pages = index + 1;
        }
    }

    /// Gives all pages back; those in the prefix cache stay there until they are needed.
    fn release(&mut self, sequence: &mut Sequence) {
        let (shared, own) = sequence.pages.split_at(sequence.num_shared_pages);
        self.cache.unlock(shared);
        for &page in own {
            self.pool.give_back(page);
        }
        sequence.pages.clear();
        sequence.num_shared_pages = 0;
        sequence.computed_len = 0;
    }

    fn check_plan(&self) {
        assert_eq!(self.plan.chunk_lens.len(), self.running.len());
        assert!(self.running.len() <= self.config.max_num_seqs);
        let num_tokens: usize = self.plan.chunk_lens.iter().sum();
        assert!(num_tokens <= self.config.max_num_batched_tokens);
        assert!(num_tokens > 0 || (self.running.is_empty() && self.waiting.is_empty()), "nobody runs");
    }
}

#[cfg(test)]
mod fuzz;
#[cfg(test)]
mod tests;
