//! Cosines and sines of positions on the device, computed by the host when a step first goes that far.

use std::sync::Arc;

use crate::backend::RopeTable;
use crate::gpu::device::{Device, DeviceError};
use crate::gpu::memory::DeviceVec;

/// Positions that are computed at once, at least.
const BLOCK_POSITIONS: usize = 256;

/// `[max_position, 2, head_dim / 2]`: cosines, then sines.
pub(super) struct DeviceRope {
    pub(super) table: DeviceVec<f32>,
    head_dim: usize,
    max_position: usize,
    /// Positions that are there.
    num_filled: usize,
}

impl DeviceRope {
    pub(super) fn new(
        device: &Arc<dyn Device>,
        head_dim: usize,
        max_position: usize,
    ) -> Result<Self, DeviceError> {
        let table = DeviceVec::new(device, max_position * head_dim)?;
        Ok(Self { table, head_dim, max_position, num_filled: 0 })
    }

    /// Makes sure that positions up to `last` are there.
    pub(super) fn fill(&mut self, source: &RopeTable, last: usize) -> Result<(), DeviceError> {
        assert!(last < self.max_position, "position {last} of {}", self.max_position);
        if last < self.num_filled {
            return Ok(());
        }
        // The write waits for the step that runs, so there are few: each makes the table at least twice as long.
        let end =
            ((last / BLOCK_POSITIONS + 1) * BLOCK_POSITIONS).max(2 * self.num_filled).min(self.max_position);
        let mut rows = Vec::with_capacity((end - self.num_filled) * self.head_dim);
        for position in self.num_filled..end {
            let (cos, sin) = source.row(position as u32);
            rows.extend_from_slice(cos);
            rows.extend_from_slice(sin);
        }
        self.table.write(self.num_filled * self.head_dim, &rows)?;
        self.num_filled = end;
        Ok(())
    }
}
