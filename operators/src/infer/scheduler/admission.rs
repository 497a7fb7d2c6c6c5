//! Which waiting sequence may run: what of its prompt is there already, what is on its way, and whether it fits.
//!
//! A prompt takes over the longest cached prefix: whole pages by reference, and the beginning of one more page by
//! copy, from the prefix cache or from the page that a running sequence is filling. If a running sequence will soon
//! have computed clearly more of it, the prompt waits for that instead of computing it twice. What was swapped out when
//! it was preempted comes back before anything is copied or awaited.

use std::collections::BTreeSet;
use std::sync::Arc;

use tidemill_kernels::step::PageId;

use super::super::forecast::{Footprint, peak_pages};
use super::super::sequence::{CopySource, Fate, Sequence};
use super::Scheduler;
use crate::group::tree::common_len;

/// A prompt waits for no fewer tokens than this: it would lose a step for nothing.
const MIN_AWAITED: usize = 4;
/// Of the running sequences, so many are compared with a prompt, the newest: prompts with a common prefix come one after
/// the other, and pages that older ones have filled are in the prefix cache.
const MAX_SIBLINGS: usize = 32;

/// What became of a waiting sequence.
pub(super) enum Admission {
    /// With its index among the running ones.
    Admitted(usize),
    /// A running sequence computes what it needs.
    AwaitsSibling,
    /// It is being swapped out.
    IsLeaving,
    OutOfPages,
}

/// The part of a prompt that need not be computed.
struct Reuse {
    path: Vec<PageId>,
    copy: Option<CopySource>,
    /// A running sequence is about to have clearly more.
    more_is_coming: bool,
    /// Host pages have more of it.
    is_in_host: bool,
}

impl Scheduler {
    /// Moves a waiting sequence to the running ones, with pages for all its tokens.
    pub(super) fn admit(&mut self, index: usize) -> Admission {
        let sequence = &self.waiting[index];
        if sequence.swapped.as_ref().is_some_and(|swapped| swapped.is_leaving) {
            return Admission::IsLeaving;
        }
        let mut reuse = self.reuse(sequence);
        if reuse.more_is_coming {
            return Admission::AwaitsSibling;
        }
        let num_new = sequence.known_len().div_ceil(self.page_size) - reuse.path.len();
        let num_idle = self.cache.num_idle_in(&reuse.path);
        let num_available = self.num_available_pages() - num_idle;
        let num_held = self.num_pages() - self.num_available_pages();
        if num_available < num_new || !self.will_fit(sequence, &self.running, num_held, num_new + num_idle) {
            assert!(!self.running.is_empty(), "a sequence that fits the cache alone is not admitted");
            return Admission::OutOfPages;
        }
        // A source that nobody uses is locked, so it must not be among the pages that are needed.
        let is_idle = |copy: &CopySource| copy.is_cached && self.cache.num_users(copy.page) == 0;
        reuse.copy = reuse.copy.filter(|copy| num_available > num_new || !is_idle(copy));
        let sequence = self.waiting.remove(index).expect("the index is below the length");
        Admission::Admitted(self.start(sequence, &reuse, num_new))
    }

    pub(super) fn awaits_sibling(&self, index: usize) -> bool {
        self.reuse(&self.waiting[index]).more_is_coming
    }

    fn start(&mut self, mut sequence: Sequence, reuse: &Reuse, num_new: usize) -> usize {
        assert_eq!(sequence.computed_len, 0);
        self.cache.lock(&reuse.path);
        let num_pages = reuse.path.len();
        let later =
            reuse.path.iter().copied().chain(reuse.copy.filter(|copy| copy.is_cached).map(|copy| copy.page));
        for (index, page) in later.enumerate() {
            self.cache.set_num_later(page, sequence.serial, self.num_later(&sequence, index));
        }
        let mut end = num_pages * self.page_size;
        if let Some(copy) = reuse.copy {
            if copy.is_cached {
                self.cache.lock_page(copy.page);
            }
            end += copy.len;
            sequence.copied_end = end;
        }
        sequence.copy = reuse.copy;
        sequence.num_shared_pages = num_pages;
        sequence.pages.extend_from_slice(&reuse.path);
        for _ in 0..num_new {
            let page = self.take_page().expect("as many pages are available");
            sequence.pages.push(page);
        }
        if reuse.is_in_host {
            end = self.swap_in(&mut sequence);
        }
        self.drop_swapped(&mut sequence);
        let num_reused = sequence.num_prompt_tokens(sequence.seen_len, end);
        sequence.num_reused += num_reused as u32;
        self.count(sequence.owner, |counters| counters.reused_tokens += num_reused as u64);
        sequence.computed_len = end;
        sequence.seen_len = sequence.seen_len.max(end);
        sequence.max_pages = (sequence.prompt_len + sequence.max_tokens).div_ceil(self.page_size);
        let index = self.running.partition_point(|other| other.priority <= sequence.priority);
        self.running.insert(index, sequence);
        index
    }

