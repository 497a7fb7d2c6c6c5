//! The seam between the engine and a model: one ragged batch in, sampled token ids out.
//!
//! Layout follows FlashInfer: sequence `s` owns rows `qo_indptr[s]..qo_indptr[s + 1]` of the token arrays and
//! pages `kv_page_indptr[s]..kv_page_indptr[s + 1]` of `kv_page_indices`. The token at position `p` of a
//! sequence lives in slot `pages[p / page_size] * page_size + p % page_size`.
//!
//! A step is started and, later, finished. A model on a device of its own lets the next step be started while one
//! runs; a token that the running step will sample is then named by [`StepBatch::sampled_by`] instead of known. Steps
//! run in the order in which they were started, each on what the one before it has written.
//!
//! The caller guarantees what [`StepBatch::check`] asserts; a model may rely on it. Which pages are free or
//! shared is unknown here: see `page_pool` and `prefix_cache` in `tidemill-operators`.

use std::collections::BTreeSet;
use std::fmt;

/// One fixed-size piece of the KV cache; `page_size` tokens, a power of two.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PageId(pub u32);

/// One piece of the host's memory, for the keys and values of one page.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct HostPageId(pub u32);

/// How the next token is chosen from the logits.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct SamplingParams {
    /// 0 is greedy: the highest logit, the lowest token id on ties.
    pub temperature: f32,
    /// Keep the smallest set of tokens whose probability reaches this; 1 keeps all.
    pub top_p: f32,
    /// Keep this many of the most likely tokens; 0 keeps all.
    pub top_k: u32,
    /// With the position of the token, decides the draw; so a draw never depends on the batch.
    pub seed: u64,
    /// Tokens that end an answer are taken like others, so the answer has its full length.
    pub ignore_eos: bool,
    /// Tokens less likely than the most likely one times this are no candidates; 0 keeps all.
    pub min_p: f32,
    /// Divides positive logits, and multiplies others, of tokens in the prompt or the answer; 1 changes nothing.
    pub repetition_penalty: f32,
    /// Taken from the logits of tokens in the answer.
    pub presence_penalty: f32,
    /// Taken from the logits of tokens in the answer, once for each time.
    pub frequency_penalty: f32,
}

impl SamplingParams {
    pub const GREEDY: Self = Self {
        temperature: 0.0,
        top_p: 1.0,
        top_k: 0,
        seed: 0,
        ignore_eos: false,
        min_p: 0.0,
        repetition_penalty: 1.0,
        presence_penalty: 0.0,
        frequency_penalty: 0.0,
    };

    /// Whether the choice depends on which tokens were used before.
    pub fn has_penalties(&self) -> bool {
        self.penalizes_prompt() || self.presence_penalty != 0.0 || self.frequency_penalty != 0.0
    }

    /// Whether it depends on those of the prompt too.
    pub fn penalizes_prompt(&self) -> bool {
        self.repetition_penalty != 1.0
    }
}

/// A token that is in the prompt or the answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(C)]
pub struct TokenUse {
    pub token_id: u32,
    /// 0 where it is in the prompt alone.
    pub num_in_answer: u32,
}

impl TokenUse {
    /// Counts a token of the answer, among uses in the order of the ids.
    pub fn count(uses: &mut Vec<Self>, token_id: u32) {
        match uses.binary_search_by_key(&token_id, |token| token.token_id) {
            Ok(place) => uses[place].num_in_answer += 1,
            Err(place) => uses.insert(place, Self { token_id, num_in_answer: 1 }),
        }
    }
}

