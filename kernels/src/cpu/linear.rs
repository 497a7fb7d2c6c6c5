//! `out[m, n] = sum over k of x[m, k] * weight[n, k]`
//!
//! Rows are quantized, then multiplied as bytes group by group; a group's exact sum is scaled into an f32 chain over
//! increasing groups, one fused multiply-add each. Tasks are blocks of rows times chunks of panels: a block of rows
//! stays in the L2 cache while its panels go by, and with few rows the op is bound by reading the weights once.

use std::ops::Range;

use super::dots::{Dots, QUAD_BYTES};
use super::elementwise::rows_per_task;
use super::isa::{Kernel, Lanes};
use super::quantize::{QuantizedRow, RowLayout, quantize_row};
use super::scratch::{PerThread, QuantizedRows, grow};
use super::tiles::Tiles;
use super::{Isa, LANES, Matrix, OFFSET};
use crate::shared::SharedMut;
use crate::team;

/// Rows of one task.
const MAX_TASK_ROWS: usize = 128;

/// Rows whose sums are kept at once: a corner of the L1 cache.
const BLOCK_ROWS: usize = 32;
/// Sums of a row that are kept at once, in vectors.
const BLOCK_PANELS: usize = 2;
/// So few rows are bound by reading weights: more vectors are then under way at once.
const FEW_ROWS: usize = 4;
const FEW_ROWS_PANELS: usize = 4;
/// Groups whose exact sums are kept until they are scaled in one go.
const BLOCK_GROUPS: usize = 4;
const BLOCK_LEN: usize = BLOCK_ROWS * BLOCK_PANELS * LANES;

/// Tasks for each thread, so that a slow one is made up for.
const TASKS_PER_THREAD: usize = 4;

/// Below this many products one thread is faster than waking another.
const MIN_PRODUCTS_PER_TASK: usize = 1 << 16;

/// Sums of a block.
pub(crate) struct BlockSums {
    /// `[BLOCK_GROUPS, rows, columns]`
    ints: Box<[i32; BLOCK_GROUPS * BLOCK_LEN]>,
    /// `[rows, columns]`
    floats: Box<[f32; BLOCK_LEN]>,
}

impl Default for BlockSums {
    fn default() -> Self {
        Self { ints: Box::new([0; BLOCK_GROUPS * BLOCK_LEN]), floats: Box::new([0.0; BLOCK_LEN]) }
    }
}

/// Working memory of the op.
#[derive(Default)]
pub(crate) struct LinearScratch {
    rows: QuantizedRows,
    buffers: PerThread<Vec<f32>>,
    sums: PerThread<BlockSums>,
}

/// `x`: `[num_tokens, num_inputs]`, `out`: `[num_tokens, num_outputs]`.
pub(super) fn linear(isa: Isa, scratch: &mut LinearScratch, x: &[f32], weight: &Matrix, out: &mut [f32]) {
    let num_tokens = x.len() / weight.layout.len;
    assert_eq!(x.len(), num_tokens * weight.layout.len);
    assert_eq!(out.len(), num_tokens * weight.num_outputs);
    scratch.sums.prepare();
    scratch.buffers.prepare();
    quantize_rows(isa, &mut scratch.rows, &scratch.buffers, x, &weight.layout);
    let rows = &scratch.rows;
    let num_blocks = num_tokens.div_ceil(MAX_TASK_ROWS);
    let products = num_tokens * weight.layout.len * weight.num_outputs;
    let tasks_wanted = (products / MIN_PRODUCTS_PER_TASK).clamp(1, team::num_threads() * TASKS_PER_THREAD);
    let chunks_wanted = tasks_wanted.div_ceil(num_blocks.max(1));
    let chunk_panels = weight.num_panels().div_ceil(chunks_wanted).next_multiple_of(FEW_ROWS_PANELS);
    let num_chunks = weight.num_panels().div_ceil(chunk_panels);
    let shared = SharedMut::new(out);
    let compute = |task: usize| {
        let (block, chunk) = (task / num_chunks, task % num_chunks);
        let first_row = block * MAX_TASK_ROWS;
        let first_panel = chunk * chunk_panels;
        isa.run(Task {
            isa,
            rows,
            weight,
            first_row,
            num_rows: MAX_TASK_ROWS.min(num_tokens - first_row),
            panels: first_panel..(first_panel + chunk_panels).min(weight.num_panels()),
            sums: &mut scratch.sums.get(),
            out: shared,
        });
    };
    team::for_each(num_blocks * num_chunks, compute);
}

