//! Which instructions the CPU has, found once at run time, and the vectors the kernels are written in.
//!
//! A kernel is one generic body over [`Lanes`]; [`Isa::run`] compiles it once for each instruction set and is the
//! only dispatch. Everything a kernel calls must be `#[inline(always)]`, or it would not be compiled for the set.
//! Tiles (AMX) compute nothing but integer dot products, see [`tiles`](super::tiles); whatever surrounds those is
//! compiled for AVX-512 there.

mod portable;
#[cfg(target_arch = "x86_64")]
mod x86;

use self::portable::Portable;

/// An instruction set the kernels are compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Isa {
    Portable,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    /// AVX2 with the dot products of AVX-VNNI.
    #[cfg(target_arch = "x86_64")]
    AvxVnni,
    /// AVX-512 with VNNI.
    #[cfg(target_arch = "x86_64")]
    Avx512,
    /// AVX-512 with VNNI, and AMX tiles for matrices of some rows.
    #[cfg(target_arch = "x86_64")]
    Amx,
}

/// One kernel with its arguments.
pub(crate) trait Kernel {
    /// Must be `#[inline(always)]`.
    fn run<V: Lanes>(self);
}

/// [`LANES`](super::LANES) numbers.
///
/// # Safety
/// The functions may only be called where the instruction set is enabled, that is below [`Isa::run`];
/// pointers must be valid for a whole vector.
pub(crate) trait Lanes: Copy {
    /// Registers suffice for tiles of 16 vectors and more.
    const WIDE: bool;
    /// One i32 a lane.
    type Ints: Copy;
    /// Four bytes a lane.
    type Quads: Copy;

    unsafe fn splat(value: f32) -> Self;
    unsafe fn load(from: *const f32) -> Self;
    unsafe fn store(self, to: *mut f32);
    unsafe fn mul(self, other: Self) -> Self;
    /// `self + a * b`, rounded once.
    unsafe fn fma(self, a: Self, b: Self) -> Self;
    /// Each integer rounded to the nearest number.
    unsafe fn from_ints(ints: Self::Ints) -> Self;
    /// Lane `i` becomes lane `i ^ DISTANCE`, which is 1, 2, 4 or 8.
    unsafe fn swap<const DISTANCE: usize>(self) -> Self;
    /// Rounds numbers between -127 and 127 to the nearest byte, ties to even; returns the bytes as integers.
    unsafe fn round_to_bytes(self, to: *mut i8) -> Self::Ints;
    /// The bits without the sign: they are ordered as the magnitudes are, infinity and NaN last.
    unsafe fn magnitude_bits(self) -> Self::Ints;

    unsafe fn zero_ints() -> Self::Ints;
    unsafe fn splat_ints(value: i32) -> Self::Ints;
    unsafe fn load_ints(from: *const i32) -> Self::Ints;
    unsafe fn store_ints(ints: Self::Ints, to: *mut i32);
    unsafe fn add_ints(a: Self::Ints, b: Self::Ints) -> Self::Ints;
    unsafe fn max_ints(a: Self::Ints, b: Self::Ints) -> Self::Ints;

    unsafe fn load_quads(from: *const u8) -> Self::Quads;
    /// The same four bytes in each lane.
    unsafe fn splat_quad(from: *const u8) -> Self::Quads;
    /// Adds to each lane the sum of its four products of an unsigned and a signed byte, exactly.
    unsafe fn dot(sums: Self::Ints, unsigned: Self::Quads, signed: Self::Quads) -> Self::Ints;
    /// Asks for the cache line; the address need not be valid.
    unsafe fn prefetch(at: *const u8);
}

impl Isa {
    /// The best set of this CPU.
    pub(crate) fn detect() -> Self {
        *Self::available().last().expect("portable code is always available")
    }

    /// All sets of this CPU, the best one last.
    pub(crate) fn available() -> Vec<Self> {
        let mut available = vec![Self::Portable];
        #[cfg(target_arch = "x86_64")]
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
            available.push(Self::Avx2);
            if is_x86_feature_detected!("avxvnni") {
                available.push(Self::AvxVnni);
            }
            if is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512vl")
                && is_x86_feature_detected!("avx512vnni")
            {
                available.push(Self::Avx512);
                if super::tiles::available() {
                    available.push(Self::Amx);
                }
            }
        }
        available
    }

    /// Whether integer dot products may be computed on tiles.
    pub(crate) fn has_tiles(self) -> bool {
        #[cfg(target_arch = "x86_64")]
        return self == Self::Amx;
        #[cfg(not(target_arch = "x86_64"))]
        return false;
    }

    #[inline]
    pub(crate) fn run<K: Kernel>(self, kernel: K) {
        match self {
            Self::Portable => kernel.run::<Portable>(),
            // SAFETY: the variant is only made by `available`, after the features were detected.
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => unsafe { x86::run_avx2(kernel) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Self::AvxVnni => unsafe { x86::run_avx_vnni(kernel) },
            // SAFETY: as above.
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 | Self::Amx => unsafe { x86::run_avx512(kernel) },
        }
    }
}
