//! A plan as a timely dataflow.
//!
//! ```text
//! source ─ deal ─┬─ tokenize ─ recall ─┬─ group ─ infer ─┬─ (next step) … ─ sink
//!   ▲            └ errors ──────┐      └ answered ───────┘                  │
//!   │                           └───────────────────────────── errors ─ sink│
//!   └──────────────── credit: the frontier of what is written ◀─────────────┘
//! ```
//!
//! One source batch is one epoch. Source, group and sink run on the first worker; tokenizing and inference
//! are spread. Blocking clients run on threads of their own, in [`source`] and [`sink`].

pub mod sink;
pub mod source;

use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tidemill_connectors::source::Position;
use tidemill_operators::Epoch;
use tidemill_operators::batch::RoundRobin;
use tidemill_operators::counters::Counters;
use tidemill_operators::document::{Document, RecordError};
use tidemill_operators::group::window::WindowLimits;
use tidemill_operators::group::{Demand, Group};
use tidemill_operators::infer::figures::EngineFigures;
use tidemill_operators::infer::load::EngineLoad;
use tidemill_operators::infer::runner::{EngineHandle, WorkContext};
use tidemill_operators::infer::{Failure, Infer, Stop};
use tidemill_operators::journal::Journal;
use tidemill_operators::recall::Recall;
use tidemill_operators::tokenize::{PromptBuilder, Tokenize};
use timely::dataflow::channels::pact::DistributorPact;
use timely::dataflow::operators::core::{Concatenate, OkErr};
use timely::dataflow::operators::{ConnectLoop, Feedback, Operator, Probe};
use timely::dataflow::{ProbeHandle, Scope, StreamVec};

use crate::plan::CreditPlan;
use sink::SinkThread;
use source::SourceThread;

/// What all workers of a run share.
#[derive(Clone)]
pub struct Shared {
    pub counters: Arc<Counters>,
    pub failure: Failure,
    /// Set when the run should end early: the user asked, a thread failed, the error budget is used up.
    pub stop: Stop,
    pub journal: Option<Journal>,
    /// What goes with the work to the engines, which other runs may share.
    pub work: Arc<WorkContext>,
    pub epochs: Arc<EpochLog>,
    /// By step.
    pub demands: Vec<Arc<Demand>>,
    pub credit: CreditPlan,
    pub at_source: Arc<AtSource>,
    /// Of the engines.
    pub loads: Vec<Arc<EngineLoad>>,
    pub figures: Vec<Arc<EngineFigures>>,
}

impl Shared {
    pub fn should_stop(&self) -> bool {
        self.work.is_over()
    }
}

/// What the source sees now, for whoever looks at it from another thread.
#[derive(Debug, Default)]
pub struct AtSource {
    /// Of the batches in flight.
    pub bytes_in_flight: AtomicU64,
    /// Batches in flight that are not rendered yet.
    pub num_unrendered: AtomicU64,
    /// A batch waits for credit.
    pub is_held_back: AtomicBool,
}

/// Where an epoch ends in the input.
#[derive(Clone, Debug)]
pub struct EpochEnd {
    pub position: Position,
    /// Each leaves as a result or as an error, unless the epoch is revoked.
    pub num_documents: u64,
    /// Set when the epoch must not be written any more.
    pub revoked: Arc<AtomicBool>,
}

/// Where each open epoch ends in the input: written before its first document is emitted, read when it is
/// committed. Epochs leave in the order of the input; inputs that are read side by side do not wait for each other.
#[derive(Debug)]
pub struct EpochLog {
    /// By input, if they are read side by side.
    open: Mutex<BTreeMap<u32, VecDeque<(Epoch, EpochEnd)>>>,
    side_by_side: bool,
    latest: AtomicU64,
}

