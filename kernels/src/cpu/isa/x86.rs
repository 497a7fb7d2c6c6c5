//! Vectors of x86: AVX2 with and without VNNI as two registers, AVX-512 as one.

use std::arch::x86_64::*;

use super::{Kernel, Lanes};

#[target_feature(enable = "avx2,fma")]
pub(super) fn run_avx2<K: Kernel>(kernel: K) {
    kernel.run::<Ymm<false>>();
}

#[target_feature(enable = "avx2,fma,avxvnni")]
pub(super) fn run_avx_vnni<K: Kernel>(kernel: K) {
    kernel.run::<Ymm<true>>();
}

#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma")]
pub(super) fn run_avx512<K: Kernel>(kernel: K) {
    kernel.run::<Zmm>();
}

/// Two registers; `VNNI` tells whether the CPU multiplies and adds bytes in one instruction.
#[derive(Clone, Copy)]
struct Ymm<const VNNI: bool>(__m256, __m256);

#[derive(Clone, Copy)]
struct Zmm(__m512);

/// Exact dot products without VNNI: bytes are widened, since `vpmaddubsw` would saturate.
///
/// # Safety
/// AVX2 must be enabled.
#[inline(always)]
unsafe fn dot_by_widening(sums: __m256i, unsigned: __m256i, signed: __m256i) -> __m256i {
    // SAFETY: AVX2 is enabled by the contract.
    unsafe {
        let low = _mm256_madd_epi16(
            _mm256_cvtepu8_epi16(_mm256_castsi256_si128(unsigned)),
            _mm256_cvtepi8_epi16(_mm256_castsi256_si128(signed)),
        );
        let high = _mm256_madd_epi16(
            _mm256_cvtepu8_epi16(_mm256_extracti128_si256::<1>(unsigned)),
            _mm256_cvtepi8_epi16(_mm256_extracti128_si256::<1>(signed)),
        );
        // Pairs of lanes 0 to 3 in `low`, 4 to 7 in `high`; adding neighbors leaves them in the order 0 1 4 5 2 3 6 7.
        let pairs = _mm256_hadd_epi32(low, high);
        _mm256_add_epi32(sums, _mm256_permute4x64_epi64::<0b11_01_10_00>(pairs))
    }
}

// SAFETY of all blocks: by the contract of the trait the instructions exist and the pointers are valid.
impl<const VNNI: bool> Lanes for Ymm<VNNI> {
    const WIDE: bool = false;
    type Ints = (__m256i, __m256i);
    type Quads = (__m256i, __m256i);

