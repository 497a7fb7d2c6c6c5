//! The machine's own limits, measured on as many threads as the engine has.
//!
//! Threads start together and each counts what it has done when its time is up, so a thread that is disturbed
//! lowers the sum and nothing else. A peak is the best of a few tries, since other work can only lower it.

use std::hint::black_box;
use std::sync::Barrier;
use std::time::Duration;

use serde::Serialize;
use tidemill_kernels::peak::{Unit, read};

use super::table;
use crate::clock::Clock;

const TIME: Duration = Duration::from_millis(150);
const NUM_TRIES: usize = 4;
/// Rounds of an arithmetic loop between two looks at the clock.
const ROUNDS: u64 = 20_000;
/// What all threads together read, or copy: no cache holds it, as none holds the weights of a model.
const MEMORY_BYTES: usize = 256 << 20;

/// Peaks of arithmetic and memory.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Machine {
    pub(super) num_threads: usize,
    pub(super) int8_unit: &'static str,
    /// Operations, two a product, in units of a billion a second.
    pub(super) int8_gops: f64,
    pub(super) f32_unit: &'static str,
    pub(super) f32_gflops: f64,
    pub(super) read_gb_per_second: f64,
    /// Bytes read and bytes written together.
    pub(super) copy_gb_per_second: f64,
}

impl Machine {
    pub(super) fn measure(num_threads: usize, clock: Clock) -> Self {
        let (int8, f32) = (Unit::int8(), Unit::f32());
        let arithmetic = |unit: Unit| giga_rate(num_threads, clock, || move || unit.run(ROUNDS));
        let memory_len = MEMORY_BYTES / size_of::<u64>() / num_threads;
        let reading = || {
            let data = vec![1u64; memory_len];
            move || {
                black_box(read(black_box(&data)));
                size_of_val(&*data) as u64
            }
        };
        let copying = || {
            let (from, mut to) = (vec![1u64; memory_len / 2], vec![2u64; memory_len / 2]);
            move || {
                black_box(&mut to).copy_from_slice(black_box(&from));
                2 * size_of_val(&*from) as u64
            }
        };
        Self {
            num_threads,
            int8_unit: int8.name(),
            int8_gops: arithmetic(int8),
            f32_unit: f32.name(),
            f32_gflops: arithmetic(f32),
            read_gb_per_second: giga_rate(num_threads, clock, reading),
            copy_gb_per_second: giga_rate(num_threads, clock, copying),
        }
    }

    pub(super) fn render(&self) -> String {
        let rows = [
            (format!("int8 ({})", self.int8_unit), self.int8_gops, "GOP/s"),
            (format!("f32 ({})", self.f32_unit), self.f32_gflops, "GFLOP/s"),
            ("memory read".to_owned(), self.read_gb_per_second, "GB/s"),
            ("memory copied".to_owned(), self.copy_gb_per_second, "GB/s"),
        ];
        let threads = format!("machine, {} threads", self.num_threads);
        table(
            &[&threads, "peak", ""],
            rows.map(|(name, peak, unit)| vec![name, format!("{peak:.0}"), unit.to_owned()]),
        )
    }
}

/// Best sum over all threads of the work done in a second, in billions. Each thread makes its own work.
fn giga_rate<W: FnMut() -> u64>(num_threads: usize, clock: Clock, make: impl Fn() -> W + Sync) -> f64 {
    let barrier = Barrier::new(num_threads);
    let rates = || {
        let mut work = make();
        work();
        [(); NUM_TRIES].map(|()| {
            barrier.wait();
            rate(clock, &mut work)
        })
    };
    let rates: Vec<[f64; NUM_TRIES]> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..num_threads).map(|_| scope.spawn(rates)).collect();
        threads.into_iter().map(|thread| thread.join().expect("the loops do not panic")).collect()
    });
    let totals = (0..NUM_TRIES).map(|index| rates.iter().map(|rates| rates[index]).sum::<f64>());
    totals.fold(0.0, f64::max) / 1e9
}

/// Work done in a second by this thread.
pub(super) fn rate(clock: Clock, work: &mut impl FnMut() -> u64) -> f64 {
    let start = clock.elapsed();
    let mut done = 0;
    loop {
        done += work();
        let time = clock.elapsed() - start;
        if time >= TIME {
            return done as f64 / time.as_secs_f64();
        }
    }
}