impl EpochLog {
    pub fn new(side_by_side: bool) -> Self {
        Self { open: Mutex::default(), side_by_side, latest: AtomicU64::new(0) }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<u32, VecDeque<(Epoch, EpochEnd)>>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Epochs come in their order.
    pub fn insert(&self, epoch: Epoch, end: EpochEnd) {
        self.latest.store(epoch, Ordering::Release);
        let input = if self.side_by_side { end.position.file } else { 0 };
        self.lock().entry(input).or_default().push_back((epoch, end));
    }

    /// The last epoch that was begun.
    pub fn latest(&self) -> Epoch {
        self.latest.load(Ordering::Acquire)
    }

    /// Epochs that are not handed to the output yet.
    pub fn num_open(&self) -> usize {
        self.lock().values().map(VecDeque::len).sum()
    }

    /// Takes the first epoch of an input of which `is_closed` says so.
    pub fn take_first(&self, is_closed: impl Fn(Epoch, &EpochEnd) -> bool) -> Option<(Epoch, EpochEnd)> {
        let mut open = self.lock();
        let closed = |queue: &VecDeque<(Epoch, EpochEnd)>| {
            queue.front().is_some_and(|(epoch, end)| is_closed(*epoch, end))
        };
        open.values_mut().find(|queue| closed(queue))?.pop_front()
    }
}

/// Builds the dataflow on one worker. `input` and `output` are `Some` on the first.
pub fn render<'scope>(
    scope: Scope<'scope, Epoch>,
    shared: &Shared,
    builders: Vec<PromptBuilder>,
    engines: &[EngineHandle],
    input: Option<SourceThread>,
    output: Option<SinkThread>,
) -> ProbeHandle<Epoch> {
    let (handle, written) = scope.feedback::<Vec<()>>(1);
    // Only the first worker groups, and only it has the input.
    let is_stream = input.as_ref().is_some_and(SourceThread::is_stream);
    let batches = source::read(written, input, shared);
    let dealt = DistributorPact(|_| RoundRobin::default());
    let rows = batches.unary::<timely::container::CapacityContainerBuilder<Vec<_>>, _, _, _>(
        dealt,
        "Documents",
        |_, _| {
            |input, output| {
                input.for_each(|capability, batch| {
                    output.session(&capability).give_iterator(batch.drain());
                });
            }
        },
    );
    let (mut documents, rejected): (
        StreamVec<'scope, Epoch, Document>,
        StreamVec<'scope, Epoch, RecordError>,
    ) = rows.ok_err(|row| row);
    let mut errors = vec![rejected];
    for (builder, demand) in builders.into_iter().zip(&shared.demands) {
        let step = Arc::clone(&builder.step);
        let (prompts, refused) = documents.tokenize(builder, Arc::clone(&shared.work.tokens));
        let (prompts, answered) = prompts.recall(
            Arc::clone(&step),
            shared.journal.clone(),
            Arc::clone(&shared.counters),
            shared.failure.clone(),
        );
        let limits = WindowLimits::new(shared.credit.documents as usize, shared.credit.bytes);
        let limits = if is_stream { limits.of_stream() } else { limits };
        let grouped = prompts.group(Arc::clone(demand), limits, Arc::clone(&shared.work));
        let inferred = grouped.infer(step, engines.to_vec(), Arc::clone(demand), Arc::clone(&shared.work));
        documents = scope.concatenate([answered, inferred]);
        errors.push(refused);
    }
    let errors = scope.concatenate(errors);
    let probe = ProbeHandle::new();
    sink::write(documents, errors, output, shared).probe_with(&probe).connect_loop(handle);
    probe
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_open_epoch_keeps_back_its_own_input_alone() {
        let end = |file, row| EpochEnd {
            position: Position { file, row },
            num_documents: 1,
            revoked: Arc::default(),
        };
        let leaving = |side_by_side: bool, open: Epoch| {
            let log = EpochLog::new(side_by_side);
            for (epoch, file) in [0, 0, 1, 0, 1].into_iter().enumerate() {
                log.insert(epoch as u64, end(file, epoch as u64));
            }
            let left = std::iter::from_fn(|| log.take_first(|epoch, _| epoch != open));
            left.map(|(epoch, _)| epoch).collect::<Vec<_>>()
        };
        assert_eq!(leaving(true, 1), [0, 2, 4]);
        assert_eq!(leaving(true, 2), [0, 1, 3]);
        assert_eq!(leaving(false, 1), [0]);
        assert_eq!(leaving(false, 9), [0, 1, 2, 3, 4]);
    }
}
