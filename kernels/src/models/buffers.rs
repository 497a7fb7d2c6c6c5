//! Working memory of a forward pass, kept between steps.
//!
//! Invariant: buffers grow to the largest step and never shrink, so a step after it allocates nothing here. Their
//! contents mean nothing between two steps.

use crate::backend::{AttentionShape, Backend};
use crate::models::ModelConfig;
use crate::models::experts::Route;
use crate::step::StepError;

pub(super) struct Buffers<B: Backend> {
    /// `[num_tokens, hidden_size]`: the residual stream.
    pub(super) hidden: Vec<f32>,
    /// `[num_tokens, hidden_size]`: input of a part, then its output.
    pub(super) normed: Vec<f32>,
    /// `[num_tokens, hidden_size]`
    pub(super) part: Vec<f32>,
    /// `[num_tokens, qkv_len]`
    pub(super) qkv: Vec<f32>,
    /// `[num_tokens, q_len]`
    pub(super) attended: Vec<f32>,
    /// `[num_tokens, 2, intermediate_size]`
    pub(super) gate_up: Vec<f32>,
    /// `[num_tokens, intermediate_size]`
    pub(super) gated: Vec<f32>,
    pub(super) experts: ExpertBuffers,
    /// The sequences whose next token is computed together.
    pub(super) head_seqs: Vec<usize>,
    /// `[head_seqs.len(), hidden_size]`
    pub(super) head_hidden: Vec<f32>,
    /// `[head_seqs.len(), hidden_size]`
    pub(super) head_normed: Vec<f32>,
    /// `[head_seqs.len(), vocab_size]`
    pub(super) logits: Vec<f32>,
    /// `[head_seqs.len()]`
    pub(super) sampled: Vec<Result<u32, StepError>>,
    pub(super) scratch: B::Scratch,
}

/// Empty where the feed-forward part is dense.
#[derive(Default)]
pub(super) struct ExpertBuffers {
    /// `[num_tokens, num_experts]`
    pub(super) scores: Vec<f32>,
    /// `[num_experts]`: the experts of one row, best first.
    pub(super) ranking: Vec<(f32, u32)>,
    /// `[num_tokens * num_experts_per_token]`
    pub(super) routes: Vec<Route>,
    /// `[num_tokens, hidden_size]`: the rows of one expert.
    pub(super) gathered: Vec<f32>,
    /// `[num_tokens, hidden_size]`: its answers.
    pub(super) answers: Vec<f32>,
}

impl<B: Backend> Default for Buffers<B> {
    fn default() -> Self {
        let empty = Vec::new;
        Self {
            hidden: empty(),
            normed: empty(),
            part: empty(),
            qkv: empty(),
            attended: empty(),
            gate_up: empty(),
            gated: empty(),
            experts: ExpertBuffers::default(),
            head_seqs: Vec::new(),
            head_hidden: empty(),
            head_normed: empty(),
            logits: empty(),
            sampled: Vec::new(),
            scratch: B::Scratch::default(),
        }
    }
}

impl<B: Backend> Buffers<B> {
    /// Sets the lengths for a step; the head has its own.
    pub(super) fn resize(&mut self, num_tokens: usize, config: &ModelConfig, shape: &AttentionShape) {
        let hidden_len = num_tokens * config.hidden_size as usize;
        let intermediate_len = num_tokens * config.intermediate_size as usize;
        self.hidden.resize(hidden_len, 0.0);
        self.normed.resize(hidden_len, 0.0);
        self.part.resize(hidden_len, 0.0);
        self.qkv.resize(num_tokens * shape.qkv_len(), 0.0);
        self.attended.resize(num_tokens * shape.q_len(), 0.0);
        self.gate_up.resize(2 * intermediate_len, 0.0);
        self.gated.resize(intermediate_len, 0.0);
        if let Some(experts) = config.experts {
            self.experts.scores.resize(num_tokens * experts.num_experts as usize, 0.0);
            self.experts.gathered.resize(hidden_len, 0.0);
            self.experts.answers.resize(hidden_len, 0.0);
        }
    }
}
