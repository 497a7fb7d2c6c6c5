//! Rows of numbers to the device through two pinned buffers: one is filled by all cores while the other is copied.

use std::num::NonZeroUsize;
use std::sync::Arc;

use crate::gpu::device::{Device, DeviceError, Event};
use crate::gpu::half_vec::HalfVec;
use crate::gpu::memory::PinnedVec;

/// Of a buffer. Large enough that a copy runs at the speed of the bus.
const BUFFER_BYTES: usize = 32 << 20;
const MAX_THREADS: usize = 16;
/// Below this a thread costs more than it does.
const MIN_THREAD_BYTES: usize = 1 << 20;

pub(super) struct Uploader {
    device: Arc<dyn Device>,
    buffers: [PinnedVec<u16>; 2],
    /// When each buffer was copied.
    copied: [Option<Event>; 2],
    next: usize,
    num_threads: usize,
}

/// Writes a row of 16-bit floats; the middle argument has room for it as f32.
pub(super) type FillRow<'a> = dyn Fn(usize, &mut [f32], &mut [u16]) + Sync + 'a;

impl Uploader {
    pub(super) fn new(device: &Arc<dyn Device>) -> Result<Self, DeviceError> {
        let buffer = || PinnedVec::new(device, BUFFER_BYTES / size_of::<u16>());
        let num_threads = std::thread::available_parallelism().map_or(1, NonZeroUsize::get).min(MAX_THREADS);
        let (device, buffers) = (Arc::clone(device), [buffer()?, buffer()?]);
        Ok(Self { device, buffers, copied: [None; 2], next: 0, num_threads })
    }

    /// Fills `to` with rows of `row_len` numbers; rows of the source have `wide_len`.
    pub(super) fn upload(
        &mut self,
        row_len: usize,
        wide_len: usize,
        fill_row: &FillRow<'_>,
        to: &HalfVec,
    ) -> Result<(), DeviceError> {
        let num_rows = to.len() / row_len;
        let rows_per_buffer = self.buffers[0].as_slice().len() / row_len;
        assert!(rows_per_buffer > 0, "a row of {row_len} numbers");
        for first in (0..num_rows).step_by(rows_per_buffer) {
            let num_rows = rows_per_buffer.min(num_rows - first);
            let index = self.next;
            self.next = 1 - index;
            if let Some(event) = self.copied[index].take() {
                self.device.wait(event)?;
            }
            let buffer = &mut self.buffers[index].as_mut_slice()[..num_rows * row_len];
            let fill_row = |row: usize, wide: &mut [f32], out: &mut [u16]| fill_row(first + row, wide, out);
            fill(buffer, row_len, wide_len, self.num_threads, &fill_row);
            // SAFETY: both ranges were checked, and the buffer stays until the event, which is waited for.
            unsafe {
                self.device.upload(to.at(first * row_len), buffer.as_ptr().cast(), size_of_val(buffer))?
            };
            self.copied[index] = Some(self.device.record()?);
        }
        Ok(())
    }
}

/// Fills rows on several threads.
fn fill(buffer: &mut [u16], row_len: usize, wide_len: usize, num_threads: usize, fill_row: &FillRow<'_>) {
    let num_threads = num_threads.min(size_of_val(buffer).div_ceil(MIN_THREAD_BYTES));
    let rows_per_thread = (buffer.len() / row_len).div_ceil(num_threads);
    let run = |first: usize, rows: &mut [u16]| {
        let mut wide = vec![0.0; wide_len];
        for (row, out) in rows.chunks_exact_mut(row_len).enumerate() {
            fill_row(first + row, &mut wide, out);
        }
    };
    std::thread::scope(|scope| {
        let mut parts = buffer.chunks_mut(rows_per_thread * row_len).enumerate();
        let mine = parts.next();
        for (index, rows) in parts {
            scope.spawn(move || run(index * rows_per_thread, rows));
        }
        if let Some((_, rows)) = mine {
            run(0, rows);
        }
    });
}
