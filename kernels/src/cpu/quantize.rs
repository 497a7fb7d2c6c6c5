//! Rows of numbers as signed bytes with a scale for each group.
//!
//! A row is rotated first, in blocks, by a Hadamard matrix: that spreads outliers over their block, so that bytes
//! represent all numbers well (QuaRot, Ashkboos et al. 2024). Weights are rotated alike, and since the matrix is
//! orthogonal, inner products stay what they were. Numbers of a row depend on that row alone.

use super::LANES;
use super::isa::Lanes;

/// Longest block that is rotated as one.
const MAX_ROTATION: usize = 512;

/// Longest group with a scale of its own.
const MAX_GROUP_LEN: usize = 256;

/// Largest byte; the negative ones are used up to it too, so that a sign never changes a magnitude.
pub(super) const MAX_BYTE: f32 = 127.0;

/// How rows of some length are cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct RowLayout {
    /// Numbers in a row.
    pub(super) len: usize,
    /// Numbers rotated as one: a power of two that divides `len`.
    pub(super) rotation: usize,
    /// All groups but the last have this length, a multiple of 64.
    pub(super) group_len: usize,
}

impl RowLayout {
    pub(super) fn new(len: usize) -> Self {
        let rotation = 1 << len.trailing_zeros().min(MAX_ROTATION.trailing_zeros());
        // Groups of one length fill tiles best; where none divides the row, the last one is shorter.
        let group_len = (64..=MAX_GROUP_LEN).rev().step_by(64).find(|group| len.is_multiple_of(*group));
        Self { len, rotation, group_len: group_len.unwrap_or(MAX_GROUP_LEN) }
    }

    pub(super) fn num_groups(&self) -> usize {
        self.len.div_ceil(self.group_len)
    }

    /// Bytes of a row: padded with zeros to whole steps of tiles.
    pub(super) fn padded_len(&self) -> usize {
        self.len.next_multiple_of(64)
    }

    /// The numbers of a group, and its bytes with the padding.
    pub(super) fn group(&self, group: usize) -> (std::ops::Range<usize>, std::ops::Range<usize>) {
        let start = group * self.group_len;
        let end = start + self.group_len;
        (start..end.min(self.len), start..end.min(self.padded_len()))
    }
}

/// Rotates blocks of `rotation` numbers in place.
#[inline(always)]
pub(super) fn rotate<V: Lanes>(rotation: usize, row: &mut [f32]) {
    if rotation == 1 {
        return;
    }
    let scale = 1.0 / (rotation as f32).sqrt();
    for block in row.chunks_exact_mut(rotation) {
        match rotation < LANES {
            true => rotate_short(scale, block),
            false => rotate_vectors::<V>(scale, block.as_chunks_mut::<LANES>().0),
        }
    }
}

/// A block of less than a vector.
#[inline(always)]
fn rotate_short(scale: f32, block: &mut [f32]) {
    let mut half = 1;
    while half < block.len() {
        for pair in block.chunks_exact_mut(2 * half) {
            let (a, b) = pair.split_at_mut(half);
            for (a, b) in a.iter_mut().zip(b) {
                (*a, *b) = (*a + *b, *a - *b);
            }
        }
        half *= 2;
    }
    for value in block {
        *value *= scale;
    }
}

/// First within vectors, then between them; four at a time as long as there are.
#[inline(always)]
fn rotate_vectors<V: Lanes>(scale: f32, vectors: &mut [[f32; LANES]]) {
    let (fours, rest) = vectors.as_chunks_mut::<4>();
    // SAFETY: callers are compiled for `V`, and the pointers are those of a whole vector.
    unsafe {
        let scale = V::splat(scale);
        for four in &mut *fours {
            let [a, b, c, d] = four;
            let (x, y) = (rotate_lanes(scale, a), rotate_lanes(scale, b));
            let (z, w) = (rotate_lanes(scale, c), rotate_lanes(scale, d));
            let minus = V::splat(-1.0);
            let (x, y) = (x.add(y), x.fma(y, minus));
            let (z, w) = (z.add(w), z.fma(w, minus));
            x.add(z).store(a.as_mut_ptr());
            y.add(w).store(b.as_mut_ptr());
            x.fma(z, minus).store(c.as_mut_ptr());
            y.fma(w, minus).store(d.as_mut_ptr());
        }
        for vector in &mut *rest {
            rotate_lanes(scale, vector).store(vector.as_mut_ptr());
        }
    }
    let mut half = if rest.is_empty() { 4 } else { 1 };
    while half < vectors.len() {
        for pair in vectors.chunks_exact_mut(2 * half) {
            let (a, b) = pair.split_at_mut(half);
            for (a, b) in a.iter_mut().zip(b) {
                for (a, b) in a.iter_mut().zip(b) {
                    (*a, *b) = (*a + *b, *a - *b);
                }
            }
        }
        half *= 2;
    }
}

