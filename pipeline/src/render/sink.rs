//! Writes what is finished, epoch by epoch, on a thread of its own.
//!
//! An epoch is handed over when the frontier has passed it, so it is complete and in the order of the
//! input. Its capability is kept until the thread has taken it over: the credit counts a document until
//! then. Results and errors of an epoch are committed together, with the position where it ends.

use std::collections::BTreeMap;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use tidemill_connectors::output::{Output, OutputError};
use tidemill_connectors::source::Position;
use tidemill_operators::Epoch;
use tidemill_operators::counters::Counters;
use tidemill_operators::document::{Document, RecordError};
use timely::container::CapacityContainerBuilder;
use timely::dataflow::StreamVec;
use timely::dataflow::channels::pact::Exchange;
use timely::dataflow::operators::{Capability, Operator};
use timely::scheduling::SyncActivator;

use super::Shared;
use crate::clock::Clock;
use crate::render::sink::rows::Rows;
use crate::spec::Budget;

pub mod rows;

/// A budget as a share is not judged before this many documents are done.
const MIN_JUDGED: u64 = 100;
/// Rows are committed early when they take this much memory.
const MAX_STAGED_BYTES: u64 = 64 << 20;

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
    end: Position,
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

/// Starts the writing thread. It ends, after a last commit, when the operator is dropped.
pub fn start(
    output: Output,
    rows: Rows,
    limits: SinkLimits,
    before: SinkReport,
    shared: &Shared,
    clock: Clock,
) -> std::io::Result<(SinkThread, JoinHandle<SinkReport>)> {
    let (ready, queue) = channel();
    let written = Arc::new(Written::default());
    let mut writer = Writer {
        output,
        rows,
        limits,
        report: before,
        shared: shared.clone(),
        clock,
        written: Arc::clone(&written),
        position: None,
        since: None,
    };
    let thread = std::thread::Builder::new().name("sink".to_owned()).spawn(move || {
        let _watch = writer.shared.failure.watch("sink");
        if let Err(error) = writer.run(&queue) {
            writer.shared.failure.fail(&error);
        }
        writer.report
    })?;
    Ok((SinkThread { ready, written }, thread))
}

struct Writer {
    output: Output,
    rows: Rows,
    limits: SinkLimits,
    report: SinkReport,
    shared: Shared,
    clock: Clock,
    written: Arc<Written>,
    /// Where the staged rows end in the input, and when the first of them came.
    position: Option<Position>,
    since: Option<Duration>,
}

#[derive(Debug, thiserror::Error)]
enum WriteError {
    #[error(transparent)]
    Output(#[from] OutputError),
    #[error("cannot make rows of the results")]
    Arrow(#[from] arrow::error::ArrowError),
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
        self.commit()?;
        self.judge(0);
        if !self.shared.should_stop() {
            self.output.finish()?;
            self.report.finished = true;
        }
        Ok(())
    }

    fn write(&mut self, mut ready: Ready) -> Result<(), WriteError> {
        ready.documents.sort_by_key(|document| document.id);
        ready.errors.sort_by_key(|error| error.id);
        if !ready.documents.is_empty() {
            self.output.write(&self.rows.results(&ready.documents)?)?;
        }
        if !ready.errors.is_empty() {
            self.output.write_errors(&self.rows.errors(&ready.errors)?)?;
        }
        self.report.rows += ready.documents.len() as u64;
        self.report.errors += ready.errors.len() as u64;
        Counters::add(&self.shared.counters.documents_done, ready.documents.len() as u64);
        Counters::add(&self.shared.counters.errors, ready.errors.len() as u64);
        self.position = Some(ready.end);
        self.since.get_or_insert(self.clock.elapsed());
        let is_due =
            self.since.is_some_and(|since| self.clock.elapsed() - since >= self.limits.commit_interval);
        // Whoever reads a stream waits for it.
        let is_stream = self.output.state_dir().is_none();
        if is_due
            || is_stream
            || self.output.staged_rows() >= self.limits.commit_rows
            || self.output.staged_bytes() >= MAX_STAGED_BYTES
        {
            self.commit()?;
        }
        self.judge(MIN_JUDGED);
        self.written.add(ready.epoch);
        Ok(())
    }

    fn commit(&mut self) -> Result<(), WriteError> {
        if let Some(position) = self.position.take() {
            self.output.commit(position)?;
        }
        self.since = None;
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
                let is_closed = |epoch: Epoch| {
                    !documents_frontier.frontier().less_equal(&epoch)
                        && !errors_frontier.frontier().less_equal(&epoch)
                };
                while let Some((epoch, end)) = epochs.take_first(is_closed) {
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
