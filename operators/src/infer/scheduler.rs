//! Decides which sequences run in a step and for how many tokens, and moves their KV pages.
//!
//! The algorithm is that of the vLLM v1 scheduler: no prefill or decode phases, only tokens not yet computed. One
//! budget of tokens a step goes to one priority after the other; within a priority to sequences with a single
//! uncomputed token first (decodes), then to running prefills in order of admission, then to waiting sequences in
//! order of submission; so a step mixes decodes with chunks of prompts. A sequence is admitted with pages for all its known tokens, if a forecast says that the answers
//! will find room too ([`admission`]), and needs another page only when its answer crosses a page boundary. When
//! there is none, the sequence that costs least to compute again is preempted: it returns to its place in the
//! waiting queue, and its pages to the host's memory where that has room ([`swapping`]). Nothing is ever dropped.
//! Sequences of lower priority give way to one that cannot be admitted.
//!
//! A step may be planned while the one before it runs: from the state in which that one has succeeded and sampled no
//! token that ends an answer. Its chunks are noted in the sequences (`chunk_lens`), and everything else changes when it is
//! committed; so if steps fail, the same ones are tried again. A token that nobody knows yet is not among those that
//! penalties are for; the model counts it. A sequence that turns out to have ended has a row
//! too many in the step behind; it keeps its pages until that is committed. Nobody is preempted behind a planned step:
//! what needs that waits until all are committed.
//!
//! Invariants: a page that a step writes has one holder, and no planned step before it reads the page. What is in the
//! prefix cache was computed by a committed step. Nobody is preempted for one of lower priority, nor the oldest of a priority for its equals; and whoever
//! fits the cache alone is admitted when nothing else runs; so every sequence finishes, unless those of higher
//! priority keep coming for ever.

mod admission;
mod preemption;
mod swapping;

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use tidemill_kernels::step::{PageCopy, PageId, PageSwap, StepBatch, StepOutput};

use super::engine::EngineConfig;
use super::forecast::AnswerLengths;
use super::page_pool::{PageHolder, PagePool};
use super::prefix_cache::PrefixCache;
use super::sequence::{
    Fate, FinishReason, Finished, MAX_PLANNED, OwnerId, Priority, Sequence, SequenceId, SequenceRequest,
};
use admission::Admission;
use swapping::HostPages;

/// How many waiting sequences are considered in a step while those before them wait for a shared prefix.
const MAX_LOOKAHEAD: usize = 32;

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
    pub swapped_out_pages: u64,
    pub swapped_in_pages: u64,
    pub peak_running: u64,
}

