//! The next token of each row of logits, on the device; see `sample.cu`. It chooses what `crate::sample` chooses, except
//! where a draw falls within the rounding of its weights (2^-22) of the border between two tokens.
//!
//! The chosen tokens stay on the device, where the next step reads them; errors are data beside them.

use super::launch;
use crate::gpu::device::{Address, Device, DeviceError, Kernel};
use crate::gpu::memory::{DeviceSlice, DeviceVec, Plain};
use crate::sample::{Choice, SampleError};
use crate::step::SamplingParams;

/// Of every kernel that searches a row (`row_search.cuh`).
pub(super) const SEARCH_SHARED_BYTES: u32 = 45512;
pub(super) const SEARCH_BLOCK: u32 = 512;
pub(super) const MAX_VOCAB_SIZE: usize = 1 << 20;

const KERNEL: Kernel =
    Kernel { name: "sample", source: "sample", block: SEARCH_BLOCK, shared_bytes: SEARCH_SHARED_BYTES };

/// How a row is sampled, as the kernel reads it.
#[derive(Clone, Copy, Debug, PartialEq)]
#[repr(C)]
pub(crate) struct RowSampling {
    seed: u64,
    position: u32,
    top_k: u32,
    temperature: f32,
    margin: f32,
    top_p: f32,
    kind: u32,
}

// SAFETY: plain numbers without padding.
unsafe impl Plain for RowSampling {}

impl RowSampling {
    /// Nothing is wanted of this row: its token and its error stay as they are.
    pub(crate) const SKIP: Self =
        Self { seed: 0, position: 0, top_k: 0, temperature: 0.0, margin: 0.0, top_p: 1.0, kind: 0 };

    /// The parameters of `crate::sample::sample`, checked.
    pub(crate) fn new(params: &SamplingParams, position: u32) -> Result<Self, SampleError> {
        let (kind, margin) = match Choice::of(params)? {
            Choice::Greedy => (1, 0.0),
            Choice::Draw { margin } => (2, margin),
        };
        let SamplingParams { temperature, top_p, top_k, seed, .. } = *params;
        Ok(Self { seed, position, top_k, temperature, margin, top_p, kind })
    }
}

/// What grammars allow.
pub(crate) struct AllowedTokens<'a> {
    /// `[masks, ceil(vocab_size / 32)]`: a bit a token.
    pub(crate) masks: &'a DeviceVec<u32>,
    /// `[num_rows]`: which mask, or -1 for none.
    pub(crate) mask_of: &'a DeviceVec<i32>,
}

pub(crate) struct Sample<'a> {
    pub(crate) num_rows: usize,
    pub(crate) vocab_size: usize,
    /// `[rows, vocab_size]`
    pub(crate) logits: &'a DeviceVec<f32>,
    /// `[num_rows]`: which rows of `logits`; the first ones if absent.
    pub(crate) rows_of: Option<&'a DeviceVec<u32>>,
    /// `[num_rows]`
    pub(crate) sampling: DeviceSlice<'a, RowSampling>,
    pub(crate) allowed: Option<AllowedTokens<'a>>,
    /// `[num_rows]`, written: 0 where there is an error.
    pub(crate) token_ids: DeviceSlice<'a, u32>,
    /// `[num_rows]`, written; see [`sample_error`].
    pub(crate) errors: DeviceSlice<'a, u32>,
}

#[derive(Clone, Copy)]
#[repr(C)]
struct Params {
    logits: Address,
    rows_of: Address,
    sampling: Address,
    allowed: Address,
    mask_of: Address,
    token_ids: Address,
    errors: Address,
    vocab_size: u32,
}

/// What the kernel wrote for a row.
pub(crate) fn sample_error(code: u32) -> Result<(), SampleError> {
    match code {
        0 => Ok(()),
        1 => Err(SampleError::NoCandidate),
        _ => Err(SampleError::NotFinite { token_id: code - 2 }),
    }
}

pub(crate) fn sample(device: &dyn Device, args: &Sample<'_>) -> Result<(), DeviceError> {
    let Sample { num_rows, vocab_size, .. } = *args;
    assert!((1..=MAX_VOCAB_SIZE).contains(&vocab_size), "a vocabulary of {vocab_size}");
    assert!(args.rows_of.map_or(args.logits.len() >= num_rows * vocab_size, |rows| rows.len() >= num_rows));
    assert!(args.sampling.len() >= num_rows);
    assert!(args.token_ids.len() >= num_rows && args.errors.len() >= num_rows);
    if let Some(allowed) = &args.allowed {
        assert!(allowed.mask_of.len() >= num_rows);
        assert_eq!(allowed.masks.len() % vocab_size.div_ceil(32), 0, "a mask is cut off");
    }
    let params = Params {
        logits: args.logits.address(),
        rows_of: Address::of(args.rows_of),
        sampling: args.sampling.address(),
        allowed: Address::of(args.allowed.as_ref().map(|allowed| allowed.masks)),
        mask_of: Address::of(args.allowed.as_ref().map(|allowed| allowed.mask_of)),
        token_ids: args.token_ids.address(),
        errors: args.errors.address(),
        vocab_size: vocab_size as u32,
    };
    // SAFETY: the lengths were checked above; rows of `rows_of` and masks of `mask_of` are those of the batch.
    unsafe { launch(device, &KERNEL, [num_rows as u32, 1, 1], &params) }
}
