//! Working memory of the ops, kept between steps so that a step allocates nothing.

use std::sync::{Mutex, MutexGuard};

use super::quantize::RowLayout;
use crate::team;

/// Rows as bytes, see [`quantize`](super::quantize).
#[derive(Default)]
pub(crate) struct QuantizedRows {
    /// `[num_rows up to a multiple of 16, padded_len]`
    pub(super) bytes: Vec<i8>,
    /// `[num_rows, num_groups]`
    pub(super) scales: Vec<f32>,
    /// `[num_rows, num_groups]`
    pub(super) sums: Vec<i32>,
}

impl QuantizedRows {
    /// Makes room; what is there is arbitrary, and memory never shrinks.
    pub(super) fn resize(&mut self, layout: &RowLayout, num_rows: usize) {
        grow(&mut self.bytes, num_rows.next_multiple_of(16) * layout.padded_len());
        grow(&mut self.scales, num_rows * layout.num_groups());
        grow(&mut self.sums, num_rows * layout.num_groups());
    }
}

pub(super) fn grow<T: Copy + Default>(values: &mut Vec<T>, len: usize) {
    if values.len() < len {
        values.resize(len, T::default());
    }
}

/// One value for each thread of the pool, so that tasks need none of their own.
#[derive(Default)]
pub(crate) struct PerThread<T> {
    values: Vec<Mutex<T>>,
}

impl<T: Default> PerThread<T> {
    /// To be called before the tasks.
    pub(super) fn prepare(&mut self) {
        while self.values.len() < team::num_threads() {
            self.values.push(Mutex::default());
        }
    }

    /// The value of this thread. The lock is never waited for, as a task does not start another one.
    pub(super) fn get(&self) -> MutexGuard<'_, T> {
        let index = team::thread_index();
        self.values[index].lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}
