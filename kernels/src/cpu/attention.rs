//! Causal attention over the paged cache with a running softmax, on bytes.
//!
//! A task is a few rows and one head of keys and values, with all query heads that share it: rows of one sequence,
//! or of several whose first pages are the same ([`cohorts`]). It walks the positions in tiles that begin at
//! multiples of [`TILE_LEN`], whatever the page size is; so the rescaling of a row happens at the same positions,
//! with the same numbers, in every batch. Scores are exact sums of bytes; weights are rounded to bytes relative to
//! the largest of their row and tile, scales of values included. Positions a row must not see weigh zero.

mod cohorts;
mod tile;

use self::cohorts::{Cohort, Cohorts};
use self::tile::{Tile, TileCopy};
use super::dots::{Dots, QUAD_BYTES};
use super::isa::{Kernel, Lanes};
use super::kv_cache::{KvCache, head_rotation};
use super::quantize::{MAX_BYTE, quantize, rotate};
use super::scratch::{PerThread, grow};
use super::tiles::Tiles;
use super::{Isa, LANES, OFFSET};
use crate::backend::AttentionShape;
use crate::shared::SharedMut;
use crate::step::StepBatch;
use crate::team;

/// Positions between two rescalings.
pub(super) const TILE_LEN: usize = 64;

const TILE_VECTORS: usize = TILE_LEN / LANES;

/// Query heads of all rows of a task: they share the loads of keys and values.
const MAX_HEAD_ROWS: usize = 64;

/// Working memory of the op.
#[derive(Default)]
pub(crate) struct AttentionScratch {
    cohorts: Cohorts,
    threads: PerThread<Scratch>,
}

/// `qkv`: `[num_tokens, qkv_len]`, `out`: `[num_tokens, num_heads, head_dim]`; a row sees the last `window`
/// positions, its own included, or all of them.
#[expect(clippy::too_many_arguments, reason = "the op has these operands")]
pub(super) fn attention(
    isa: Isa,
    scratch: &mut AttentionScratch,
    shape: &AttentionShape,
    window: Option<u32>,
    batch: &StepBatch,
    qkv: &[f32],
    cache: &KvCache,
    out: &mut [f32],
) {
    assert_eq!(qkv.len(), batch.num_tokens() * shape.qkv_len());
    assert_eq!(out.len(), batch.num_tokens() * shape.q_len());
    let max_rows = (MAX_HEAD_ROWS / shape.group_len()).max(1);
    scratch.cohorts.plan(shape.page_size, batch, max_rows);
    scratch.threads.prepare();
    let AttentionScratch { cohorts, threads } = &*scratch;
    let out = SharedMut::new(out);
    let num_tasks = cohorts.len() * shape.num_kv_heads;
    team::for_each(num_tasks, |task| {
        // The last cohort has the most positions: it goes first.
        let cohort = cohorts.get(cohorts.len() - 1 - task / shape.num_kv_heads);
        let kv_head = task % shape.num_kv_heads;
        let scratch = &mut *threads.get();
        isa.run(Attend { isa, shape, window, batch, cohort, kv_head, qkv, cache, scratch, out });
    });
}

/// Working memory of a thread. A head row is one query head of one row.
#[derive(Default)]
struct Scratch {
    /// Rotated queries, `[head_rows up to a multiple of 16 and 16 more, head_dim]`
    queries: Vec<i8>,
    /// `[head_rows]`; with the scale of the softmax.
    query_scales: Vec<f32>,
    /// Sums of the bytes, `[head_rows]`
    query_sums: Vec<i32>,
    /// Scores, then weighted values: `[head_rows, TILE_LEN]`, `[head_rows, head_dim]`
    ints: Vec<i32>,
    /// `[head_rows, TILE_LEN]`
    weights: Vec<i8>,
    /// `[head_rows]`
    weight_scales: Vec<f32>,
    /// What the sums so far shrink by, `[head_rows]`
    rescales: Vec<f32>,
    /// `[head_rows, head_dim]`
    sums: Vec<f32>,
    /// Highest score so far, `[head_rows]`
    max: Vec<f32>,
    /// Sums of weights so far, one a lane: `[head_rows, LANES]`
    total: Vec<f32>,
    /// One head.
    query: Vec<f32>,
    /// None only while it is in use.
    copy: Option<Box<TileCopy>>,
}

