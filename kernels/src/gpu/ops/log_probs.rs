//! Logarithms of the probabilities of tokens; see `log_probs.cu`.

use super::launch;
use super::sample::{MAX_VOCAB_SIZE, SEARCH_BLOCK, SEARCH_SHARED_BYTES};
use crate::gpu::device::{Address, Device, DeviceError, Kernel};
use crate::gpu::memory::DeviceVec;

const KERNEL: Kernel =
    Kernel { name: "log_probs", source: "log_probs", block: SEARCH_BLOCK, shared_bytes: SEARCH_SHARED_BYTES };

/// As many as anybody may ask for.
const MAX_TOP: usize = 20;

/// The most likely tokens of each row, the most likely one first.
pub(crate) struct TopLogProbs<'a> {
    pub(crate) num_top: usize,
    /// `[num_rows, num_top]`, written
    pub(crate) ids: &'a DeviceVec<u32>,
    /// `[num_rows, num_top]`, written
    pub(crate) log_probs: &'a DeviceVec<f32>,
}

pub(crate) struct LogProbs<'a> {
    pub(crate) num_rows: usize,
    pub(crate) vocab_size: usize,
    /// `[rows, vocab_size]`
    pub(crate) logits: &'a DeviceVec<f32>,
    /// `[num_rows]`: which rows of `logits`; the first ones if absent.
    pub(crate) rows_of: Option<&'a DeviceVec<u32>>,
    /// `[num_rows + 1]`: which token ids are a row's; one a row if absent.
    pub(crate) indptr: Option<&'a DeviceVec<u32>>,
    /// `[num_rows]`, or `[indptr.last()]`
    pub(crate) token_ids: &'a DeviceVec<u32>,
    /// As many, written.
    pub(crate) log_probs: &'a DeviceVec<f32>,
    pub(crate) top: Option<TopLogProbs<'a>>,
}

#[derive(Clone, Copy)]
#[repr(C)]
struct Params {
    logits: Address,
    rows_of: Address,
    indptr: Address,
    token_ids: Address,
    log_probs: Address,
    top_ids: Address,
    top_log_probs: Address,
    vocab_size: u32,
    num_top: u32,
}

pub(crate) fn log_probs(device: &dyn Device, args: &LogProbs<'_>) -> Result<(), DeviceError> {
    let LogProbs { num_rows, vocab_size, .. } = *args;
    assert!((1..=MAX_VOCAB_SIZE).contains(&vocab_size), "a vocabulary of {vocab_size}");
    assert!(args.rows_of.map_or(args.logits.len() >= num_rows * vocab_size, |rows| rows.len() >= num_rows));
    assert!(args.indptr.map_or(args.token_ids.len() >= num_rows, |indptr| indptr.len() > num_rows));
    assert!(args.log_probs.len() >= args.token_ids.len());
    let num_top = args.top.as_ref().map_or(0, |top| top.num_top);
    assert!(num_top <= MAX_TOP, "{num_top} of the most likely tokens");
    let len = num_rows * num_top;
    assert!(args.top.as_ref().is_none_or(|top| top.ids.len() >= len && top.log_probs.len() >= len));
    let params = Params {
        logits: args.logits.address(),
        rows_of: Address::of(args.rows_of),
        indptr: Address::of(args.indptr),
        token_ids: args.token_ids.address(),
        log_probs: args.log_probs.address(),
        top_ids: Address::of(args.top.as_ref().map(|top| top.ids)),
        top_log_probs: Address::of(args.top.as_ref().map(|top| top.log_probs)),
        vocab_size: vocab_size as u32,
        num_top: num_top as u32,
    };
    // SAFETY: the lengths were checked above; rows of `rows_of` and the end of `indptr` are those of the batch.
    unsafe { launch(device, &KERNEL, [num_rows as u32, 1, 1], &params) }
}
