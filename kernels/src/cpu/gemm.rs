//! The one matrix kernel: f32 rows times f16 vectors. Linear layers, scores and weighted values are all made of it.
//!
//! Invariant: `c[m, n]` is one chain of fused multiply-adds over `k = 0, 1, …`, starting at zero or, when
//! accumulating, at what is there. The tile it is computed in decides the speed, never the bits.

use super::LANES;
use super::isa::{Kernel, Lanes};

/// How far ahead vectors are asked for: the hardware does not look beyond a page of 4 KiB.
const PREFETCH_DISTANCE: usize = 32 * LANES;

/// `c[m, n] (+)= sum over k of a[m, k] * b[k, n]`, with `b` f16 and `n` in whole vectors.
#[derive(Clone, Copy)]
pub(super) struct Gemm {
    pub(super) num_rows: usize,
    /// Vectors of [`LANES`] columns.
    pub(super) num_vectors: usize,
    pub(super) k_len: usize,
    pub(super) a: *const f32,
    pub(super) a_row_stride: usize,
    pub(super) b: *const u16,
    pub(super) b_k_stride: usize,
    pub(super) b_vector_stride: usize,
    pub(super) c: *mut f32,
    pub(super) c_row_stride: usize,
    pub(super) accumulate: bool,
}

impl Gemm {
    /// # Safety
    /// All rows, vectors and `k` of the three matrices must be in bounds, and nobody else may use `c`.
    /// To be called below [`Isa::run`](super::Isa::run) with the vectors of that instruction set.
    #[inline(always)]
    pub(super) unsafe fn compute<V: Lanes>(self) {
        // SAFETY: the tiles below cover the matrices exactly once and stay inside.
        unsafe {
            match (V::WIDE, self.num_rows) {
                // Few rows: bound by memory, so many vectors are under way at once.
                (true, ..=6) => {
                    let vector = self.columns::<V, 6, 4>(0);
                    self.columns::<V, 6, 1>(vector);
                }
                (true, _) => {
                    let vector = self.columns::<V, 12, 2>(0);
                    self.columns::<V, 12, 1>(vector);
                }
                (false, ..=2) => {
                    let vector = self.columns::<V, 2, 2>(0);
                    self.columns::<V, 2, 1>(vector);
                }
                (false, _) => {
                    self.columns::<V, 6, 1>(0);
                }
            }
        }
    }

    /// Computes columns from `vector` on, `NV` vectors and at most `MAX_MR` rows at a time, as many sums as registers
    /// hold; returns the first vector left over.
    ///
    /// # Safety
    /// As [`compute`](Self::compute).
    #[inline(always)]
    unsafe fn columns<V: Lanes, const MAX_MR: usize, const NV: usize>(self, mut vector: usize) -> usize {
        while vector + NV <= self.num_vectors {
            // SAFETY: the rows are counted up to `num_rows`, the vectors were just compared.
            unsafe {
                let mut row = self.rows::<V, MAX_MR, NV>(0, vector);
                if MAX_MR > 4 {
                    row = self.rows::<V, 4, NV>(row, vector);
                }
                if MAX_MR > 2 {
                    row = self.rows::<V, 2, NV>(row, vector);
                }
                self.rows::<V, 1, NV>(row, vector);
            }
            vector += NV;
        }
        vector
    }

    /// Computes rows from `row` on, `MR` at a time; returns the first one left over.
    ///
    /// # Safety
    /// As [`compute`](Self::compute); `NV` vectors from `vector` on must exist.
    #[inline(always)]
    unsafe fn rows<V: Lanes, const MR: usize, const NV: usize>(self, mut row: usize, vector: usize) -> usize {
        while row + MR <= self.num_rows {
            // SAFETY: the rows were just compared.
            unsafe { self.tile::<V, MR, NV>(row, vector) };
            row += MR;
        }
        row
    }

    /// # Safety
    /// As [`compute`](Self::compute); `MR` rows and `NV` vectors from here on must exist.
    #[inline(always)]
    #[expect(clippy::needless_range_loop, reason = "rows and vectors index sums, columns and pointers alike")]
    unsafe fn tile<V: Lanes, const MR: usize, const NV: usize>(self, row: usize, vector: usize) {
        // SAFETY: offsets of rows, vectors and k in bounds, by the contract.
        unsafe {
            let a = self.a.add(row * self.a_row_stride);
            let mut b = self.b.add(vector * self.b_vector_stride);
            let c = self.c.add(row * self.c_row_stride + vector * LANES);
            let mut sums = [[V::zero(); NV]; MR];
            if self.accumulate {
                for m in 0..MR {
                    for n in 0..NV {
                        sums[m][n] = V::load(c.add(m * self.c_row_stride + n * LANES));
                    }
                }
            }
            for k in 0..self.k_len {
                let mut columns = [V::zero(); NV];
                for n in 0..NV {
                    columns[n] = V::load_f16(b.add(n * self.b_vector_stride));
                    V::prefetch(b.wrapping_add(n * self.b_vector_stride + PREFETCH_DISTANCE));
                }
                for m in 0..MR {
                    let value = V::splat(*a.add(m * self.a_row_stride + k));
                    for n in 0..NV {
                        sums[m][n] = sums[m][n].fma(value, columns[n]);
                    }
                }
                // Wrapping, since the last addition may leave the matrix; nothing is read there.
                b = b.wrapping_add(self.b_k_stride);
            }
            for m in 0..MR {
                for n in 0..NV {
                    sums[m][n].store(c.add(m * self.c_row_stride + n * LANES));
                }
            }
        }
    }
}

/// [`Gemm`] alone as a kernel.
pub(super) struct GemmKernel {
    gemm: Gemm,
}

impl GemmKernel {
    /// # Safety
    /// As [`Gemm::compute`].
    pub(super) unsafe fn new(gemm: Gemm) -> Self {
        Self { gemm }
    }
}

impl Kernel for GemmKernel {
    #[inline(always)]
    fn run<V: Lanes>(self) {
        // SAFETY: promised to `new`.
        unsafe { self.gemm.compute::<V>() }
    }
}
