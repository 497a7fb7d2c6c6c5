//! What a core can do at most: loops that keep one of its parts busy and do nothing else.
//!
//! A measured speed means little without the limit of the machine it was measured on. Each function does a given
//! amount of work and says how much that was; clock and threads are the caller's. The arithmetic loops stay in
//! registers, so they bound every kernel from above; what memory allows is for [`read`] and a plain copy to show.

use std::hint::black_box;
use std::io;

use crate::backend::Backend;
use crate::cpu::packed::Packing;
use crate::cpu::{Cpu, Isa, Matrix, Scratch};
use crate::team::Team;

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

/// A linear layer of the fast path with arbitrary weights, to see how near a shape comes to the peak.
pub struct Linear {
    cpu: Cpu,
    weight: Matrix,
    scratch: Scratch,
    team: Team,
    /// `[num_rows, num_inputs]`
    x: Vec<f32>,
    /// `[num_rows, num_outputs]`
    out: Vec<f32>,
    num_inputs: u64,
}

impl Linear {
    pub fn new(
        num_rows: usize,
        num_inputs: usize,
        num_outputs: usize,
        num_threads: usize,
    ) -> io::Result<Self> {
        let cpu = Cpu { isa: Isa::detect(), packing: Packing::in_memory() };
        let number = |i: usize| (i * 37 % 101) as f32 - 50.0;
        let weight = cpu.matrix(num_outputs, num_inputs, &mut |output, row| {
            row.iter_mut().enumerate().for_each(|(i, weight)| *weight = number(i + output));
        });
        Ok(Self {
            cpu,
            weight,
            scratch: Scratch::default(),
            team: Team::new(num_threads)?,
            x: (0..num_rows * num_inputs).map(number).collect(),
            out: vec![0.0; num_rows * num_outputs],
            num_inputs: num_inputs as u64,
        })
    }

    /// Computes the layer once; returns the operations done, two a product.
    pub fn run(&mut self) -> u64 {
        let Self { cpu, weight, scratch, team, x, out, num_inputs } = self;
        team.install(|| cpu.linear(scratch, x, weight, out));
        2 * *num_inputs * out.len() as u64
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
    use crate::cpu::{Isa, Tiles};

    /// Independent sums: enough to hide the latency of an instruction, few enough for the registers.
    const NUM_SUMS: usize = 12;

    pub(super) fn int8() -> Option<Unit> {
        if Isa::detect().has_tiles() {
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

    fn tiles(rounds: u64) -> u64 {
        if rounds == 0 {
            return 0;
        }
        let _tiles = Tiles::new();
        // SAFETY: the tiles are configured while the guard lives; compiled code uses none.
        unsafe {
            asm!(
                "2:",
                "tdpbusd tmm0, tmm6, tmm7",
                "tdpbusd tmm1, tmm6, tmm7",
                "tdpbusd tmm2, tmm6, tmm7",
                "tdpbusd tmm3, tmm6, tmm7",
                "dec {rounds}",
                "jnz 2b",
                rounds = inout(reg) rounds => _,
                options(nostack, nomem),
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
        assert_eq!(Linear::new(3, 64, 20, 2).unwrap().run(), 2 * 3 * 64 * 20);
    }
}
