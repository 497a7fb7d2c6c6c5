//! Hands out KV-cache pages and knows who holds each.
//!
//! Invariant: every page is in exactly one of free, held by one sequence, or held by the prefix cache. Only full
//! pages are shared and only through the [`prefix_cache`](super::prefix_cache), which counts their users; so a page
//! that may still be written has one holder. Device memory is not touched here: a page is only a number.

use tidemill_kernels::step::PageId;

/// Who holds a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PageHolder {
    Free,
    Sequence,
    PrefixCache,
}

/// The pages of one KV cache.
#[derive(Debug)]
pub struct PagePool {
    /// Indexed by page.
    holders: Vec<PageHolder>,
    /// The next page to hand out is the last one.
    free: Vec<PageId>,
}

impl PagePool {
    pub fn new(num_pages: u32) -> Self {
        assert!(num_pages > 0, "a cache without pages");
        Self {
            holders: vec![PageHolder::Free; num_pages as usize],
            free: (0..num_pages).rev().map(PageId).collect(),
        }
    }

    /// A free page for one sequence to write, if there is one.
    pub fn take(&mut self) -> Option<PageId> {
        let page = self.free.pop()?;
        self.change(page, PageHolder::Free, PageHolder::Sequence);
        Some(page)
    }

    /// Frees a page of a sequence.
    pub fn give_back(&mut self, page: PageId) {
        self.change(page, PageHolder::Sequence, PageHolder::Free);
        self.free.push(page);
    }

    /// A sequence has filled `page` and hands it to the prefix cache.
    pub fn share(&mut self, page: PageId) {
        self.change(page, PageHolder::Sequence, PageHolder::PrefixCache);
    }

    /// The prefix cache gives up `page`.
    pub fn evict(&mut self, page: PageId) {
        self.change(page, PageHolder::PrefixCache, PageHolder::Free);
        self.free.push(page);
    }

    pub fn holder(&self, page: PageId) -> PageHolder {
        self.holders[page.0 as usize]
    }

    pub fn num_pages(&self) -> usize {
        self.holders.len()
    }

    pub fn num_free(&self) -> usize {
        self.free.len()
    }

    #[track_caller]
    fn change(&mut self, page: PageId, from: PageHolder, to: PageHolder) {
        let holder = &mut self.holders[page.0 as usize];
        assert_eq!(*holder, from, "page {page} changes hands to {to:?}");
        *holder = to;
    }
}

#[cfg(test)]
pub(crate) mod fuzz;