fn quantize_rows(
    isa: Isa,
    rows: &mut QuantizedRows,
    buffers: &PerThread<Vec<f32>>,
    x: &[f32],
    layout: &RowLayout,
) {
    let num_rows = x.len() / layout.len;
    rows.resize(layout, num_rows);
    let (padded_len, num_groups) = (layout.padded_len(), layout.num_groups());
    let per_task = rows_per_task(layout.len, num_rows);
    let QuantizedRows { bytes, scales, sums } = rows;
    let (bytes, scales, sums) = (SharedMut::new(bytes), SharedMut::new(scales), SharedMut::new(sums));
    team::for_each(num_rows.div_ceil(per_task), |task| {
        let first = task * per_task;
        let rows = first..num_rows.min(first + per_task);
        // SAFETY: a task writes what belongs to its rows alone.
        let (bytes, scales, sums) = unsafe {
            (
                bytes.part(first * padded_len, rows.len() * padded_len),
                scales.part(first * num_groups, rows.len() * num_groups),
                sums.part(first * num_groups, rows.len() * num_groups),
            )
        };
        let x = &x[rows.start * layout.len..rows.end * layout.len];
        isa.run(QuantizeRows { layout, x, buffer: &mut buffers.get(), bytes, scales, sums });
    });
}

struct QuantizeRows<'a> {
    layout: &'a RowLayout,
    x: &'a [f32],
    /// Holds the rotated row.
    buffer: &'a mut Vec<f32>,
    bytes: &'a mut [i8],
    scales: &'a mut [f32],
    sums: &'a mut [i32],
}

impl Kernel for QuantizeRows<'_> {
    #[inline(always)]
    fn run<V: Lanes>(self) {
        let Self { layout, x, buffer, bytes, scales, sums } = self;
        grow(buffer, layout.len);
        let row = &mut buffer[..layout.len];
        let (padded_len, num_groups) = (layout.padded_len(), layout.num_groups());
        let groups = scales.chunks_exact_mut(num_groups).zip(sums.chunks_exact_mut(num_groups));
        let rows = x.chunks_exact(layout.len).zip(bytes.chunks_exact_mut(padded_len)).zip(groups);
        for ((x, bytes), (scales, sums)) in rows {
            row.copy_from_slice(x);
            quantize_row::<V>(layout, row, QuantizedRow { bytes, scales, sums });
        }
    }
}

/// Some rows times some panels.
struct Task<'a> {
    isa: Isa,
    rows: &'a QuantizedRows,
    weight: &'a Matrix,
    first_row: usize,
    num_rows: usize,
    panels: Range<usize>,
    sums: &'a mut BlockSums,
    out: SharedMut<'a, f32>,
}

impl Kernel for Task<'_> {
    #[inline(always)]
    fn run<V: Lanes>(mut self) {
        let tiles = self.isa.has_tiles().then(Tiles::new);
        let block_panels = if self.num_rows <= FEW_ROWS { FEW_ROWS_PANELS } else { BLOCK_PANELS };
        for panel in self.panels.clone().step_by(block_panels) {
            let panels = panel..self.panels.end.min(panel + block_panels);
            for row in (self.first_row..self.first_row + self.num_rows).step_by(BLOCK_ROWS) {
                let num_rows = BLOCK_ROWS.min(self.first_row + self.num_rows - row);
                self.block::<V>(tiles.as_ref(), row, num_rows, panels.clone());
            }
        }
    }
}

