//! What a step tells the device: one block of memory, written by the host and copied as one.
//!
//! Where each array lies depends only on the shape of the step, so a recorded graph finds them again. The host has a
//! block for each step that may be in flight, the device one: its copy is queued behind the kernels of the step before.

use std::sync::Arc;

use crate::gpu::device::{Device, DeviceError};
use crate::gpu::memory::{DeviceSlice, DeviceVec, PinnedVec, Plain};
use crate::gpu::ops::RowSampling;
use crate::gpu::plan::{PlanLayout, PlanSize};

pub(super) const ALIGN: usize = 256;

/// Sizes of a step, with what is there for padding.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct StepShape {
    pub(super) num_rows: usize,
    /// Rows whose next token is wanted.
    pub(super) num_heads: usize,
    pub(super) num_copies: usize,
    /// For the plan of attention.
    pub(super) room: PlanSize,
}

/// Where each array begins, in bytes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Layout {
    pub(super) shape: StepShape,
    ids: usize,
    from: usize,
    positions: usize,
    slots: usize,
    head_rows: usize,
    sampling: usize,
    copies: usize,
    /// The last, since its end is copied only as far as it is used.
    plan: usize,
    pub(super) plan_layout: PlanLayout,
}

impl Layout {
    pub(super) fn new(shape: StepShape) -> Self {
        let StepShape { num_rows, num_heads, num_copies, room } = shape;
        let plan_layout = PlanLayout::new(room);
        let mut end = 0usize;
        let mut next = |num_bytes: usize| {
            let first = end.next_multiple_of(ALIGN);
            end = first + num_bytes;
            first
        };
        let ids = next(4 * num_rows);
        let from = next(4 * num_rows);
        let positions = next(4 * num_rows);
        let slots = next(4 * num_rows);
        let head_rows = next(4 * num_heads);
        let sampling = next(size_of::<RowSampling>() * num_heads);
        let copies = next(12 * num_copies);
        let plan = next(4 * plan_layout.len);
        Self { shape, ids, from, positions, slots, head_rows, sampling, copies, plan, plan_layout }
    }

    /// With so many words of the plan.
    fn num_bytes(&self, plan_len: usize) -> usize {
        self.plan + 4 * plan_len
    }
}

/// The arrays of a step on the host.
pub(super) struct HostInputs<'a> {
    pub(super) ids: &'a mut [u32],
    pub(super) from: &'a mut [i32],
    pub(super) positions: &'a mut [u32],
    pub(super) slots: &'a mut [i32],
    pub(super) head_rows: &'a mut [u32],
    pub(super) sampling: &'a mut [RowSampling],
    pub(super) copies: &'a mut [u32],
    pub(super) plan: &'a mut [u32],
}

/// The arrays of a step on the device.
pub(super) struct DeviceInputs<'a> {
    pub(super) ids: DeviceSlice<'a, u32>,
    pub(super) from: DeviceSlice<'a, i32>,
    pub(super) positions: DeviceSlice<'a, u32>,
    pub(super) slots: DeviceSlice<'a, i32>,
    pub(super) head_rows: DeviceSlice<'a, u32>,
    pub(super) sampling: DeviceSlice<'a, RowSampling>,
    pub(super) copies: DeviceSlice<'a, u32>,
    pub(super) plan: DeviceSlice<'a, u32>,
}

pub(super) struct Inputs {
    device: Arc<dyn Device>,
    host: [PinnedVec<u8>; 2],
    there: DeviceVec<u8>,
}

impl Inputs {
    /// For steps of up to this shape.
    pub(super) fn new(device: &Arc<dyn Device>, max_shape: StepShape) -> Result<Self, DeviceError> {
        let layout = Layout::new(max_shape);
        let num_bytes = layout.num_bytes(layout.plan_layout.len);
        let host = || PinnedVec::new(device, num_bytes);
        Ok(Self {
            device: Arc::clone(device),
            host: [host()?, host()?],
            there: DeviceVec::new(device, num_bytes)?,
        })
    }

    /// The arrays of block `index`; the step that used it before is finished.
    pub(super) fn host(&mut self, index: usize, layout: &Layout) -> HostInputs<'_> {
        let StepShape { num_rows, num_heads, num_copies, .. } = layout.shape;
        let plan_len = layout.plan_layout.len;
        let block = &mut self.host[index].as_mut_slice()[..layout.num_bytes(plan_len)];
        let (rest, plan) = block.split_at_mut(layout.plan);
        let (rest, copies) = rest.split_at_mut(layout.copies);
        let (rest, sampling) = rest.split_at_mut(layout.sampling);
        let (rest, head_rows) = rest.split_at_mut(layout.head_rows);
        let (rest, slots) = rest.split_at_mut(layout.slots);
        let (rest, positions) = rest.split_at_mut(layout.positions);
        let (ids, from) = rest.split_at_mut(layout.from);
        HostInputs {
            ids: as_plain(ids, num_rows),
            from: as_plain(from, num_rows),
            positions: as_plain(positions, num_rows),
            slots: as_plain(slots, num_rows),
            head_rows: as_plain(head_rows, num_heads),
            sampling: as_plain(sampling, num_heads),
            copies: as_plain(copies, 3 * num_copies),
            plan: as_plain(plan, plan_len),
        }
    }

    /// Queues the copy of block `index`, of whose plan so many words are used.
    pub(super) fn upload(&self, index: usize, layout: &Layout, plan_len: usize) -> Result<(), DeviceError> {
        let num_bytes = layout.num_bytes(plan_len);
        let block = self.host[index].pointer(0, num_bytes);
        // SAFETY: both blocks are of this length at least, and the host's is not written before the step is finished.
        unsafe { self.device.upload(self.there.address(), block, num_bytes) }
    }

    pub(super) fn there(&self, layout: &Layout) -> DeviceInputs<'_> {
        let StepShape { num_rows, num_heads, num_copies, .. } = layout.shape;
        let there = &self.there;
        DeviceInputs {
            ids: DeviceSlice::of_bytes(there, layout.ids, num_rows),
            from: DeviceSlice::of_bytes(there, layout.from, num_rows),
            positions: DeviceSlice::of_bytes(there, layout.positions, num_rows),
            slots: DeviceSlice::of_bytes(there, layout.slots, num_rows),
            head_rows: DeviceSlice::of_bytes(there, layout.head_rows, num_heads),
            sampling: DeviceSlice::of_bytes(there, layout.sampling, num_heads),
            copies: DeviceSlice::of_bytes(there, layout.copies, 3 * num_copies),
            plan: DeviceSlice::of_bytes(there, layout.plan, layout.plan_layout.len),
        }
    }
}

/// The first `len` numbers of an aligned piece of memory.
pub(super) fn as_plain<T: Plain>(bytes: &mut [u8], len: usize) -> &mut [T] {
    let pointer = bytes.as_mut_ptr().cast::<T>();
    assert!(pointer.is_aligned() && len * size_of::<T>() <= bytes.len());
    // SAFETY: alignment and length were checked, any bytes are a plain number, and `bytes` is borrowed alone.
    unsafe { std::slice::from_raw_parts_mut(pointer, len) }
}
