//! What the kernels of attention do in a step, planned once and used by all layers.
//!
//! A tile is some rows (query heads of tokens, packed by their head of keys and values) against some keys of a list of
//! pages; see `attention.cuh`. Sequences with few rows, decodes above all, are cut along their keys so that many blocks
//! work on one, and their parts are merged. Long chunks are cut along their rows.
//!
//! Invariant: keys are cut at multiples of `split_len` and nowhere else, whatever else is in the batch. So the bits of
//! a row depend on its position alone in batch-invariant mode, where long chunks merge at the same places, and sharing
//! a prefix changes no bits in either mode. Windows are not planned for: they differ by layer.
//!
//! Sequences with few rows whose page tables begin with the same pages share tiles over whole splits of them, so that
//! the keys of a common prefix are read once for all (as in Hydragen, Juravsky et al. 2024, and FlashInfer's cascades).
//! Equal page ids mean equal tokens.

use std::ops::Range;

use super::GpuOptions;
use super::device::Device;
use super::ops::KvDtype;
use crate::backend::AttentionShape;
use crate::step::{PageId, StepBatch};

/// Rows of a tile for the kernel that is made for Hopper.
pub(crate) const WIDE_ROWS: usize = 128;
/// Sequences with more tiles of rows than this are not cut along their keys.
const MAX_SPLIT_TILES: usize = 4;
/// Head dimensions that the kernel for Hopper knows.
const MAX_WIDE_DIM: usize = 128;
/// Parts of the keys of a sequence that decodes, for which there is room on average; what does not fit is not cut.
const PARTS_PER_SEQUENCE: usize = 16;
/// Words of a tile and of a merge.
const RECORD: usize = 8;

#[derive(Clone, Copy, Debug)]
pub(crate) struct PlanOptions {
    pub(crate) page_size: usize,
    /// Query heads of a head of keys and values.
    pub(crate) group_len: usize,
    pub(crate) head_dim: usize,
    /// A row's bits depend on its sequence alone.
    pub(crate) batch_invariant: bool,
    /// Long chunks go to the kernel for Hopper; not where `batch_invariant`.
    pub(crate) wide_tiles: bool,
    pub(crate) share_prefixes: bool,
    /// Keys of a part, a multiple of 64.
    pub(crate) split_len: u32,
    /// Rows of partial results that there is room for, at least one for each row of a batch. Sequences whose parts do
    /// not fit are not cut.
    pub(crate) max_part_rows: usize,
}

impl PlanOptions {
    /// For steps of so many rows and sequences.
    pub(crate) fn of_steps(
        device: &dyn Device,
        shape: &AttentionShape,
        options: GpuOptions,
        [max_rows, max_seqs]: [usize; 2],
    ) -> Self {
        let batch_invariant = options.deterministic;
        Self {
            page_size: shape.page_size,
            group_len: shape.group_len(),
            head_dim: shape.head_dim,
            batch_invariant,
            wide_tiles: !batch_invariant
                && device.is_hopper()
                && options.kv_dtype == KvDtype::Half
                && shape.head_dim <= MAX_WIDE_DIM,
            share_prefixes: true,
            split_len: if batch_invariant { Self::BATCH_INVARIANT_SPLIT_LEN } else { Self::SPLIT_LEN },
            max_part_rows: (max_rows + max_seqs * PARTS_PER_SEQUENCE) * shape.group_len(),
        }
    }

    /// A part's results cost 8 bytes a dimension and row to write and read again, its keys 2048 a dimension and head.
    pub(crate) const SPLIT_LEN: u32 = 512;
    /// Long chunks merge too then, which costs each row as much.
    pub(crate) const BATCH_INVARIANT_SPLIT_LEN: u32 = 1024;

    /// As many as a block of the kernel takes.
    fn tile_rows(&self) -> usize {
        if self.head_dim == 256 { 32 } else { 64 }
    }
}

/// Numbers of things that a plan has, or that there is room for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct PlanSize {
    pub(crate) tiles: usize,
    pub(crate) wide_tiles: usize,
    pub(crate) merges: usize,
    pub(crate) tokens: usize,
    pub(crate) pages: usize,
    /// Rows of partial results.
    pub(crate) part_rows: usize,
}

impl PlanSize {
    pub(crate) fn fits(&self, room: &Self) -> bool {
        self.tiles <= room.tiles
            && self.wide_tiles <= room.wide_tiles
            && self.merges <= room.merges
            && self.tokens <= room.tokens
            && self.pages <= room.pages
            && self.part_rows <= room.part_rows
    }
}