/// # Safety
/// To be called below [`Isa::run`](super::Isa::run) with the vectors of that instruction set.
#[inline(always)]
unsafe fn rotate_lanes<V: Lanes>(scale: V, vector: &[f32; LANES]) -> V {
    // SAFETY: by the contract; the pointer is that of a whole vector.
    unsafe {
        let mut lanes = V::load(vector.as_ptr());
        lanes = butterfly::<V, 1>(lanes);
        lanes = butterfly::<V, 2>(lanes);
        lanes = butterfly::<V, 4>(lanes);
        lanes = butterfly::<V, 8>(lanes);
        lanes.mul(scale)
    }
}

/// Sums and differences of lanes that are `DISTANCE` apart.
///
/// # Safety
/// To be called below [`Isa::run`](super::Isa::run) with the vectors of that instruction set.
#[inline(always)]
unsafe fn butterfly<V: Lanes, const DISTANCE: usize>(lanes: V) -> V {
    let signs: [f32; LANES] = std::array::from_fn(|i| if i & DISTANCE == 0 { 1.0 } else { -1.0 });
    // SAFETY: by the contract; the signs are a whole vector.
    unsafe { lanes.swap::<DISTANCE>().fma(lanes, V::load(signs.as_ptr())) }
}

/// Rounds numbers to bytes relative to the largest magnitude; returns the scale and the sum of the bytes.
///
/// A NaN or infinity becomes some byte with a scale that is not finite, so that it is seen at the end.
#[inline(always)]
pub(super) fn quantize<V: Lanes>(values: &[f32], bytes: &mut [i8]) -> (f32, i32) {
    let bytes = &mut bytes[..values.len()];
    let (chunks, rest) = values.as_chunks::<LANES>();
    let mut padded = [0.0; LANES];
    padded[..rest.len()].copy_from_slice(rest);
    // SAFETY: callers are compiled for `V`, and every pointer is that of a whole vector.
    let max = unsafe {
        let mut max = V::load(padded.as_ptr()).magnitude_bits();
        for chunk in chunks {
            max = V::max_ints(max, V::load(chunk.as_ptr()).magnitude_bits());
        }
        f32::from_bits(fold::<V>(max, i32::max) as u32)
    };
    let max = if max < f32::MIN_POSITIVE { 0.0 } else { max };
    let inverse = if max > 0.0 { MAX_BYTE / max } else { 0.0 };
    let (byte_chunks, byte_rest) = bytes.as_chunks_mut::<LANES>();
    // SAFETY: as above.
    let sums = unsafe {
        let inverse = V::splat(inverse);
        let mut padded_bytes = [0; LANES];
        let mut sums = V::load(padded.as_ptr()).mul(inverse).round_to_bytes(padded_bytes.as_mut_ptr());
        byte_rest.copy_from_slice(&padded_bytes[..byte_rest.len()]);
        for (values, bytes) in chunks.iter().zip(byte_chunks) {
            let ints = V::load(values.as_ptr()).mul(inverse).round_to_bytes(bytes.as_mut_ptr());
            sums = V::add_ints(sums, ints);
        }
        fold::<V>(sums, i32::wrapping_add)
    };
    (max / MAX_BYTE, sums)
}

/// Combines all lanes, by halves.
#[inline(always)]
fn fold<V: Lanes>(ints: V::Ints, combine: impl Fn(i32, i32) -> i32) -> i32 {
    let mut lanes = [0; LANES];
    // SAFETY: callers are compiled for `V`, and the array is a whole vector.
    unsafe { V::store_ints(ints, lanes.as_mut_ptr()) };
    let eight: [i32; 8] = std::array::from_fn(|i| combine(lanes[i], lanes[i + 8]));
    let four: [i32; 4] = std::array::from_fn(|i| combine(eight[i], eight[i + 4]));
    combine(combine(four[0], four[2]), combine(four[1], four[3]))
}

