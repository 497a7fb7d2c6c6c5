//! `x += y`, the residual connection.

use super::Isa;
use super::elementwise::par_rows;
use super::isa::{Kernel, Lanes};

pub(super) fn add(isa: Isa, x: &mut [f32], y: &[f32]) {
    par_rows(y, 1, x, 1, |y, x| isa.run(Add { x, y }));
}

struct Add<'a> {
    x: &'a mut [f32],
    y: &'a [f32],
}

impl Kernel for Add<'_> {
    #[inline(always)]
    fn run<V: Lanes>(self) {
        for (x, y) in self.x.iter_mut().zip(self.y) {
            *x += y;
        }
    }
}
