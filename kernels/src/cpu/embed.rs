//! Copies the embedding of each token, out of the panels which the output head may share.

use super::elementwise::rows_per_task;
use super::{Isa, Matrix};
use crate::team;

/// `out`: `[num_tokens, hidden_size]`
pub(super) fn embed(isa: Isa, table: &Matrix, token_ids: &[u32], out: &mut [f32]) {
    let hidden_size = table.layout.len;
    assert_eq!(out.len(), token_ids.len() * hidden_size);
    let num_rows = rows_per_task(hidden_size, token_ids.len());
    team::for_each_chunk(out, num_rows * hidden_size, |index, out| {
        for (&id, out) in token_ids[index * num_rows..].iter().zip(out.chunks_exact_mut(hidden_size)) {
            table.row(isa, id as usize, out);
        }
    });
}