/// Rotates and quantizes a row.
#[inline(always)]
pub(super) fn quantize_row<V: Lanes>(layout: &RowLayout, row: &mut [f32], to: QuantizedRow<'_>) {
    rotate::<V>(layout.rotation, row);
    for group in 0..layout.num_groups() {
        let (numbers, _) = layout.group(group);
        let (scale, sum) = quantize::<V>(&row[numbers.clone()], &mut to.bytes[numbers]);
        to.scales[group] = scale;
        to.sums[group] = sum;
    }
    to.bytes[layout.len..].fill(0);
}

/// Where a row goes.
pub(super) struct QuantizedRow<'a> {
    /// `[padded_len]`
    pub(super) bytes: &'a mut [i8],
    /// `[num_groups]`
    pub(super) scales: &'a mut [f32],
    /// Sums of the bytes, `[num_groups]`
    pub(super) sums: &'a mut [i32],
}

#[cfg(test)]
mod tests {
    use super::super::isa::{Isa, Kernel};
    use super::*;

    struct Rotate<'a>(&'a mut [f32]);

    impl Kernel for Rotate<'_> {
        #[inline(always)]
        fn run<V: Lanes>(self) {
            rotate::<V>(RowLayout::new(self.0.len()).rotation, self.0);
        }
    }

    struct Quantize<'a>(&'a [f32], &'a mut [i8], &'a mut (f32, i32));

    impl Kernel for Quantize<'_> {
        #[inline(always)]
        fn run<V: Lanes>(self) {
            *self.2 = quantize::<V>(self.0, self.1);
        }
    }

    fn quantized(isa: Isa, values: &[f32]) -> (Vec<i8>, f32, i32) {
        let (mut bytes, mut result) = (vec![1; values.len()], (0.0, 0));
        isa.run(Quantize(values, &mut bytes, &mut result));
        (bytes, result.0, result.1)
    }

    #[test]
    fn a_rotation_keeps_lengths_and_undoes_itself() {
        for (isa, len) in Isa::available()
            .into_iter()
            .flat_map(|isa| [1, 2, 6, 8, 16, 48, 64, 192, 576, 1536].map(|len| (isa, len)))
        {
            let row: Vec<f32> = (0..len).map(|i| ((i * 37 + 11) % 101) as f32 - 50.0).collect();
            let mut rotated = row.clone();
            isa.run(Rotate(&mut rotated));
            let square = |row: &[f32]| row.iter().map(|x| x * x).sum::<f32>();
            assert!((square(&rotated) / square(&row) - 1.0).abs() < 1e-5);
            assert!(len % 2 == 1 || rotated != row);
            isa.run(Rotate(&mut rotated));
            assert!(row.iter().zip(&rotated).all(|(a, b)| (a - b).abs() < 1e-4), "{len}");
        }
    }

    #[test]
    fn rows_of_models_are_cut_into_groups_of_one_length() {
        let cut = |len| (RowLayout::new(len).rotation, RowLayout::new(len).group_len);
        assert_eq!(cut(576), (64, 192));
        assert_eq!(cut(1536), (512, 256));
        assert_eq!(cut(640), (128, 128));
        assert_eq!(cut(4096), (512, 256));
        // 100 has no such group: one short group.
        assert_eq!((cut(100), RowLayout::new(100).padded_len()), ((4, 256), 128));
    }

    #[test]
    fn bytes_are_the_nearest_and_nan_is_seen() {
        let values: Vec<f32> = (-20..=20).map(|i| i as f32 * 0.37).collect();
        for isa in Isa::available() {
            let (bytes, scale, sum) = quantized(isa, &values);
            assert_eq!((bytes[0], bytes[20], bytes[40], sum), (-127, 0, 127, 0));
            assert!(
                values.iter().zip(&bytes).all(|(v, b)| (v - f32::from(*b) * scale).abs() <= scale * 0.5001)
            );
            assert!(quantized(isa, &[1.0, f32::NAN]).1.is_nan());
            assert_eq!(quantized(isa, &[0.0; 3]), (vec![0; 3], 0.0, 0));
        }
    }
}
