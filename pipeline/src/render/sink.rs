//! Writes what is finished, epoch by epoch, on a thread of its own.
//!
//! An epoch is handed over when all its documents are here, or the frontier has passed it and what is missing was canceled;
//! epochs of one input in its order. Its capability is kept until the thread has taken it over: the credit counts a document until
//! then. Results and errors of an epoch are committed together, with the position where it ends.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use tidemill_connectors::kafka::KafkaError;
use tidemill_connectors::kafka::commit::StagedEpoch;
use tidemill_connectors::kafka::output::KafkaOutput;
use tidemill_connectors::output::{Output, OutputError};
use tidemill_connectors::source::{Checkpoint, InputNames};
use tidemill_operators::Epoch;
use tidemill_operators::counters::Counters;
use tidemill_operators::document::{Document, RecordError};
use tidemill_operators::journal::JournalError;
use timely::container::CapacityContainerBuilder;
use timely::dataflow::StreamVec;
use timely::dataflow::channels::pact::Exchange;
use timely::dataflow::operators::{Capability, Operator};
use timely::scheduling::SyncActivator;

use super::{EpochEnd, Shared};
use crate::clock::Clock;
use crate::render::sink::records::Records;
use crate::render::sink::rows::Rows;
use crate::spec::Budget;

pub mod records;
pub mod rows;

/// A budget as a share is not judged before this many documents are done.
const MIN_JUDGED: u64 = 100;
/// Rows are committed early when they take this much memory.
const MAX_STAGED_BYTES: u64 = 64 << 20;

/// The journal is cut when it has this many answers: with those before them, some megabytes of memory tell where they
/// are. An equal prompt that comes later is answered anew.
const MAX_JOURNAL_ANSWERS: usize = 16_384;

/// When to commit, and when to give up.
#[derive(Clone, Copy, Debug)]
pub struct SinkLimits {
    pub commit_rows: u64,
    pub commit_interval: Duration,
    pub budget: Option<Budget>,
}

/// How writing ended.
#[derive(Clone, Copy, Debug, Default)]
pub struct SinkReport {
    /// Rows and errors in the output, those of earlier runs included.
    pub rows: u64,
    pub errors: u64,
    pub over_budget: bool,
    /// The input was used up and everything is committed.
    pub finished: bool,
}

/// One complete epoch.
struct Ready {
    epoch: Epoch,
    end: EpochEnd,
    documents: Vec<Document>,
    errors: Vec<RecordError>,
}

/// The thread's side of the sink operator.
pub struct SinkThread {
    ready: Sender<Ready>,
    written: Arc<Written>,
}

/// Epochs the thread has taken over.
#[derive(Default)]
struct Written {
    epochs: Mutex<Vec<Epoch>>,
    operator: Mutex<Option<SyncActivator>>,
}

impl Written {
    fn add(&self, epoch: Epoch) {
        self.epochs.lock().unwrap_or_else(PoisonError::into_inner).push(epoch);
        if let Some(operator) = &*self.operator.lock().unwrap_or_else(PoisonError::into_inner) {
            // Fails only when the worker is gone, and then nobody needs waking.
            let _ = operator.activate();
        }
    }
}

/// An opened output and what makes its rows.
pub enum Target {
    Files { output: Box<Output>, rows: Rows, names: InputNames, checkpoint: Checkpoint, may_finish: bool },
    Topics { output: Box<KafkaOutput>, records: Box<Records> },
}

/// Starts the writing thread. It ends, after a last commit, when the operator is dropped.
pub fn start(
    target: Target,
    limits: SinkLimits,
    before: SinkReport,
    shared: &Shared,
    clock: Clock,
) -> std::io::Result<(SinkThread, JoinHandle<SinkReport>)> {
    let (ready, queue) = channel();
    let written = Arc::new(Written::default());
    let mut writer = Writer {
        target,
        limits,
        report: before,
        shared: shared.clone(),
        clock,
        written: Arc::clone(&written),
        since: None,
        next_epoch: 0,
        later_epochs: BTreeSet::new(),
        rotated_at: 0,
    };
    let thread = std::thread::Builder::new().name("sink".to_owned()).spawn(move || {
        let _watch = writer.shared.failure.watch("sink");
        match writer.run(&queue) {
            // Who asked for the end does not wait for ever: the answers are journaled, and what they are to is read again.
            Err(WriteError::Kafka(error @ KafkaError::Unfinished { .. })) if writer.shared.should_stop() => {
                tracing::warn!("{error}; the next run goes on there and computes nothing twice");
            }
            Err(error) => writer.shared.failure.fail(&error),
            Ok(()) => {}
        }
        writer.report
    })?;
    Ok((SinkThread { ready, written }, thread))
}