/// One forward pass over any mix of prefill chunks and decodes.
#[derive(Clone, Debug, Default)]
pub struct StepBatch {
    /// `[num_tokens]`
    pub token_ids: Vec<u32>,
    /// `[num_tokens]`, consecutive within a sequence.
    pub positions: Vec<u32>,
    /// `[num_seqs + 1]`
    pub qo_indptr: Vec<u32>,
    /// `[num_seqs + 1]`
    pub kv_page_indptr: Vec<u32>,
    /// `[kv_page_indptr.last()]`
    pub kv_page_indices: Vec<PageId>,
    /// `[num_seqs]`: `Some` where the token after the sequence's last row is wanted.
    pub sampling: Vec<Option<SamplingParams>>,
    /// `[num_seqs]`: `Some(s)` where the only row of the sequence is the token which the step started just before this
    /// one samples for its sequence `s`; its entry in `token_ids` is 0 then. All `None` for a model with
    /// [`max_started`](Model::max_started) 1.
    pub sampled_by: Vec<Option<u32>>,
    /// `[num_seqs + 1]`
    pub token_uses_indptr: Vec<u32>,
    /// `[token_uses_indptr.last()]`: what the penalties of a sequence are for, in the order of the ids, none twice. Empty for
    /// a sequence that is not sampled or has [none](SamplingParams::has_penalties); tokens that are in the prompt alone may be
    /// left out where [nothing asks for them](SamplingParams::penalizes_prompt). A token that `sampled_by` names is not among
    /// them: the model counts it.
    pub token_uses: Vec<TokenUse>,
    /// Done in this order before anything else; empty unless the model has [host pages](Model::num_host_pages). All that go
    /// out come first, and no host page goes both ways.
    pub swaps: Vec<PageSwap>,
    /// Done after the swaps, before anything is written; empty unless the model [`copies_pages`](Model::copies_pages). No page is
    /// both source and target.
    pub copies: Vec<PageCopy>,
}

/// The keys and values in the first `len` slots of a page, for another page: a prefix that ends within a page is
/// shared by copying its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageCopy {
    pub from: PageId,
    pub to: PageId,
    pub len: u32,
}

/// The keys and values of a whole page, for a host page or from one. Where they come from, they stay until something
/// else is written there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PageSwap {
    Out { page: PageId, host: HostPageId },
    In { host: HostPageId, page: PageId },
}

/// `[num_seqs]`: the sampled token where one was asked for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StepOutput {
    pub token_ids: Vec<Option<u32>>,
}

/// What the engine must know of a model.
#[derive(Clone, Debug)]
pub struct ModelInfo {
    pub name: String,
    /// Hex digest of the weights and the numeric path: equal digests give equal answers.
    pub digest: String,
    pub vocab_size: u32,
    /// Longest sequence, prompt and answer together, in tokens.
    pub max_position: u32,
    /// Tokens that end an answer.
    pub eos_token_ids: Vec<u32>,
    /// Tokens per page.
    pub page_size: u32,
    pub num_pages: u32,
}

/// A step failed as a whole; nothing of it was kept.
#[derive(Debug, thiserror::Error)]
#[error("model step failed: {message}")]
pub struct StepError {
    pub message: String,
}

/// A model with its KV cache. Answers must not depend on how sequences are cut into steps.
///
/// It may be dropped while steps are started and not finished.
pub trait Model: Send {
    fn info(&self) -> &ModelInfo;
    /// Starts a step: the batch's keys and values are written to their slots, then tokens are sampled where asked. The
    /// caller may reuse the batch afterwards. A step that fails here is not started and is not finished.
    fn start(&mut self, batch: &StepBatch) -> Result<(), StepError>;
    /// Waits for the oldest step that is started and not finished. After a failure the steps started behind it are
    /// finished too, and what they return means nothing; then the same steps may be started again.
    fn finish(&mut self) -> Result<StepOutput, StepError>;
    /// So many steps may be started and not finished at once.
    fn max_started(&self) -> usize {
        1
    }
    /// Starts a step and waits for it; no other may be started.
    fn step(&mut self, batch: &StepBatch) -> Result<StepOutput, StepError> {
        self.start(batch)?;
        self.finish()
    }
    /// Whether a step carries out [`StepBatch::copies`]; otherwise only whole pages are shared.
    fn copies_pages(&self) -> bool {
        false
    }
    /// So many pages can be swapped to the host's memory, by [`StepBatch::swaps`].
    fn num_host_pages(&self) -> u32 {
        0
    }
}

