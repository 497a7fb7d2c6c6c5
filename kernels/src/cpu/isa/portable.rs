//! Vectors of plain Rust, for CPUs without a set of their own; slow, and the definition of the others.

use super::Lanes;
use crate::cpu::LANES;

#[derive(Clone, Copy)]
pub(super) struct Portable([f32; LANES]);

// SAFETY of all blocks: the pointers are valid for a whole vector by the contract of the trait.
impl Lanes for Portable {
    const WIDE: bool = false;
    type Ints = [i32; LANES];
    type Quads = [u8; 4 * LANES];

    #[inline(always)]
    unsafe fn splat(value: f32) -> Self {
        Self([value; LANES])
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: see above.
        Self(unsafe { from.cast::<[f32; LANES]>().read_unaligned() })
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: see above.
        unsafe { to.cast::<[f32; LANES]>().write_unaligned(self.0) }
    }

    #[inline(always)]
    unsafe fn mul(self, other: Self) -> Self {
        Self(std::array::from_fn(|i| self.0[i] * other.0[i]))
    }

    #[inline(always)]
    unsafe fn fma(self, a: Self, b: Self) -> Self {
        Self(std::array::from_fn(|i| a.0[i].mul_add(b.0[i], self.0[i])))
    }

    #[inline(always)]
    unsafe fn from_ints(ints: Self::Ints) -> Self {
        Self(ints.map(|int| int as f32))
    }

    #[inline(always)]
    unsafe fn swap<const DISTANCE: usize>(self) -> Self {
        Self(std::array::from_fn(|i| self.0[i ^ DISTANCE]))
    }

    #[inline(always)]
    unsafe fn round_to_bytes(self, to: *mut i8) -> Self::Ints {
        let bytes = self.0.map(|value| value.round_ties_even() as i8);
        // SAFETY: see above.
        unsafe { to.cast::<[i8; LANES]>().write_unaligned(bytes) };
        bytes.map(i32::from)
    }

    #[inline(always)]
    unsafe fn magnitude_bits(self) -> Self::Ints {
        self.0.map(|value| value.abs().to_bits() as i32)
    }

    #[inline(always)]
    unsafe fn zero_ints() -> Self::Ints {
        [0; LANES]
    }

    #[inline(always)]
    unsafe fn splat_ints(value: i32) -> Self::Ints {
        [value; LANES]
    }

    #[inline(always)]
    unsafe fn load_ints(from: *const i32) -> Self::Ints {
        // SAFETY: see above.
        unsafe { from.cast::<Self::Ints>().read_unaligned() }
    }

    #[inline(always)]
    unsafe fn store_ints(ints: Self::Ints, to: *mut i32) {
        // SAFETY: see above.
        unsafe { to.cast::<Self::Ints>().write_unaligned(ints) }
    }

    #[inline(always)]
    unsafe fn add_ints(a: Self::Ints, b: Self::Ints) -> Self::Ints {
        std::array::from_fn(|i| a[i].wrapping_add(b[i]))
    }

    #[inline(always)]
    unsafe fn max_ints(a: Self::Ints, b: Self::Ints) -> Self::Ints {
        std::array::from_fn(|i| a[i].max(b[i]))
    }

    #[inline(always)]
    unsafe fn load_quads(from: *const u8) -> Self::Quads {
        // SAFETY: see above.
        unsafe { from.cast::<Self::Quads>().read_unaligned() }
    }

    #[inline(always)]
    unsafe fn splat_quad(from: *const u8) -> Self::Quads {
        // SAFETY: see above.
        let quad = unsafe { from.cast::<[u8; 4]>().read_unaligned() };
        std::array::from_fn(|i| quad[i % 4])
    }

    #[inline(always)]
    unsafe fn dot(sums: Self::Ints, unsigned: Self::Quads, signed: Self::Quads) -> Self::Ints {
        std::array::from_fn(|i| {
            let products = (4 * i..4 * i + 4).map(|j| i32::from(unsigned[j]) * i32::from(signed[j] as i8));
            sums[i].wrapping_add(products.sum())
        })
    }

    #[inline(always)]
    unsafe fn prefetch(_at: *const u8) {}
}
