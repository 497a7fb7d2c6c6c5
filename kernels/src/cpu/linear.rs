//! `out[m, n] = sum over k of x[m, k] * weight[n, k]`
//!
//! Rows are quantized, then multiplied as bytes group by group; a group's exact sum is scaled into an f32 chain over
//! increasing groups, one fused multiply-add each. Tasks are blocks of rows times chunks of panels: a block of rows
//! stays in the L2 cache while its panels go by, and with few rows the op is bound by reading the weights once.

use rayon::prelude::*;

use super::dots::{Dots, QUAD_BYTES};
use super::elementwise::rows_per_task;
use super::isa::{Kernel, Lanes};
use super::quantize::{QuantizedRow, RowLayout, quantize_row};
use super::scratch::{PerThread, QuantizedRows, grow};
use super::shared::SharedMut;
use super::tiles::Tiles;
use super::{Isa, LANES, Matrix, OFFSET};

/// Rows of one task.
const MAX_TASK_ROWS: usize = 128;

/// Rows and panels whose sums are kept at once: a corner of the L1 cache.
const BLOCK_ROWS: usize = 32;
const BLOCK_PANELS: usize = 4;
const BLOCK_COLUMNS: usize = BLOCK_PANELS * LANES;

/// Tasks for each thread, so that a slow one is made up for.
const TASKS_PER_THREAD: usize = 4;

/// Below this many products one thread is faster than waking another.
const MIN_PRODUCTS_PER_TASK: usize = 1 << 16;

/// Sums of a block, `[BLOCK_ROWS, BLOCK_COLUMNS]`
pub(crate) struct BlockSums {
    ints: Box<[i32; BLOCK_ROWS * BLOCK_COLUMNS]>,
    floats: Box<[f32; BLOCK_ROWS * BLOCK_COLUMNS]>,
}

impl Default for BlockSums {
    fn default() -> Self {
        Self {
            ints: Box::new([0; BLOCK_ROWS * BLOCK_COLUMNS]),
            floats: Box::new([0.0; BLOCK_ROWS * BLOCK_COLUMNS]),
        }
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
    let tasks_wanted =
        (products / MIN_PRODUCTS_PER_TASK).clamp(1, rayon::current_num_threads() * TASKS_PER_THREAD);
    let chunks_wanted = tasks_wanted.div_ceil(num_blocks.max(1));
    let chunk_panels = weight.num_panels().div_ceil(chunks_wanted).next_multiple_of(BLOCK_PANELS);
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
    match num_blocks * num_chunks {
        1 => compute(0),
        num_tasks => (0..num_tasks).into_par_iter().with_max_len(1).for_each(compute),
    }
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
    let quantize = |((x, bytes), (scales, sums)): ((&[f32], &mut [i8]), (&mut [f32], &mut [i32]))| {
        let buffer = &mut *buffers.get();
        isa.run(QuantizeRows { layout, x, buffer, bytes, scales, sums });
    };
    let bytes = &mut bytes[..num_rows * padded_len];
    let scales = &mut scales[..num_rows * num_groups];
    let sums = &mut sums[..num_rows * num_groups];
    if per_task >= num_rows {
        return quantize(((x, bytes), (scales, sums)));
    }
    let numbers = x.par_chunks(per_task * layout.len).zip(bytes.par_chunks_mut(per_task * padded_len));
    let groups = scales.par_chunks_mut(per_task * num_groups).zip(sums.par_chunks_mut(per_task * num_groups));
    numbers.zip(groups).for_each(quantize);
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
    panels: std::ops::Range<usize>,
    sums: &'a mut BlockSums,
    out: SharedMut<'a, f32>,
}

impl Kernel for Task<'_> {
    #[inline(always)]
    fn run<V: Lanes>(mut self) {
        let tiles = self.isa.has_tiles().then(Tiles::new);
        for panel in self.panels.clone().step_by(BLOCK_PANELS) {
            let num_panels = BLOCK_PANELS.min(self.panels.end - panel);
            for row in (self.first_row..self.first_row + self.num_rows).step_by(BLOCK_ROWS) {
                let num_rows = BLOCK_ROWS.min(self.first_row + self.num_rows - row);
                self.block::<V>(tiles.as_ref(), row, num_rows, panel, num_panels);
            }
        }
    }
}

