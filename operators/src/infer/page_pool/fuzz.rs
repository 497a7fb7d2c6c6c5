//! Random calls on [`PagePool`], compared with one set of pages a holder.

use std::collections::BTreeSet;

use super::*;

/// SplitMix64: enough randomness for tests, and the same on every machine.
pub(crate) struct Random(u64);

impl Random {
    /// Prints the seed; the test runner shows it when the test fails.
    pub(crate) fn new(seed: u64) -> Self {
        println!("seed {seed}");
        Self(seed)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut bits = self.0;
        bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        bits ^ (bits >> 31)
    }

    /// A number in `0..end`.
    pub(crate) fn below(&mut self, end: usize) -> usize {
        (self.next() % end as u64) as usize
    }

    /// A number in `first..=last`.
    pub(crate) fn between(&mut self, first: usize, last: usize) -> usize {
        first + self.below(last - first + 1)
    }

    pub(crate) fn pick<'a, T>(&mut self, values: &'a [T]) -> &'a T {
        &values[self.below(values.len())]
    }

    /// True once in `n`.
    pub(crate) fn one_in(&mut self, n: usize) -> bool {
        self.below(n) == 0
    }
}

fn remove_any(random: &mut Random, pages: &mut BTreeSet<PageId>) -> Option<PageId> {
    let page = *pages.iter().nth(random.below(pages.len().max(1)))?;
    pages.remove(&page);
    Some(page)
}

fn case(seed: u64) {
    let mut random = Random::new(seed);
    let num_pages = random.between(1, 20) as u32;
    let mut pool = PagePool::new(num_pages);
    let (mut owned, mut shared) = (BTreeSet::new(), BTreeSet::new());
    for _ in 0..300 {
        match random.below(5) {
            0 | 1 => match pool.take() {
                Some(page) => assert!(!shared.contains(&page) && owned.insert(page), "{page} is taken twice"),
                None => assert_eq!(owned.len() + shared.len(), num_pages as usize),
            },
            2 => {
                remove_any(&mut random, &mut owned).into_iter().for_each(|page| pool.give_back(page));
            }
            3 => {
                if let Some(page) = remove_any(&mut random, &mut owned) {
                    pool.share(page);
                    shared.insert(page);
                }
            }
            _ => remove_any(&mut random, &mut shared).into_iter().for_each(|page| pool.evict(page)),
        }
        assert_eq!(pool.num_free(), num_pages as usize - owned.len() - shared.len());
        for page in (0..num_pages).map(PageId) {
            let holder = match (owned.contains(&page), shared.contains(&page)) {
                (true, _) => PageHolder::Sequence,
                (_, true) => PageHolder::PrefixCache,
                _ => PageHolder::Free,
            };
            assert_eq!(pool.holder(page), holder, "page {page}");
        }
    }
}

#[test]
fn agrees_with_sets() {
    (0..200).for_each(case);
}