impl Scratch {
    fn resize(&mut self, head_rows: usize, head_dim: usize) {
        // Tiles read and write rows up to a multiple of 16, from any first row on.
        let padded_rows = head_rows.next_multiple_of(16) + 16;
        grow(&mut self.queries, padded_rows * head_dim);
        grow(&mut self.query_scales, head_rows);
        grow(&mut self.query_sums, head_rows);
        grow(&mut self.ints, padded_rows * head_dim.max(TILE_LEN));
        grow(&mut self.weights, padded_rows * TILE_LEN);
        grow(&mut self.weight_scales, head_rows);
        grow(&mut self.rescales, head_rows);
        grow(&mut self.sums, head_rows * head_dim);
        grow(&mut self.max, head_rows);
        grow(&mut self.total, head_rows * LANES);
        grow(&mut self.query, head_dim);
    }
}

struct Attend<'a> {
    isa: Isa,
    shape: &'a AttentionShape,
    window: Option<u32>,
    batch: &'a StepBatch,
    cohort: Cohort<'a>,
    kv_head: usize,
    qkv: &'a [f32],
    cache: &'a KvCache,
    scratch: &'a mut Scratch,
    out: SharedMut<'a, f32>,
}

impl Kernel for Attend<'_> {
    #[inline(always)]
    fn run<V: Lanes>(mut self) {
        let tiles = self.isa.has_tiles().then(Tiles::new);
        self.start::<V>();
        let rows = self.cohort.rows;
        // What all rows share, then the rest of each sequence.
        self.walk::<V>(tiles.as_ref(), 0..rows.len(), 0..self.cohort.num_shared_tiles);
        let mut first = 0;
        while first < rows.len() {
            let seq = rows[first].seq;
            let end = first + rows[first..].iter().take_while(|row| row.seq == seq).count();
            let num_tiles = self.position(end - 1) / TILE_LEN + 1;
            self.walk::<V>(tiles.as_ref(), first..end, self.cohort.num_shared_tiles..num_tiles);
            first = end;
        }
        self.finish::<V>();
    }
}

