//! `silu(gate) * up`, the gate of the feed-forward part; `silu(x) = x / (1 + exp(-x))`.

use crate::team;

/// `gate_up`: `[num_tokens, 2, intermediate_size]`, `out`: `[num_tokens, intermediate_size]`
pub(super) fn silu_mul(intermediate_size: usize, gate_up: &[f32], out: &mut [f32]) {
    assert_eq!(gate_up.len(), 2 * out.len());
    team::for_each_chunk(out, intermediate_size, |row, out| {
        let (gate, up) =
            gate_up[2 * row * intermediate_size..][..2 * intermediate_size].split_at(intermediate_size);
        for ((gate, up), out) in gate.iter().zip(up).zip(out) {
            *out = gate / (1.0 + (-gate).exp()) * up;
        }
    });
}
