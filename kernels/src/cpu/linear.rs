//! `out[m, n] = sum over k of x[m, k] * weight[n, k]`
//!
//! Tasks are blocks of rows times chunks of panels. A block of rows is small enough to stay in the L2 cache while
//! all its panels go by; a panel is converted from f16 as it is loaded, which costs little next to the twelve rows
//! it is used for. With few rows the op is bound by reading the weights once.

use rayon::prelude::*;

use super::gemm::{Gemm, GemmKernel};
use super::shared::SharedMut;
use super::{Isa, LANES, Matrix};

/// Rows of one task: 96 rows of 1536 inputs are 576 KiB.
const MAX_BLOCK_ROWS: usize = 96;

/// Tasks for each thread, so that a slow one is made up for.
const TASKS_PER_THREAD: usize = 4;

/// Panels of one task are a multiple of this, the widest tile.
const PANEL_MULTIPLE: usize = 4;

/// `x`: `[num_tokens, num_inputs]`, `out`: `[num_tokens, num_outputs]`
pub(super) fn linear(isa: Isa, x: &[f32], weight: &Matrix, out: &mut [f32]) {
    let num_tokens = x.len() / weight.num_inputs;
    assert_eq!(x.len(), num_tokens * weight.num_inputs);
    assert_eq!(out.len(), num_tokens * weight.num_outputs);
    let num_blocks = num_tokens.div_ceil(MAX_BLOCK_ROWS);
    let tasks_wanted = rayon::current_num_threads() * TASKS_PER_THREAD;
    let chunks_wanted = tasks_wanted.div_ceil(num_blocks.max(1));
    let chunk_panels = weight.num_panels().div_ceil(chunks_wanted).next_multiple_of(PANEL_MULTIPLE);
    let num_chunks = weight.num_panels().div_ceil(chunk_panels);
    let out = SharedMut::new(out);
    (0..num_blocks * num_chunks).into_par_iter().for_each(|task| {
        let (block, chunk) = (task / num_chunks, task % num_chunks);
        let row = block * MAX_BLOCK_ROWS;
        let num_rows = MAX_BLOCK_ROWS.min(num_tokens - row);
        let panel = chunk * chunk_panels;
        let num_panels = chunk_panels.min(weight.num_panels() - panel);
        compute(
            isa,
            &x[row * weight.num_inputs..(row + num_rows) * weight.num_inputs],
            weight,
            panel..panel + num_panels,
            row,
            out,
        );
    });
}

/// Rows `first_row..` of `out`, for the outputs of some panels.
fn compute(
    isa: Isa,
    x: &[f32],
    weight: &Matrix,
    panels: std::ops::Range<usize>,
    first_row: usize,
    out: SharedMut<'_>,
) {
    let num_rows = x.len() / weight.num_inputs;
    // The last panel may reach beyond the outputs: it goes through a buffer.
    let full_panels =
        panels.end.min(weight.num_outputs / LANES) - panels.start.min(weight.num_outputs / LANES);
    let gemm = |panel: usize, num_vectors: usize, c: *mut f32, c_row_stride: usize| {
        let packed = &weight.panels[panel * weight.panel_len()..(panel + num_vectors) * weight.panel_len()];
        let gemm = Gemm {
            num_rows,
            num_vectors,
            k_len: weight.num_inputs,
            a: x.as_ptr(),
            a_row_stride: weight.num_inputs,
            b: packed.as_ptr(),
            b_k_stride: LANES,
            b_vector_stride: weight.panel_len(),
            c,
            c_row_stride,
            accumulate: false,
        };
        // SAFETY: `x` has `num_rows` rows of `num_inputs`, `packed` was sliced to its panels, and both callers
        // below pass a `c` of `num_rows` rows with `num_vectors` whole vectors that belongs to this task alone.
        isa.run(unsafe { GemmKernel::new(gemm) });
    };
    if full_panels > 0 && num_rows > 0 {
        let start = first_row * weight.num_outputs + panels.start * LANES;
        let len = (num_rows - 1) * weight.num_outputs + full_panels * LANES;
        gemm(panels.start, full_panels, out.at(start, len), weight.num_outputs);
    }
    if panels.start + full_panels < panels.end {
        let panel = panels.end - 1;
        let num_columns = weight.num_outputs - panel * LANES;
        let mut buffer = vec![0.0; num_rows * LANES];
        gemm(panel, 1, buffer.as_mut_ptr(), LANES);
        for (row, values) in buffer.chunks_exact(LANES).enumerate() {
            let to = out.at((first_row + row) * weight.num_outputs + panel * LANES, num_columns);
            // SAFETY: `at` checked the bounds, and these outputs of these rows belong to this task alone.
            unsafe { to.copy_from_nonoverlapping(values.as_ptr(), num_columns) };
        }
    }
}
