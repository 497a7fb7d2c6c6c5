//! A model for tests whose answers tell whether the pages were right.
//!
//! Each slot keeps the token id and position that were written there, with a digest of everything that came before
//! it, as the keys and values of a real model depend on all earlier tokens. To sample, the page table is walked from
//! position 0 and hashed. A slot that was never written, that was written for another position, or that was computed
//! after another history changes the answer and is counted as a fault.
//! So an answer is a function of the tokens and the sampling parameters, unless the pages were wrong, or the list of what
//! was used where there are penalties.
//!
//! One that `runs_ahead` takes a second step while one is started, as a model on a device does: each is computed when
//! it is finished, from the pages as the step before it left them.

use std::collections::VecDeque;
use std::time::Duration;

use crate::step::{
    Model, ModelInfo, PageId, PageSwap, SamplingParams, StepBatch, StepError, StepOutput, TokenUse,
};

const START: u64 = 0x7469_6465_6d69_6c6c;
const FAULT: u64 = 0x6661_756c_7400_0000;

/// What a fake model looks like.
#[derive(Clone, Debug)]
pub struct FakeConfig {
    pub name: String,
    pub vocab_size: u32,
    /// The token that ends an answer.
    pub eos_token_id: u32,
    /// Chance of each answer token to be the last.
    pub eos_probability: f64,
    pub page_size: u32,
    pub num_pages: u32,
    pub num_host_pages: u32,
    pub max_position: u32,
    /// Each step takes this for every token of its batch, so that a test can interrupt it.
    pub delay_per_token: Duration,
    /// Two steps may be started at once.
    pub runs_ahead: bool,
}

impl Default for FakeConfig {
    fn default() -> Self {
        Self {
            name: "fake".to_owned(),
            vocab_size: 1000,
            eos_token_id: 0,
            eos_probability: 0.1,
            page_size: 16,
            num_pages: 256,
            num_host_pages: 0,
            max_position: 4096,
            delay_per_token: Duration::ZERO,
            runs_ahead: false,
        }
    }
}

/// See the module.
#[derive(Debug)]
pub struct FakeModel {
    config: FakeConfig,
    info: ModelInfo,
    /// `[num_pages * page_size]`
    slots: Vec<Option<Slot>>,
    /// `[num_host_pages * page_size]`
    host_slots: Vec<Option<Slot>>,
    /// Steps that are not finished, the oldest first.
    started: VecDeque<StepBatch>,
    /// Of the last step that was finished.
    last_output: StepOutput,
    num_faults: u64,
    num_tokens: u64,
}

#[derive(Clone, Copy, Debug)]
struct Slot {
    token_id: u32,
    position: u32,
    /// Digest of all tokens up to and with this one, as seen when it was written.
    history: u64,
}

impl FakeModel {
    pub fn new(config: FakeConfig) -> Self {
        assert!(config.page_size.is_power_of_two(), "the page size is a power of two");
        assert!(
            config.vocab_size > 1 && config.eos_token_id < config.vocab_size,
            "a token besides the last one"
        );
        assert!((0.0..=1.0).contains(&config.eos_probability), "a probability");
        let info = ModelInfo {
            name: config.name.clone(),
            digest: format!("fake-{}-{}-{}", config.vocab_size, config.eos_token_id, config.eos_probability),
            vocab_size: config.vocab_size,
            max_position: config.max_position,
            eos_token_ids: vec![config.eos_token_id],
            page_size: config.page_size,
            num_pages: config.num_pages,
        };
        let slots = vec![None; config.page_size as usize * config.num_pages as usize];
        let host_slots = vec![None; config.page_size as usize * config.num_host_pages as usize];
        let (started, last_output) = (VecDeque::new(), StepOutput::default());
        Self { config, info, slots, host_slots, started, last_output, num_faults: 0, num_tokens: 0 }
    }

    /// How often a slot was read that did not hold what the sequence wrote there.
    pub fn num_faults(&self) -> u64 {
        self.num_faults
    }

    /// Tokens computed so far: the measure of what a prefix cache saves.
    pub fn num_tokens(&self) -> u64 {
        self.num_tokens
    }

    fn slot(&self, pages: &[PageId], position: u32) -> usize {
        let page = pages[(position / self.config.page_size) as usize].0 as usize;
        page * self.config.page_size as usize + (position % self.config.page_size) as usize
    }

    /// Digests of the history after each position from 0 to `last`; a fault changes all that follow.
    fn histories(&self, pages: &[PageId], last: u32) -> Vec<u64> {
        let mut history = START;
        let walk = (0..=last).map(|position| {
            history = match self.slots[self.slot(pages, position)] {
                Some(slot) => mix(mix(history, slot.token_id.into()), slot.position.into()),
                None => mix(history, FAULT),
            };
            history
        });
        walk.collect()
    }

