//! The inference engine: prompts in, answers out, one model step at a time.
//!
//! A plain struct without threads, clock or channels: whoever owns it calls [`Engine::step`] while
//! [`Engine::has_work`]. An answer depends on the model, the prompt, `max_tokens` and the sampling parameters only;
//! never on what else runs, how prompts are cut into steps, or what the prefix cache holds. Who runs when is decided
//! in [`scheduler`](super::scheduler); here a plan becomes a batch and a model's output becomes answers.
//!
//! A model that takes a second step while one runs is given it before the first is waited for, so that it never waits
//! for the engine. Which answer ends where does not depend on it.

use std::collections::VecDeque;

use tidemill_kernels::step::{Model, ModelInfo, StepBatch, StepError, StepOutput};

use super::scheduler::{Counters, Scheduler};
use super::sequence::{Finished, MAX_PLANNED, OwnerId, SequenceId, SequenceRequest};

/// The bounds of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EngineConfig {
    /// Most sequences running at once.
    pub max_num_seqs: usize,
    /// Most tokens in one step, prefill chunks and decodes together.
    pub max_num_batched_tokens: usize,
    pub enable_prefix_cache: bool,
}

/// Counts since the engine was made. Once it is idle, `prompt_tokens + recomputed_tokens` equals
/// `computed_tokens + reused_tokens + aborted_tokens`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct EngineStats {
    /// Model calls that succeeded.
    pub steps: u64,
    /// Tokens that went through the model, prompt and answer tokens together.
    pub step_tokens: u64,
    /// Sequences answered.
    pub finished: u64,
    /// Sequences given up, and their prompt tokens that were neither computed nor reused until then.
    pub aborted: u64,
    pub aborted_tokens: u64,
    /// Prompt tokens of the sequences submitted so far.
    pub prompt_tokens: u64,
    /// Prompt tokens that went through the model, recomputation included.
    pub computed_tokens: u64,
    /// Prompt tokens taken from the prefix cache.
    pub reused_tokens: u64,
    /// Prompt tokens among `computed_tokens` that the same sequence had computed or reused before a preemption.
    pub recomputed_tokens: u64,
    /// Answer tokens that were computed again after a preemption.
    pub recomputed_output_tokens: u64,
    /// Answer tokens, without those that end a sequence.
    pub output_tokens: u64,
    pub preemptions: u64,
    /// Pages of preempted sequences that went to the host's memory, and that came back from there.
    pub swapped_out_pages: u64,
    pub swapped_in_pages: u64,
    pub kv_pages_total: u64,
    /// Pages that running sequences hold.
    pub kv_pages_in_use: u64,
    /// Pages that only the prefix cache holds; they are given up when a sequence needs them.
    pub kv_pages_cached: u64,
    /// Most sequences that ever ran at once.
    pub peak_running: u64,
}

/// A prompt the engine can never answer; a fault of the data, not of the engine.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SubmitError {
    #[error("prompt is empty")]
    Empty,
    #[error("prompt asks for no answer tokens")]
    NoAnswer,
    #[error("prompt and answer need {len} tokens, the limit is {limit}")]
    TooLong { len: u64, limit: u32 },
    #[error("prompt has token id {token_id}, the vocabulary has {vocab_size} tokens")]
    UnknownToken { token_id: u32, vocab_size: u32 },
}

/// A model, its KV cache and the sequences in flight.
pub struct Engine {
    model: Box<dyn Model>,
    scheduler: Scheduler,
    steps: u64,
    step_tokens: u64,
    max_started: usize,
    /// Steps that the model runs, the oldest first.
    started: VecDeque<StepBatch>,
    /// Batches to be reused.
    spare: Vec<StepBatch>,
}

impl Engine {
    pub fn new(model: Box<dyn Model>, config: EngineConfig) -> Self {
        let info = model.info();
        assert!(info.page_size.is_power_of_two(), "page_size is {}", info.page_size);
        assert!(info.max_position > 0, "a model without positions");
        let scheduler = Scheduler::new(config, info.num_pages, info.page_size, model.copies_pages())
            .with_host_pages(model.num_host_pages());
        let max_started = model.max_started().min(MAX_PLANNED);
        assert!(max_started > 0, "a model that starts no step");
        let (started, spare) = (VecDeque::new(), Vec::new());
        Self { model, scheduler, steps: 0, step_tokens: 0, max_started, started, spare }
    }

    pub fn model_info(&self) -> &ModelInfo {
        self.model.info()
    }

    /// Longest sequence, prompt and answer together, that fits the model and the whole KV cache.
    pub fn max_seq_len(&self) -> u32 {
        let info = self.model.info();
        info.max_position.min(info.num_pages.saturating_mul(info.page_size))
    }

