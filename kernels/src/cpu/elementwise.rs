//! Shared by the ops that touch every number once: rows in parallel, and the exponential.

use crate::team;

/// Below this many numbers one thread is faster than waking another.
const MIN_NUMBERS_PER_TASK: usize = 1 << 13;

/// Rows for one task.
pub(super) fn rows_per_task(row_len: usize, num_rows: usize) -> usize {
    let by_threads = num_rows.div_ceil(team::num_threads() * 2);
    by_threads.max(MIN_NUMBERS_PER_TASK.div_ceil(row_len)).max(1)
}

/// Calls `each` with blocks of whole rows of `x` and the same rows of `out`.
pub(super) fn par_rows(
    x: &[f32],
    x_row_len: usize,
    out: &mut [f32],
    out_row_len: usize,
    each: impl Fn(&[f32], &mut [f32]) + Sync,
) {
    let num_rows = out.len() / out_row_len;
    assert_eq!(x.len(), num_rows * x_row_len);
    assert_eq!(out.len(), num_rows * out_row_len);
    let rows = rows_per_task(x_row_len.max(out_row_len), num_rows);
    if rows >= num_rows {
        return each(x, out);
    }
    team::for_each_chunk(out, rows * out_row_len, |index, out| {
        let len = out.len() / out_row_len * x_row_len;
        each(&x[index * rows * x_row_len..][..len], out);
    });
}

/// Calls `each` with blocks of whole rows of `x`.
pub(super) fn par_rows_mut(x: &mut [f32], row_len: usize, each: impl Fn(&mut [f32]) + Send + Sync) {
    let num_rows = x.len() / row_len;
    assert_eq!(x.len(), num_rows * row_len);
    let rows = rows_per_task(row_len, num_rows);
    if rows >= num_rows {
        return each(x);
    }
    team::for_each_chunk(x, rows * row_len, |_, x| each(x));
}

/// `e^x` to about two units in the last place; below -87 a tiny number, above 88 a huge one. NaN stays NaN.
///
/// Written without calls and branches, so that loops over it become vector instructions.
#[inline(always)]
#[expect(clippy::excessive_precision, reason = "the constants are given as published (Cephes expf)")]
pub(super) fn exp(x: f32) -> f32 {
    // Adding it rounds to an integer, which then is in the low bits.
    const ROUND: f32 = 12_582_912.0;
    let x = if x < -87.0 { -87.0 } else { x };
    let x = if x > 88.0 { 88.0 } else { x };
    let rounded = x.mul_add(std::f32::consts::LOG2_E, ROUND);
    let n = rounded - ROUND;
    // x - n ln 2, in two parts to keep all bits.
    let r = n.mul_add(2.121_944_4e-4, n.mul_add(-0.693_359_375, x));
    let p = 1.987_569_15e-4f32;
    let p = p.mul_add(r, 1.398_199_95e-3);
    let p = p.mul_add(r, 8.333_451_9e-3);
    let p = p.mul_add(r, 4.166_579_6e-2);
    let p = p.mul_add(r, 1.666_666_55e-1);
    let p = p.mul_add(r, 5.000_000_1e-1);
    let p = p.mul_add(r * r, r) + 1.0;
    let power = f32::from_bits((rounded.to_bits() << 23).wrapping_add(1.0f32.to_bits()));
    p * power
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_close_to_the_exact_one() {
        for i in -8700..=8800 {
            let x = i as f32 / 100.0;
            let exact = f64::from(x).exp();
            let error = (f64::from(exp(x)) - exact).abs() / exact;
            assert!(error < 3e-7, "exp({x}) is off by {error}");
        }
        assert_eq!(exp(0.0), 1.0);
        assert!(exp(f32::NEG_INFINITY) < 1e-37);
        assert!(exp(f32::INFINITY) > 1e38);
        assert!(exp(f32::NAN).is_nan());
    }
}
