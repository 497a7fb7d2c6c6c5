//! Scales each row to a mean square of one, then by the weights.

use super::elementwise::par_rows;
use super::isa::{Kernel, Lanes};
use super::{Isa, LANES};

/// `x`, `out`: `[num_tokens, weight.len()]`
pub(super) fn rms_norm(isa: Isa, x: &[f32], weight: &[f32], epsilon: f32, out: &mut [f32]) {
    par_rows(x, weight.len(), out, weight.len(), |x, out| isa.run(RmsNorm { x, weight, epsilon, out }));
}

struct RmsNorm<'a> {
    x: &'a [f32],
    weight: &'a [f32],
    epsilon: f32,
    out: &'a mut [f32],
}

impl Kernel for RmsNorm<'_> {
    #[inline(always)]
    fn run<V: Lanes>(self) {
        let len = self.weight.len();
        for (x, out) in self.x.chunks_exact(len).zip(self.out.chunks_exact_mut(len)) {
            let scale = 1.0 / (square_sum(x) / len as f32 + self.epsilon).sqrt();
            for ((x, weight), out) in x.iter().zip(self.weight).zip(out) {
                *out = x * scale * weight;
            }
        }
    }
}

/// One sum a lane, then the lanes in order.
#[inline(always)]
pub(super) fn square_sum(x: &[f32]) -> f32 {
    let mut sums = [0.0f32; LANES];
    let (chunks, rest) = x.as_chunks::<LANES>();
    for chunk in chunks {
        for (sum, x) in sums.iter_mut().zip(chunk) {
            *sum = x.mul_add(*x, *sum);
        }
    }
    for (sum, x) in sums.iter_mut().zip(rest) {
        *sum = x.mul_add(*x, *sum);
    }
    let mut total = 0.0;
    for sum in sums {
        total += sum;
    }
    total
}
