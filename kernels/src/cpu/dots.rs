//! The one inner product: bytes times bytes into 32 bits, on tiles or vectors. Linear layers, scores and weighted
//! values are all made of it.
//!
//! Invariant: sums are exact. 2^31 / (128 * 255) products fit, more than any group or head has; so tiles, vectors,
//! their shapes and the order of rows change the speed, never a bit.

use super::LANES;
use super::isa::Lanes;
use super::tiles::Tiles;

/// Bytes of a row that one quad of all columns of a vector takes.
pub(super) const QUAD_BYTES: usize = 4 * LANES;

/// Bytes that one step of a tile multiplies for each row.
pub(super) const TILE_STEP: usize = 64;

/// Fewer rows are faster on vectors, since a tile computes sixteen.
const MIN_TILE_ROWS: usize = 5;

/// How far ahead quads are asked for: the hardware does not look beyond a page of 4 KiB.
const PREFETCH_BYTES: usize = 24 * QUAD_BYTES;

/// `sums[m, n] = sum over k of a[m, k] * b[k, n]`, columns in whole vectors.
///
/// With `UNSIGNED_B`, bytes of `a` are signed and those of `b` unsigned; else the other way around.
#[derive(Clone, Copy)]
pub(super) struct Dots {
    pub(super) num_rows: usize,
    pub(super) num_vectors: usize,
    /// Products of a sum, divided by 4.
    pub(super) num_quads: usize,
    pub(super) a: *const u8,
    pub(super) a_row_stride: usize,
    /// `[num_vectors, num_quads, LANES, 4]`, with strides.
    pub(super) b: *const u8,
    pub(super) b_vector_stride: usize,
    pub(super) b_quad_stride: usize,
    pub(super) sums: *mut i32,
    pub(super) sums_row_stride: usize,
}

impl Dots {
    /// # Safety
    /// All rows, vectors and quads must be in bounds, and nobody else may use the sums. With tiles, rows of `a` and
    /// `sums` must exist up to a multiple of 16. To be called below [`Isa::run`](super::Isa::run) with the vectors of
    /// that instruction set.
    #[inline(always)]
    pub(super) unsafe fn compute<V: Lanes, const UNSIGNED_B: bool>(self, tiles: Option<&Tiles>) {
        // SAFETY: promised by the caller.
        unsafe {
            #[cfg(target_arch = "x86_64")]
            if let Some(tiles) = tiles
                && self.num_rows >= MIN_TILE_ROWS
                && self.num_vectors.is_multiple_of(2)
                && (4 * self.num_quads).is_multiple_of(TILE_STEP)
            {
                return self.on_tiles::<UNSIGNED_B>(tiles);
            }
            let _ = tiles;
            match V::WIDE {
                true if self.num_rows <= 4 => self.columns::<V, UNSIGNED_B, 4, 4>(),
                true => self.columns::<V, UNSIGNED_B, 8, 2>(),
                false => self.columns::<V, UNSIGNED_B, 4, 1>(),
            }
        }
    }

    /// # Safety
    /// As [`compute`](Self::compute).
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    unsafe fn on_tiles<const UNSIGNED_B: bool>(self, tiles: &Tiles) {
        for row in (0..self.num_rows).step_by(32) {
            for vector in (0..self.num_vectors).step_by(2) {
                // SAFETY: rows exist up to a multiple of 16, vectors come in pairs; both by the contract.
                unsafe {
                    let b = self.b.add(vector * self.b_vector_stride);
                    tiles.dots::<UNSIGNED_B>(super::tiles::TileDots {
                        a: self.a.add(row * self.a_row_stride),
                        a_row_stride: self.a_row_stride,
                        two_row_tiles: self.num_rows - row > 16,
                        b: [b, b.add(self.b_vector_stride)],
                        b_quad_stride: self.b_quad_stride,
                        num_steps: 4 * self.num_quads / TILE_STEP,
                        sums: self.sums.add(row * self.sums_row_stride + vector * LANES),
                        sums_row_stride: self.sums_row_stride,
                    });
                }
            }
        }
    }

    /// # Safety
    /// As [`compute`](Self::compute).
    #[inline(always)]
    unsafe fn columns<V: Lanes, const UNSIGNED_B: bool, const MR: usize, const NV: usize>(self) {
        let mut vector = 0;
        // SAFETY: the vectors are compared with their number.
        unsafe {
            while vector + NV <= self.num_vectors {
                self.rows::<V, UNSIGNED_B, MR, NV>(vector);
                vector += NV;
            }
            while vector < self.num_vectors {
                self.rows::<V, UNSIGNED_B, MR, 1>(vector);
                vector += 1;
            }
        }
    }

    /// # Safety
    /// As [`compute`](Self::compute); `NV` vectors from `vector` on must exist.
    #[inline(always)]
    unsafe fn rows<V: Lanes, const UNSIGNED_B: bool, const MR: usize, const NV: usize>(self, vector: usize) {
        let mut row = 0;
        // SAFETY: the rows are compared with their number.
        unsafe {
            while row + MR <= self.num_rows {
                self.block::<V, UNSIGNED_B, MR, NV>(row, vector);
                row += MR;
            }
            if MR > 4 && row + 4 <= self.num_rows {
                self.block::<V, UNSIGNED_B, 4, NV>(row, vector);
                row += 4;
            }
            if row + 2 <= self.num_rows {
                self.block::<V, UNSIGNED_B, 2, NV>(row, vector);
                row += 2;
            }
            if row < self.num_rows {
                self.block::<V, UNSIGNED_B, 1, NV>(row, vector);
            }
        }
    }

    /// # Safety
    /// As [`compute`](Self::compute); `MR` rows and `NV` vectors from here on must exist.
    #[inline(always)]
    #[expect(clippy::needless_range_loop, reason = "rows and vectors index sums, columns and pointers alike")]
    unsafe fn block<V: Lanes, const UNSIGNED_B: bool, const MR: usize, const NV: usize>(
        self,
        row: usize,
        vector: usize,
    ) {
        // SAFETY: offsets of rows, vectors and quads in bounds, by the contract.
        unsafe {
            let a = self.a.add(row * self.a_row_stride);
            let mut b = self.b.add(vector * self.b_vector_stride);
            let mut sums = [[V::zero_ints(); NV]; MR];
            for quad in 0..self.num_quads {
                let columns: [V::Quads; NV] =
                    std::array::from_fn(|n| V::load_quads(b.add(n * self.b_vector_stride)));
                if MR <= 2 {
                    for n in 0..NV {
                        V::prefetch(b.wrapping_add(n * self.b_vector_stride + PREFETCH_BYTES));
                    }
                }
                for m in 0..MR {
                    let value = V::splat_quad(a.add(m * self.a_row_stride + 4 * quad));
                    for n in 0..NV {
                        sums[m][n] = match UNSIGNED_B {
                            true => V::dot(sums[m][n], columns[n], value),
                            false => V::dot(sums[m][n], value, columns[n]),
                        };
                    }
                }
                // Wrapping, since the last addition may leave the matrix; nothing is read there.
                b = b.wrapping_add(self.b_quad_stride);
            }
            let to = self.sums.add(row * self.sums_row_stride + vector * LANES);
            for m in 0..MR {
                for n in 0..NV {
                    V::store_ints(sums[m][n], to.add(m * self.sums_row_stride + n * LANES));
                }
            }
        }
    }
}
