//! Pages of preempted sequences in the host's memory, so that they need not be computed again.
//!
//! What is swapped out are the pages that nobody else uses; those before them stay in the prefix cache as long as they
//! may. If one of those is gone when the sequence is admitted again, the host pages are of no use and it is computed
//! again, as it is where the host has no room.
//!
//! Invariants: a host page is free, of a sequence that waits, or of one whose step that swaps it in is not committed.
//! Who is being swapped out is not admitted before that is committed. So a step that failed can swap in again. It cannot
//! swap out again, since it may have written the pages: what it was to swap out is lost and computed again.

use tidemill_kernels::step::{HostPageId, PageId, PageSwap, StepBatch};

use super::super::sequence::{Sequence, Swapped};
use super::Scheduler;

/// The host's pages.
#[derive(Debug, Default)]
pub(super) struct HostPages {
    pub(super) free: Vec<HostPageId>,
    /// What the first planned step swaps out.
    outs: Vec<PageSwap>,
}

impl HostPages {
    pub(super) fn new(num_pages: u32) -> Self {
        Self { free: (0..num_pages).rev().map(HostPageId).collect(), outs: Vec::new() }
    }
}

impl Scheduler {
    /// Finds room in the host's memory for what a sequence would lose, if there is any. Its pages are still its own.
    pub(super) fn swap_out(&mut self, sequence: &mut Sequence) {
        assert!(sequence.swapped.is_none() && sequence.swap_ins.is_empty(), "swapped out twice");
        let first_page = sequence.pages.len() - self.num_own_pages(sequence);
        let end = sequence.computed_len.div_ceil(self.page_size);
        if first_page >= end || end - first_page > self.host.free.len() {
            return;
        }
        let pages = self.host.free.split_off(self.host.free.len() - (end - first_page));
        let swaps = sequence.pages[first_page..end].iter().zip(&pages);
        self.host.outs.extend(swaps.map(|(&page, &host)| PageSwap::Out { page, host }));
        let computed_len = sequence.computed_len;
        sequence.swapped = Some(Swapped { first_page, pages, computed_len, is_leaving: true });
    }

    /// Whether host pages hold more of a sequence than the pages of the prefix cache on this path and `copied_len` tokens.
    pub(super) fn is_in_host(&self, sequence: &Sequence, path: &[PageId], copied_len: usize) -> bool {
        let is_more = |swapped: &Swapped| swapped.computed_len > path.len() * self.page_size + copied_len;
        let is_whole = |swapped: &Swapped| swapped.first_page <= path.len();
        sequence.swapped.as_ref().is_some_and(|swapped| is_whole(swapped) && is_more(swapped))
    }

    /// A sequence is admitted with its pages behind those of the prefix cache: the host's go there. Returns how many
    /// tokens are then computed.
    pub(super) fn swap_in(&mut self, sequence: &mut Sequence) -> usize {
        let swapped = sequence.swapped.take().expect("something was swapped out");
        assert!(!swapped.is_leaving, "swapped in before it is swapped out");
        let (cached, hosts) = swapped.pages.split_at(sequence.num_shared_pages - swapped.first_page);
        self.host.free.extend_from_slice(cached);
        let pages = sequence.pages[sequence.num_shared_pages..].iter();
        sequence.swap_ins = hosts.iter().copied().zip(pages.copied()).collect();
        swapped.computed_len
    }

    /// What was swapped out is not needed any more.
    pub(super) fn drop_swapped(&mut self, sequence: &mut Sequence) {
        if let Some(swapped) = sequence.swapped.take() {
            self.host.free.extend(swapped.pages);
        }
    }

    /// What was to be swapped in is in place, or not wanted any more. Returns how many pages.
    pub(super) fn drop_swap_ins(&mut self, sequence: &mut Sequence) -> u64 {
        let num_pages = sequence.swap_ins.len() as u64;
        self.host.free.extend(sequence.swap_ins.drain(..).map(|(host, _)| host));
        num_pages
    }

    pub(super) fn fill_outs(&self, batch: &mut StepBatch) {
        batch.swaps.extend_from_slice(&self.host.outs);
    }

    /// The oldest planned step is done.
    pub(super) fn commit_outs(&mut self) {
        if self.host.outs.is_empty() {
            return;
        }
        self.host.outs.clear();
        let mut swapped_out = Vec::new();
        for sequence in &mut self.waiting {
            if let Some(swapped) = sequence.swapped.as_mut().filter(|swapped| swapped.is_leaving) {
                swapped.is_leaving = false;
                swapped_out.push((sequence.owner, swapped.pages.len() as u64));
            }
        }
        for (owner, num_pages) in swapped_out {
            self.count(owner, |counters| counters.swapped_out_pages += num_pages);
        }
    }

    /// A planned step has failed. All are tried again, without swapping out.
    pub fn fail(&mut self) {
        self.host.outs.clear();
        for sequence in &mut self.waiting {
            if let Some(swapped) = sequence.swapped.take_if(|swapped| swapped.is_leaving) {
                self.host.free.extend(swapped.pages);
            }
        }
    }
}