impl fmt::Display for PageId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)
    }
}

impl StepBatch {
    pub fn num_tokens(&self) -> usize {
        self.token_ids.len()
    }

    pub fn num_seqs(&self) -> usize {
        self.sampling.len()
    }

    /// Rows of sequence `seq` in the token arrays.
    pub fn rows(&self, seq: usize) -> std::ops::Range<usize> {
        self.qo_indptr[seq] as usize..self.qo_indptr[seq + 1] as usize
    }

    /// Page table of sequence `seq`.
    pub fn pages(&self, seq: usize) -> &[PageId] {
        &self.kv_page_indices[self.kv_page_indptr[seq] as usize..self.kv_page_indptr[seq + 1] as usize]
    }

    /// What the penalties of sequence `seq` are for.
    pub fn uses(&self, seq: usize) -> &[TokenUse] {
        &self.token_uses[self.token_uses_indptr[seq] as usize..self.token_uses_indptr[seq + 1] as usize]
    }

    /// Adds one sequence; `positions` start at `first_position`.
    pub fn push(
        &mut self,
        token_ids: &[u32],
        first_position: u32,
        pages: &[PageId],
        sampling: Option<SamplingParams>,
    ) {
        if self.qo_indptr.is_empty() {
            self.qo_indptr.push(0);
            self.kv_page_indptr.push(0);
            self.token_uses_indptr.push(0);
        }
        self.token_ids.extend_from_slice(token_ids);
        self.positions.extend((0..token_ids.len() as u32).map(|i| first_position + i));
        self.kv_page_indices.extend_from_slice(pages);
        self.qo_indptr.push(self.token_ids.len() as u32);
        self.kv_page_indptr.push(self.kv_page_indices.len() as u32);
        self.sampling.push(sampling);
        self.sampled_by.push(None);
        self.token_uses_indptr.push(self.token_uses.len() as u32);
    }

    /// Adds one sequence with one row: the token that the step started just before this one samples for `sampled_by`.
    pub fn push_ahead(
        &mut self,
        sampled_by: u32,
        position: u32,
        pages: &[PageId],
        sampling: Option<SamplingParams>,
    ) {
        self.push(&[0], position, pages, sampling);
        if let Some(last) = self.sampled_by.last_mut() {
            *last = Some(sampled_by);
        }
    }

    /// Says what the penalties of the sequence added last are for.
    pub fn push_uses(&mut self, uses: &[TokenUse]) {
        self.token_uses.extend_from_slice(uses);
        *self.token_uses_indptr.last_mut().expect("a sequence was added") = self.token_uses.len() as u32;
    }

    /// Removes everything and keeps the memory.
    pub fn clear(&mut self) {
        self.token_ids.clear();
        self.positions.clear();
        self.qo_indptr.clear();
        self.kv_page_indptr.clear();
        self.kv_page_indices.clear();
        self.sampling.clear();
        self.sampled_by.clear();
        self.token_uses_indptr.clear();
        self.token_uses.clear();
        self.swaps.clear();
        self.copies.clear();
    }

    /// Whether a token is named by the step that samples it.
    pub fn is_ahead(&self) -> bool {
        self.sampled_by.iter().any(Option::is_some)
    }

