//! The numbers of one matrix where the checkpoint keeps them, row by row.
//!
//! Whoever makes a matrix reads each row once, from any thread; that all numbers were finite is found out then.

use std::sync::atomic::{AtomicBool, Ordering};

use crate::gpu::HalfDtype;
use crate::quant::{Dtype, dequantize};

/// What a matrix is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum MatrixRole {
    Embedding,
    /// Queries, keys and values of all heads.
    Qkv,
    AttentionOutput,
    Router,
    GateUp,
    Down,
    Output,
}

/// Rows of one length from one tensor or several.
pub(crate) struct MatrixSource<'a> {
    pub(crate) role: MatrixRole,
    pub(crate) num_inputs: usize,
    rows: Vec<(Dtype, &'a [u8])>,
    is_finite: AtomicBool,
}

impl<'a> MatrixSource<'a> {
    pub(crate) fn new(role: MatrixRole, num_inputs: usize) -> Self {
        Self { role, num_inputs, rows: Vec::new(), is_finite: AtomicBool::new(true) }
    }

    pub(crate) fn push(&mut self, dtype: Dtype, row: &'a [u8]) {
        self.rows.push((dtype, row));
    }

    pub(crate) fn num_outputs(&self) -> usize {
        self.rows.len()
    }

    /// Writes row `index` as f32.
    pub(crate) fn fill(&self, index: usize, out: &mut [f32]) {
        let (dtype, data) = self.rows[index];
        dequantize(dtype, data, out);
        self.saw(out.iter().all(|x| x.is_finite()));
    }

    /// Writes row `index` as 16-bit floats, rounded to the nearest; `wide` has room for a row.
    pub(crate) fn fill_half(&self, half: HalfDtype, index: usize, wide: &mut [f32], out: &mut [u16]) {
        let (dtype, data) = self.rows[index];
        if matches!((dtype, half), (Dtype::Bf16, HalfDtype::Bf16) | (Dtype::F16, HalfDtype::F16)) {
            for (bytes, out) in data.as_chunks::<2>().0.iter().zip(&mut *out) {
                *out = u16::from_le_bytes(*bytes);
            }
        } else {
            dequantize(dtype, data, wide);
            for (x, out) in wide.iter().zip(&mut *out) {
                *out = half.round(*x);
            }
        }
        // Infinity and NaN have all bits of the exponent.
        let exponent = half.exponent();
        self.saw(out.iter().all(|x| x & exponent != exponent));
    }

    /// Of the rows read so far.
    pub(super) fn was_finite(&self) -> bool {
        self.is_finite.load(Ordering::Relaxed)
    }

    fn saw(&self, finite: bool) {
        if !finite {
            self.is_finite.store(false, Ordering::Relaxed);
        }
    }
}
