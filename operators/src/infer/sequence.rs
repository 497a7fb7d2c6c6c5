//! One sequence: what was asked, the tokens known so far and which of them are in the KV cache.
//!
//! Invariant: `computed_len` tokens have their keys and values in `pages`; the first `num_shared_pages` of those
//! pages belong to the prefix cache and are never written again, the others belong to this sequence alone.
//! Steps that are planned and not committed have a chunk each in `chunk_lens`; nothing else changes before the commit.
//! A sequence only holds numbers: it neither takes nor frees pages, see [`scheduler`](super::scheduler).

use std::ops::Range;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use tidemill_kernels::step::{HostPageId, PageId, SamplingParams, TokenUse};

/// Names a sequence towards the caller, who keeps them distinct.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SequenceId(pub u64);

/// Whose a sequence is; work is counted, and answer lengths are learned, for each owner. Small numbers from 0.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct OwnerId(pub u32);

/// Who goes first; no answer depends on it. Within a priority the order of submission counts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Priority {
    High,
    #[default]
    Normal,
    Low,
}

impl Priority {
    /// The first to be served first.
    pub const ALL: [Self; 3] = [Self::High, Self::Normal, Self::Low];
}

/// So many prompts that will be submitted later begin with the same `len` tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SharedPrefix {
    pub len: u32,
    pub num_later: u32,
}

/// A prompt to be answered.
#[derive(Clone, Debug)]
pub struct SequenceRequest {
    pub id: SequenceId,
    pub token_ids: Arc<[u32]>,
    /// The answer ends here at the latest; at least 1.
    pub max_tokens: u32,
    pub sampling: SamplingParams,
    pub owner: OwnerId,
    pub priority: Priority,
    /// The owner's step; how long answers become is learned for each.
    pub step: Arc<str>,
    /// Longer prefixes have fewer users. Empty if nothing is known; no answer depends on it.
    pub shared: Arc<[SharedPrefix]>,
}

impl SequenceRequest {
    /// A prompt of which nothing more is known.
    pub fn new(id: SequenceId, token_ids: Arc<[u32]>, max_tokens: u32, sampling: SamplingParams) -> Self {
        let (owner, priority, step, shared) =
            (OwnerId::default(), Priority::default(), "".into(), Arc::default());
        Self { id, token_ids, max_tokens, sampling, owner, priority, step, shared }
    }
}

/// Why an answer ended, in the words of vLLM and OpenAI.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FinishReason {
    /// The model said so with an end-of-sequence token.
    Stop,
    /// `max_tokens` was reached.
    Length,
}

/// An answered sequence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finished {
    pub id: SequenceId,
    /// The answer without its end-of-sequence token.
    pub token_ids: Vec<u32>,
    pub reason: FinishReason,
    pub prompt_len: u32,
    /// Prompt tokens that went through the model; those computed again after a preemption count again.
    pub computed_len: u32,
    /// Prompt tokens that this sequence never computed, since the prefix cache had them.
    pub reused_len: u32,
}

impl FinishReason {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Length => "length",
        }
    }
}

/// The beginning of a page that a sequence takes over before its first step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CopySource {
    pub page: PageId,
    pub len: usize,
    /// The page is of the prefix cache, and locked there for this sequence; otherwise of a running sequence.
    pub is_cached: bool,
}

/// What of a preempted sequence is in the host's memory.
#[derive(Debug)]
pub struct Swapped {
    /// Place in the page table of the first of `pages`.
    pub first_page: usize,
    pub pages: Vec<HostPageId>,
    /// Tokens that were computed; the last one is in the last page.
    pub computed_len: usize,
    /// The step that swaps them out is not committed.
    pub is_leaving: bool,
}

/// Most steps that are planned and not committed: one runs and the next is started behind it.
pub const MAX_PLANNED: usize = 2;

/// What becomes of a running sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    GoesOn,
    /// Given up while a step was planned; retired with the next commit.
    GivenUp,
    /// Answered or given up. It keeps its pages until a step is done that was planned before.
    Retired,
}

