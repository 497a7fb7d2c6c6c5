//! Which rows of a batch attend together.
//!
//! Rows of a long chunk go by blocks. Sequences with a few rows each, decodes above all, go together where their
//! page tables begin with the same pages: the keys and values of a shared prefix are then read once for all of them
//! (as in Hydragen, Juravsky et al. 2024, and Tokasaurus). Pages are shared by the prefix cache, so equal
//! page ids mean equal tokens. What a row computes does not depend on its company.

use super::TILE_LEN;
use crate::step::{PageId, StepBatch};

/// A row of the batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Row {
    pub(super) row: u32,
    pub(super) seq: u32,
}

/// Rows that attend together; those of a sequence are neighbors, in order.
#[derive(Clone, Copy, Debug)]
pub(super) struct Cohort<'a> {
    pub(super) rows: &'a [Row],
    /// Tiles that all rows see in full, on the same pages.
    pub(super) num_shared_tiles: usize,
}

/// All cohorts of a batch; memory is kept between batches.
#[derive(Default)]
pub(super) struct Cohorts {
    rows: Vec<Row>,
    /// End in `rows`, and shared tiles.
    ends: Vec<(usize, usize)>,
    /// Short sequences.
    seqs: Vec<u32>,
}

impl Cohorts {
    pub(super) fn len(&self) -> usize {
        self.ends.len()
    }

    pub(super) fn get(&self, index: usize) -> Cohort<'_> {
        let start = index.checked_sub(1).map_or(0, |before| self.ends[before].0);
        let (end, num_shared_tiles) = self.ends[index];
        Cohort { rows: &self.rows[start..end], num_shared_tiles }
    }

    pub(super) fn plan(&mut self, page_size: usize, batch: &StepBatch, max_rows: usize) {
        let Self { rows, ends, seqs } = self;
        rows.clear();
        ends.clear();
        seqs.clear();
        seqs.extend((0..batch.num_seqs() as u32).filter(|&seq| batch.rows(seq as usize).len() < max_rows));
        // Neighbors in this order share the most pages.
        seqs.sort_unstable_by_key(|&seq| batch.pages(seq as usize));
        let mut first = 0;
        while first < seqs.len() {
            let (end, num_shared_tiles) = company(page_size, batch, &seqs[first..], max_rows);
            for &seq in &seqs[first..first + end] {
                rows.extend(batch.rows(seq as usize).map(|row| Row { row: row as u32, seq }));
            }
            ends.push((rows.len(), num_shared_tiles));
            first += end;
        }
        for seq in 0..batch.num_seqs() {
            let all = batch.rows(seq);
            if all.len() >= max_rows {
                for start in all.clone().step_by(max_rows) {
                    let block = start..(start + max_rows).min(all.end);
                    rows.extend(block.map(|row| Row { row: row as u32, seq: seq as u32 }));
                    ends.push((rows.len(), 0));
                }
            }
        }
    }
}

/// How many of the first sequences go together, and the tiles they share.
fn company(page_size: usize, batch: &StepBatch, seqs: &[u32], max_rows: usize) -> (usize, usize) {
    let first = seqs[0] as usize;
    let mut num_rows = batch.rows(first).len();
    let mut num_shared = full_tiles(batch, first);
    let mut end = 1;
    for &seq in &seqs[1..] {
        let seq = seq as usize;
        num_rows += batch.rows(seq).len();
        let both = common_pages(batch.pages(first), batch.pages(seq)) * page_size / TILE_LEN;
        let both = both.min(full_tiles(batch, seq)).min(num_shared);
        // A sequence that shares much less would take the others' shared tiles away.
        if num_rows > max_rows || both == 0 || (end > 1 && 2 * both < num_shared) {
            break;
        }
        (num_shared, end) = (both, end + 1);
    }
    (end, if end == 1 { 0 } else { num_shared })
}

/// Tiles that lie before the first row of a sequence.
fn full_tiles(batch: &StepBatch, seq: usize) -> usize {
    batch.positions[batch.rows(seq).start] as usize / TILE_LEN
}

fn common_pages(a: &[PageId], b: &[PageId]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn batch(seqs: &[(u32, u32, &[u32])]) -> StepBatch {
        let mut batch = StepBatch::default();
        for &(first_position, num_rows, pages) in seqs {
            let pages: Vec<PageId> = pages.iter().copied().map(PageId).collect();
            batch.push(&vec![0; num_rows as usize], first_position, &pages, None);
        }
        batch
    }

    #[test]
    fn decodes_with_equal_first_pages_go_together_and_long_chunks_by_blocks() {
        let batch = batch(&[
            (130, 1, &[5, 6, 7]),
            (0, 50, &[1]),
            (200, 1, &[5, 6, 8, 9]),
            (70, 1, &[2, 3]),
            (129, 2, &[5, 6, 4]),
        ]);
        let mut cohorts = Cohorts::default();
        cohorts.plan(64, &batch, 21);
        let all: Vec<(Vec<u32>, usize)> = (0..cohorts.len())
            .map(|i| (cohorts.get(i).rows.iter().map(|r| r.seq).collect(), cohorts.get(i).num_shared_tiles))
            .collect();
        assert_eq!(
            all,
            [(vec![3], 0), (vec![4, 4, 0, 2], 2), (vec![1; 21], 0), (vec![1; 21], 0), (vec![1; 8], 0),]
        );
    }
}
