//! Causal attention over the paged cache with a running softmax.
//!
//! A task is a few rows of one sequence and one head of keys and values, with all query heads that share it. It
//! walks the positions from 0 on in tiles that begin at multiples of [`TILE_LEN`], whatever the page size is: so the
//! rescaling of a row happens at the same positions, with the same numbers, in every batch. A tile's positions beyond
//! a row get the weight zero, which adds nothing to its sums.

use rayon::prelude::*;

use super::elementwise::exp;
use super::gemm::Gemm;
use super::isa::{Kernel, Lanes};
use super::shared::SharedMut;
use super::{Isa, KEY_GROUP_LEN, KvCache, LANES};
use crate::backend::AttentionShape;
use crate::step::{PageId, StepBatch};

/// Positions between two rescalings.
const TILE_LEN: usize = 64;

/// Rows of a task: they share the loads of keys and values.
const MAX_TASK_ROWS: usize = 16;

/// `qkv`: `[num_tokens, qkv_len]`, `out`: `[num_tokens, num_heads, head_dim]`
pub(super) fn attention(
    isa: Isa,
    shape: &AttentionShape,
    window: Option<u32>,
    batch: &StepBatch,
    qkv: &[f32],
    cache: &KvCache,
    out: &mut [f32],
) {
    assert_eq!(qkv.len(), batch.num_tokens() * shape.qkv_len());
    assert_eq!(out.len(), batch.num_tokens() * shape.q_len());
    let mut tasks = Vec::new();
    for seq in 0..batch.num_seqs() {
        for first_row in batch.rows(seq).step_by(MAX_TASK_ROWS) {
            let num_rows = MAX_TASK_ROWS.min(batch.rows(seq).end - first_row);
            let positions = &batch.positions[first_row..first_row + num_rows];
            for kv_head in 0..shape.num_kv_heads {
                tasks.push(Task { pages: batch.pages(seq), positions, first_row, kv_head });
            }
        }
    }
    let out = SharedMut::new(out);
    tasks.par_iter().for_each_init(
        || Scratch::new(shape),
        |scratch, task| isa.run(Attend { shape, window, task, qkv, cache, scratch, out }),
    );
}

struct Task<'a> {
    pages: &'a [PageId],
    /// `[num_rows]`
    positions: &'a [u32],
    first_row: usize,
    kv_head: usize,
}

/// Working memory of a thread. A head row is one query head of one row; there are `num_rows * group_len`.
struct Scratch {
    /// Scaled queries, `[head_rows, head_dim]`
    queries: Vec<f32>,
    /// Scores, then weights, `[head_rows, TILE_LEN]`
    weights: Vec<f32>,
    /// `[head_rows, head_dim]`
    sums: Vec<f32>,
    /// Highest score so far, `[head_rows]`
    max: Vec<f32>,
    /// Sum of weights so far, `[head_rows]`
    total: Vec<f32>,
}

impl Scratch {
    fn new(shape: &AttentionShape) -> Self {
        let head_rows = MAX_TASK_ROWS * shape.group_len();
        Self {
            queries: vec![0.0; head_rows * shape.head_dim],
            weights: vec![0.0; head_rows * TILE_LEN],
            sums: vec![0.0; head_rows * shape.head_dim],
            max: vec![0.0; head_rows],
            total: vec![0.0; head_rows],
        }
    }
}

struct Attend<'a> {
    shape: &'a AttentionShape,
    window: Option<u32>,
    task: &'a Task<'a>,
    qkv: &'a [f32],
    cache: &'a KvCache,
    scratch: &'a mut Scratch,
    out: SharedMut<'a>,
}

impl Kernel for Attend<'_> {
    #[inline(always)]
    fn run<V: Lanes>(mut self) {
        self.start();
        let last = *self.task.positions.last().expect("a task has rows") as usize;
        let first = self.first_visible(0) / TILE_LEN * TILE_LEN;
        for tile_start in (first..=last).step_by(TILE_LEN) {
            let tile_len = TILE_LEN.min(last + 1 - tile_start);
            self.scores::<V>(tile_start, tile_len);
            self.softmax(tile_start);
            self.weigh_values::<V>(tile_start, tile_len);
        }
        self.finish();
    }
}