/// A sequence inside the engine.
#[derive(Debug)]
pub struct Sequence {
    pub id: SequenceId,
    /// Place in the order of submission.
    pub serial: u64,
    pub owner: OwnerId,
    pub priority: Priority,
    pub step: Arc<str>,
    pub shared: Arc<[SharedPrefix]>,
    /// The prompt, then the answer so far.
    pub token_ids: Vec<u32>,
    pub prompt_len: usize,
    pub max_tokens: usize,
    pub sampling: SamplingParams,
    /// What its penalties are for among the known tokens, in the order of the ids; empty without penalties.
    pub token_uses: Vec<TokenUse>,
    /// Leading tokens whose keys and values are in `pages`.
    pub computed_len: usize,
    /// How many tokens each planned step computes, the oldest step first; 0 leaves the sequence out.
    pub chunk_lens: [usize; MAX_PLANNED],
    pub fate: Fate,
    /// Page table.
    pub pages: Vec<PageId>,
    /// How long it may become; set when the sequence is admitted.
    pub max_pages: usize,
    /// Leading pages held by the prefix cache.
    pub num_shared_pages: usize,
    /// Until the step that copies it is done.
    pub copy: Option<CopySource>,
    /// Where the copied tokens end; 0 without a copy.
    pub copied_end: usize,
    /// While it waits.
    pub swapped: Option<Swapped>,
    /// Pages that come from the host, until the step that swaps them in is done.
    pub swap_ins: Vec<(HostPageId, PageId)>,
    /// Most tokens that were ever computed or reused: below it, computing is recomputing.
    pub seen_len: usize,
    /// Counts for [`Finished`].
    pub num_computed: u32,
    pub num_reused: u32,
}

impl Sequence {
    pub fn new(request: &SequenceRequest, serial: u64) -> Self {
        assert!(!request.token_ids.is_empty());
        assert!(request.max_tokens > 0);
        assert!(request.shared.is_sorted_by(|a, b| a.len < b.len && a.num_later > b.num_later));
        Self {
            id: request.id,
            serial,
            owner: request.owner,
            priority: request.priority,
            step: Arc::clone(&request.step),
            shared: Arc::clone(&request.shared),
            token_ids: request.token_ids.to_vec(),
            prompt_len: request.token_ids.len(),
            max_tokens: request.max_tokens as usize,
            sampling: request.sampling,
            token_uses: uses_of_prompt(&request.token_ids, &request.sampling),
            computed_len: 0,
            chunk_lens: [0; MAX_PLANNED],
            fate: Fate::GoesOn,
            pages: Vec::new(),
            max_pages: 0,
            num_shared_pages: 0,
            copy: None,
            copied_end: 0,
            swapped: None,
            swap_ins: Vec::new(),
            seen_len: 0,
            num_computed: 0,
            num_reused: 0,
        }
    }

    /// Place in the waiting queue.
    pub fn place(&self) -> (Priority, u64) {
        (self.priority, self.serial)
    }

    /// Tokens known, computed or not.
    pub fn known_len(&self) -> usize {
        self.token_ids.len()
    }

    /// Where the tokens are that a planned step computes.
    pub fn chunk(&self, step: usize) -> Range<usize> {
        let first = self.computed_len + self.chunk_lens[..step].iter().sum::<usize>();
        first..first + self.chunk_lens[step]
    }

    /// Whether a planned step samples a token for this sequence.
    pub fn is_sampled_in(&self, step: usize) -> bool {
        self.chunk_lens[step] > 0 && self.chunk(step).end == self.known_len_after(step)
    }

    /// Tokens known when so many of the planned steps are done and none of them has ended the sequence early.
    pub fn known_len_after(&self, num_steps: usize) -> usize {
        self.known_len() + (0..num_steps).filter(|&step| self.is_sampled_in(step)).count()
    }

    /// Tokens known but not in the KV cache after so many planned steps; at least 1 if the sequence goes on then, since
    /// the newest token is never computed.
    pub fn uncomputed_len(&self, num_steps: usize) -> usize {
        self.known_len_after(num_steps) - self.chunk(num_steps).start
    }

    /// Whether there is more to compute after so many planned steps, as far as one can tell.
    pub fn goes_on(&self, num_steps: usize) -> bool {
        let answer_len = self.known_len_after(num_steps) - self.prompt_len;
        self.fate == Fate::GoesOn && answer_len < self.max_tokens
    }