    #[inline(always)]
    unsafe fn splat(value: f32) -> Self {
        // SAFETY: see above.
        unsafe { Self(_mm256_set1_ps(value), _mm256_set1_ps(value)) }
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: see above.
        unsafe { Self(_mm256_loadu_ps(from), _mm256_loadu_ps(from.add(8))) }
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: see above.
        unsafe {
            _mm256_storeu_ps(to, self.0);
            _mm256_storeu_ps(to.add(8), self.1);
        }
    }

    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        // SAFETY: see above.
        unsafe { Self(_mm256_add_ps(self.0, other.0), _mm256_add_ps(self.1, other.1)) }
    }

    #[inline(always)]
    unsafe fn max(self, other: Self) -> Self {
        // SAFETY: see above.
        unsafe { Self(_mm256_max_ps(self.0, other.0), _mm256_max_ps(self.1, other.1)) }
    }

    #[inline(always)]
    unsafe fn min(self, other: Self) -> Self {
        // SAFETY: see above.
        unsafe { Self(_mm256_min_ps(self.0, other.0), _mm256_min_ps(self.1, other.1)) }
    }

    #[inline(always)]
    unsafe fn power_of_two(self) -> Self {
        // SAFETY: see above.
        unsafe {
            let one = _mm256_castps_si256(_mm256_set1_ps(1.0));
            let power = |x| {
                _mm256_castsi256_ps(_mm256_add_epi32(_mm256_slli_epi32::<23>(_mm256_castps_si256(x)), one))
            };
            Self(power(self.0), power(self.1))
        }
    }

    #[inline(always)]
    unsafe fn mul(self, other: Self) -> Self {
        // SAFETY: see above.
        unsafe { Self(_mm256_mul_ps(self.0, other.0), _mm256_mul_ps(self.1, other.1)) }
    }

    #[inline(always)]
    unsafe fn fma(self, a: Self, b: Self) -> Self {
        // SAFETY: see above.
        unsafe { Self(_mm256_fmadd_ps(a.0, b.0, self.0), _mm256_fmadd_ps(a.1, b.1, self.1)) }
    }

    #[inline(always)]
    unsafe fn from_ints(ints: Self::Ints) -> Self {
        // SAFETY: see above.
        unsafe { Self(_mm256_cvtepi32_ps(ints.0), _mm256_cvtepi32_ps(ints.1)) }
    }

    #[inline(always)]
    unsafe fn swap<const DISTANCE: usize>(self) -> Self {
        // SAFETY: see above.
        unsafe {
            match DISTANCE {
                1 => Self(
                    _mm256_permute_ps::<0b10_11_00_01>(self.0),
                    _mm256_permute_ps::<0b10_11_00_01>(self.1),
                ),
                2 => Self(
                    _mm256_permute_ps::<0b01_00_11_10>(self.0),
                    _mm256_permute_ps::<0b01_00_11_10>(self.1),
                ),
                4 => Self(
                    _mm256_permute2f128_ps::<1>(self.0, self.0),
                    _mm256_permute2f128_ps::<1>(self.1, self.1),
                ),
                _ => Self(self.1, self.0),
            }
        }
    }

    #[inline(always)]
    unsafe fn round_to_bytes(self, to: *mut i8) -> Self::Ints {
        // SAFETY: see above.
        unsafe {
            let ints = (_mm256_cvtps_epi32(self.0), _mm256_cvtps_epi32(self.1));
            let words = _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_packs_epi32(ints.0, ints.1));
            let bytes = _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256::<1>(words));
            _mm_storeu_si128(to.cast(), bytes);
            ints
        }
    }

    #[inline(always)]
    unsafe fn magnitude_bits(self) -> Self::Ints {
        // SAFETY: see above.
        unsafe {
            let mask = _mm256_set1_epi32(0x7fff_ffff);
            (
                _mm256_and_si256(_mm256_castps_si256(self.0), mask),
                _mm256_and_si256(_mm256_castps_si256(self.1), mask),
            )
        }
    }

    #[inline(always)]
    unsafe fn zero_ints() -> Self::Ints {
        // SAFETY: see above.
        unsafe { (_mm256_setzero_si256(), _mm256_setzero_si256()) }
    }

    #[inline(always)]
    unsafe fn splat_ints(value: i32) -> Self::Ints {
        // SAFETY: see above.
        unsafe { (_mm256_set1_epi32(value), _mm256_set1_epi32(value)) }
    }

    #[inline(always)]
    unsafe fn load_ints(from: *const i32) -> Self::Ints {
        // SAFETY: see above.
        unsafe { (_mm256_loadu_si256(from.cast()), _mm256_loadu_si256(from.add(8).cast())) }
    }

    #[inline(always)]
    unsafe fn store_ints(ints: Self::Ints, to: *mut i32) {
        // SAFETY: see above.
        unsafe {
            _mm256_storeu_si256(to.cast(), ints.0);
            _mm256_storeu_si256(to.add(8).cast(), ints.1);
        }
    }

    #[inline(always)]
    unsafe fn add_ints(a: Self::Ints, b: Self::Ints) -> Self::Ints {
        // SAFETY: see above.
        unsafe { (_mm256_add_epi32(a.0, b.0), _mm256_add_epi32(a.1, b.1)) }
    }

    #[inline(always)]
    unsafe fn max_ints(a: Self::Ints, b: Self::Ints) -> Self::Ints {
        // SAFETY: see above.
        unsafe { (_mm256_max_epi32(a.0, b.0), _mm256_max_epi32(a.1, b.1)) }
    }

    #[inline(always)]
    unsafe fn load_quads(from: *const u8) -> Self::Quads {
        // SAFETY: see above.
        unsafe { (_mm256_loadu_si256(from.cast()), _mm256_loadu_si256(from.add(32).cast())) }
    }

    #[inline(always)]
    unsafe fn splat_quad(from: *const u8) -> Self::Quads {
        // SAFETY: see above.
        unsafe {
            let quad = _mm256_set1_epi32(from.cast::<i32>().read_unaligned());
            (quad, quad)
        }
    }

    #[inline(always)]
    unsafe fn dot(sums: Self::Ints, unsigned: Self::Quads, signed: Self::Quads) -> Self::Ints {
        // SAFETY: see above.
        unsafe {
            if VNNI {
                (
                    _mm256_dpbusd_avx_epi32(sums.0, unsigned.0, signed.0),
                    _mm256_dpbusd_avx_epi32(sums.1, unsigned.1, signed.1),
                )
            } else {
                (dot_by_widening(sums.0, unsigned.0, signed.0), dot_by_widening(sums.1, unsigned.1, signed.1))
            }
        }
    }

    #[inline(always)]
    unsafe fn prefetch(at: *const u8) {
        // SAFETY: see above.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(at.cast()) }
    }
}

// SAFETY of all blocks: as above.
impl Lanes for Zmm {
    const WIDE: bool = true;
    type Ints = __m512i;
    type Quads = __m512i;

    #[inline(always)]
    unsafe fn splat(value: f32) -> Self {
        // SAFETY: see above.
        unsafe { Self(_mm512_set1_ps(value)) }
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: see above.
        unsafe { Self(_mm512_loadu_ps(from)) }
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: see above.
        unsafe { _mm512_storeu_ps(to, self.0) }
    }

