//! `silu(gate) * up`, the gate of the feed-forward part; `silu(x) = x / (1 + exp(-x))`.

use super::Isa;
use super::elementwise::{exp, par_rows};
use super::isa::{Kernel, Lanes};

/// `gate_up`: `[num_tokens, 2, intermediate_size]`, `out`: `[num_tokens, intermediate_size]`
pub(super) fn silu_mul(isa: Isa, intermediate_size: usize, gate_up: &[f32], out: &mut [f32]) {
    par_rows(gate_up, 2 * intermediate_size, out, intermediate_size, |gate_up, out| {
        isa.run(SiluMul { intermediate_size, gate_up, out });
    });
}

struct SiluMul<'a> {
    intermediate_size: usize,
    gate_up: &'a [f32],
    out: &'a mut [f32],
}

impl Kernel for SiluMul<'_> {
    #[inline(always)]
    fn run<V: Lanes>(self) {
        let len = self.intermediate_size;
        for (gate_up, out) in self.gate_up.chunks_exact(2 * len).zip(self.out.chunks_exact_mut(len)) {
            let (gate, up) = gate_up.split_at(len);
            for ((gate, up), out) in gate.iter().zip(up).zip(out) {
                *out = gate / (1.0 + exp(-gate)) * up;
            }
        }
    }
}
