//! What the penalties of a step are for: a block of memory beside its inputs.
//!
//! Only steps in which a sequence has penalties copy it, and none of those is a graph. So it may grow with them: room for
//! the longest prompts of as many sequences as may run would be more than most steps ever use.

use std::sync::Arc;

use super::inputs::{ALIGN, as_plain};
use crate::gpu::device::{Device, DeviceError};
use crate::gpu::memory::{DeviceSlice, DeviceVec, PinnedVec};
use crate::gpu::ops::RowPenalties;
use crate::step::{StepBatch, TokenUse};

const MIN_BYTES: usize = 1 << 10;

/// Where each array begins, in bytes.
#[derive(Clone, Copy, Debug)]
pub(super) struct PenaltyLayout {
    num_heads: usize,
    num_uses: usize,
    indptr: usize,
    newest_from: usize,
    uses: usize,
    num_bytes: usize,
}

/// The arrays of a step on the device.
pub(super) struct DevicePenalties<'a> {
    /// `[num_heads]`
    pub(super) penalties: DeviceSlice<'a, RowPenalties>,
    /// `[num_heads + 1]`
    pub(super) indptr: DeviceSlice<'a, u32>,
    pub(super) uses: DeviceSlice<'a, TokenUse>,
    /// `[num_heads]`: where among what the step before has sampled the token is that the host has not counted, or -1.
    pub(super) newest_from: DeviceSlice<'a, i32>,
}

pub(super) struct PenaltyInputs {
    device: Arc<dyn Device>,
    host: [PinnedVec<u8>; 2],
    there: DeviceVec<u8>,
}

impl PenaltyLayout {
    fn of(batch: &StepBatch) -> Self {
        let num_heads = batch.sampling.iter().flatten().count();
        let num_uses = batch.token_uses.len();
        let indptr = (num_heads * size_of::<RowPenalties>()).next_multiple_of(ALIGN);
        let newest_from = (indptr + (num_heads + 1) * size_of::<u32>()).next_multiple_of(ALIGN);
        let uses = (newest_from + num_heads * size_of::<i32>()).next_multiple_of(ALIGN);
        let num_bytes = uses + num_uses * size_of::<TokenUse>();
        Self { num_heads, num_uses, indptr, newest_from, uses, num_bytes }
    }
}

impl PenaltyInputs {
    pub(super) fn new(device: &Arc<dyn Device>) -> Result<Self, DeviceError> {
        let host = || PinnedVec::new(device, 0);
        Ok(Self { device: Arc::clone(device), host: [host()?, host()?], there: DeviceVec::new(device, 0)? })
    }

    /// Fills block `index` and queues its copy; the step that used it before is finished. `sampled_at` is where the step
    /// before this one leaves the token of each of its sequences. `None` if the step has no
    /// penalties, or none that is for anything yet.
    pub(super) fn upload(
        &mut self,
        batch: &StepBatch,
        sampled_at: &[Option<u32>],
        index: usize,
    ) -> Result<Option<PenaltyLayout>, DeviceError> {
        if !batch.has_penalties() {
            return Ok(None);
        }
        let layout = PenaltyLayout::of(batch);
        self.grow(index, layout.num_bytes)?;
        let block = &mut self.host[index].as_mut_slice()[..layout.num_bytes];
        let (rest, uses) = block.split_at_mut(layout.uses);
        let (rest, newest_from) = rest.split_at_mut(layout.newest_from);
        let (penalties, indptr) = rest.split_at_mut(layout.indptr);
        let penalties: &mut [RowPenalties] = as_plain(penalties, layout.num_heads);
        let indptr: &mut [u32] = as_plain(indptr, layout.num_heads + 1);
        let newest_from: &mut [i32] = as_plain(newest_from, layout.num_heads);
        // Who is not sampled has no uses, so those of the others lie one behind the other.
        let sampled =
            batch.sampling.iter().enumerate().filter_map(|(seq, params)| Some((seq, params.as_ref()?)));
        for (head, (seq, params)) in sampled.enumerate() {
            penalties[head] = RowPenalties::from(params);
            indptr[head] = batch.token_uses_indptr[seq];
            let newest = batch.sampled_by[seq].filter(|_| params.has_penalties());
            let at = |seq: u32| sampled_at[seq as usize].expect("the step before samples for it") as i32;
            newest_from[head] = newest.map_or(-1, at);
        }
        indptr[layout.num_heads] = layout.num_uses as u32;
        as_plain(uses, layout.num_uses).copy_from_slice(&batch.token_uses);
        let block = self.host[index].pointer(0, layout.num_bytes);
        // SAFETY: both blocks are of this length at least, and the host's is not written before the step is finished.
        unsafe { self.device.upload(self.there.address(), block, layout.num_bytes)? };
        Ok(Some(layout))
    }

    /// Makes room. What is replaced is freed when the steps that read it are done.
    fn grow(&mut self, index: usize, num_bytes: usize) -> Result<(), DeviceError> {
        let room = num_bytes.next_power_of_two().max(MIN_BYTES);
        if self.host[index].len() < num_bytes {
            self.host[index] = PinnedVec::new(&self.device, room)?;
        }
        if self.there.len() < num_bytes {
            self.there = DeviceVec::new(&self.device, room)?;
        }
        Ok(())
    }

    pub(super) fn there(&self, layout: &PenaltyLayout) -> DevicePenalties<'_> {
        DevicePenalties {
            penalties: DeviceSlice::of_bytes(&self.there, 0, layout.num_heads),
            indptr: DeviceSlice::of_bytes(&self.there, layout.indptr, layout.num_heads + 1),
            uses: DeviceSlice::of_bytes(&self.there, layout.uses, layout.num_uses),
            newest_from: DeviceSlice::of_bytes(&self.there, layout.newest_from, layout.num_heads),
        }
    }
}
