//! Takes down the logits of tokens that were used before, in place; see `penalties.cu`. The bits are those of
//! `crate::sample::penalize`.

use super::launch;
use crate::gpu::device::{Address, Device, DeviceError, Kernel};
use crate::gpu::memory::{DeviceSlice, DeviceVec, Plain};
use crate::step::{SamplingParams, TokenUse};

const KERNEL: Kernel = Kernel { name: "penalties", source: "penalties", block: 256, shared_bytes: 0 };

/// Of a row, as the kernel reads them.
#[derive(Clone, Copy, Debug, PartialEq)]
#[repr(C)]
pub(crate) struct RowPenalties {
    repetition: f32,
    presence: f32,
    frequency: f32,
}

// SAFETY: plain numbers without padding.
unsafe impl Plain for RowPenalties {}
// SAFETY: two numbers of 32 bits.
unsafe impl Plain for TokenUse {}

impl From<&SamplingParams> for RowPenalties {
    fn from(params: &SamplingParams) -> Self {
        Self {
            repetition: params.repetition_penalty,
            presence: params.presence_penalty,
            frequency: params.frequency_penalty,
        }
    }
}

pub(crate) struct Penalties<'a> {
    pub(crate) num_rows: usize,
    pub(crate) vocab_size: usize,
    /// `[rows, vocab_size]`
    pub(crate) logits: &'a DeviceVec<f32>,
    /// `[num_rows]`: which rows of `logits`, none twice; the first ones if absent.
    pub(crate) rows_of: Option<&'a DeviceVec<u32>>,
    /// `[num_rows]`
    pub(crate) penalties: DeviceSlice<'a, RowPenalties>,
    /// `[num_rows + 1]`
    pub(crate) indptr: DeviceSlice<'a, u32>,
    /// `[indptr.last()]`; a token of a row has one.
    pub(crate) uses: DeviceSlice<'a, TokenUse>,
    /// `[num_rows]`: which of `sampled` was used once more, or -1; the row's uses are in the order of their ids then.
    pub(crate) newest_from: DeviceSlice<'a, i32>,
    pub(crate) sampled: &'a DeviceVec<u32>,
}

#[derive(Clone, Copy)]
#[repr(C)]
struct Params {
    logits: Address,
    rows_of: Address,
    penalties: Address,
    indptr: Address,
    uses: Address,
    newest_from: Address,
    sampled: Address,
    vocab_size: u32,
}

pub(crate) fn penalties(device: &dyn Device, args: &Penalties<'_>) -> Result<(), DeviceError> {
    let Penalties { num_rows, vocab_size, .. } = *args;
    assert!(args.rows_of.map_or(args.logits.len() >= num_rows * vocab_size, |rows| rows.len() >= num_rows));
    assert!(args.penalties.len() >= num_rows && args.indptr.len() > num_rows);
    assert!(args.newest_from.len() >= num_rows);
    let params = Params {
        logits: args.logits.address(),
        rows_of: Address::of(args.rows_of),
        penalties: args.penalties.address(),
        indptr: args.indptr.address(),
        uses: args.uses.address(),
        newest_from: args.newest_from.address(),
        sampled: args.sampled.address(),
        vocab_size: vocab_size as u32,
    };
    // SAFETY: the lengths were checked above; rows of `rows_of`, the end of `indptr` and `newest_from` are those of the
    // batch.
    unsafe { launch(device, &KERNEL, [num_rows as u32, 1, 1], &params) }
}
