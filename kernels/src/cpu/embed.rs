//! Copies the embedding of each token, out of the panels which the output head may share.

use rayon::prelude::*;

use super::elementwise::rows_per_task;
use super::{Isa, Matrix};

/// `out`: `[num_tokens, hidden_size]`
pub(super) fn embed(isa: Isa, table: &Matrix, token_ids: &[u32], out: &mut [f32]) {
    let hidden_size = table.layout.len;
    assert_eq!(out.len(), token_ids.len() * hidden_size);
    let copy = |(&id, out): (&u32, &mut [f32])| table.row(isa, id as usize, out);
    let min_len = rows_per_task(hidden_size, token_ids.len());
    token_ids.par_iter().zip(out.par_chunks_exact_mut(hidden_size)).with_min_len(min_len).for_each(copy);
}
