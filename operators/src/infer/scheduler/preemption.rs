//! Who gives way when pages or places are short, and what becomes of it.
//!
//! Invariant: a sequence is preempted only while no step is planned but the one in the making; so no page is taken that a
//! step may be reading or writing.

use std::cmp::Reverse;
use std::ops::Range;

use super::super::sequence::{Priority, Sequence};
use super::Scheduler;

impl Scheduler {
    /// Makes sure the next token of a running sequence has a page, at the cost of others; false when the sequence
    /// itself was preempted, or must wait until nobody is being computed. `index` stays with the sequence, or then is
    /// that of its successor.
    pub(super) fn extend_pages(&mut self, index: &mut usize, budget: &mut usize) -> bool {
        let sequence = &self.running[*index];
        if sequence.chunk(self.num_planned).start < sequence.pages.len() * self.page_size {
            return true;
        }
        loop {
            if let Some(page) = self.take_page() {
                self.running[*index].pages.push(page);
                return true;
            }
            if self.num_planned > 0 {
                self.needs_commit = true;
                *index += 1;
                return false;
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

    /// Preempts one sequence of lower priority, if any runs and none is being computed. They have no part in the plan
    /// yet.
    pub(super) fn make_way(&mut self, priority: Priority) -> bool {
        let first = self.running.partition_point(|other| other.priority <= priority);
        let Some(victim) = self.cheapest_of(first..self.running.len()) else { return false };
        if self.num_planned > 0 {
            self.needs_commit = true;
            return false;
        }
        let planned_len = self.preempt(victim);
        assert_eq!(planned_len, 0, "a lower priority was planned before a higher one");
        true
    }

    /// Returns what of the budget the sequence had.
    fn preempt(&mut self, index: usize) -> usize {
        assert_eq!(self.num_planned, 0, "preempted while it may be computed");
        let mut sequence = self.running.remove(index);
        let planned_len = std::mem::take(&mut sequence.chunk_lens[0]);
        self.swap_out(&mut sequence);
        self.release(&mut sequence);
        self.count(sequence.owner, |counters| counters.preemptions += 1);
        self.wait(sequence);
        planned_len
    }

    /// Pages that nobody else uses: the last ones of the page table.
    pub(super) fn num_own_pages(&self, sequence: &Sequence) -> usize {
        let shared = &sequence.pages[..sequence.num_shared_pages];
        let num_alone = shared.iter().rev().take_while(|&&page| self.cache.num_users(page) == 1).count();
        sequence.pages.len() - shared.len() + num_alone
    }
}
