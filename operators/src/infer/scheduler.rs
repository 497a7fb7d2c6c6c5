//! Decides which sequences run in a step and for how many tokens, and moves their KV pages.
//!
//! The algorithm is that of the vLLM v1 scheduler: no prefill or decode phases, only tokens not yet computed. One
//! budget of tokens a step goes to one priority after the other; within a priority to sequences with a single
//! uncomputed token first (decodes), then to running prefills in order of admission, then to waiting sequences in
//! order of submission; so a step mixes decodes with chunks of prompts. A sequence is admitted with pages for all its known tokens, if a forecast says that the answers
//! will find room too ([`admission`]), and needs another page only when its answer crosses a page boundary. When
//! there is none, the sequence that costs least to compute again is preempted: it returns to its place in the
//! waiting queue. Nothing is ever dropped. Sequences of lower priority give way to one that cannot be admitted.
//!
//! Invariants: a page that a step writes has one holder. What is in the prefix cache was computed by an earlier
//! step. Nobody is preempted for one of lower priority, nor the oldest of a priority for its equals; and whoever
//! fits the cache alone is admitted when nothing else runs; so every sequence finishes, unless those of higher
//! priority keep coming for ever.

mod admission;

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::ops::Range;
use std::sync::Arc;

use tidemill_kernels::step::{PageCopy, PageId, StepBatch, StepOutput};

use super::engine::EngineConfig;
use super::forecast::AnswerLengths;
use super::page_pool::{PageHolder, PagePool};
use super::prefix_cache::PrefixCache;
use super::sequence::{Finished, OwnerId, Priority, Sequence, SequenceId, SequenceRequest};
use admission::Admission;

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
    pub aborted: u64,
    pub aborted_tokens: u64,
    pub prompt_tokens: u64,
    pub computed_tokens: u64,
    pub reused_tokens: u64,
    pub recomputed_tokens: u64,
    pub recomputed_output_tokens: u64,
    pub output_tokens: u64,
    pub preemptions: u64,
    pub peak_running: u64,
}

/// Queues, pages and the plan of the next step.
#[derive(Debug)]
pub struct Scheduler {
    config: EngineConfig,
    page_size: usize,
    /// Whether the model copies the beginning of a page; otherwise whole pages are shared and nothing else.
    copies_pages: bool,
    pool: PagePool,
    /// Stays empty when the configuration says so.
    cache: PrefixCache,
    /// By priority, then in order of submission.
    waiting: VecDeque<Sequence>,
    /// By priority, then in order of admission.
    running: Vec<Sequence>,
    plan: StepPlan,
    /// Planned and not committed. A step that failed is tried again as it was, since it may have written some pages.
    is_planned: bool,
    /// Running sequences to give up with the next commit: the planned step may be writing their pages.
    aborting: BTreeSet<SequenceId>,
    answer_lengths: BTreeMap<(OwnerId, Arc<str>), AnswerLengths>,
    num_submitted: u64,
    counters: Counters,
    /// Of the last commit.
    first_tokens: Vec<SequenceId>,
    /// What of `counters` is each owner's; indexed by owner.
    owned: Vec<Counters>,
}

impl Scheduler {
    pub fn new(config: EngineConfig, num_pages: u32, page_size: u32, copies_pages: bool) -> Self {
        assert!(config.max_num_seqs > 0, "max_num_seqs is 0");
        assert!(config.max_num_batched_tokens > 0, "max_num_batched_tokens is 0");
        Self {
            config,
            page_size: page_size as usize,
            copies_pages,
            pool: PagePool::new(num_pages),
            cache: PrefixCache::new(num_pages, page_size),
            waiting: VecDeque::new(),
            running: Vec::new(),
            plan: StepPlan::default(),
            is_planned: false,
            aborting: BTreeSet::new(),
            answer_lengths: BTreeMap::new(),
            num_submitted: 0,
            counters: Counters::default(),
            first_tokens: Vec::new(),
            owned: Vec::new(),
        }
    }

    /// Queues a sequence which fits the cache alone, prompt and answer together. The queue has no bound of its own.
    pub fn submit(&mut self, request: &SequenceRequest) {
        let sequence = Sequence::new(request, self.num_submitted);
        let max_len = sequence.prompt_len + sequence.max_tokens;
        assert!(max_len <= self.pool.num_pages() * self.page_size, "the sequence could never finish");
        self.num_submitted += 1;
        self.count(sequence.owner, |counters| counters.prompt_tokens += sequence.prompt_len as u64);
        self.wait(sequence);
    }

