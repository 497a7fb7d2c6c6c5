//! Scales some heads of each row to a mean square of one, then by the weights.

use std::ops::Range;

use super::Isa;
use super::elementwise::par_rows_mut;
use super::isa::{Kernel, Lanes};
use super::rms_norm::square_sum;
use crate::backend::AttentionShape;

/// `qkv`: `[num_tokens, qkv_len]`, `weight`: `[head_dim]`
pub(super) fn head_norm(
    isa: Isa,
    weight: &[f32],
    epsilon: f32,
    shape: &AttentionShape,
    heads: Range<usize>,
    qkv: &mut [f32],
) {
    assert_eq!(weight.len(), shape.head_dim);
    let columns = heads.start * shape.head_dim..heads.end * shape.head_dim;
    par_rows_mut(qkv, shape.qkv_len(), |qkv| {
        for row in qkv.chunks_exact_mut(shape.qkv_len()) {
            isa.run(HeadNorm { weight, epsilon, heads: &mut row[columns.clone()] });
        }
    });
}

struct HeadNorm<'a> {
    weight: &'a [f32],
    epsilon: f32,
    heads: &'a mut [f32],
}

impl Kernel for HeadNorm<'_> {
    #[inline(always)]
    fn run<V: Lanes>(self) {
        for head in self.heads.chunks_exact_mut(self.weight.len()) {
            let scale = 1.0 / (square_sum(head) / head.len() as f32 + self.epsilon).sqrt();
            for (x, weight) in head.iter_mut().zip(self.weight) {
                *x = *x * scale * weight;
            }
        }
    }
}
