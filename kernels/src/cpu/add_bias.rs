//! Adds a bias to each row.

use super::Isa;
use super::elementwise::par_rows_mut;
use super::isa::{Kernel, Lanes};

/// `x`: `[num_tokens, bias.len()]`
pub(super) fn add_bias(isa: Isa, bias: &[f32], x: &mut [f32]) {
    par_rows_mut(x, bias.len(), |x| isa.run(AddBias { bias, x }));
}

struct AddBias<'a> {
    bias: &'a [f32],
    x: &'a mut [f32],
}

impl Kernel for AddBias<'_> {
    #[inline(always)]
    fn run<V: Lanes>(self) {
        for row in self.x.chunks_exact_mut(self.bias.len()) {
            for (x, bias) in row.iter_mut().zip(self.bias) {
                *x += bias;
            }
        }
    }
}