impl Attend<'_> {
    #[inline(always)]
    fn position(&self, row: usize) -> usize {
        self.batch.positions[self.cohort.rows[row].row as usize] as usize
    }

    /// Positions that a row sees.
    #[inline(always)]
    fn visible(&self, row: usize) -> std::ops::Range<usize> {
        let end = self.position(row) + 1;
        let first = self.window.map_or(0, |window| end.saturating_sub(window as usize));
        first..end
    }

    #[inline(always)]
    fn start<V: Lanes>(&mut self) {
        let (head_dim, group_len) = (self.shape.head_dim, self.shape.group_len());
        let head_rows = self.cohort.rows.len() * group_len;
        self.scratch.resize(head_rows, head_dim);
        for (i, row) in self.cohort.rows.iter().enumerate() {
            let from = row.row as usize * self.shape.qkv_len() + self.kv_head * group_len * head_dim;
            for (head, query) in
                self.qkv[from..from + group_len * head_dim].chunks_exact(head_dim).enumerate()
            {
                let head_row = i * group_len + head;
                let Scratch { queries, query_scales, query_sums, query: rotated, .. } = &mut *self.scratch;
                let rotated = &mut rotated[..head_dim];
                rotated.copy_from_slice(query);
                rotate::<V>(head_rotation(head_dim), rotated);
                let bytes = &mut queries[head_row * head_dim..(head_row + 1) * head_dim];
                let (scale, sum) = quantize::<V>(rotated, bytes);
                query_scales[head_row] = scale * self.shape.scale;
                query_sums[head_row] = sum;
            }
        }
        self.scratch.sums[..head_rows * head_dim].fill(0.0);
        self.scratch.max[..head_rows].fill(f32::NEG_INFINITY);
        self.scratch.total[..head_rows * LANES].fill(0.0);
    }

    /// Some rows over some tiles of the first one's pages.
    #[inline(always)]
    fn walk<V: Lanes>(
        &mut self,
        tiles: Option<&Tiles>,
        rows: std::ops::Range<usize>,
        range: std::ops::Range<usize>,
    ) {
        let pages = self.batch.pages(self.cohort.rows[rows.start].seq as usize);
        let group_len = self.shape.group_len();
        let head_rows = rows.start * group_len..rows.end * group_len;
        // Rows are in order of their positions within a sequence, and those of a cohort beyond its shared tiles.
        let first_visible = rows.clone().map(|row| self.visible(row).start).min().unwrap_or(0);
        let mut copy = self.scratch.copy.take().unwrap_or_default();
        for index in range.start.max(first_visible / TILE_LEN)..range.end {
            let first = index * TILE_LEN;
            let len = TILE_LEN.min(rows.clone().map(|row| self.position(row)).max().unwrap_or(0) + 1 - first);
            let tile = Tile::new(self.shape, self.cache, pages, self.kv_head, first, len, &mut copy);
            self.scores::<V>(tiles, &tile, head_rows.clone());
            for row in rows.clone() {
                let visible = self.visible(row);
                let valid =
                    visible.start.saturating_sub(first)..visible.end.saturating_sub(first).min(TILE_LEN);
                for head in 0..group_len {
                    let at = (row - rows.start) * group_len + head;
                    self.weigh::<V>(row * group_len + head, at, &tile, valid.clone());
                }
            }
            self.add_values::<V>(tiles, &tile, head_rows.clone());
        }
        self.scratch.copy = Some(copy);
    }

    /// Exact products of queries and keys.
    #[inline(always)]
    fn scores<V: Lanes>(
        &mut self,
        tiles: Option<&Tiles>,
        tile: &Tile<'_>,
        head_rows: std::ops::Range<usize>,
    ) {
        let head_dim = self.shape.head_dim;
        let padded_rows = head_rows.len().next_multiple_of(16);
        let dots = Dots {
            num_rows: head_rows.len(),
            num_vectors: TILE_VECTORS,
            num_quads: head_dim / 4,
            a: self.scratch.queries[head_rows.start * head_dim..][..padded_rows * head_dim].as_ptr().cast(),
            a_row_stride: head_dim,
            b: tile.keys.as_ptr(),
            b_vector_stride: LANES * head_dim,
            b_quad_stride: QUAD_BYTES,
            sums: self.scratch.ints[..padded_rows * TILE_LEN].as_mut_ptr(),
            sums_row_stride: TILE_LEN,
        };
        assert_eq!(tile.keys.len(), TILE_LEN * head_dim);
        // SAFETY: the slices were cut to the sizes named here.
        unsafe { dots.compute::<V, true>(tiles) };
    }

    /// Turns scores into weights relative to the highest score so far; `at` is the row among those of the scores.
    #[inline(always)]
    #[expect(clippy::needless_range_loop, reason = "vectors index sums, scales and bytes alike")]
    fn weigh<V: Lanes>(
        &mut self,
        head_row: usize,
        at: usize,
        tile: &Tile<'_>,
        valid: std::ops::Range<usize>,
    ) {
        let Scratch { ints, weights, query_scales, query_sums, weight_scales, rescales, max, total, .. } =
            &mut *self.scratch;
        let bytes = &mut weights[at * TILE_LEN..(at + 1) * TILE_LEN];
        if valid.is_empty() {
            bytes.fill(0);
            (weight_scales[at], rescales[at]) = (0.0, 1.0);
            return;
        }
        let ints = &ints[at * TILE_LEN..(at + 1) * TILE_LEN];
        let is_partial = valid.len() < TILE_LEN;
        let old_max = max[head_row];
        // SAFETY: this is compiled for `V`; the rows were cut to a tile, and vectors of a tile are in bounds.
        unsafe {
            let offset = V::splat_ints(-OFFSET * query_sums[head_row]);
            let scale = V::splat(query_scales[head_row]);
            // Loops instead of closures: a closure may be compiled apart, without the instruction set.
            let mut vectors = [V::splat(0.0); TILE_VECTORS];
            for n in 0..TILE_VECTORS {
                let ints = V::add_ints(V::load_ints(ints[n * LANES..].as_ptr()), offset);
                let scale = scale.mul(V::load(tile.key_scales[n * LANES..].as_ptr()));
                vectors[n] = V::from_ints(ints).mul(scale);
            }
            if is_partial {
                mask(&mut vectors, &valid, f32::NEG_INFINITY);
            }
            let tile_max = reduce_max(vectors[0].max(vectors[1]).max(vectors[2].max(vectors[3])));
            let new_max = if tile_max > old_max { tile_max } else { old_max };
            let minus_max = V::splat(-new_max);
            for vector in &mut vectors {
                *vector = exp_lanes(vector.add(minus_max));
            }
            if is_partial {
                mask(&mut vectors, &valid, 0.0);
            }
            // A bound of the largest product instead of the product: it costs one number, not a reduction.
            let bound = first(exp_lanes(V::splat(tile_max - new_max))) * tile.value_bounds[valid.end - 1];
            let inverse = V::splat(if bound > 0.0 { MAX_BYTE / bound } else { 0.0 });
            let mut sum = V::splat(0.0);
            for n in 0..TILE_VECTORS {
                sum = sum.add(vectors[n]);
                vectors[n] = vectors[n].mul(V::load(tile.value_scales[n * LANES..].as_ptr()).mul(inverse));
            }
            if is_partial {
                // Again, as a slot that was never written may have any scale.
                mask(&mut vectors, &valid, 0.0);
            }
            for n in 0..TILE_VECTORS {
                vectors[n].round_to_bytes(bytes[n * LANES..].as_mut_ptr());
            }
            let rescale =
                if new_max == old_max { 1.0 } else { first(exp_lanes(V::splat(old_max - new_max))) };
            weight_scales[at] = bound / MAX_BYTE;
            rescales[at] = rescale;
            let total = total[head_row * LANES..][..LANES].as_mut_ptr();
            sum.fma(V::load(total), V::splat(rescale)).store(total);
            max[head_row] = new_max;
        }
    }

    /// Adds the weighted values of a tile to the rescaled sums.
    #[inline(always)]
    fn add_values<V: Lanes>(
        &mut self,
        tiles: Option<&Tiles>,
        tile: &Tile<'_>,
        head_rows: std::ops::Range<usize>,
    ) {
        let head_dim = self.shape.head_dim;
        let padded_rows = head_rows.len().next_multiple_of(16);
        let Scratch { weights, ints, sums, weight_scales, rescales, .. } = &mut *self.scratch;
        let dots = Dots {
            num_rows: head_rows.len(),
            num_vectors: head_dim / LANES,
            num_quads: TILE_LEN / 4,
            a: weights[..padded_rows * TILE_LEN].as_ptr().cast(),
            a_row_stride: TILE_LEN,
            b: tile.values.as_ptr(),
            b_vector_stride: QUAD_BYTES,
            b_quad_stride: 4 * head_dim,
            sums: ints[..padded_rows * head_dim].as_mut_ptr(),
            sums_row_stride: head_dim,
        };
        assert_eq!(tile.values.len(), TILE_LEN * head_dim);
        // SAFETY: the slices were cut to the sizes named here. Weights are not negative, so they are the same bytes
        // with and without a sign.
        unsafe { dots.compute::<V, false>(tiles) };
        let sums = sums[head_rows.start * head_dim..head_rows.end * head_dim].chunks_exact_mut(head_dim);
        for (at, (sums, ints)) in sums.zip(ints.chunks_exact(head_dim)).enumerate() {
            let (scale, rescale) = (weight_scales[at], rescales[at]);
            for (sum, int) in sums.iter_mut().zip(ints) {
                *sum = (*int as f32).mul_add(scale, *sum * rescale);
            }
        }
    }

    #[inline(always)]
    fn finish<V: Lanes>(&mut self) {
        let (head_dim, group_len) = (self.shape.head_dim, self.shape.group_len());
        for (i, row) in self.cohort.rows.iter().enumerate() {
            let to = row.row as usize * self.shape.q_len() + self.kv_head * group_len * head_dim;
            let to = self.out.at(to, group_len * head_dim);
            // SAFETY: `at` checked the bounds; these heads of this row belong to this task alone.
            let to = unsafe { std::slice::from_raw_parts_mut(to, group_len * head_dim) };
            let from = &self.scratch.sums[i * group_len * head_dim..][..group_len * head_dim];
            let heads = to.chunks_exact_mut(head_dim).zip(from.chunks_exact(head_dim));
            let totals = self.scratch.total[i * group_len * LANES..].chunks_exact(LANES);
            for ((to, from), total) in heads.zip(totals) {
                // SAFETY: a total is a whole vector, and this is compiled for `V`.
                let inverse = 1.0 / unsafe { reduce_sum(V::load(total.as_ptr())) };
                for (to, from) in to.iter_mut().zip(from) {
                    *to = from * inverse;
                }
            }
        }
    }
}