    /// Asserts the layout; a failure is a bug in the scheduler.
    #[track_caller]
    pub fn check(&self, info: &ModelInfo) {
        assert!(self.num_seqs() > 0, "an empty step");
        assert_eq!(self.positions.len(), self.num_tokens());
        assert_eq!(self.qo_indptr.len(), self.num_seqs() + 1);
        assert_eq!(self.kv_page_indptr.len(), self.num_seqs() + 1);
        assert_eq!(self.sampled_by.len(), self.num_seqs());
        for seq in 0..self.num_seqs() {
            let rows = self.rows(seq);
            assert!(!rows.is_empty(), "a sequence without tokens");
            let first = self.positions[rows.start];
            let last = self.positions[rows.end - 1];
            assert_eq!(last - first, rows.len() as u32 - 1, "positions are not consecutive");
            assert!(last < info.max_position, "position {last} is beyond the model");
            if self.sampled_by[seq].is_some() {
                assert_eq!(self.token_ids[rows], [0], "a token to be sampled is one row");
            }
            assert!(last / info.page_size < self.pages(seq).len() as u32, "no page for position {last}");
        }
        self.check_uses(info);
        assert!(self.token_ids.iter().all(|&id| id < info.vocab_size), "token id beyond the vocabulary");
        assert!(self.kv_page_indices.iter().all(|page| page.0 < info.num_pages), "page beyond the cache");
        let mut hosts_out = BTreeSet::new();
        for swap in &self.swaps {
            let (PageSwap::Out { page, host } | PageSwap::In { host, page }) = *swap;
            assert!(page.0 < info.num_pages, "a swap beyond the cache");
            match swap {
                PageSwap::Out { .. } => assert!(hosts_out.insert(host), "a host page is written twice"),
                PageSwap::In { .. } => assert!(!hosts_out.contains(&host), "a host page goes both ways"),
            }
        }
        for copy in &self.copies {
            assert!(copy.from.0 < info.num_pages && copy.to.0 < info.num_pages, "copy beyond the cache");
            assert!((1..info.page_size).contains(&copy.len), "a copy of {} slots", copy.len);
            assert!(self.copies.iter().all(|other| other.to != copy.from), "a source is a target too");
        }
    }

    /// Whether the logits of a sequence are changed by penalties.
    pub fn has_penalties(&self) -> bool {
        let is_counted = |(seq, params): (usize, &Option<SamplingParams>)| {
            params.is_some_and(|params| params.has_penalties()) && self.sampled_by[seq].is_some()
        };
        !self.token_uses.is_empty() || self.sampling.iter().enumerate().any(is_counted)
    }

    /// Fills in the tokens that the step before has sampled, and counts them, for a model that does so on the host.
    pub fn fill_in(&mut self, before: &StepOutput) {
        let (mut uses, mut indptr) = (Vec::new(), vec![0]);
        for seq in 0..self.num_seqs() {
            let mut of_seq = self.uses(seq).to_vec();
            if let Some(sampled_by) = self.sampled_by[seq] {
                let token_id =
                    before.token_ids[sampled_by as usize].expect("the step before has sampled a token");
                let row = self.rows(seq).start;
                self.token_ids[row] = token_id;
                if self.sampling[seq].is_some_and(|params| params.has_penalties()) {
                    TokenUse::count(&mut of_seq, token_id);
                }
            }
            uses.extend(of_seq);
            indptr.push(uses.len() as u32);
        }
        (self.token_uses, self.token_uses_indptr) = (uses, indptr);
    }

    fn check_uses(&self, info: &ModelInfo) {
        assert_eq!(self.token_uses_indptr.len(), self.num_seqs() + 1);
        assert_eq!(self.token_uses_indptr.last(), Some(&(self.token_uses.len() as u32)));
        for seq in 0..self.num_seqs() {
            let uses = self.uses(seq);
            let Some(last) = uses.last() else { continue };
            assert!(
                self.sampling[seq].is_some_and(|params| params.has_penalties()),
                "tokens that nothing asks for"
            );
            assert!(uses.is_sorted_by(|a, b| a.token_id < b.token_id), "a token is counted twice");
            assert!(last.token_id < info.vocab_size, "a use beyond the vocabulary");
            let known_len =
                u64::from(self.positions[self.rows(seq).end - 1]) + u64::from(self.sampled_by[seq].is_none());
            let num_used: u64 = uses.iter().map(|token| u64::from(token.num_in_answer.max(1))).sum();
            assert!(num_used <= known_len, "{num_used} uses of {known_len} tokens");
        }
    }
}
