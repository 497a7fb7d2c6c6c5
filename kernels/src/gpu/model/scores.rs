//! What a model thinks of tokens that are there already: for comparisons and for perplexity, not for answers.
//!
//! Runs a step by itself, while no other is in flight, and waits for every part of it.

use super::buffers::MAX_HEAD_ROWS;
use super::forward::Head;
use super::inputs::{Layout, StepShape};
use super::{GpuModel, Runner};
use crate::gpu::device::DeviceError;
use crate::gpu::memory::DeviceVec;
use crate::gpu::ops::{LogProbs, log_probs};
use crate::step::{StepBatch, StepError};

impl GpuModel {
    /// Runs a step and returns the logits after the last row of every sequence, `[num_seqs, vocab_size]`.
    pub fn logits(&mut self, batch: &StepBatch) -> Result<Vec<f32>, StepError> {
        let rows: Vec<u32> = (0..batch.num_seqs()).map(|seq| batch.rows(seq).end as u32 - 1).collect();
        let vocab_size = self.info.vocab_size as usize;
        let mut logits = Vec::with_capacity(rows.len() * vocab_size);
        self.run_heads(batch, &rows, |runner, rows| {
            logits.extend_from_slice(&runner.buffers.logits.read()?[..rows.len() * vocab_size]);
            Ok(())
        })?;
        Ok(logits)
    }

    /// Runs a step and returns the natural logarithm of the probability of each token of the batch that has one before
    /// it there: what perplexity is made of.
    pub fn log_probabilities(&mut self, batch: &StepBatch) -> Result<Vec<f64>, StepError> {
        let rows_before_others = |seq| batch.rows(seq).start as u32..batch.rows(seq).end as u32 - 1;
        let rows: Vec<u32> = (0..batch.num_seqs()).flat_map(rows_before_others).collect();
        if rows.is_empty() {
            // Keys and values are written all the same.
            return self.logits(batch).map(|_| Vec::new());
        }
        let mut all = Vec::with_capacity(rows.len());
        self.run_heads(batch, &rows, |runner, rows| {
            let device = &runner.device;
            let token_ids: Vec<u32> = rows.iter().map(|&row| batch.token_ids[row as usize + 1]).collect();
            let out = DeviceVec::new(device, rows.len())?;
            let args = LogProbs {
                num_rows: rows.len(),
                vocab_size: runner.weights.config.vocab_size as usize,
                logits: &runner.buffers.logits,
                rows_of: None,
                indptr: None,
                token_ids: &DeviceVec::from_slice(device, &token_ids)?,
                log_probs: &out,
                top: None,
            };
            log_probs(&**device, &args)?;
            all.extend(out.read()?.into_iter().map(f64::from));
            Ok(())
        })?;
        Ok(all)
    }

    /// Runs a step and shows the logits after some of its rows, so many at a time as there is room for. `show` waits for
    /// the device.
    fn run_heads(
        &mut self,
        batch: &StepBatch,
        rows: &[u32],
        mut show: impl FnMut(&Runner, &[u32]) -> Result<(), DeviceError>,
    ) -> Result<(), StepError> {
        batch.check(&self.info);
        assert!(self.in_flight.is_empty(), "a step is in flight");
        assert!(!batch.is_ahead(), "no step runs whose tokens could be taken");
        assert!(batch.swaps.is_empty(), "nobody was preempted");
        assert!(batch.num_tokens() <= self.runner.max_rows() && batch.num_seqs() <= self.max_num_seqs());
        self.plan.plan(batch);
        let num_heads = rows.len().min(self.max_num_seqs()).min(MAX_HEAD_ROWS);
        let layout = Layout::new(StepShape {
            num_rows: batch.num_tokens(),
            num_heads,
            num_copies: batch.copies.len(),
            room: self.plan.size(),
        });
        let plan_len = self.fill(batch, &layout, 0)?;
        for (index, rows) in rows.chunks(num_heads).enumerate() {
            self.inputs.host(0, &layout).head_rows[..rows.len()].copy_from_slice(rows);
            self.inputs.upload(0, &layout, plan_len)?;
            let inputs = self.inputs.there(&layout);
            if index == 0 {
                self.runner.layers(&layout, &inputs)?;
            }
            self.runner.head(&inputs, Head::Listed, 0, rows.len())?;
            show(&self.runner, rows)?;
        }
        Ok(())
    }
}
