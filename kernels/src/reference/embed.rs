//! Copies the embedding of each token.

use super::Matrix;

/// `out`: `[num_tokens, hidden_size]`
pub(super) fn embed(table: &Matrix, token_ids: &[u32], out: &mut [f32]) {
    for (&id, out) in token_ids.iter().zip(out.chunks_exact_mut(table.num_inputs)) {
        let start = id as usize * table.num_inputs;
        out.copy_from_slice(&table.values[start..start + table.num_inputs]);
    }
}