/// Replaces the numbers of positions that are not valid; a NaN of one that is becomes infinite, and so stays seen.
///
/// # Safety
/// To be called below [`Isa::run`] with the vectors of that instruction set.
#[inline(always)]
unsafe fn mask<V: Lanes>(values: &mut [V; TILE_VECTORS], valid: &std::ops::Range<usize>, other: f32) {
    let mut bounds = [other; TILE_LEN];
    bounds[valid.clone()].fill(f32::INFINITY);
    for (n, value) in values.iter_mut().enumerate() {
        // SAFETY: by the contract; the bounds are whole vectors.
        *value = unsafe { value.min(V::load(bounds[n * LANES..].as_ptr())) };
    }
}

/// `e^x` for `x` up to 0, to about 4e-6; below -87 a tiny number. NaN stays NaN.
///
/// # Safety
/// To be called below [`Isa::run`] with the vectors of that instruction set.
#[inline(always)]
#[expect(
    clippy::excessive_precision,
    reason = "the coefficients are the nearest f32 of a minimax fit of 2^r"
)]
unsafe fn exp_lanes<V: Lanes>(x: V) -> V {
    // Adding it rounds to an integer, which then is in the low bits.
    const ROUND: f32 = 12_582_912.0;
    // SAFETY: by the contract.
    unsafe {
        // The order of the two makes the maximum of NaN a NaN.
        let power = V::splat(-126.0).max(x.mul(V::splat(std::f32::consts::LOG2_E)));
        let rounded = power.add(V::splat(ROUND));
        let rest = power.add(rounded.add(V::splat(-ROUND)).mul(V::splat(-1.0)));
        let mut sum = V::splat(9.570_099_41e-3);
        for coefficient in [5.591_785_9e-2, 2.402_474_43e-1, 6.931_217_9e-1, 9.999_992_8e-1] {
            sum = V::splat(coefficient).fma(sum, rest);
        }
        sum.mul(rounded.power_of_two())
    }
}