/// Queues, pages and the planned steps.
#[derive(Debug)]
pub struct Scheduler {
    config: EngineConfig,
    page_size: usize,
    /// Whether the model copies the beginning of a page; otherwise whole pages are shared and nothing else.
    copies_pages: bool,
    pool: PagePool,
    host: HostPages,
    /// Stays empty when the configuration says so.
    cache: PrefixCache,
    /// By priority, then in order of submission.
    waiting: VecDeque<Sequence>,
    /// By priority, then in order of admission.
    running: Vec<Sequence>,
    /// Steps that are planned and not committed. One that failed is tried again as it was, since it may have written
    /// some pages.
    num_planned: usize,
    /// Somebody must be preempted, so no step is planned behind another one.
    needs_commit: bool,
    /// Replaced by pages of the prefix cache; a planned step may read them until the next commit.
    replaced_pages: Vec<PageId>,
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
            host: HostPages::default(),
            cache: PrefixCache::new(num_pages, page_size),
            waiting: VecDeque::new(),
            running: Vec::new(),
            num_planned: 0,
            needs_commit: false,
            replaced_pages: Vec::new(),
            answer_lengths: BTreeMap::new(),
            num_submitted: 0,
            counters: Counters::default(),
            first_tokens: Vec::new(),
            owned: Vec::new(),
        }
    }

    /// Lets preempted sequences keep their pages in the host's memory.
    pub fn with_host_pages(self, num_pages: u32) -> Self {
        Self { host: HostPages::new(num_pages), ..self }
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

    /// Gives up a sequence and its pages, at once or when the planned steps are done. False if there is none of this name.
    pub fn abort(&mut self, id: SequenceId) -> bool {
        if let Some(index) = self.waiting.iter().position(|sequence| sequence.id == id) {
            let mut sequence = self.waiting.remove(index).expect("it was just found");
            self.drop_swapped(&mut sequence);
            self.forget(&sequence);
            return true;
        }
        let is_known = |sequence: &Sequence| sequence.id == id && sequence.fate == Fate::GoesOn;
        let Some(index) = self.running.iter().position(is_known) else { return false };
        if self.num_planned > 0 {
            self.running[index].fate = Fate::GivenUp;
            return true;
        }
        let mut sequence = self.running.remove(index);
        self.release(&mut sequence);
        self.forget(&sequence);
        true
    }

    /// Plans the step with this number behind those that are planned and not committed, unless it is planned already. False
    /// if there is nothing for it to do, or nothing before the others are committed.
    pub fn plan(&mut self, step: usize) -> bool {
        if step < self.num_planned {
            return true;
        }
        assert!(step == self.num_planned && step < MAX_PLANNED, "step {step} is not the next");
        if step == 0 {
            self.needs_commit = false;
        } else if self.needs_commit {
            return false;
        }
        let mut budget = self.config.max_num_batched_tokens;
        let mut admits = true;
        for priority in Priority::ALL {
            self.plan_decodes(priority, &mut budget);
            self.plan_prefills(priority, &mut budget);
            // Who waits for room must not see it taken by lower priorities.
            admits = admits && self.plan_admissions(priority, &mut budget);
        }
        self.counters.peak_running = self.counters.peak_running.max(self.num_going_on() as u64);
        let is_planned = self.check_plan();
        self.num_planned += usize::from(is_planned);
        is_planned
    }

    /// Adds the chunks of a planned step to an empty batch.
    pub fn fill(&self, step: usize, batch: &mut StepBatch) {
        assert!(step < self.num_planned, "step {step} is not planned");
        if step == 0 {
            self.fill_outs(batch);
        }
        let mut num_before = 0;
        for sequence in &self.running {
            let sampled_by = num_before;
            num_before += u32::from(step > 0 && sequence.chunk_lens[step - 1] > 0);
            let chunk = sequence.chunk(step);
            if chunk.is_empty() {
                continue;
            }
            let pages = &sequence.pages[..chunk.end.div_ceil(self.page_size)];
            let first_page = chunk.start / self.page_size;
            assert!(sequence.num_shared_pages <= first_page, "a shared page would be written");
            let written = &pages[first_page..];
            assert!(written.iter().all(|&page| self.pool.holder(page) == PageHolder::Sequence));
            let sampling = sequence.is_sampled_in(step).then_some(sequence.sampling);
            if chunk.end <= sequence.known_len() {
                batch.push(&sequence.token_ids[chunk.clone()], chunk.start as u32, pages, sampling);
            } else {
                assert!(chunk.len() == 1 && sequence.is_sampled_in(step - 1), "a token that nobody samples");
                batch.push_ahead(sampled_by, chunk.start as u32, pages, sampling);
            }
            if sampling.is_some() {
                batch.push_uses(&sequence.token_uses);
            }
            // Once, with the first chunk.
            if chunk.start > sequence.computed_len {
                continue;
            }
            batch.swaps.extend(sequence.swap_ins.iter().map(|&(host, page)| PageSwap::In { host, page }));
            if let Some(copy) = sequence.copy {
                let to = pages[sequence.copied_end / self.page_size];
                batch.copies.push(PageCopy { from: copy.page, to, len: copy.len as u32 });
            }
        }
    }

    /// Takes in the output of the oldest planned step; returns the sequences it has finished.
    pub fn commit(&mut self, output: &StepOutput, eos_token_ids: &[u32]) -> Vec<Finished> {
        assert!(self.num_planned > 0, "commit without a plan");
        self.num_planned -= 1;
        self.first_tokens.clear();
        self.commit_outs();
        self.replaced_pages.drain(..).for_each(|page| self.pool.give_back(page));
        let mut finished = Vec::new();
        let mut sampled = output.token_ids.iter();
        for mut sequence in std::mem::take(&mut self.running) {
            let chunk_len = sequence.next_chunk();
            let token_id = match chunk_len {
                0 => None,
                _ => *sampled.next().expect("the output has one entry a planned sequence"),
            };
            let mut is_done = sequence.fate == Fate::Retired;
            if !is_done {
                finished.extend(self.commit_chunk(&mut sequence, chunk_len, token_id, eos_token_ids));
                is_done = sequence.fate == Fate::Retired && self.num_planned == 0;
            }
            if is_done {
                assert!(sequence.chunk_lens == [0; MAX_PLANNED], "planned after it has ended");
                self.release(&mut sequence);
            } else {
                self.running.push(sequence);
            }
        }
        assert!(sampled.next().is_none(), "the output has more entries than the plan");
        finished
    }

    /// The answer if this was its end.
    fn commit_chunk(
        &mut self,
        sequence: &mut Sequence,
        chunk_len: usize,
        token_id: Option<u32>,
        eos_token_ids: &[u32],
    ) -> Option<Finished> {
        if chunk_len > 0 {
            self.drop_copy(sequence);
            let num_swapped = self.drop_swap_ins(sequence);
            self.count(sequence.owner, |counters| counters.swapped_in_pages += num_swapped);
            self.advance(sequence, chunk_len);
        }
        let is_sampled = chunk_len > 0 && sequence.computed_len == sequence.known_len();
        let token_id = is_sampled.then(|| token_id.expect("a token was sampled"));
        if sequence.fate == Fate::GivenUp {
            self.forget(sequence);
            sequence.retire(token_id);
            return None;
        }
        let token_id = token_id?;
        if sequence.answer_len() == 0 {
            self.first_tokens.push(sequence.id);
        }
        let before = sequence.answer_len();
        let reason = sequence.push_sampled(token_id, eos_token_ids);
        let answer_len = sequence.answer_len();
        self.count(sequence.owner, |counters| counters.output_tokens += (answer_len - before) as u64);
        let reason = reason?;
        self.count(sequence.owner, |counters| counters.finished += 1);
        self.learn(sequence.owner, &sequence.step, answer_len);
        let finished = sequence.finished(reason);
        sequence.retire((reason == FinishReason::Stop).then_some(token_id));
        Some(finished)
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

    /// Without those that have left and wait for a planned step.
    pub fn num_running(&self) -> usize {
        self.running.iter().filter(|sequence| sequence.fate != Fate::Retired).count()
    }

    /// Whether there is something to plan or to commit.
    pub fn has_work(&self) -> bool {
        !self.waiting.is_empty() || !self.running.is_empty()
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
        let step = self.num_planned;
        let mut index = self.running.partition_point(|other| other.priority < priority);
        while self.running.get(index).is_some_and(|next| next.priority == priority) && *budget > 0 {
            let sequence = &self.running[index];
            if !sequence.goes_on(step) || sequence.uncomputed_len(step) > 1 {
                index += 1;
            } else if self.extend_pages(&mut index, budget) {
                self.running[index].chunk_lens[step] = 1;
                *budget -= 1;
                index += 1;
            }
        }
    }

    fn plan_prefills(&mut self, priority: Priority, budget: &mut usize) {
        let step = self.num_planned;
        for sequence in self.running.iter_mut().filter(|one| one.priority == priority && one.goes_on(step)) {
            let uncomputed_len = sequence.uncomputed_len(step);
            if uncomputed_len > 1 {
                let chunk_len = uncomputed_len.min(*budget);
                sequence.chunk_lens[step] = chunk_len;
                *budget -= chunk_len;
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
            let is_full = self.num_going_on() == self.config.max_num_seqs;
            if is_full && self.awaits_sibling(index) {
                index += 1;
                continue;
            }
            if is_full && !self.make_way(priority) {
                return false;
            }
            match self.admit(index) {
                Admission::Admitted(at) => {
                    let chunk_len = self.running[at].uncomputed_len(self.num_planned).min(*budget);
                    self.running[at].chunk_lens[self.num_planned] = chunk_len;
                    *budget -= chunk_len;
                }
                Admission::AwaitsSibling => index += 1,
                Admission::IsLeaving => return false,
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

    /// Puts a sequence in its place among those that wait.
    fn wait(&mut self, sequence: Sequence) {
        let place = self.waiting.partition_point(|other| other.place() < sequence.place());
        self.waiting.insert(place, sequence);
    }

    /// Counts a sequence that is given up.
    fn forget(&mut self, sequence: &Sequence) {
        let num_unseen = sequence.num_prompt_tokens(sequence.seen_len, usize::MAX) as u64;
        self.count(sequence.owner, |counters| {
            counters.aborted += 1;
            counters.aborted_tokens += num_unseen;
        });
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
            let own = sequence.pages[index];
            let page = self.cache.insert(parent, token_ids, own, &mut self.pool);
            if page != own && self.num_planned > 0 {
                self.replaced_pages.push(own);
            } else if page != own {
                self.pool.give_back(own);
            }
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
        self.drop_swap_ins(sequence);
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

    /// Sequences that the next step may compute, as far as one can tell.
    fn num_going_on(&self) -> usize {
        self.running.iter().filter(|sequence| sequence.goes_on(self.num_planned)).count()
    }

    /// Whether the new plan has anything to compute.
    fn check_plan(&self) -> bool {
        let step = self.num_planned;
        let in_step = self.running.iter().filter(|sequence| sequence.chunk_lens[step] > 0);
        assert!(in_step.count() <= self.config.max_num_seqs);
        let num_tokens: usize = self.running.iter().map(|sequence| sequence.chunk_lens[step]).sum();
        assert!(num_tokens <= self.config.max_num_batched_tokens);
        assert!(num_tokens > 0 || step > 0 || !self.has_work(), "nobody runs");
        num_tokens > 0
    }
}

#[cfg(test)]
mod fuzz;
#[cfg(test)]
pub(super) mod tests;
