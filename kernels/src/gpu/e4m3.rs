//! Eight-bit floats with 4 bits of exponent and 3 of mantissa (OCP 8-bit floating point, E4M3): no infinity, up to 448.
//!
//! The same rounding as `to_e4m3` of `types.cuh`: to the nearest, ties to even, beyond the largest to the largest.

pub(crate) const MAX: f32 = 448.0;

pub(crate) fn to_f32(bits: u8) -> f32 {
    let (exponent, mantissa) = (i32::from(bits >> 3 & 15), f32::from(bits & 7));
    let magnitude = match (exponent, bits & 7) {
        (15, 7) => f32::NAN,
        (0, _) => mantissa * 2f32.powi(-9),
        _ => (8.0 + mantissa) * 2f32.powi(exponent - 10),
    };
    if bits & 0x80 == 0 { magnitude } else { -magnitude }
}

pub(crate) fn from_f32(x: f32) -> u8 {
    let sign = (x.to_bits() >> 24) as u8 & 0x80;
    let magnitude = x.abs();
    if magnitude.is_nan() {
        0x7f
    } else if magnitude >= MAX {
        sign | 0x7e
    } else if magnitude < 2f32.powi(-6) {
        sign | (magnitude * 512.0).round_ties_even() as u8
    } else {
        let bits = magnitude.to_bits();
        // Half of the last place that stays, less one where it is even.
        let rounded = bits + 0x7_ffff + (bits >> 20 & 1);
        sign | ((rounded >> 20) - (120 << 3)) as u8
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_number_comes_back_and_others_go_to_the_nearest() {
        let numbers: Vec<f32> = (0..0x7f).map(to_f32).collect();
        assert!(numbers.is_sorted_by(|a, b| a < b));
        assert_eq!(numbers.last(), Some(&MAX));
        for bits in (0..=u8::MAX).filter(|bits| bits & 0x7f != 0x7f) {
            assert_eq!(from_f32(to_f32(bits)), bits);
        }
        for (bits, pair) in (0u8..).zip(numbers.windows(2)) {
            let middle = (pair[0] + pair[1]) / 2.0;
            assert_eq!(from_f32(middle), bits + (bits & 1), "{middle} is a tie");
            assert_eq!(from_f32(middle.next_down()), bits);
            assert_eq!(from_f32(middle.next_up()), bits + 1);
        }
        assert_eq!(from_f32(1e9), 0x7e);
        assert_eq!(from_f32(f32::NEG_INFINITY), 0xfe);
        assert!(to_f32(from_f32(f32::NAN)).is_nan());
    }
}