/// Where things lie in the words of a plan. The same for the same room, so that a recorded graph can take any plan that
/// fits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PlanLayout {
    pub(crate) room: PlanSize,
    pub(crate) tiles: usize,
    pub(crate) wide_tiles: usize,
    pub(crate) merges: usize,
    pub(crate) tokens: usize,
    pub(crate) pages: usize,
    /// Words of the whole.
    pub(crate) len: usize,
}

impl PlanLayout {
    /// Words that say how many tiles, wide tiles and merges there are.
    pub(crate) const NUM_TILES: usize = 0;
    pub(crate) const NUM_WIDE_TILES: usize = 1;
    pub(crate) const NUM_MERGES: usize = 2;

    pub(crate) fn new(room: PlanSize) -> Self {
        let tiles = RECORD;
        let wide_tiles = tiles + room.tiles * RECORD;
        let merges = wide_tiles + room.wide_tiles * RECORD;
        let tokens = merges + room.merges * RECORD;
        let pages = tokens + room.tokens;
        Self { room, tiles, wide_tiles, merges, tokens, pages, len: pages + room.pages }
    }
}

/// As in `attention.cuh`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Tile {
    /// Packed rows: those of the first token in `tokens`, head by head, then the next.
    pub(crate) row0: u32,
    pub(crate) num_rows: u32,
    pub(crate) k0: u32,
    pub(crate) k1: u32,
    /// First row of the partial results.
    pub(crate) part: Option<u32>,
    pub(crate) pages: u32,
    /// No row is before it.
    pub(crate) min_position: u32,
    /// 0, or: parts are merged within the tile.
    pub(crate) split: u32,
}

/// As in `attention.cuh`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Merge {
    pub(crate) token: u32,
    pub(crate) shared: Parts,
    pub(crate) own: Parts,
}

/// A token's rows in partial results: first, distance to the next part, parts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Parts {
    pub(crate) first: u32,
    pub(crate) stride: u32,
    pub(crate) len: u32,
}

/// The plan of a step; memory is kept between steps.
#[derive(Debug)]
pub(crate) struct AttentionPlan {
    options: PlanOptions,
    tiles: Vec<Tile>,
    wide_tiles: Vec<Tile>,
    merges: Vec<Merge>,
    /// Rows of the token arrays, in the order of packed rows.
    tokens: Vec<u32>,
    num_pages: usize,
    part_rows: usize,
    /// Rows of the batch that have no place yet.
    rows_left: usize,
    /// Sequences with few rows.
    short: Vec<u32>,
}

impl AttentionPlan {
    pub(crate) fn new(options: PlanOptions) -> Self {
        assert!(options.page_size.is_power_of_two());
        assert!(options.split_len > 0 && options.split_len.is_multiple_of(64));
        assert!(!(options.wide_tiles && options.batch_invariant), "wide tiles sum in another order");
        Self {
            options,
            tiles: Vec::new(),
            wide_tiles: Vec::new(),
            merges: Vec::new(),
            tokens: Vec::new(),
            num_pages: 0,
            part_rows: 0,
            rows_left: 0,
            short: Vec::new(),
        }
    }

    pub(crate) fn size(&self) -> PlanSize {
        PlanSize {
            tiles: self.tiles.len(),
            wide_tiles: self.wide_tiles.len(),
            merges: self.merges.len(),
            tokens: self.tokens.len(),
            pages: self.num_pages,
            part_rows: self.part_rows,
        }
    }

    /// Plans a step. What was planned before is forgotten.
    pub(crate) fn plan(&mut self, batch: &StepBatch) {
        self.tiles.clear();
        self.wide_tiles.clear();
        self.merges.clear();
        self.tokens.clear();
        self.short.clear();
        self.num_pages = batch.kv_page_indices.len();
        self.part_rows = 0;
        self.rows_left = batch.num_tokens() * self.options.group_len;
        assert!(self.rows_left <= self.options.max_part_rows, "no room for a part of each row");
        for seq in 0..batch.num_seqs() {
            if self.rows_of(batch, seq) > MAX_SPLIT_TILES * self.options.tile_rows() {
                self.whole(batch, seq);
            } else {
                self.short.push(seq as u32);
            }
        }
        let mut short = std::mem::take(&mut self.short);
        if self.options.share_prefixes {
            // Neighbors in this order share the most pages.
            short.sort_unstable_by(|&a, &b| {
                batch.pages(a as usize).cmp(batch.pages(b as usize)).then(a.cmp(&b))
            });
        }
        let mut rest = &short[..];
        while !rest.is_empty() {
            let (len, num_shared) = self.company(batch, rest);
            self.cohort(batch, &rest[..len], num_shared);
            rest = &rest[len..];
        }
        self.short = short;
        // The longest first, so that the last ones to end are short.
        let order = |tile: &Tile| (tile.k0.wrapping_sub(tile.k1), tile.row0, tile.k0);
        self.tiles.sort_unstable_by_key(order);
        self.wide_tiles.sort_unstable_by_key(order);
    }

