//! Rotates queries and keys by their position; the two halves of a head are the two coordinates.

use super::Isa;
use super::elementwise::rows_per_task;
use super::isa::{Kernel, Lanes};
use crate::backend::{AttentionShape, RopeTable};
use crate::team;

/// `qkv`: `[num_tokens, qkv_len]`; the values are left as they are.
pub(super) fn rope(isa: Isa, table: &RopeTable, shape: &AttentionShape, positions: &[u32], qkv: &mut [f32]) {
    assert_eq!(qkv.len(), positions.len() * shape.qkv_len());
    let rows = rows_per_task(shape.qkv_len(), positions.len());
    if rows >= positions.len() {
        return isa.run(Rope { table, shape, positions, qkv });
    }
    team::for_each_chunk(qkv, rows * shape.qkv_len(), |index, qkv| {
        let positions = &positions[index * rows..][..qkv.len() / shape.qkv_len()];
        isa.run(Rope { table, shape, positions, qkv });
    });
}

struct Rope<'a> {
    table: &'a RopeTable,
    shape: &'a AttentionShape,
    positions: &'a [u32],
    qkv: &'a mut [f32],
}

impl Kernel for Rope<'_> {
    #[inline(always)]
    fn run<V: Lanes>(self) {
        let rotated_len = self.shape.q_len() + self.shape.kv_len();
        let half_dim = self.shape.head_dim / 2;
        for (&position, row) in self.positions.iter().zip(self.qkv.chunks_exact_mut(self.shape.qkv_len())) {
            let (cos, sin) = self.table.row(position);
            for head in row[..rotated_len].chunks_exact_mut(self.shape.head_dim) {
                let (first, second) = head.split_at_mut(half_dim);
                for ((a, b), (cos, sin)) in first.iter_mut().zip(second).zip(cos.iter().zip(sin)) {
                    (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
                }
            }
        }
    }
}