    /// Queues a prompt. Prompts are admitted in this order, so equal prefixes should follow each other. How many are
    /// queued is for the caller to bound.
    pub fn submit(&mut self, request: SequenceRequest) -> Result<(), SubmitError> {
        if request.token_ids.is_empty() {
            return Err(SubmitError::Empty);
        }
        if request.max_tokens == 0 {
            return Err(SubmitError::NoAnswer);
        }
        let len = request.token_ids.len() as u64 + u64::from(request.max_tokens);
        let limit = self.max_seq_len();
        if len > u64::from(limit) {
            return Err(SubmitError::TooLong { len, limit });
        }
        let vocab_size = self.model.info().vocab_size;
        if let Some(&token_id) = request.token_ids.iter().find(|&&token_id| token_id >= vocab_size) {
            return Err(SubmitError::UnknownToken { token_id, vocab_size });
        }
        self.scheduler.submit(&request);
        Ok(())
    }

    /// Sequences whose first token came with the last step.
    pub fn first_tokens(&self) -> &[SequenceId] {
        self.scheduler.first_tokens()
    }

    /// Gives up a sequence, waiting or running: it is never reported as finished. False if there is none of this name.
    pub fn abort(&mut self, id: SequenceId) -> bool {
        self.scheduler.abort(id)
    }

    pub fn has_work(&self) -> bool {
        self.scheduler.has_work()
    }

    pub fn num_waiting(&self) -> usize {
        self.scheduler.num_waiting()
    }

    pub fn num_running(&self) -> usize {
        self.scheduler.num_running()
    }

    /// Waits for one step of the model and returns the sequences this has finished; without work it does nothing.
    /// Before it waits, it starts the step behind, if the model takes it; so when the last answer is there, a step may
    /// still be running, and there is work until it is done.
    ///
    /// A failed step changes no sequence, nor does one that was started behind it. Both are the same when tried again, but
    /// for what they were to swap out, which is lost and will be computed again.
    pub fn step(&mut self) -> Result<Vec<Finished>, StepError> {
        if !self.has_work() {
            return Ok(Vec::new());
        }
        let finished = self.start_steps().and_then(|()| self.finish_step());
        if finished.is_err() {
            self.drain();
            self.scheduler.fail();
        }
        finished
    }

    fn start_steps(&mut self) -> Result<(), StepError> {
        while self.started.len() < self.max_started && self.scheduler.plan(self.started.len()) {
            let mut batch = self.spare.pop().unwrap_or_default();
            batch.clear();
            self.scheduler.fill(self.started.len(), &mut batch);
            batch.check(self.model.info());
            self.model.start(&batch)?;
            self.started.push_back(batch);
        }
        Ok(())
    }

    fn finish_step(&mut self) -> Result<Vec<Finished>, StepError> {
        let batch = self.started.pop_front().expect("with work there is a step");
        let output = self.model.finish()?;
        let info = self.model.info();
        check_output(&batch, &output, info)?;
        self.steps += 1;
        self.step_tokens += batch.num_tokens() as u64;
        let finished = self.scheduler.commit(&output, &info.eos_token_ids);
        self.spare.push(batch);
        Ok(finished)
    }

    /// What runs behind a failed step is waited for and dropped.
    fn drain(&mut self) {
        while let Some(batch) = self.started.pop_front() {
            let _ = self.model.finish();
            self.spare.push(batch);
        }
    }

    /// What of the counts is this owner's.
    pub fn counters_of(&self, owner: OwnerId) -> Counters {
        self.scheduler.counters_of(owner)
    }

    pub fn stats(&self) -> EngineStats {
        let counters = self.scheduler.counters();
        let num_pages = self.scheduler.num_pages();
        EngineStats {
            steps: self.steps,
            step_tokens: self.step_tokens,
            finished: counters.finished,
            aborted: counters.aborted,
            aborted_tokens: counters.aborted_tokens,
            prompt_tokens: counters.prompt_tokens,
            computed_tokens: counters.computed_tokens,
            reused_tokens: counters.reused_tokens,
            recomputed_tokens: counters.recomputed_tokens,
            recomputed_output_tokens: counters.recomputed_output_tokens,
            output_tokens: counters.output_tokens,
            preemptions: counters.preemptions,
            swapped_out_pages: counters.swapped_out_pages,
            swapped_in_pages: counters.swapped_in_pages,
            kv_pages_total: num_pages as u64,
            kv_pages_in_use: (num_pages - self.scheduler.num_available_pages()) as u64,
            kv_pages_cached: self.scheduler.num_idle_pages() as u64,
            peak_running: counters.peak_running,
        }
    }
}

/// A model is foreign code: what it returns is checked before anything is changed.
fn check_output(batch: &StepBatch, output: &StepOutput, info: &ModelInfo) -> Result<(), StepError> {
    let fail = |message: String| Err(StepError { message });
    if output.token_ids.len() != batch.num_seqs() {
        return fail(format!("model answered {} of {} sequences", output.token_ids.len(), batch.num_seqs()));
    }
    for (sampling, token_id) in batch.sampling.iter().zip(&output.token_ids) {
        match (sampling, *token_id) {
            (Some(_), None) => return fail("model sampled no token".to_owned()),
            (Some(_), Some(token_id)) if token_id >= info.vocab_size => {
                return fail(format!(
                    "model sampled token id {token_id}, the vocabulary has {} tokens",
                    info.vocab_size
                ));
            }
            _ => {}
        }
    }
    Ok(())
}

#[cfg(test)]
mod fuzz;
#[cfg(test)]
mod tests;
