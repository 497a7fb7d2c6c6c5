//! How long answers will become, and how many pages the running sequences will hold at most.
//!
//! Admission asks this instead of reserving `max_tokens` for everybody (the past-future scheduler of LightLLM,
//! ASPLOS 2025). Lengths are learned from finished answers, for each step of the pipeline; until there are some, an
//! answer is expected to reach `max_tokens`. A forecast that is wrong costs a preemption or a smaller batch, never
//! an answer. Time passes here in steps, one token a sequence: prefills count as done.

use std::collections::VecDeque;

/// Finished answers that are remembered.
const MAX_LENGTHS: usize = 256;
/// With fewer finished answers nothing is learned yet: short ones finish first.
const MIN_LENGTHS: usize = 16;

/// The lengths of the last answers of one step.
#[derive(Debug, Default)]
pub struct AnswerLengths {
    /// In order of finishing.
    recent: VecDeque<usize>,
    sorted: Vec<usize>,
}

impl AnswerLengths {
    pub fn add(&mut self, len: usize) {
        if self.recent.len() == MAX_LENGTHS {
            let oldest = self.recent.pop_front().expect("the queue is full");
            self.sorted.remove(self.sorted.partition_point(|&other| other < oldest));
        }
        self.recent.push_back(len);
        self.sorted.insert(self.sorted.partition_point(|&other| other < len), len);
    }

    /// How many tokens an answer with `len` tokens still gets: three in four of those that were longer got no more.
    /// One that is longer than all others is expected to become twice as long.
    pub fn remaining(&self, len: usize, max_tokens: usize) -> usize {
        let longer = &self.sorted[self.sorted.partition_point(|&other| other <= len)..];
        let expected = match self.recent.len() < MIN_LENGTHS {
            true => max_tokens,
            false => longer.get(longer.len() * 3 / 4).map_or(2 * len, |&len| len).min(max_tokens),
        };
        expected.saturating_sub(len).max(1)
    }
}

/// What the forecast knows of a sequence.
#[derive(Clone, Copy, Debug)]
pub struct Footprint {
    pub num_pages: usize,
    /// Of them, those that nobody else uses: free when it ends.
    pub num_own_pages: usize,
    pub known_len: usize,
    /// Tokens it will still get.
    pub remaining: usize,
}

impl Footprint {
    /// Pages that nobody else uses when it ends.
    pub fn num_pages_at_end(&self, page_size: usize) -> usize {
        let end = (self.known_len + self.remaining).div_ceil(page_size);
        self.num_own_pages + end.saturating_sub(self.num_pages)
    }
}

/// Most pages in use at any time until all have finished, if `num_shared` are in use by several.
///
/// Between two ends usage only grows, so it is highest when one is about to end.
pub fn peak_pages(num_shared: usize, footprints: &[Footprint], page_size: usize) -> usize {
    let at_end_of = |ending: &Footprint| {
        let running = footprints.iter().filter(|other| other.remaining >= ending.remaining);
        let held = running.map(|one| {
            let end = (one.known_len + ending.remaining).div_ceil(page_size);
            one.num_own_pages + end.saturating_sub(one.num_pages)
        });
        num_shared + held.sum::<usize>()
    };
    footprints.iter().map(at_end_of).max().unwrap_or(num_shared)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_are_learned_and_forgotten() {
        let mut lengths = AnswerLengths::default();
        assert_eq!(lengths.remaining(0, 100), 100);
        (1..=40).for_each(|len| lengths.add(len));
        assert_eq!(lengths.remaining(0, 100), 31);
        assert_eq!(lengths.remaining(0, 20), 20);
        assert_eq!(lengths.remaining(20, 100), 36 - 20);
        assert_eq!(lengths.remaining(40, 100), 40, "longer than any that finished");
        assert_eq!(lengths.remaining(60, 100), 40);
        (0..MAX_LENGTHS).for_each(|_| lengths.add(7));
        assert_eq!(lengths.remaining(0, 100), 7);
        assert_eq!((lengths.recent.len(), lengths.sorted.len()), (MAX_LENGTHS, MAX_LENGTHS));
    }

    #[test]
    fn the_peak_is_that_of_a_simulation() {
        let mut state = 1_u64;
        let mut draw = |n: u64| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            ((state >> 33) % n) as usize
        };
        for _ in 0..300 {
            let page_size = 1 << draw(4);
            let footprints: Vec<Footprint> = (0..1 + draw(6))
                .map(|_| {
                    let known_len = 1 + draw(50);
                    let num_pages = known_len.div_ceil(page_size);
                    let num_own_pages = draw(num_pages as u64 + 1);
                    Footprint { num_pages, num_own_pages, known_len, remaining: 1 + draw(40) }
                })
                .collect();
            let in_use = |time: usize| {
                let held = footprints.iter().filter(|one| one.remaining >= time).map(|one| {
                    one.num_own_pages + (one.known_len + time).div_ceil(page_size) - one.num_pages
                });
                3 + held.sum::<usize>()
            };
            assert_eq!(peak_pages(3, &footprints, page_size), (1..=41).map(in_use).max().unwrap());
        }
    }
}
