//! `gelu(gate) * up`, the gate of the feed-forward part, with gelu in its tanh form.
//!
//! `(1 + tanh(y)) / 2 = 1 / (1 + exp(-2 y))`, so one exponential is enough and small results keep their digits.

use super::Isa;
use super::elementwise::{exp, par_rows};
use super::isa::{Kernel, Lanes};

/// `2 * sqrt(2 / pi)`
const TWICE_SQRT_2_OVER_PI: f32 = 1.595_769;

/// `gate_up`: `[num_tokens, 2, intermediate_size]`, `out`: `[num_tokens, intermediate_size]`
pub(super) fn gelu_mul(isa: Isa, intermediate_size: usize, gate_up: &[f32], out: &mut [f32]) {
    par_rows(gate_up, 2 * intermediate_size, out, intermediate_size, |gate_up, out| {
        isa.run(GeluMul { intermediate_size, gate_up, out });
    });
}

struct GeluMul<'a> {
    intermediate_size: usize,
    gate_up: &'a [f32],
    out: &'a mut [f32],
}

impl Kernel for GeluMul<'_> {
    #[inline(always)]
    fn run<V: Lanes>(self) {
        let len = self.intermediate_size;
        for (gate_up, out) in self.gate_up.chunks_exact(2 * len).zip(self.out.chunks_exact_mut(len)) {
            let (gate, up) = gate_up.split_at(len);
            for ((gate, up), out) in gate.iter().zip(up).zip(out) {
                let inner = TWICE_SQRT_2_OVER_PI * (gate + 0.044_715 * gate * gate * gate);
                *out = gate / (1.0 + exp(-inner)) * up;
            }
        }
    }
}