    /// The digest that the answer comes from: the walk, with what each slot remembers of its own past.
    fn verified_history(&mut self, pages: &[PageId], last: u32) -> u64 {
        let histories = self.histories(pages, last);
        let mut verified = START;
        for (position, history) in (0..=last).zip(histories) {
            let slot = self.slots[self.slot(pages, position)];
            let sound = slot.is_some_and(|slot| slot.position == position && slot.history == history);
            verified = mix(verified, history);
            if !sound {
                self.num_faults += 1;
                verified = mix(verified, FAULT ^ u64::from(position));
            }
        }
        verified
    }

    fn compute(&mut self, batch: &StepBatch) -> StepOutput {
        if !self.config.delay_per_token.is_zero() {
            std::thread::sleep(self.config.delay_per_token * batch.num_tokens() as u32);
        }
        self.num_tokens += batch.num_tokens() as u64;
        let page_size = self.config.page_size as usize;
        for swap in &batch.swaps {
            let (PageSwap::Out { page, host } | PageSwap::In { host, page }) = *swap;
            let in_cache = &mut self.slots[page.0 as usize * page_size..][..page_size];
            let in_host = &mut self.host_slots[host.0 as usize * page_size..][..page_size];
            match swap {
                PageSwap::Out { .. } => in_host.copy_from_slice(in_cache),
                PageSwap::In { .. } => in_cache.copy_from_slice(in_host),
            }
        }
        for copy in &batch.copies {
            let from = copy.from.0 as usize * page_size;
            self.slots.copy_within(from..from + copy.len as usize, copy.to.0 as usize * page_size);
        }
        // As in a real model, all rows are written before any is read.
        for seq in 0..batch.num_seqs() {
            for row in batch.rows(seq) {
                let slot = self.slot(batch.pages(seq), batch.positions[row]);
                self.slots[slot] =
                    Some(Slot { token_id: batch.token_ids[row], position: batch.positions[row], history: 0 });
            }
        }
        for seq in 0..batch.num_seqs() {
            let last = batch.positions[batch.rows(seq).end - 1];
            let histories = self.histories(batch.pages(seq), last);
            for row in batch.rows(seq) {
                let position = batch.positions[row];
                let slot = self.slot(batch.pages(seq), position);
                if let Some(slot) = &mut self.slots[slot] {
                    slot.history = histories[position as usize];
                }
            }
        }
        let mut output = StepOutput { token_ids: vec![None; batch.num_seqs()] };
        for seq in 0..batch.num_seqs() {
            let last = batch.positions[batch.rows(seq).end - 1];
            let history = self.verified_history(batch.pages(seq), last);
            output.token_ids[seq] =
                batch.sampling[seq].map(|params| self.answer(history, &params, batch.uses(seq)));
        }
        output
    }

    fn answer(&self, history: u64, params: &SamplingParams, uses: &[TokenUse]) -> u32 {
        let mut hash = history;
        // Greedy answers do not depend on the seed, as in a real model.
        if params.temperature > 0.0 {
            for part in
                [params.temperature.to_bits().into(), params.top_p.to_bits().into(), params.top_k.into()]
            {
                hash = mix(hash, part);
            }
            hash = mix(hash, params.seed);
            if params.min_p > 0.0 {
                hash = mix(hash, params.min_p.to_bits().into());
            }
        }
        if params.has_penalties() {
            for part in [params.repetition_penalty, params.presence_penalty, params.frequency_penalty] {
                hash = mix(hash, part.to_bits().into());
            }
            for token in uses {
                hash = mix(hash, u64::from(token.token_id) << 32 | u64::from(token.num_in_answer));
            }
        }
        let uniform = (mix(hash, 1) >> 11) as f64 / (1u64 << 53) as f64;
        if uniform < self.config.eos_probability {
            return self.config.eos_token_id;
        }
        // Any token but the last one.
        let token_id = (mix(hash, 2) % u64::from(self.config.vocab_size - 1)) as u32;
        token_id + u32::from(token_id >= self.config.eos_token_id)
    }
}

impl Model for FakeModel {
    fn info(&self) -> &ModelInfo {
        &self.info
    }

    fn start(&mut self, batch: &StepBatch) -> Result<(), StepError> {
        batch.check(&self.info);
        assert!(self.started.len() < self.max_started(), "too many steps are started");
        assert!(self.config.runs_ahead || !batch.is_ahead(), "a token of a step that does not run");
        self.started.push_back(batch.clone());
        Ok(())
    }

    fn finish(&mut self) -> Result<StepOutput, StepError> {
        let mut batch = self.started.pop_front().expect("a step is started");
        if batch.is_ahead() {
            batch.fill_in(&self.last_output);
        }
        self.last_output = self.compute(&batch);
        Ok(self.last_output.clone())
    }

    fn max_started(&self) -> usize {
        if self.config.runs_ahead { 2 } else { 1 }
    }

    fn copies_pages(&self) -> bool {
        true
    }

    fn num_host_pages(&self) -> u32 {
        self.config.num_host_pages
    }
}

fn mix(hash: u64, value: u64) -> u64 {
    let mut z = (hash ^ value)
        .wrapping_add(0x9e37_79b9_7f4a_7c15)
        .rotate_left(23)
        .wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests;