    /// Writes the words of the plan, and how many they are: those behind are not read.
    pub(crate) fn write(&self, batch: &StepBatch, layout: &PlanLayout, words: &mut [u32]) -> usize {
        assert!(self.size().fits(&layout.room), "a plan of {:?} for {:?}", self.size(), layout.room);
        words[..RECORD].fill(0);
        words[PlanLayout::NUM_TILES] = self.tiles.len() as u32;
        words[PlanLayout::NUM_WIDE_TILES] = self.wide_tiles.len() as u32;
        words[PlanLayout::NUM_MERGES] = self.merges.len() as u32;
        for (first, tiles) in [(layout.tiles, &self.tiles), (layout.wide_tiles, &self.wide_tiles)] {
            for (tile, words) in tiles.iter().zip(words[first..].chunks_exact_mut(RECORD)) {
                let part = tile.part.unwrap_or(u32::MAX);
                let Tile { row0, num_rows, k0, k1, pages, min_position, split, .. } = *tile;
                words.copy_from_slice(&[row0, num_rows, k0, k1, part, pages, min_position, split]);
            }
        }
        for (merge, words) in self.merges.iter().zip(words[layout.merges..].chunks_exact_mut(RECORD)) {
            let Merge { token, shared, own } = *merge;
            words.copy_from_slice(&[
                token,
                shared.first,
                shared.stride,
                shared.len,
                own.first,
                own.stride,
                own.len,
                0,
            ]);
        }
        words[layout.tokens..][..self.tokens.len()].copy_from_slice(&self.tokens);
        for (word, page) in words[layout.pages..].iter_mut().zip(&batch.kv_page_indices) {
            *word = page.0;
        }
        layout.pages + self.num_pages
    }

    fn rows_of(&self, batch: &StepBatch, seq: usize) -> usize {
        batch.rows(seq).len() * self.options.group_len
    }

    /// How many of the first sequences go together, and the splits that they share.
    fn company(&self, batch: &StepBatch, seqs: &[u32]) -> (usize, usize) {
        let first = seqs[0] as usize;
        let mut num_shared = self.splits_before(batch, first);
        let mut len = 1;
        for &seq in seqs[1..].iter().take_while(|_| self.options.share_prefixes) {
            let seq = seq as usize;
            let common = common_pages(batch.pages(first), batch.pages(seq)) * self.options.page_size;
            let both = common / self.options.split_len as usize;
            let both = both.min(self.splits_before(batch, seq)).min(num_shared);
            // A sequence that shares much less would take the others' shared tiles away.
            if both == 0 || (len > 1 && 2 * both < num_shared) {
                break;
            }
            (num_shared, len) = (both, len + 1);
        }
        (len, if len == 1 { 0 } else { num_shared })
    }

    /// Splits that lie before the first row of a sequence.
    fn splits_before(&self, batch: &StepBatch, seq: usize) -> usize {
        (batch.positions[batch.rows(seq).start] / self.options.split_len) as usize
    }

    /// Splits up to the last row of a sequence.
    fn num_splits(&self, batch: &StepBatch, seq: usize) -> usize {
        last_position(batch, seq) as usize / self.options.split_len as usize + 1
    }