    /// The oldest planned step is done: how many tokens it has computed.
    pub fn next_chunk(&mut self) -> usize {
        let chunk_len = self.chunk_lens[0];
        self.chunk_lens.rotate_left(1);
        self.chunk_lens[MAX_PLANNED - 1] = 0;
        chunk_len
    }

    /// Answer tokens so far.
    pub fn answer_len(&self) -> usize {
        self.known_len() - self.prompt_len
    }

    /// How many later prompts have more than the first `len` tokens in common with this one.
    pub fn num_later(&self, len: usize) -> u32 {
        let place = self.shared.partition_point(|prefix| prefix.len as usize <= len);
        self.shared.get(place).map_or(0, |prefix| prefix.num_later)
    }

    /// Of the positions in `first..end`, how many belong to the prompt.
    pub fn num_prompt_tokens(&self, first: usize, end: usize) -> usize {
        end.min(self.prompt_len).saturating_sub(first)
    }

    /// Adds a sampled token; `Some` when it ends the answer.
    pub fn push_sampled(&mut self, token_id: u32, eos_token_ids: &[u32]) -> Option<FinishReason> {
        assert_eq!(self.computed_len, self.known_len(), "sampled before all tokens were computed");
        if !self.sampling.ignore_eos && eos_token_ids.contains(&token_id) {
            return Some(FinishReason::Stop);
        }
        self.token_ids.push(token_id);
        if self.sampling.has_penalties() {
            TokenUse::count(&mut self.token_uses, token_id);
        }
        (self.answer_len() == self.max_tokens).then_some(FinishReason::Length)
    }

    /// It has left. A planned step may compute one token more: the one that was sampled last, which no answer has.
    pub fn retire(&mut self, unanswered: Option<u32>) {
        self.fate = Fate::Retired;
        self.token_ids.extend(unanswered);
    }

    /// The answer that ended so.
    pub fn finished(&self, reason: FinishReason) -> Finished {
        Finished {
            id: self.id,
            token_ids: self.token_ids[self.prompt_len..].to_vec(),
            reason,
            prompt_len: self.prompt_len as u32,
            computed_len: self.num_computed,
            reused_len: self.num_reused,
        }
    }
}

/// What penalties are for before there is an answer.
fn uses_of_prompt(token_ids: &[u32], sampling: &SamplingParams) -> Vec<TokenUse> {
    if !sampling.penalizes_prompt() {
        return Vec::new();
    }
    let mut uses: Vec<TokenUse> =
        token_ids.iter().map(|&token_id| TokenUse { token_id, num_in_answer: 0 }).collect();
    uses.sort_unstable_by_key(|token| token.token_id);
    uses.dedup();
    uses
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uses_are_counted_for_penalties_alone() {
        let of = |token_id, num_in_answer| TokenUse { token_id, num_in_answer };
        for (sampling, before, after) in [
            (SamplingParams::GREEDY, vec![], vec![]),
            (
                SamplingParams { frequency_penalty: 0.5, ..SamplingParams::GREEDY },
                vec![],
                vec![of(3, 1), of(8, 2)],
            ),
            (
                SamplingParams { repetition_penalty: 1.1, ..SamplingParams::GREEDY },
                vec![of(2, 0), of(5, 0), of(8, 0)],
                vec![of(2, 0), of(3, 1), of(5, 0), of(8, 2)],
            ),
        ] {
            let request = SequenceRequest::new(SequenceId(0), Arc::from([8, 2, 5, 2, 8]), 9, sampling);
            let mut sequence = Sequence::new(&request, 0);
            assert_eq!(sequence.token_uses, before);
            for token_id in [8, 3, 8, 0] {
                sequence.computed_len = sequence.known_len();
                sequence.push_sampled(token_id, &[0]);
            }
            assert_eq!(sequence.token_uses, after);
        }
    }

    #[test]
    fn a_reason_is_stored_as_it_is_shown() {
        for reason in [FinishReason::Stop, FinishReason::Length] {
            assert_eq!(serde_json::to_string(&reason).unwrap(), format!("\"{}\"", reason.as_str()));
        }
    }
}