impl Task<'_> {
    #[inline(always)]
    fn block<V: Lanes>(
        &mut self,
        tiles: Option<&Tiles>,
        row: usize,
        num_rows: usize,
        panel: usize,
        num_panels: usize,
    ) {
        let layout = &self.weight.layout;
        let padded_len = layout.padded_len();
        let bytes = &self.rows.bytes[row * padded_len..(row + num_rows.next_multiple_of(16)) * padded_len];
        let panel_stride = self.weight.panel_stride();
        let panels = &self.weight.panels()[panel * panel_stride..(panel + num_panels) * panel_stride];
        for group in 0..layout.num_groups() {
            let (_, padded) = layout.group(group);
            let dots = Dots {
                num_rows,
                num_vectors: num_panels,
                num_quads: padded.len() / 4,
                a: bytes[padded.start..].as_ptr().cast(),
                a_row_stride: padded_len,
                b: panels[padded.start * LANES..].as_ptr(),
                b_vector_stride: panel_stride,
                b_quad_stride: QUAD_BYTES,
                sums: self.sums.ints.as_mut_ptr(),
                sums_row_stride: BLOCK_COLUMNS,
            };
            // SAFETY: the slices were cut to rows up to a multiple of 16 and to the panels; a group lies within a
            // row; the sums have room for a whole block, and 16 divides its rows.
            unsafe { dots.compute::<V, true>(tiles) };
            self.scale::<V>(row, num_rows, panel, num_panels, group);
        }
        self.store::<V>(row, num_rows, panel, num_panels);
    }

    /// Adds the exact sums of a group, scaled.
    #[inline(always)]
    fn scale<V: Lanes>(
        &mut self,
        row: usize,
        num_rows: usize,
        panel: usize,
        num_panels: usize,
        group: usize,
    ) {
        let num_groups = self.weight.layout.num_groups();
        let scales =
            &self.weight.scales()[panel * num_groups * LANES..(panel + num_panels) * num_groups * LANES];
        let BlockSums { ints, floats } = &mut *self.sums;
        let rows = ints.chunks_exact(BLOCK_COLUMNS).zip(floats.chunks_exact_mut(BLOCK_COLUMNS));
        for (i, (ints, floats)) in rows.take(num_rows).enumerate() {
            let at = (row + i) * num_groups + group;
            let (row_scale, row_sum) = (self.rows.scales[at], self.rows.sums[at]);
            for n in 0..num_panels {
                // SAFETY: vector `n` lies within the rows of the sums, and scales were cut to the panels.
                unsafe {
                    let ints = V::load_ints(ints[n * LANES..][..LANES].as_ptr());
                    let ints = V::add_ints(ints, V::splat_ints(-OFFSET * row_sum));
                    let weight_scales = V::load(scales[(n * num_groups + group) * LANES..][..LANES].as_ptr());
                    let scale = V::splat(row_scale).mul(weight_scales);
                    let floats = floats[n * LANES..][..LANES].as_mut_ptr();
                    let before = if group == 0 { V::splat(0.0) } else { V::load(floats) };
                    before.fma(V::from_ints(ints), scale).store(floats);
                }
            }
        }
    }

    /// Copies a finished block; the last panel may reach beyond the outputs.
    #[inline(always)]
    fn store<V: Lanes>(&mut self, row: usize, num_rows: usize, panel: usize, num_panels: usize) {
        let num_outputs = self.weight.num_outputs;
        let num_columns = (num_panels * LANES).min(num_outputs - panel * LANES);
        for (i, floats) in self.sums.floats.chunks_exact(BLOCK_COLUMNS).take(num_rows).enumerate() {
            let to = self.out.at((row + i) * num_outputs + panel * LANES, num_columns);
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
