//! A model that is watched: what each step must do at least, and when the host was at work for it.
//!
//! The time of the host for a step is that from the end of the last call of the model to the end of its start: commit,
//! plan, batch and queueing. Counting the step comes behind that and is in no figure but the whole.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tidemill_kernels::step::{Model, ModelInfo, StepBatch, StepError, StepOutput};

use super::cost::{Cost, Counter};
use crate::clock::Clock;

/// A finished step.
#[derive(Clone, Copy, Debug)]
pub(super) struct Step {
    pub(super) cost: Cost,
    pub(super) host: Duration,
}

/// What is shared with who looks on.
#[derive(Clone, Debug, Default)]
pub(super) struct Steps(Arc<Mutex<Vec<Step>>>);

impl Steps {
    /// Those that finished since the last call.
    pub(super) fn take(&self) -> Vec<Step> {
        std::mem::take(&mut *self.lock())
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Step>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

pub(super) struct Timed {
    model: Box<dyn Model>,
    counter: Counter,
    clock: Clock,
    /// When the host began to work for the next step.
    since: Duration,
    started: VecDeque<Step>,
    finished: Steps,
}

impl Timed {
    pub(super) fn new(model: Box<dyn Model>, counter: Counter, clock: Clock) -> (Self, Steps) {
        let finished = Steps::default();
        let steps = finished.clone();
        (Self { model, counter, clock, since: clock.elapsed(), started: VecDeque::new(), finished }, steps)
    }
}

impl Model for Timed {
    fn info(&self) -> &ModelInfo {
        self.model.info()
    }

    fn start(&mut self, batch: &StepBatch) -> Result<(), StepError> {
        self.model.start(batch)?;
        let host = self.clock.elapsed() - self.since;
        self.started.push_back(Step { cost: self.counter.count(batch), host });
        self.since = self.clock.elapsed();
        Ok(())
    }

    fn finish(&mut self) -> Result<StepOutput, StepError> {
        let output = self.model.finish()?;
        self.since = self.clock.elapsed();
        let step = self.started.pop_front().expect("what is finished was started");
        self.finished.lock().push(step);
        Ok(output)
    }

    fn max_started(&self) -> usize {
        self.model.max_started()
    }

    fn copies_pages(&self) -> bool {
        self.model.copies_pages()
    }

    fn num_host_pages(&self) -> u32 {
        self.model.num_host_pages()
    }
}
