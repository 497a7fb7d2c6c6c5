//! Integer dot products on AMX tiles: 16 rows by 16 columns by 64 bytes in one instruction.
//!
//! Rust has no stable intrinsics for tiles, so the few instructions are assembly. Tile registers are never touched
//! by compiled code: a [`Tiles`] guard configures them on its thread and frees them when dropped, and all uses lie
//! in between. Sums are integers, so they equal those of vectors exactly.

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::asm;
    use std::arch::x86_64::__cpuid_count;
    use std::marker::PhantomData;
    use std::sync::OnceLock;

    /// `arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA)`
    const SYS_ARCH_PRCTL: usize = 158;
    const ARCH_REQ_XCOMP_PERM: usize = 0x1023;
    const XFEATURE_XTILEDATA: usize = 18;

    /// Whether the CPU has tiles for bytes and the system lets this process use them.
    pub(crate) fn available() -> bool {
        static AVAILABLE: OnceLock<bool> = OnceLock::new();
        *AVAILABLE.get_or_init(|| {
            // Bits of leaf 7, register EDX: AMX-TILE and AMX-INT8.
            const TILE_BITS: u32 = 1 << 24 | 1 << 25;
            // The leaf is there: the CPU has AVX-512, which is told in it too.
            let has_tiles =
                is_x86_feature_detected!("avx512f") && __cpuid_count(7, 0).edx & TILE_BITS == TILE_BITS;
            has_tiles && cfg!(target_os = "linux") && request_permission()
        })
    }

    fn request_permission() -> bool {
        let mut result = SYS_ARCH_PRCTL;
        // SAFETY: the call changes nothing but what this process may use; `rcx` and `r11` are what a call clobbers.
        unsafe {
            asm!(
                "syscall",
                inout("rax") result,
                in("rdi") ARCH_REQ_XCOMP_PERM,
                in("rsi") XFEATURE_XTILEDATA,
                out("rcx") _,
                out("r11") _,
                options(nostack),
            );
        }
        result == 0
    }

    #[repr(C, align(64))]
    struct TileConfig {
        palette: u8,
        start_row: u8,
        reserved: [u8; 14],
        row_bytes: [u16; 16],
        rows: [u8; 16],
    }

    /// All eight tiles as 16 rows of 64 bytes.
    static CONFIG: TileConfig = TileConfig {
        palette: 1,
        start_row: 0,
        reserved: [0; 14],
        row_bytes: [64, 64, 64, 64, 64, 64, 64, 64, 0, 0, 0, 0, 0, 0, 0, 0],
        rows: [16, 16, 16, 16, 16, 16, 16, 16, 0, 0, 0, 0, 0, 0, 0, 0],
    };

    /// Tiles are configured on this thread while it lives.
    pub(crate) struct Tiles {
        /// Bound to its thread.
        not_send: PhantomData<*const ()>,
    }

    /// `num_steps` times 64 products for 16 or 32 rows and 32 columns.
    #[derive(Clone, Copy)]
    pub(crate) struct TileDots {
        /// First byte of row 0.
        pub(crate) a: *const u8,
        pub(crate) a_row_stride: usize,
        /// Rows 16 to 31 are wanted too.
        pub(crate) two_row_tiles: bool,
        /// First quads of columns 0 and 16; a row of a tile is 16 columns of 4 bytes.
        pub(crate) b: [*const u8; 2],
        pub(crate) b_quad_stride: usize,
        pub(crate) num_steps: usize,
        /// Sum of row 0 and column 0; columns lie side by side.
        pub(crate) sums: *mut i32,
        pub(crate) sums_row_stride: usize,
    }

    /// One row tile: sums in `tmm0` and `tmm1`.
    macro_rules! one_row_tile {
        ($dot:literal, $dots:expr) => {
            asm!(
                "tilezero tmm0",
                "tilezero tmm1",
                "2:",
                "tileloadd tmm4, [{a} + {a_stride}*1]",
                "tileloadd tmm6, [{b0} + {b_stride}*1]",
                concat!($dot, " tmm0, tmm4, tmm6"),
                "tileloadd tmm7, [{b1} + {b_stride}*1]",
                concat!($dot, " tmm1, tmm4, tmm7"),
                "add {a}, 64",
                "add {b0}, {b_step}",
                "add {b1}, {b_step}",
                "dec {num_steps}",
                "jnz 2b",
                a = inout(reg) $dots.a => _,
                a_stride = in(reg) $dots.a_row_stride,
                b0 = inout(reg) $dots.b[0] => _,
                b1 = inout(reg) $dots.b[1] => _,
                b_stride = in(reg) $dots.b_quad_stride,
                b_step = in(reg) $dots.b_quad_stride * 16,
                num_steps = inout(reg) $dots.num_steps => _,
                options(nostack, readonly),
            )
        };
    }

    /// Two row tiles: sums of the second one in `tmm2` and `tmm3`.
    macro_rules! two_row_tiles {
        ($dot:literal, $dots:expr) => {
            asm!(
                "tilezero tmm0",
                "tilezero tmm1",
                "tilezero tmm2",
                "tilezero tmm3",
                "2:",
                "tileloadd tmm4, [{a0} + {a_stride}*1]",
                "tileloadd tmm6, [{b0} + {b_stride}*1]",
                concat!($dot, " tmm0, tmm4, tmm6"),
                "tileloadd tmm7, [{b1} + {b_stride}*1]",
                concat!($dot, " tmm1, tmm4, tmm7"),
                "tileloadd tmm5, [{a1} + {a_stride}*1]",
                concat!($dot, " tmm2, tmm5, tmm6"),
                concat!($dot, " tmm3, tmm5, tmm7"),
                "add {a0}, 64",
                "add {a1}, 64",
                "add {b0}, {b_step}",
                "add {b1}, {b_step}",
                "dec {num_steps}",
                "jnz 2b",
                a0 = inout(reg) $dots.a => _,
                a1 = inout(reg) $dots.a.wrapping_add(16 * $dots.a_row_stride) => _,
                a_stride = in(reg) $dots.a_row_stride,
                b0 = inout(reg) $dots.b[0] => _,
                b1 = inout(reg) $dots.b[1] => _,
                b_stride = in(reg) $dots.b_quad_stride,
                b_step = in(reg) $dots.b_quad_stride * 16,
                num_steps = inout(reg) $dots.num_steps => _,
                options(nostack, readonly),
            )
        };
    }

    /// Stores two tiles side by side.
    macro_rules! store_pair {
        ($first:literal, $second:literal, $sums:expr, $row_stride:expr) => {
            asm!(
                concat!("tilestored [{c0} + {c_stride}*1], ", $first),
                concat!("tilestored [{c1} + {c_stride}*1], ", $second),
                c0 = in(reg) $sums,
                c1 = in(reg) $sums.wrapping_add(16),
                c_stride = in(reg) $row_stride * size_of::<i32>(),
                options(nostack),
            )
        };
    }

    impl Tiles {
        pub(crate) fn new() -> Self {
            assert!(available(), "tiles are used where there are none");
            // SAFETY: the CPU has tiles and the process may use them; the configuration is 64 valid bytes.
            unsafe { asm!("ldtilecfg [{}]", in(reg) &raw const CONFIG, options(nostack, readonly)) };
            Self { not_send: PhantomData }
        }

        /// # Safety
        /// All bytes and sums named by `dots` must be in bounds, and nobody else may use the sums.
        /// `num_steps` is not zero.
        pub(crate) unsafe fn dots<const UNSIGNED_B: bool>(&self, dots: TileDots) {
            debug_assert!(dots.num_steps > 0);
            // SAFETY: the tiles are configured while `self` lives; the memory is promised by the caller.
            unsafe {
                match (UNSIGNED_B, dots.two_row_tiles) {
                    (true, false) => one_row_tile!("tdpbsud", dots),
                    (true, true) => two_row_tiles!("tdpbsud", dots),
                    (false, false) => one_row_tile!("tdpbusd", dots),
                    (false, true) => two_row_tiles!("tdpbusd", dots),
                }
                store_pair!("tmm0", "tmm1", dots.sums, dots.sums_row_stride);
                if dots.two_row_tiles {
                    let sums = dots.sums.wrapping_add(16 * dots.sums_row_stride);
                    store_pair!("tmm2", "tmm3", sums, dots.sums_row_stride);
                }
            }
        }
    }

    impl Drop for Tiles {
        fn drop(&mut self) {
            // SAFETY: no tile is in use any more; without state, switching threads costs less.
            unsafe { asm!("tilerelease", options(nostack, nomem)) };
        }
    }
}

#[cfg(target_arch = "x86_64")]
pub(crate) use self::x86::{TileDots, Tiles, available};

/// Elsewhere there are no tiles, so there is no value of this type.
#[cfg(not(target_arch = "x86_64"))]
pub(crate) enum Tiles {}

#[cfg(not(target_arch = "x86_64"))]
impl Tiles {
    pub(crate) fn new() -> Self {
        unreachable!("no instruction set here has tiles")
    }
}