    #[inline(always)]
    unsafe fn add(self, other: Self) -> Self {
        // SAFETY: see above.
        unsafe { Self(_mm512_add_ps(self.0, other.0)) }
    }

    #[inline(always)]
    unsafe fn max(self, other: Self) -> Self {
        // SAFETY: see above.
        unsafe { Self(_mm512_max_ps(self.0, other.0)) }
    }

    #[inline(always)]
    unsafe fn min(self, other: Self) -> Self {
        // SAFETY: see above.
        unsafe { Self(_mm512_min_ps(self.0, other.0)) }
    }

    #[inline(always)]
    unsafe fn power_of_two(self) -> Self {
        // SAFETY: see above.
        unsafe {
            let one = _mm512_castps_si512(_mm512_set1_ps(1.0));
            Self(_mm512_castsi512_ps(_mm512_add_epi32(
                _mm512_slli_epi32::<23>(_mm512_castps_si512(self.0)),
                one,
            )))
        }
    }

    #[inline(always)]
    unsafe fn mul(self, other: Self) -> Self {
        // SAFETY: see above.
        unsafe { Self(_mm512_mul_ps(self.0, other.0)) }
    }

    #[inline(always)]
    unsafe fn fma(self, a: Self, b: Self) -> Self {
        // SAFETY: see above.
        unsafe { Self(_mm512_fmadd_ps(a.0, b.0, self.0)) }
    }

    #[inline(always)]
    unsafe fn from_ints(ints: Self::Ints) -> Self {
        // SAFETY: see above.
        unsafe { Self(_mm512_cvtepi32_ps(ints)) }
    }

    #[inline(always)]
    unsafe fn swap<const DISTANCE: usize>(self) -> Self {
        // SAFETY: see above.
        unsafe {
            Self(match DISTANCE {
                1 => _mm512_permute_ps::<0b10_11_00_01>(self.0),
                2 => _mm512_permute_ps::<0b01_00_11_10>(self.0),
                4 => _mm512_shuffle_f32x4::<0b10_11_00_01>(self.0, self.0),
                _ => _mm512_shuffle_f32x4::<0b01_00_11_10>(self.0, self.0),
            })
        }
    }

    #[inline(always)]
    unsafe fn round_to_bytes(self, to: *mut i8) -> Self::Ints {
        // SAFETY: see above.
        unsafe {
            let ints = _mm512_cvtps_epi32(self.0);
            _mm_storeu_si128(to.cast(), _mm512_cvtsepi32_epi8(ints));
            ints
        }
    }

    #[inline(always)]
    unsafe fn magnitude_bits(self) -> Self::Ints {
        // SAFETY: see above.
        unsafe { _mm512_and_si512(_mm512_castps_si512(self.0), _mm512_set1_epi32(0x7fff_ffff)) }
    }

    #[inline(always)]
    unsafe fn zero_ints() -> Self::Ints {
        // SAFETY: see above.
        unsafe { _mm512_setzero_si512() }
    }

    #[inline(always)]
    unsafe fn splat_ints(value: i32) -> Self::Ints {
        // SAFETY: see above.
        unsafe { _mm512_set1_epi32(value) }
    }

    #[inline(always)]
    unsafe fn load_ints(from: *const i32) -> Self::Ints {
        // SAFETY: see above.
        unsafe { _mm512_loadu_si512(from.cast()) }
    }

    #[inline(always)]
    unsafe fn store_ints(ints: Self::Ints, to: *mut i32) {
        // SAFETY: see above.
        unsafe { _mm512_storeu_si512(to.cast(), ints) }
    }

    #[inline(always)]
    unsafe fn add_ints(a: Self::Ints, b: Self::Ints) -> Self::Ints {
        // SAFETY: see above.
        unsafe { _mm512_add_epi32(a, b) }
    }

    #[inline(always)]
    unsafe fn max_ints(a: Self::Ints, b: Self::Ints) -> Self::Ints {
        // SAFETY: see above.
        unsafe { _mm512_max_epi32(a, b) }
    }

    #[inline(always)]
    unsafe fn load_quads(from: *const u8) -> Self::Quads {
        // SAFETY: see above.
        unsafe { _mm512_loadu_si512(from.cast()) }
    }

    #[inline(always)]
    unsafe fn splat_quad(from: *const u8) -> Self::Quads {
        // SAFETY: see above.
        unsafe { _mm512_set1_epi32(from.cast::<i32>().read_unaligned()) }
    }

    #[inline(always)]
    unsafe fn dot(sums: Self::Ints, unsigned: Self::Quads, signed: Self::Quads) -> Self::Ints {
        // SAFETY: see above.
        unsafe { _mm512_dpbusd_epi32(sums, unsigned, signed) }
    }

    #[inline(always)]
    unsafe fn prefetch(at: *const u8) {
        // SAFETY: see above.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(at.cast()) }
    }
}
