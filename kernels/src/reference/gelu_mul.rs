//! `gelu(gate) * up`, the gate of the feed-forward part, with gelu in its tanh form:
//! `gelu(x) = x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x^3)))`.

use std::f32::consts::{FRAC_2_SQRT_PI, SQRT_2};

/// `gate_up`: `[num_tokens, 2, intermediate_size]`, `out`: `[num_tokens, intermediate_size]`
pub(super) fn gelu_mul(intermediate_size: usize, gate_up: &[f32], out: &mut [f32]) {
    assert_eq!(gate_up.len(), 2 * out.len());
    let rows = gate_up.chunks_exact(2 * intermediate_size).zip(out.chunks_exact_mut(intermediate_size));
    for (gate_up, out) in rows {
        let (gate, up) = gate_up.split_at(intermediate_size);
        for ((gate, up), out) in gate.iter().zip(up).zip(out) {
            let inner = FRAC_2_SQRT_PI / SQRT_2 * (gate + 0.044_715 * gate * gate * gate);
            *out = 0.5 * gate * (1.0 + inner.tanh()) * up;
        }
    }
}