/// # Safety
/// To be called below [`Isa::run`] with the vectors of that instruction set.
#[inline(always)]
unsafe fn reduce_max<V: Lanes>(lanes: V) -> f32 {
    // SAFETY: by the contract.
    unsafe {
        let lanes = lanes.max(lanes.swap::<8>());
        let lanes = lanes.max(lanes.swap::<4>());
        let lanes = lanes.max(lanes.swap::<2>());
        first(lanes.max(lanes.swap::<1>()))
    }
}

/// All lanes added, by halves.
///
/// # Safety
/// To be called below [`Isa::run`] with the vectors of that instruction set.
#[inline(always)]
unsafe fn reduce_sum<V: Lanes>(lanes: V) -> f32 {
    // SAFETY: by the contract.
    unsafe {
        let lanes = lanes.add(lanes.swap::<8>());
        let lanes = lanes.add(lanes.swap::<4>());
        let lanes = lanes.add(lanes.swap::<2>());
        first(lanes.add(lanes.swap::<1>()))
    }
}

/// # Safety
/// To be called below [`Isa::run`] with the vectors of that instruction set.
#[inline(always)]
unsafe fn first<V: Lanes>(lanes: V) -> f32 {
    let mut all = [0.0; LANES];
    // SAFETY: by the contract; the array is a whole vector.
    unsafe { lanes.store(all.as_mut_ptr()) };
    all[0]
}