impl Task<'_> {
    #[inline(always)]
    fn block<V: Lanes>(&mut self, tiles: Option<&Tiles>, row: usize, num_rows: usize, panels: Range<usize>) {
        let num_groups = self.weight.layout.num_groups();
        for first_group in (0..num_groups).step_by(BLOCK_GROUPS) {
            let groups = first_group..num_groups.min(first_group + BLOCK_GROUPS);
            for group in groups.clone() {
                self.dots::<V>(tiles, row, num_rows, panels.clone(), group, group - first_group);
            }
            // Scaled group by group in one chain; how many at once changes no bit.
            for (n, panel) in panels.clone().enumerate() {
                match groups.len() {
                    1 => self.scale::<V, 1>(row, num_rows, n, panel, panels.len(), first_group),
                    2 => self.scale::<V, 2>(row, num_rows, n, panel, panels.len(), first_group),
                    3 => self.scale::<V, 3>(row, num_rows, n, panel, panels.len(), first_group),
                    _ => self.scale::<V, BLOCK_GROUPS>(row, num_rows, n, panel, panels.len(), first_group),
                }
            }
        }
        self.store::<V>(row, num_rows, panels);
    }

    /// The exact sums of a group.
    #[inline(always)]
    fn dots<V: Lanes>(
        &mut self,
        tiles: Option<&Tiles>,
        row: usize,
        num_rows: usize,
        panels: Range<usize>,
        group: usize,
        at: usize,
    ) {
        let layout = &self.weight.layout;
        let padded_len = layout.padded_len();
        let bytes = &self.rows.bytes[row * padded_len..(row + num_rows.next_multiple_of(16)) * padded_len];
        let stride = self.weight.panel_stride();
        let packed = &self.weight.panels()[panels.start * stride..panels.end * stride];
        let (_, padded) = layout.group(group);
        let dots = Dots {
            num_rows,
            num_vectors: panels.len(),
            num_quads: padded.len() / 4,
            a: bytes[padded.start..].as_ptr().cast(),
            a_row_stride: padded_len,
            b: packed[padded.start * LANES..].as_ptr(),
            b_vector_stride: stride,
            b_quad_stride: QUAD_BYTES,
            sums: self.sums.ints[at * BLOCK_LEN..(at + 1) * BLOCK_LEN].as_mut_ptr(),
            sums_row_stride: panels.len() * LANES,
        };
        // SAFETY: the slices were cut to rows up to a multiple of 16 and to the panels; a group lies within a
        // row. The sums have room for all rows of a block and its panels, or for few rows and twice the panels.
        unsafe { dots.compute::<V, true>(tiles) };
    }

    /// Scales the exact sums of `GROUPS` groups into the chain of each number of vector `n`, one of `num_vectors`.
    #[inline(always)]
    fn scale<V: Lanes, const GROUPS: usize>(
        &mut self,
        row: usize,
        num_rows: usize,
        n: usize,
        panel: usize,
        num_vectors: usize,
        first_group: usize,
    ) {
        let num_groups = self.weight.layout.num_groups();
        let weight_scales =
            &self.weight.scales()[(panel * num_groups + first_group) * LANES..][..GROUPS * LANES];
        let range = row * num_groups + first_group..(row + num_rows - 1) * num_groups + first_group + GROUPS;
        let (row_scales, row_sums) = (&self.rows.scales[range.clone()], &self.rows.sums[range]);
        let row_len = num_vectors * LANES;
        assert!(num_rows * row_len <= BLOCK_LEN);
        let BlockSums { ints, floats } = &mut *self.sums;
        // SAFETY: rows and groups lie within the slices cut above, vector `n` within a row of the sums, and
        // all rows within a block, as was asserted.
        unsafe {
            let mut scales = [V::splat(0.0); GROUPS];
            for (group, scales) in scales.iter_mut().enumerate() {
                *scales = V::load(weight_scales[group * LANES..].as_ptr());
            }
            for i in 0..num_rows {
                let at = i * row_len + n * LANES;
                let floats = floats.as_mut_ptr().add(at);
                let mut sum = if first_group == 0 { V::splat(0.0) } else { V::load(floats) };
                for (group, weight_scales) in scales.iter().enumerate() {
                    let row_group = i * num_groups + group;
                    let offset = V::splat_ints(-OFFSET * row_sums.get_unchecked(row_group));
                    let ints = V::add_ints(V::load_ints(ints.as_ptr().add(group * BLOCK_LEN + at)), offset);
                    let scale = weight_scales.mul(V::splat(*row_scales.get_unchecked(row_group)));
                    sum = sum.fma(V::from_ints(ints), scale);
                }
                sum.store(floats);
            }
        }
    }

    /// Copies a finished block; the last panel may reach beyond the outputs.
    #[inline(always)]
    fn store<V: Lanes>(&mut self, row: usize, num_rows: usize, panels: Range<usize>) {
        let num_outputs = self.weight.num_outputs;
        let row_len = panels.len() * LANES;
        let num_columns = row_len.min(num_outputs - panels.start * LANES);
        for (i, floats) in self.sums.floats.chunks_exact(row_len).take(num_rows).enumerate() {
            let to = self.out.at((row + i) * num_outputs + panels.start * LANES, num_columns);
            let (vectors, rest) = floats[..num_columns].as_chunks::<LANES>();
            // SAFETY: `at` checked the bounds, and these outputs of these rows belong to this task alone.
            unsafe {
                for (n, vector) in vectors.iter().enumerate() {
                    V::load(vector.as_ptr()).store(to.add(n * LANES));
                }
                to.add(vectors.len() * LANES).copy_from_nonoverlapping(rest.as_ptr(), rest.len());
            }
        }
    }
}