    fn reuse(&self, sequence: &Sequence) -> Reuse {
        if !self.config.enable_prefix_cache {
            let is_in_host = self.is_in_host(sequence, &[], 0);
            return Reuse { path: Vec::new(), copy: None, more_is_coming: false, is_in_host };
        }
        // The last token is always computed: its logits choose the next one.
        let token_ids = &sequence.token_ids[..sequence.known_len() - 1];
        let path = self.cache.lookup(token_ids);
        let rest = &token_ids[path.len() * self.page_size..];
        let cached = self.cache.lookup_partial(path.last().copied(), rest);
        let mut copy = cached.map(|(page, len)| CopySource { page, len, is_cached: true });
        let mut coming_len = 0;
        // One of lower priority may be preempted in this step, and may take long: it is neither copied nor awaited.
        let end = self.running.partition_point(|other| other.priority <= sequence.priority);
        for sibling in &self.running[end.saturating_sub(MAX_SIBLINGS)..end] {
            if sibling.fate != Fate::GoesOn {
                continue;
            }
            let (num_pages, first) = (path.len(), path.len() * self.page_size);
            if sibling.num_shared_pages < num_pages || sibling.pages[..num_pages].last() != path.last() {
                continue;
            }
            let shared_len = common_len(&sibling.token_ids[first.min(sibling.known_len())..], rest);
            // What it swaps in is shared when it is there.
            if sibling.computed_len < first + shared_len || !sibling.swap_ins.is_empty() {
                coming_len = coming_len.max(shared_len);
            }
            // Computed tokens of the page that it fills; those that it copies are in the source.
            let filled_len = sibling.computed_len.saturating_sub(first).min(shared_len);
            let is_complete = sibling.copy.is_none() && sibling.swap_ins.is_empty();
            let is_filling = sibling.num_shared_pages == num_pages && is_complete;
            if is_filling && filled_len > copy.map_or(0, |copy| copy.len) {
                copy = Some(CopySource { page: sibling.pages[num_pages], len: filled_len, is_cached: false });
            }
        }
        if !self.copies_pages {
            copy = None;
            coming_len -= coming_len % self.page_size;
        }
        let copied_len = copy.map_or(0, |copy| copy.len);
        if self.is_in_host(sequence, &path, copied_len) {
            return Reuse { path, copy: None, more_is_coming: false, is_in_host: true };
        }
        // Without copies a page is waited for as soon as it comes whole.
        let more_is_coming = coming_len >= copied_len + MIN_AWAITED.min(self.page_size);
        Reuse { path, copy, more_is_coming, is_in_host: false }
    }

    /// Whether a waiting sequence would find room if all of lower priority gave way.
    pub(super) fn fits_without_lower(&self, index: usize) -> bool {
        let sequence = &self.waiting[index];
        let num_staying = self.running.partition_point(|other| other.priority <= sequence.priority);
        let staying = &self.running[..num_staying];
        let held: BTreeSet<PageId> = staying.iter().flat_map(|one| one.pages.iter().copied()).collect();
        let path = self.reuse(sequence).path;
        let num_new = sequence.known_len().div_ceil(self.page_size) - path.len();
        let num_idle = path.iter().filter(|&page| !held.contains(page)).count();
        let is_available = self.num_pages() - held.len() >= num_new + num_idle;
        is_available && self.will_fit(sequence, staying, held.len(), num_new + num_idle)
    }

    /// Whether the cache will hold these running sequences, which use `num_held` pages, and another one until they
    /// end, as far as one can tell. That one takes `num_more` pages now that none of them uses.
    fn will_fit(&self, sequence: &Sequence, running: &[Sequence], num_held: usize, num_more: usize) -> bool {
        if running.is_empty() {
            return true;
        }
        // Nearly always there is room even if all answers were as long as they may be.
        let num_pages = sequence.known_len().div_ceil(self.page_size);
        let max_pages = (sequence.prompt_len + sequence.max_tokens).div_ceil(self.page_size);
        let max_growth = running.iter().map(|one| one.max_pages - one.pages.len()).sum::<usize>();
        if num_held + num_more + max_growth + (max_pages - num_pages) <= self.num_pages() {
            return true;
        }
        let mut footprints: Vec<Footprint> =
            running.iter().map(|one| self.footprint(one, one.pages.len(), self.num_own_pages(one))).collect();
        let num_own: usize = footprints.iter().map(|footprint| footprint.num_own_pages).sum();
        footprints.push(self.footprint(sequence, num_pages, num_more));
        // And often if all ended at the same time.
        let at_their_ends = footprints.iter().map(|one| one.num_pages_at_end(self.page_size)).sum::<usize>();
        if num_held - num_own + at_their_ends <= self.num_pages() {
            return true;
        }
        peak_pages(num_held - num_own, &footprints, self.page_size) <= self.num_pages()
    }

    fn footprint(&self, sequence: &Sequence, num_pages: usize, num_own_pages: usize) -> Footprint {
        let known_len = sequence.known_len_after(self.num_planned);
        let (len, max_tokens) = (known_len - sequence.prompt_len, sequence.max_tokens);
        let lengths = self.answer_lengths.get(&(sequence.owner, Arc::clone(&sequence.step)));
        let expected = lengths.map(|lengths| lengths.remaining(len, max_tokens));
        let remaining = expected.unwrap_or(max_tokens - len);
        Footprint { num_pages, num_own_pages, known_len, remaining }
    }
}
