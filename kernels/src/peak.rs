//! What a core can do at most: loops that keep one of its parts busy and do nothing else.
//!
//! A measured speed means little without the limit of the machine it was measured on. Each function does a given
//! amount of work and says how much that was; clock and threads are the caller's. The arithmetic loops stay in
//! registers, so they bound every kernel from above; what memory allows is for [`read`] and a plain copy to show.

use std::hint::black_box;

/// The widest instruction of one kind that this CPU has.
#[derive(Clone, Copy)]
pub struct Unit {
    name: &'static str,
    run: fn(u64) -> u64,
}

impl Unit {
    /// Products and sums of bytes.
    pub fn int8() -> Self {
        #[cfg(target_arch = "x86_64")]
        if let Some(unit) = x86::int8() {
            return unit;
        }
        Self { name: "portable", run: portable_int8 }
    }

    /// Fused multiply-adds of f32.
    pub fn f32() -> Self {
        #[cfg(target_arch = "x86_64")]
        if let Some(unit) = x86::f32() {
            return unit;
        }
        Self { name: "portable", run: portable_f32 }
    }

    /// Name of the instructions.
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// Works for some rounds, a fraction of a microsecond each; returns the operations done, two a product.
    pub fn run(&self, rounds: u64) -> u64 {
        (self.run)(rounds)
    }
}

/// Reads all of the memory once, and nothing is done with it but a sum.
pub fn read(data: &[u64]) -> u64 {
    let mut sums = [0u64; 16];
    for chunk in data.chunks_exact(16) {
        for (sum, value) in sums.iter_mut().zip(chunk) {
            *sum = sum.wrapping_add(*value);
        }
    }
    sums.iter().fold(0, |sum, value| sum.wrapping_add(*value))
}

const PORTABLE_LANES: usize = 64;

fn portable_int8(rounds: u64) -> u64 {
    let factors = black_box([3i8; PORTABLE_LANES]);
    let mut sums = [0i32; PORTABLE_LANES];
    for round in 0..rounds {
        let value = round as i8;
        for (sum, factor) in sums.iter_mut().zip(factors) {
            *sum = sum.wrapping_add(i32::from(factor) * i32::from(value));
        }
    }
    black_box(sums);
    rounds * 2 * PORTABLE_LANES as u64
}