    /// Gives up a sequence and its pages, at once or when the planned step is done. False if there is none of this name.
    pub fn abort(&mut self, id: SequenceId) -> bool {
        if let Some(index) = self.waiting.iter().position(|sequence| sequence.id == id) {
            let sequence = self.waiting.remove(index).expect("it was just found");
            self.forget(&sequence);
            return true;
        }
        let Some(index) = self.running.iter().position(|sequence| sequence.id == id) else { return false };
        if self.is_planned {
            return self.aborting.insert(id);
        }
        let mut sequence = self.running.remove(index);
        self.release(&mut sequence);
        self.forget(&sequence);
        true
    }

    /// Plans the next step. Without [`commit`](Self::commit) the plan stays as it is.
    pub fn plan(&mut self) -> &StepPlan {
        if self.is_planned {
            return &self.plan;
        }
        let mut budget = self.config.max_num_batched_tokens;
        self.plan.chunk_lens.clear();
        self.plan.chunk_lens.resize(self.running.len(), 0);
        let mut admits = true;
        for priority in Priority::ALL {
            self.plan_decodes(priority, &mut budget);
            self.plan_prefills(priority, &mut budget);
            // Who waits for room must not see it taken by lower priorities.
            admits = admits && self.plan_admissions(priority, &mut budget);
        }
        self.counters.peak_running = self.counters.peak_running.max(self.running.len() as u64);
        self.check_plan();
        self.is_planned = !self.running.is_empty();
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
            if let Some(copy) = sequence.copy {
                let to = pages[sequence.copied_end / self.page_size];
                batch.copies.push(PageCopy { from: copy.page, to, len: copy.len as u32 });
            }
        }
    }

    /// Takes in the output of the planned step; returns the sequences it has finished.
    pub fn commit(&mut self, output: &StepOutput, eos_token_ids: &[u32]) -> Vec<Finished> {
        self.is_planned = false;
        self.first_tokens.clear();
        let mut finished = Vec::new();
        let mut sampled = output.token_ids.iter();
        let mut chunk_lens = std::mem::take(&mut self.plan.chunk_lens);
        assert_eq!(chunk_lens.len(), self.running.len(), "commit without a plan");
        let running = std::mem::take(&mut self.running);
        for (mut sequence, chunk_len) in running.into_iter().zip(chunk_lens.drain(..)) {
            let mut token_id = None;
            if chunk_len > 0 {
                token_id = *sampled.next().expect("the output has one entry a planned sequence");
                self.drop_copy(&mut sequence);
                self.advance(&mut sequence, chunk_len);
            }
            if self.aborting.remove(&sequence.id) {
                self.release(&mut sequence);
                self.forget(&sequence);
                continue;
            }
            if chunk_len == 0 || sequence.computed_len < sequence.known_len() {
                self.running.push(sequence);
                continue;
            }
            if sequence.answer_len() == 0 {
                self.first_tokens.push(sequence.id);
            }
            let answer_len = sequence.known_len();
            let reason = sequence.push_sampled(token_id.expect("a token was sampled"), eos_token_ids);
            let num_new = (sequence.known_len() - answer_len) as u64;
            self.count(sequence.owner, |counters| counters.output_tokens += num_new);
            match reason {
                None => self.running.push(sequence),
                Some(reason) => {
                    self.release(&mut sequence);
                    self.count(sequence.owner, |counters| counters.finished += 1);
                    self.learn(sequence.owner, &sequence.step, sequence.answer_len());
                    finished.push(sequence.finish(reason));
                }
            }
        }
        assert!(sampled.next().is_none(), "the output has more entries than the plan");
        assert!(self.aborting.is_empty(), "only running sequences are aborted with a commit");
        self.plan.chunk_lens = chunk_lens;
        finished
    }

    /// Expects answers of a step to be like this one.
    pub fn learn(&mut self, owner: OwnerId, step: &Arc<str>, answer_len: usize) {
        self.answer_lengths.entry((owner, Arc::clone(step))).or_default().add(answer_len);
    }

    pub fn counters(&self) -> Counters {
        self.counters
    }

    /// What of the counters is this owner's; `peak_running` is nobody's.
    pub fn counters_of(&self, owner: OwnerId) -> Counters {
        self.owned.get(owner.0 as usize).copied().unwrap_or_default()
    }

    /// Sequences whose first token came with the last commit.
    pub fn first_tokens(&self) -> &[SequenceId] {
        &self.first_tokens
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

    fn plan_decodes(&mut self, priority: Priority, budget: &mut usize) {
        let mut index = self.running.partition_point(|other| other.priority < priority);
        while self.running.get(index).is_some_and(|next| next.priority == priority) && *budget > 0 {
            if self.running[index].uncomputed_len() > 1 {
                index += 1;
            } else if self.extend_pages(&mut index, budget) {
                self.plan.chunk_lens[index] = 1;
                *budget -= 1;
                index += 1;
            }
        }
    }

    fn plan_prefills(&mut self, priority: Priority, budget: &mut usize) {
        for (sequence, chunk_len) in self.running.iter().zip(&mut self.plan.chunk_lens) {
            let uncomputed_len = sequence.uncomputed_len();
            if sequence.priority == priority && uncomputed_len > 1 {
                *chunk_len = uncomputed_len.min(*budget);
                *budget -= *chunk_len;
            }
        }
    }

    /// Admits sequences of a priority; those of lower priority that run give way where that helps. False if somebody
    /// lacks room.
    fn plan_admissions(&mut self, priority: Priority, budget: &mut usize) -> bool {
        let mut index = self.waiting.partition_point(|other| other.priority < priority);
        let end = index + MAX_LOOKAHEAD;
        let is_next = |next: &Sequence| next.priority == priority;
        while *budget > 0 && index < end && self.waiting.get(index).is_some_and(is_next) {
            let is_full = self.running.len() == self.config.max_num_seqs;
            if is_full && self.awaits_sibling(index) {
                index += 1;
                continue;
            }
            if is_full && !self.make_way(priority) {
                return false;
            }
            match self.admit(index) {
                Admission::Admitted(at) => {
                    let chunk_len = self.running[at].uncomputed_len().min(*budget);
                    self.plan.chunk_lens.insert(at, chunk_len);
                    *budget -= chunk_len;
                }
                Admission::AwaitsSibling => index += 1,
                // Overtaking would let short prompts keep a long one out for ever.
                Admission::OutOfPages => {
                    if !self.fits_without_lower(index) || !self.make_way(priority) {
                        return false;
                    }
                }
            }
        }
        true
    }

    /// Makes sure the next token of a running sequence has a page, at the cost of others; false when the sequence
    /// itself was preempted. `index` stays with the sequence, or then is that of its successor.
    fn extend_pages(&mut self, index: &mut usize, budget: &mut usize) -> bool {
        let sequence = &self.running[*index];
        if sequence.computed_len < sequence.pages.len() * self.page_size {
            return true;
        }
        loop {
            if let Some(page) = self.take_page() {
                self.running[*index].pages.push(page);
                return true;
            }
            let victim = self.cheapest_victim(*index);
            *budget += self.preempt(victim);
            if victim == *index {
                return false;
            }
            *index -= usize::from(victim < *index);
        }
    }

    /// Who gives way to a running sequence that needs a page: one of its equals or of lower priority, but not the oldest
    /// of its equals; itself if there is no other.
    fn cheapest_victim(&self, index: usize) -> usize {
        let priority = self.running[index].priority;
        let oldest = self.running.partition_point(|other| other.priority < priority);
        let victim = self.cheapest_of(oldest + 1..self.running.len());
        assert!(victim.is_some() || index > 0, "a sequence that fits the cache alone has no page");
        victim.unwrap_or(index)
    }

    /// The lowest priority first; of equals the one that loses the fewest tokens, then the newest. Tokens in pages that
    /// others use are not lost, and who has no other pages is of no help.
    fn cheapest_of(&self, candidates: Range<usize>) -> Option<usize> {
        candidates.min_by_key(|index| {
            let sequence = &self.running[*index];
            let num_own_pages = self.num_own_pages(sequence);
            let kept_len = (sequence.pages.len() - num_own_pages) * self.page_size;
            let lost_len = sequence.computed_len.saturating_sub(kept_len);
            (num_own_pages == 0, Reverse(sequence.priority), lost_len, Reverse(*index))
        })
    }

    /// Preempts one sequence of lower priority, if any runs. They have no part in the plan yet.
    fn make_way(&mut self, priority: Priority) -> bool {
        let first = self.running.partition_point(|other| other.priority <= priority);
        let Some(victim) = self.cheapest_of(first..self.running.len()) else { return false };
        let planned_len = self.preempt(victim);
        assert_eq!(planned_len, 0, "a lower priority was planned before a higher one");
        true
    }

    /// Returns what of the budget the sequence had.
    fn preempt(&mut self, index: usize) -> usize {
        let mut sequence = self.running.remove(index);
        self.release(&mut sequence);
        self.count(sequence.owner, |counters| counters.preemptions += 1);
        self.wait(sequence);
        self.plan.chunk_lens.remove(index)
    }

    /// Puts a sequence in its place among those that wait.
    fn wait(&mut self, sequence: Sequence) {
        let place = self.waiting.partition_point(|other| other.place() < sequence.place());
        self.waiting.insert(place, sequence);
    }

    /// Counts a sequence that is given up.
    fn forget(&mut self, sequence: &Sequence) {
        assert!(sequence.pages.is_empty(), "given up with pages");
        let num_unseen = sequence.num_prompt_tokens(sequence.seen_len, usize::MAX) as u64;
        self.count(sequence.owner, |counters| {
            counters.aborted += 1;
            counters.aborted_tokens += num_unseen;
        });
    }

    /// Pages that nobody else uses: the last ones of the page table.
    fn num_own_pages(&self, sequence: &Sequence) -> usize {
        let shared = &sequence.pages[..sequence.num_shared_pages];
        let num_alone = shared.iter().rev().take_while(|&&page| self.cache.num_users(page) == 1).count();
        sequence.pages.len() - shared.len() + num_alone
    }

    /// A free page, or one that the prefix cache gives up.
    fn take_page(&mut self) -> Option<PageId> {
        if self.pool.num_free() == 0 && !self.cache.evict(&mut self.pool) {
            return None;
        }
        self.pool.take()
    }

    /// Counts a computed chunk, and hands the pages it has filled to the prefix cache.
    fn advance(&mut self, sequence: &mut Sequence, chunk_len: usize) {
        let (first, end) = (sequence.computed_len, sequence.computed_len + chunk_len);
        let num_computed = sequence.num_prompt_tokens(first, end);
        sequence.num_computed += num_computed as u32;
        let seen_end = end.min(sequence.seen_len);
        let num_recomputed = sequence.num_prompt_tokens(first, seen_end);
        self.count(sequence.owner, |counters| {
            counters.computed_tokens += num_computed as u64;
            counters.recomputed_tokens += num_recomputed as u64;
            counters.recomputed_output_tokens += (seen_end.saturating_sub(first) - num_recomputed) as u64;
        });
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
            self.cache.set_num_later(page, sequence.serial, self.num_later(sequence, index));
        }
    }

    /// How many later prompts need what this sequence has computed of one of its pages.
    fn num_later(&self, sequence: &Sequence, index: usize) -> u32 {
        let (first, last) = (index * self.page_size, (index + 1) * self.page_size - 1);
        sequence.num_later(if self.copies_pages { first.max(sequence.copied_end) } else { last })
    }

    /// The copy is done, or not wanted any more.
    fn drop_copy(&mut self, sequence: &mut Sequence) {
        if let Some(copy) = sequence.copy.take().filter(|copy| copy.is_cached) {
            self.cache.unlock_page(copy.page);
        }
    }

    /// Gives all pages back; those in the prefix cache stay there until they are needed.
    fn release(&mut self, sequence: &mut Sequence) {
        self.drop_copy(sequence);
        let (shared, own) = sequence.pages.split_at(sequence.num_shared_pages);
        self.cache.unlock(shared);
        for &page in own {
            self.pool.give_back(page);
        }
        sequence.pages.clear();
        sequence.num_shared_pages = 0;
        sequence.copied_end = 0;
        sequence.computed_len = 0;
    }

    /// Counts in the totals and for the owner.
    fn count(&mut self, owner: OwnerId, change: impl Fn(&mut Counters)) {
        let index = owner.0 as usize;
        self.owned.resize_with(self.owned.len().max(index + 1), Counters::default);
        change(&mut self.counters);
        change(&mut self.owned[index]);
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
pub(super) mod tests;
