//! `out[m, n] = sum over k of x[m, k] * weight[n, k]`

use super::Matrix;
use crate::team;

/// Partial sums of one dot product: enough for the compiler to use vector instructions.
const NUM_SUMS: usize = 16;

const COLUMNS_PER_TASK: usize = 16;

/// `x`: `[num_tokens, num_inputs]`, `out`: `[num_tokens, num_outputs]`
pub(super) fn linear(x: &[f32], weight: &Matrix, out: &mut [f32]) {
    let num_outputs = weight.values.len() / weight.num_inputs;
    let num_tokens = x.len() / weight.num_inputs;
    assert_eq!(out.len(), num_tokens * num_outputs);
    // Columns of the output are not neighbors in memory: each is computed apart, then written.
    let mut columns = vec![Vec::new(); num_outputs];
    team::for_each_chunk(&mut columns, COLUMNS_PER_TASK, |task, columns| {
        let weights =
            weight.values[task * COLUMNS_PER_TASK * weight.num_inputs..].chunks_exact(weight.num_inputs);
        for (column, weight) in columns.iter_mut().zip(weights) {
            column.extend(x.chunks_exact(weight.len()).map(|x| dot(x, weight)));
        }
    });
    for (n, column) in columns.iter().enumerate() {
        for (m, value) in column.iter().enumerate() {
            out[m * num_outputs + n] = *value;
        }
    }
}

pub(super) fn dot(x: &[f32], y: &[f32]) -> f32 {
    let mut sums = [0.0f32; NUM_SUMS];
    let (x_chunks, x_rest) = x.as_chunks::<NUM_SUMS>();
    let (y_chunks, y_rest) = y.as_chunks::<NUM_SUMS>();
    for (x, y) in x_chunks.iter().zip(y_chunks) {
        for i in 0..NUM_SUMS {
            sums[i] += x[i] * y[i];
        }
    }
    let rest: f32 = x_rest.iter().zip(y_rest).map(|(x, y)| x * y).sum();
    sums.iter().sum::<f32>() + rest
}