fn portable_f32(rounds: u64) -> u64 {
    let factor = black_box(0.5f32);
    let mut sums = [1.0f32; PORTABLE_LANES];
    for _ in 0..rounds {
        for sum in &mut sums {
            *sum = *sum * factor + 1.0;
        }
    }
    black_box(sums);
    rounds * 2 * PORTABLE_LANES as u64
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::asm;
    use std::arch::x86_64::*;
    use std::hint::black_box;

    use super::Unit;

    /// Independent sums: enough to hide the latency of an instruction, few enough for the registers.
    const NUM_SUMS: usize = 12;

    pub(super) fn int8() -> Option<Unit> {
        if has_tiles() {
            return Some(Unit { name: "AMX", run: tiles });
        }
        if is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512vnni") {
            // SAFETY: the features were just detected.
            return Some(Unit { name: "AVX-512 VNNI", run: |rounds| unsafe { avx512_vnni(rounds) } });
        }
        if is_x86_feature_detected!("avxvnni") && is_x86_feature_detected!("avx2") {
            // SAFETY: the features were just detected.
            return Some(Unit { name: "AVX-VNNI", run: |rounds| unsafe { avx_vnni(rounds) } });
        }
        if is_x86_feature_detected!("avx2") {
            // SAFETY: the feature was just detected.
            return Some(Unit { name: "AVX2", run: |rounds| unsafe { avx2_int8(rounds) } });
        }
        None
    }

    pub(super) fn f32() -> Option<Unit> {
        if is_x86_feature_detected!("avx512f") {
            // SAFETY: the feature was just detected.
            return Some(Unit { name: "AVX-512", run: |rounds| unsafe { avx512_f32(rounds) } });
        }
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
            // SAFETY: the features were just detected.
            return Some(Unit { name: "AVX2", run: |rounds| unsafe { avx2_f32(rounds) } });
        }
        None
    }

    macro_rules! register_loop {
        ($name:ident, $features:literal, $operations:literal, $zero:expr, $value:expr, $step:expr) => {
            #[target_feature(enable = $features)]
            fn $name(rounds: u64) -> u64 {
                let value = black_box($value);
                let mut sums = [$zero; NUM_SUMS];
                for _ in 0..rounds {
                    for sum in &mut sums {
                        *sum = $step(*sum, value);
                    }
                }
                black_box(sums);
                rounds * NUM_SUMS as u64 * $operations
            }
        };
    }

    register_loop!(
        avx512_vnni,
        "avx512f,avx512vnni",
        128,
        _mm512_setzero_si512(),
        _mm512_set1_epi8(1),
        |sum, value| { _mm512_dpbusd_epi32(sum, value, value) }
    );
    register_loop!(
        avx_vnni,
        "avx2,avxvnni",
        64,
        _mm256_setzero_si256(),
        _mm256_set1_epi8(1),
        |sum, value| { _mm256_dpbusd_avx_epi32(sum, value, value) }
    );
    register_loop!(avx2_int8, "avx2", 64, _mm256_setzero_si256(), _mm256_set1_epi8(1), |sum, value| {
        let pairs = _mm256_maddubs_epi16(value, sum);
        _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, value))
    });
    register_loop!(avx512_f32, "avx512f", 32, _mm512_set1_ps(1.0), _mm512_set1_ps(0.5), |sum, value| {
        _mm512_fmadd_ps(sum, value, value)
    });
    register_loop!(avx2_f32, "avx2,fma", 16, _mm256_set1_ps(1.0), _mm256_set1_ps(0.5), |sum, value| {
        _mm256_fmadd_ps(sum, value, value)
    });

    /// Whether the CPU has tiles for bytes and the system lets this process use them.
    fn has_tiles() -> bool {
        let cpu = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        if !cpu.contains(" amx_int8") || !cfg!(target_os = "linux") {
            return false;
        }
        // arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA)
        let mut result: isize = 158;
        // SAFETY: the call changes only what this process may use; a system call clobbers `rcx` and `r11`.
        unsafe {
            asm!("syscall", inout("rax") result, in("rdi") 0x1023, in("rsi") 18, out("rcx") _, out("r11") _,
                options(nostack));
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

    /// Eight tiles of 16 rows of 64 bytes.
    static TILES: TileConfig = TileConfig {
        palette: 1,
        start_row: 0,
        reserved: [0; 14],
        row_bytes: [64, 64, 64, 64, 64, 64, 64, 64, 0, 0, 0, 0, 0, 0, 0, 0],
        rows: [16, 16, 16, 16, 16, 16, 16, 16, 0, 0, 0, 0, 0, 0, 0, 0],
    };

    fn tiles(rounds: u64) -> u64 {
        if rounds == 0 {
            return 0;
        }
        // SAFETY: made a unit only after `has_tiles`; compiled code uses no tiles, and they are freed at the end.
        unsafe {
            asm!(
                "ldtilecfg [{config}]",
                "2:",
                "tdpbusd tmm0, tmm6, tmm7",
                "tdpbusd tmm1, tmm6, tmm7",
                "tdpbusd tmm2, tmm6, tmm7",
                "tdpbusd tmm3, tmm6, tmm7",
                "dec {rounds}",
                "jnz 2b",
                "tilerelease",
                config = in(reg) &raw const TILES,
                rounds = inout(reg) rounds => _,
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nostack),
            );
        }
        // 16 rows by 16 columns by 64 bytes, each a product and a sum.
        rounds * 4 * 2 * 16 * 16 * 64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_unit_does_what_it_counts() {
        for unit in [Unit::int8(), Unit::f32()] {
            assert_eq!(unit.run(0), 0, "{}", unit.name());
            assert_eq!(unit.run(7) * 2, unit.run(14), "{}", unit.name());
        }
        assert_eq!(portable_int8(5), 10 * PORTABLE_LANES as u64);
        assert_eq!(portable_f32(5), 10 * PORTABLE_LANES as u64);
        assert_eq!(read(&vec![2; 320]), 640);
    }
}
