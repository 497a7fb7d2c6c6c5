//! Copies the embedding of each token, out of the panels which the output head may share.

use super::{LANES, Matrix};

/// `out`: `[num_tokens, hidden_size]`
pub(super) fn embed(table: &Matrix, token_ids: &[u32], out: &mut [f32]) {
    for (&id, out) in token_ids.iter().zip(out.chunks_exact_mut(table.num_inputs)) {
        let (panel, lane) = (id as usize / LANES, id as usize % LANES);
        let panel = &table.panels[panel * table.panel_len()..(panel + 1) * table.panel_len()];
        for (value, packed) in out.iter_mut().zip(panel.chunks_exact(LANES)) {
            *value = half::f16::from_bits(packed[lane]).to_f32();
        }
    }
}