struct Writer {
    target: Target,
    limits: SinkLimits,
    report: SinkReport,
    shared: Shared,
    clock: Clock,
    written: Arc<Written>,
    /// When the first of the staged rows came.
    since: Option<Duration>,
    /// The first epoch that is not staged, those after it that are, and the one that the journal was last rotated at.
    next_epoch: Epoch,
    later_epochs: BTreeSet<Epoch>,
    rotated_at: Epoch,
}

#[derive(Debug, thiserror::Error)]
enum WriteError {
    #[error(transparent)]
    Output(#[from] OutputError),
    #[error(transparent)]
    Kafka(#[from] KafkaError),
    #[error(transparent)]
    Journal(#[from] JournalError),
    #[error("cannot make rows of the results")]
    Arrow(#[from] arrow::error::ArrowError),
}

impl Target {
    /// Whether to commit before it is time.
    fn is_full(&self, limits: &SinkLimits) -> bool {
        let (rows, bytes) = match self {
            // Whoever reads a stream waits for it.
            Self::Files { output, .. } if output.state_dir().is_none() => return true,
            Self::Files { output, .. } => (output.staged_rows(), output.staged_bytes()),
            Self::Topics { output, .. } => (output.staged_rows(), output.staged_bytes()),
        };
        rows >= limits.commit_rows || bytes >= MAX_STAGED_BYTES
    }
}

impl Writer {
    fn run(&mut self, queue: &Receiver<Ready>) -> Result<(), WriteError> {
        loop {
            let wait = match self.since {
                Some(since) => self.limits.commit_interval.saturating_sub(self.clock.elapsed() - since),
                None => self.limits.commit_interval,
            };
            match queue.recv_timeout(wait) {
                Ok(ready) => self.write(ready)?,
                Err(RecvTimeoutError::Timeout) => self.commit()?,
                Err(RecvTimeoutError::Disconnected) => break,
            }
        }
        if let Target::Topics { output, .. } = &mut self.target
            && self.shared.should_stop()
        {
            output.hurry();
        }
        self.commit()?;
        self.judge(0);
        if !self.shared.should_stop() {
            match &mut self.target {
                Target::Files { output, may_finish: true, .. } => output.finish()?,
                // A topic goes on after the end that was read to.
                Target::Files { .. } => {}
                Target::Topics { output, .. } => output.finish()?,
            }
            self.report.finished = true;
        }
        Ok(())
    }

    fn write(&mut self, mut ready: Ready) -> Result<(), WriteError> {
        let epoch = ready.epoch;
        // Its partition is somebody else's: so is its work.
        if !ready.end.revoked.load(Ordering::Acquire) {
            ready.documents.sort_by_key(|document| document.id);
            self.stage(ready)?;
        }
        self.later_epochs.insert(epoch);
        while self.later_epochs.remove(&self.next_epoch) {
            self.next_epoch += 1;
        }
        self.since.get_or_insert(self.clock.elapsed());
        let is_due =
            self.since.is_some_and(|since| self.clock.elapsed() - since >= self.limits.commit_interval);
        if is_due || self.target.is_full(&self.limits) {
            self.commit()?;
        }
        self.judge(MIN_JUDGED);
        self.written.add(epoch);
        Ok(())
    }

    fn stage(&mut self, ready: Ready) -> Result<(), WriteError> {
        let Ready { end, documents, mut errors, .. } = ready;
        let num_documents = documents.len() as u64;
        let mut num_refused = 0;
        match &mut self.target {
            Target::Files { output, rows, names, checkpoint, .. } => {
                errors.sort_by_key(|error| error.id);
                if !documents.is_empty() {
                    output.write(&rows.results(&documents)?)?;
                }
                if !errors.is_empty() {
                    output.write_errors(&rows.errors(&errors)?)?;
                }
                checkpoint.advance(end.position, names);
            }
            Target::Topics { output, records } => {
                let mut staged = records.results(&documents, &mut errors)?;
                num_refused = num_documents - staged.len() as u64;
                errors.sort_by_key(|error| error.id);
                staged.extend(errors.iter().map(|error| records.error(error)));
                output.stage(StagedEpoch {
                    input: end.position.file,
                    end: end.position.row,
                    revoked: end.revoked,
                    num_rows: num_documents - num_refused,
                    num_errors: errors.len() as u64,
                    records: staged,
                });
            }
        }
        let num_errors = errors.len() as u64;
        let num_rows = num_documents - num_refused;
        self.report.rows += num_rows;
        self.report.errors += num_errors;
        Counters::add(&self.shared.counters.documents_done, num_rows);
        Counters::add(&self.shared.counters.errors, num_errors);
        Ok(())
    }

    fn commit(&mut self) -> Result<(), WriteError> {
        if self.since.take().is_none() {
            return Ok(());
        }
        match &mut self.target {
            Target::Files { output, checkpoint, .. } => output.commit(checkpoint.clone())?,
            Target::Topics { output, .. } => {
                output.commit()?;
            }
        }
        self.rotate_journal()
    }

    /// Answers are not kept for ever. What was journaled before the last rotation belongs to epochs up to
    /// `rotated_at`, so it is of no use when those are committed.
    fn rotate_journal(&mut self) -> Result<(), WriteError> {
        let Some(journal) = &self.shared.journal else { return Ok(()) };
        if self.next_epoch > self.rotated_at && journal.len() >= MAX_JOURNAL_ANSWERS {
            self.rotated_at = self.shared.epochs.latest();
            journal.rotate()?;
        }
        Ok(())
    }

    /// Stops the run if too many documents failed.
    fn judge(&mut self, min_judged: u64) {
        let total = self.report.rows + self.report.errors;
        let over = match self.limits.budget {
            Some(Budget::Documents(most)) => self.report.errors > most,
            Some(Budget::Percent(most)) => {
                total >= min_judged && self.report.errors as f64 * 100.0 > most * total as f64
            }
            None => false,
        };
        if over {
            self.report.over_budget = true;
            self.shared.stop.set();
        }
    }
}

/// What has arrived of an epoch.
#[derive(Default)]
struct Arrived {
    documents: Vec<Document>,
    errors: Vec<RecordError>,
    /// Held until the thread has taken the epoch over.
    capability: Option<Capability<Epoch>>,
}

/// The sink operator; its output carries only the progress of what is written.
pub fn write<'scope>(
    documents: StreamVec<'scope, Epoch, Document>,
    errors: StreamVec<'scope, Epoch, RecordError>,
    output: Option<SinkThread>,
    shared: &Shared,
) -> StreamVec<'scope, Epoch, ()> {
    let epochs = Arc::clone(&shared.epochs);
    let counters = Arc::clone(&shared.counters);
    let worker = documents.scope().worker();
    documents.binary_frontier::<_, CapacityContainerBuilder<Vec<()>>, _, _, _, _>(
        errors,
        Exchange::new(|_: &Document| 0),
        Exchange::new(|_: &RecordError| 0),
        "Sink",
        move |_, info| {
            if let Some(output) = &output {
                let activator = worker.sync_activator_for(info.address.to_vec());
                *output.written.operator.lock().unwrap_or_else(PoisonError::into_inner) = Some(activator);
            }
            let mut arrived: BTreeMap<Epoch, Arrived> = BTreeMap::new();
            let mut handed_over: BTreeMap<Epoch, Capability<Epoch>> = BTreeMap::new();
            move |(documents, documents_frontier), (errors, errors_frontier), _output| {
                documents.for_each(|capability, rows| {
                    let Some(capability) = capability.retain_least(0) else { return };
                    let epoch = arrived.entry(*capability.time()).or_default();
                    Counters::add(&counters.arrived, rows.len() as u64);
                    epoch.documents.append(rows);
                    epoch.capability.get_or_insert(capability);
                });
                errors.for_each(|capability, rows| {
                    let Some(capability) = capability.retain_least(0) else { return };
                    let epoch = arrived.entry(*capability.time()).or_default();
                    Counters::add(&counters.arrived, rows.len() as u64);
                    epoch.errors.append(rows);
                    epoch.capability.get_or_insert(capability);
                });
                let Some(output) = &output else { return };
                let is_closed = |epoch: Epoch, end: &EpochEnd| {
                    let num_here = |one: &Arrived| (one.documents.len() + one.errors.len()) as u64;
                    arrived.get(&epoch).is_some_and(|one| num_here(one) == end.num_documents)
                        || !documents_frontier.frontier().less_equal(&epoch)
                            && !errors_frontier.frontier().less_equal(&epoch)
                };
                let mut closed = Vec::new();
                while let Some(found) = epochs.take_first(is_closed) {
                    closed.push(found);
                }
                for (epoch, end) in closed {
                    let Arrived { documents, errors, capability } =
                        arrived.remove(&epoch).unwrap_or_default();
                    handed_over.extend(capability.map(|capability| (epoch, capability)));
                    // The thread ends before the operator only on a failure that is reported already.
                    let _ = output.ready.send(Ready { epoch, end, documents, errors });
                }
                for epoch in output.written.epochs.lock().unwrap_or_else(PoisonError::into_inner).drain(..) {
                    handed_over.remove(&epoch);
                }
            }
        },
    )
}
