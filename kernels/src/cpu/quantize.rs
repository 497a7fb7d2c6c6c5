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

/// Adding it rounds to the nearest integer, ties to even, which then is in the low bits.
const ROUND: f32 = 12_582_912.0;

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
pub(super) fn rotate(rotation: usize, row: &mut [f32]) {
    if rotation == 1 {
        return;
    }
    let scale = 1.0 / (rotation as f32).sqrt();
    if rotation < LANES {
        for block in row.chunks_exact_mut(rotation) {
            let mut half = 1;
            while half < rotation {
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
        return;
    }
    for block in row.chunks_exact_mut(rotation) {
        let (vectors, _) = block.as_chunks_mut::<LANES>();
        for vector in &mut *vectors {
            let mut lanes = *vector;
            lanes = butterfly::<1>(lanes);
            lanes = butterfly::<2>(lanes);
            lanes = butterfly::<4>(lanes);
            lanes = butterfly::<8>(lanes);
            *vector = lanes.map(|lane| lane * scale);
        }
        let mut half = 1;
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
}

/// Sums and differences of lanes that are `HALF` apart.
#[inline(always)]
fn butterfly<const HALF: usize>(lanes: [f32; LANES]) -> [f32; LANES] {
    std::array::from_fn(|i| match i & HALF {
        0 => lanes[i] + lanes[i ^ HALF],
        _ => lanes[i ^ HALF] - lanes[i],
    })
}

/// Rounds numbers to bytes relative to the largest magnitude; returns the scale and the sum of the bytes.
///
/// A NaN becomes some byte with a scale that is not a number, so that it is seen at the end.
#[inline(always)]
pub(super) fn quantize(values: &[f32], bytes: &mut [i8]) -> (f32, i32) {
    let mut max = max_magnitude(values);
    if max < f32::MIN_POSITIVE {
        max = 0.0;
    }
    let scale = max / MAX_BYTE;
    let inverse = if max > 0.0 { MAX_BYTE / max } else { 0.0 };
    let mut sums = [0i32; LANES];
    let (value_chunks, value_rest) = values.as_chunks::<LANES>();
    let (bytes, rest) = bytes[..values.len()].as_chunks_mut::<LANES>();
    for (values, bytes) in value_chunks.iter().zip(bytes) {
        for i in 0..LANES {
            let rounded = (values[i] * inverse + ROUND).to_bits() as i32 - ROUND.to_bits() as i32;
            bytes[i] = rounded as i8;
            sums[i] += i32::from(rounded as i8);
        }
    }
    for (value, byte) in value_rest.iter().zip(rest) {
        let rounded = (value * inverse + ROUND).to_bits() as i32 - ROUND.to_bits() as i32;
        *byte = rounded as i8;
        sums[0] += i32::from(rounded as i8);
    }
    (scale, sums.iter().sum())
}

/// The largest magnitude; NaN or infinity if there is one.
#[inline(always)]
pub(super) fn max_magnitude(values: &[f32]) -> f32 {
    // Without their sign, the bits of floats are ordered as integers, NaN last: no comparison is unordered.
    let mut lanes = [0u32; LANES];
    let (chunks, rest) = values.as_chunks::<LANES>();
    for chunk in chunks {
        for i in 0..LANES {
            lanes[i] = lanes[i].max(chunk[i].to_bits() & 0x7fff_ffff);
        }
    }
    for (lane, value) in lanes.iter_mut().zip(rest) {
        *lane = (*lane).max(value.to_bits() & 0x7fff_ffff);
    }
    f32::from_bits(lanes.into_iter().fold(0, u32::max))
}

/// `V` makes callers compile this for their instruction set.
#[inline(always)]
pub(super) fn quantize_row<V: Lanes>(layout: &RowLayout, row: &mut [f32], to: QuantizedRow<'_>) {
    rotate(layout.rotation, row);
    for group in 0..layout.num_groups() {
        let (numbers, _) = layout.group(group);
        let (scale, sum) = quantize(&row[numbers.clone()], &mut to.bytes[numbers]);
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
    use super::*;

    #[test]
    fn a_rotation_keeps_lengths_and_undoes_itself() {
        for len in [1, 2, 6, 8, 48, 64, 192, 576, 1536] {
            let row: Vec<f32> = (0..len).map(|i| ((i * 37 + 11) % 101) as f32 - 50.0).collect();
            let layout = RowLayout::new(len);
            let mut rotated = row.clone();
            rotate(layout.rotation, &mut rotated);
            let square = |row: &[f32]| row.iter().map(|x| x * x).sum::<f32>();
            assert!((square(&rotated) / square(&row) - 1.0).abs() < 1e-5);
            assert!(layout.rotation == 1 || rotated != row);
            rotate(layout.rotation, &mut rotated);
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
        let mut bytes = vec![0; values.len()];
        let (scale, sum) = quantize(&values, &mut bytes);
        assert_eq!((bytes[0], bytes[20], bytes[40], sum), (-127, 0, 127, 0));
        assert!(values.iter().zip(&bytes).all(|(v, b)| (v - f32::from(*b) * scale).abs() <= scale * 0.5001));
        assert!(quantize(&[1.0, f32::NAN], &mut [0; 2]).0.is_nan());
        assert_eq!(quantize(&[0.0; 3], &mut [1; 3]), (0.0, 0));
    }
}