impl Attend<'_> {
    #[inline(always)]
    fn head_rows(&self) -> usize {
        self.task.positions.len() * self.shape.group_len()
    }

    /// First position that a row sees.
    #[inline(always)]
    fn first_visible(&self, row: usize) -> usize {
        let num_positions = self.task.positions[row] as usize + 1;
        self.window.map_or(0, |window| num_positions.saturating_sub(window as usize))
    }

    /// Start of a page's part of this head in the cache, in slots.
    #[inline(always)]
    fn page_start(&self, position: usize) -> usize {
        let page = self.task.pages[position / self.shape.page_size].0 as usize;
        (page * self.shape.num_kv_heads + self.task.kv_head) * self.shape.page_size
    }

    #[inline(always)]
    fn start(&mut self) {
        let (head_dim, group_len) = (self.shape.head_dim, self.shape.group_len());
        let scale = self.shape.scale;
        for row in 0..self.task.positions.len() {
            let from =
                (self.task.first_row + row) * self.shape.qkv_len() + self.task.kv_head * group_len * head_dim;
            let from = &self.qkv[from..from + group_len * head_dim];
            let to = &mut self.scratch.queries[row * group_len * head_dim..][..group_len * head_dim];
            for (to, from) in to.iter_mut().zip(from) {
                *to = from * scale;
            }
        }
        let head_rows = self.head_rows();
        self.scratch.sums[..head_rows * head_dim].fill(0.0);
        self.scratch.max[..head_rows].fill(f32::NEG_INFINITY);
        self.scratch.total[..head_rows].fill(0.0);
    }

    /// Scores of whole groups of keys; those beyond a row are overwritten by `softmax`.
    #[inline(always)]
    fn scores<V: Lanes>(&mut self, tile_start: usize, tile_len: usize) {
        let head_dim = self.shape.head_dim;
        let head_rows = self.head_rows();
        for offset in (0..tile_len).step_by(KEY_GROUP_LEN) {
            let position = tile_start + offset;
            let group = self.page_start(position) + position % self.shape.page_size;
            let keys = &self.cache.keys[group * head_dim..(group + KEY_GROUP_LEN) * head_dim];
            let queries = &self.scratch.queries[..head_rows * head_dim];
            let scores = &mut self.scratch.weights[..head_rows * TILE_LEN];
            let gemm = Gemm {
                num_rows: head_rows,
                num_vectors: 1,
                k_len: head_dim,
                a: queries.as_ptr(),
                a_row_stride: head_dim,
                b: keys.as_ptr(),
                b_k_stride: KEY_GROUP_LEN,
                b_vector_stride: 0,
                c: scores[offset..].as_mut_ptr(),
                c_row_stride: TILE_LEN,
                accumulate: false,
            };
            // SAFETY: the three slices were cut to the sizes named here; a group lies within one page.
            unsafe { gemm.compute::<V>() };
        }
    }

    /// Turns scores into weights relative to the highest score so far, and rescales what was summed before.
    #[inline(always)]
    fn softmax(&mut self, tile_start: usize) {
        let (head_dim, group_len) = (self.shape.head_dim, self.shape.group_len());
        for head_row in 0..self.head_rows() {
            let num_positions = self.task.positions[head_row / group_len] as usize + 1;
            let valid = num_positions.saturating_sub(tile_start).min(TILE_LEN);
            let hidden = self.first_visible(head_row / group_len).saturating_sub(tile_start).min(valid);
            let Scratch { weights, sums, max, total, .. } = &mut *self.scratch;
            let weights = &mut weights.as_chunks_mut::<TILE_LEN>().0[head_row];
            if valid == hidden {
                weights.fill(0.0);
                continue;
            }
            weights[..hidden].fill(f32::NEG_INFINITY);
            weights[valid..].fill(f32::NEG_INFINITY);
            let new_max = lane_max(weights, max[head_row]);
            let rescale = exp(max[head_row] - new_max);
            for weight in weights.iter_mut() {
                *weight = exp(*weight - new_max);
            }
            weights[..hidden].fill(0.0);
            weights[valid..].fill(0.0);
            total[head_row] = total[head_row].mul_add(rescale, lane_sum(weights));
            max[head_row] = new_max;
            for sum in &mut sums[head_row * head_dim..(head_row + 1) * head_dim] {
                *sum *= rescale;
            }
        }
    }

    /// Adds the values of a tile, page by page.
    #[inline(always)]
    fn weigh_values<V: Lanes>(&mut self, tile_start: usize, tile_len: usize) {
        let head_dim = self.shape.head_dim;
        let head_rows = self.head_rows();
        let mut offset = 0;
        while offset < tile_len {
            let position = tile_start + offset;
            let in_page = position % self.shape.page_size;
            let len = (self.shape.page_size - in_page).min(tile_len - offset);
            let slot = self.page_start(position) + in_page;
            let values = &self.cache.values[slot * head_dim..(slot + len) * head_dim];
            let weights = &self.scratch.weights[..head_rows * TILE_LEN];
            let sums = &mut self.scratch.sums[..head_rows * head_dim];
            let gemm = Gemm {
                num_rows: head_rows,
                num_vectors: head_dim / LANES,
                k_len: len,
                a: weights[offset..].as_ptr(),
                a_row_stride: TILE_LEN,
                b: values.as_ptr(),
                b_k_stride: head_dim,
                b_vector_stride: LANES,
                c: sums.as_mut_ptr(),
                c_row_stride: head_dim,
                accumulate: true,
            };
            // SAFETY: the three slices were cut to the sizes named here; `len` positions lie within one page.
            unsafe { gemm.compute::<V>() };
            offset += len;
        }
    }

    #[inline(always)]
    fn finish(&mut self) {
        let (head_dim, group_len) = (self.shape.head_dim, self.shape.group_len());
        for row in 0..self.task.positions.len() {
            let to =
                (self.task.first_row + row) * self.shape.q_len() + self.task.kv_head * group_len * head_dim;
            let to = self.out.at(to, group_len * head_dim);
            // SAFETY: `at` checked the bounds; these heads of this row belong to this task alone.
            let to = unsafe { std::slice::from_raw_parts_mut(to, group_len * head_dim) };
            let from = &self.scratch.sums[row * group_len * head_dim..][..group_len * head_dim];
            let heads = to.chunks_exact_mut(head_dim).zip(from.chunks_exact(head_dim));
            for ((to, from), total) in heads.zip(&self.scratch.total[row * group_len..]) {
                for (to, from) in to.iter_mut().zip(from) {
                    *to = from / total;
                }
            }
        }
    }
}

/// The highest of a tile and of `start`; a NaN may be passed over, the sums will show it.
#[inline(always)]
fn lane_max(values: &[f32; TILE_LEN], start: f32) -> f32 {
    let mut lanes = [start; LANES];
    for chunk in values.as_chunks::<LANES>().0 {
        for (lane, value) in lanes.iter_mut().zip(chunk) {
            *lane = if *value > *lane { *value } else { *lane };
        }
    }
    let mut max = lanes[0];
    for lane in lanes {
        max = if lane > max { lane } else { max };
    }
    max
}

/// One sum a lane, then the lanes in order.
#[inline(always)]
fn lane_sum(values: &[f32; TILE_LEN]) -> f32 {
    let mut lanes = [0.0; LANES];
    for chunk in values.as_chunks::<LANES>().0 {
        for (lane, value) in lanes.iter_mut().zip(chunk) {
            *lane += value;
        }
    }
    let mut sum = 0.0;
    for lane in lanes {
        sum += lane;
    }
    sum
}