    /// Plans sequences that share their first splits.
    fn cohort(&mut self, batch: &StepBatch, seqs: &[u32], num_shared: usize) {
        let num_rows: usize = seqs.iter().map(|&seq| self.rows_of(batch, seq as usize)).sum();
        let own = |seq: &u32| self.num_splits(batch, *seq as usize) - num_shared;
        let parts: usize = seqs.iter().map(|seq| own(seq) * self.rows_of(batch, *seq as usize)).sum();
        let is_cut = num_shared > 0 || own(&seqs[0]) > 1;
        let wanted = num_shared * num_rows + parts;
        if is_cut && self.part_rows + wanted + self.rows_left - num_rows > self.options.max_part_rows {
            for &seq in seqs {
                self.whole(batch, seq as usize);
            }
            return;
        }
        self.rows_left -= num_rows;
        let group_len = self.options.group_len as u32;
        let mut row0 = (self.tokens.len() * self.options.group_len) as u32;
        let min_position = seqs.iter().map(|&seq| batch.positions[batch.rows(seq as usize).start]).min();
        let all = TileRows {
            rows: row0..row0 + num_rows as u32,
            pages: batch.kv_page_indptr[seqs[0] as usize],
            min_position: min_position.expect("a cohort has sequences"),
        };
        let mut shared = self.parts(&all, 0..num_shared, u32::MAX);
        for &seq in seqs {
            let seq = seq as usize;
            let rows = batch.rows(seq);
            let num_splits = self.num_splits(batch, seq);
            let own = TileRows {
                rows: row0..row0 + rows.len() as u32 * group_len,
                pages: batch.kv_page_indptr[seq],
                min_position: batch.positions[rows.start],
            };
            self.tokens.extend(rows.clone().map(|row| row as u32));
            row0 = own.rows.end;
            let end = last_position(batch, seq) + 1;
            if num_splits == 1 {
                self.cut_rows(&own, 0..end, None);
                continue;
            }
            let mut own = self.parts(&own, num_shared..num_splits, end);
            for row in rows {
                self.merges.push(Merge { token: row as u32, shared, own });
                shared.first += group_len;
                own.first += group_len;
            }
        }
    }

    /// Tiles for splits of the keys up to `end`.
    fn parts(&mut self, rows: &TileRows, splits: Range<usize>, end: u32) -> Parts {
        let split_len = self.options.split_len;
        let first = self.part_rows as u32;
        for split in splits.clone() {
            let k0 = split as u32 * split_len;
            let part = self.part_rows as u32;
            self.part_rows += rows.rows.len();
            self.cut_rows(rows, k0..end.min(k0 + split_len), Some(part));
        }
        Parts { first, stride: rows.rows.len() as u32, len: splits.len() as u32 }
    }

    /// Tiles for all rows against the same keys.
    fn cut_rows(&mut self, rows: &TileRows, keys: Range<u32>, part: Option<u32>) {
        for row0 in rows.rows.clone().step_by(self.options.tile_rows()) {
            self.tiles.push(Tile {
                row0,
                num_rows: (rows.rows.end - row0).min(self.options.tile_rows() as u32),
                k0: keys.start,
                k1: keys.end,
                part: part.map(|part| part + row0 - rows.rows.start),
                pages: rows.pages,
                min_position: rows.min_position,
                split: 0,
            });
        }
    }

    /// Plans a sequence whose rows see all their keys in one tile.
    fn whole(&mut self, batch: &StepBatch, seq: usize) {
        let PlanOptions { batch_invariant, wide_tiles, split_len, group_len, .. } = self.options;
        let rows = batch.rows(seq);
        let num_rows = rows.len() * group_len;
        self.rows_left -= num_rows;
        let first = self.tokens.len() * group_len;
        self.tokens.extend(rows.clone().map(|row| row as u32));
        let tile_rows = if wide_tiles { WIDE_ROWS } else { self.options.tile_rows() };
        for row in (0..num_rows).step_by(tile_rows) {
            let end = num_rows.min(row + tile_rows);
            let k1 = batch.positions[rows.start + (end - 1) / group_len] + 1;
            let split = if batch_invariant && k1 > split_len { split_len } else { 0 };
            let part = (split > 0).then_some(self.part_rows as u32);
            self.part_rows += if split > 0 { end - row } else { 0 };
            let tile = Tile {
                row0: (first + row) as u32,
                num_rows: (end - row) as u32,
                k0: 0,
                k1,
                part,
                pages: batch.kv_page_indptr[seq],
                min_position: batch.positions[rows.start + row / group_len],
                split,
            };
            if wide_tiles { self.wide_tiles.push(tile) } else { self.tiles.push(tile) }
        }
    }
}

/// Packed rows with the pages that they see.
struct TileRows {
    rows: Range<u32>,
    pages: u32,
    min_position: u32,
}

fn last_position(batch: &StepBatch, seq: usize) -> u32 {
    batch.positions[batch.rows(seq).end - 1]
}

fn common_pages(a: &[PageId], b: &[PageId]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}

#[cfg(test)]
mod tests;
