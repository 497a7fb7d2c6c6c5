//! Reads the input on a thread of its own and lets it into the dataflow while there is credit.
//!
//! The source is the gate. It looks at the frontier of what the sink has written, and emits a batch only
//! while documents, bytes and tokens in flight stay within the credit; otherwise batches wait in a short channel
//! and the reading thread waits with them. So memory does not depend on the length of the input.

mod pace;

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;
use std::time::Duration;

use crossbeam_channel::{Receiver, SendTimeoutError, Sender, TryRecvError, bounded};
use tidemill_connectors::source::{Read, Source, SourceBatch, SourceError};
use tidemill_operators::Epoch;
use tidemill_operators::batch::Batch;
use tidemill_operators::counters::Counters;
use tidemill_operators::document::{Document, DocumentId, ErrorKind, Lease, Payload, RecordError};
use tidemill_operators::in_flight::TokensInFlight;
use tidemill_operators::infer::load::EngineLoad;
use timely::container::NoopBuilder;
use timely::dataflow::channels::pact::Pipeline;
use timely::dataflow::operators::generic::OutputBuilder;
use timely::dataflow::operators::generic::builder_rc::OperatorBuilder;
use timely::dataflow::{Stream, StreamVec};
use timely::scheduling::SyncActivator;

use super::{AtSource, EpochEnd, Shared};
use crate::clock::Clock;
use crate::plan::CreditPlan;
use pace::Pace;

/// Without a credit in tokens, so many fillings of the KV cache may be in flight, and as many of what is free of it: a
/// busy engine reads less far ahead. Prompts are grouped by prefix over what was read, so it is far.
const KV_FILLINGS: u64 = 64;
/// Batches of which the tokens are not known yet, for each worker: one to render and one to come.
const MAX_UNRENDERED: usize = 2;
/// Batches that wait outside the dataflow.
const MAX_BATCHES_AHEAD: usize = 4;

/// A source that is ready to be read.
pub struct SourceThread {
    source: Box<dyn Source>,
    threads: Arc<std::sync::Mutex<Vec<JoinHandle<()>>>>,
    clock: Clock,
}

impl SourceThread {
    /// `threads` gets the reading thread once it runs.
    pub fn new(
        source: Box<dyn Source>,
        threads: Arc<std::sync::Mutex<Vec<JoinHandle<()>>>>,
        clock: Clock,
    ) -> Self {
        Self { source, threads, clock }
    }

    /// Whether rows come for as long as somebody writes them.
    pub fn is_stream(&self) -> bool {
        self.source.num_rows().is_none()
    }

    fn start(self, shared: &Shared, operator: SyncActivator) -> Receiver<SourceBatch> {
        let Self { mut source, threads, clock } = self;
        let (batches, queue) = bounded(MAX_BATCHES_AHEAD);
        let (shared, failure) = (shared.clone(), shared.failure.clone());
        let reported = failure.clone();
        let thread = std::thread::Builder::new().name("source".to_owned()).spawn(move || {
            let _watch = failure.watch("source");
            if let Err(error) = pump(source.as_mut(), &batches, &operator, &shared, clock) {
                failure.fail(&error);
            }
            // First, so that whoever commits last knows that nobody polls any more.
            drop(source);
            drop(batches);
            // Fails only when the worker is gone, and then nobody needs waking.
            let _ = operator.activate();
        });
        match thread {
            Ok(thread) => {
                threads.lock().unwrap_or_else(std::sync::PoisonError::into_inner).push(thread);
            }
            Err(error) => reported.fail(&error),
        }
        queue
    }
}

/// How long a source that is held back is left alone at a time.
const HOLD_BACK: Duration = Duration::from_millis(20);

fn pump(
    source: &mut dyn Source,
    batches: &Sender<SourceBatch>,
    operator: &SyncActivator,
    shared: &Shared,
    clock: Clock,
) -> Result<(), SourceError> {
    let mut pace = Pace::new(clock.elapsed());
    let mut num_read = 0;
    while !shared.should_stop() {
        let done = Counters::get(&shared.counters.documents_done);
        source.set_batch_rows(pace.batch_rows(clock.elapsed(), done));
        let mut batch = match source.read()? {
            Read::Batch(batch) => batch,
            Read::Idle => continue,
            Read::End if source.reads_on() && !is_at_output(num_read, shared) => continue,
            Read::End => return Ok(()),
        };
        num_read += num_documents(&batch);
        let mut held_back = Duration::ZERO;
        loop {
            match batches.send_timeout(batch, HOLD_BACK) {
                Ok(()) => break,
                // The operator is gone: the run is over.
                Err(SendTimeoutError::Disconnected(_)) => return Ok(()),
                Err(SendTimeoutError::Timeout(back)) => batch = back,
            }
            held_back += HOLD_BACK;
            source.hold_back(held_back)?;
        }
        // Fails only when the worker is gone, and then nobody needs waking.
        let _ = operator.activate();
    }
    Ok(())
}

/// Whether the output has taken over all that was read. The order matters: a batch is counted as read when it is in flight.
fn is_at_output(num_read: u64, shared: &Shared) -> bool {
    let counters = &shared.counters;
    counters.documents_read.load(Ordering::Acquire) == num_read
        && shared.epochs.num_open() == 0
        && Counters::get(&counters.documents_in_flight) == 0
}

fn num_documents(batch: &SourceBatch) -> u64 {
    (batch.row_numbers.len() + batch.rejected.len()) as u64
}

/// Of rows and rejected rows; both are kept until they are written.
fn num_bytes(batch: &SourceBatch) -> u64 {
    let rejected: usize = batch.rejected.iter().map(|row| row.raw.len() + row.reason.len()).sum();
    let rejected_rows = batch.rejected_rows.as_ref().map_or(0, |rows| rows.get_array_memory_size());
    (batch.rows.get_array_memory_size() + rejected + rejected_rows) as u64
}

/// Counts what is in flight against the credit.
#[derive(Debug)]
pub struct Gate {
    credit: CreditPlan,
    tokens: Arc<TokensInFlight>,
    loads: Vec<Arc<EngineLoad>>,
    max_unrendered: usize,
    /// Oldest first: epoch, documents, bytes.
    open: VecDeque<(Epoch, u64, u64)>,
    documents: u64,
    bytes: u64,
}

impl Gate {
    pub fn new(
        credit: CreditPlan,
        tokens: Arc<TokensInFlight>,
        loads: Vec<Arc<EngineLoad>>,
        num_workers: usize,
    ) -> Self {
        let max_unrendered = MAX_UNRENDERED * num_workers;
        Self { credit, tokens, loads, max_unrendered, open: VecDeque::new(), documents: 0, bytes: 0 }
    }

    /// One batch may always go, so that a batch beyond the credit is slow but not stuck. Tokens are known
    /// once rendered, so they may exceed the credit by those of `max_unrendered` batches, and where a later step takes more.
    pub fn admits(&self, documents: u64, bytes: u64) -> bool {
        self.open.is_empty()
            || (self.documents + documents <= self.credit.documents
                && self.bytes + bytes <= self.credit.bytes
                && self.open.len() < self.tokens.num_known() + self.max_unrendered
                && self.tokens.total() < self.token_credit())
    }

    fn token_credit(&self) -> u64 {
        let by_kv_cache = || {
            let kv_tokens: u64 = self.loads.iter().map(|load| load.kv_tokens() + load.kv_tokens_free()).sum();
            kv_tokens.saturating_mul(KV_FILLINGS)
        };
        self.credit.tokens.unwrap_or_else(by_kv_cache)
    }

    pub fn enter(&mut self, epoch: Epoch, documents: u64, bytes: u64) {
        self.open.push_back((epoch, documents, bytes));
        self.documents += documents;
        self.bytes += bytes;
    }

    /// Frees the epochs that `is_written`, oldest first.
    pub fn leave(&mut self, is_written: impl Fn(Epoch) -> bool) {
        while let Some(&(epoch, documents, bytes)) = self.open.front() {
            if !is_written(epoch) {
                break;
            }
            self.open.pop_front();
            self.tokens.remove(epoch);
            self.documents -= documents;
            self.bytes -= bytes;
        }
    }

    fn show(&self, at_source: &AtSource, is_held_back: bool) {
        let num_unrendered = self.open.len().saturating_sub(self.tokens.num_known());
        at_source.bytes_in_flight.store(self.bytes, Ordering::Relaxed);
        at_source.num_unrendered.store(num_unrendered as u64, Ordering::Relaxed);
        at_source.is_held_back.store(is_held_back, Ordering::Relaxed);
    }

    pub fn documents(&self) -> u64 {
        self.documents
    }
}

/// The source operator; `written` is the feedback of the sink.
///
/// What is written decides when a batch is let in and never at which time, so the feedback is not connected to the
/// output: else an epoch that waits to be written would keep all later ones open.
pub fn read<'scope>(
    written: StreamVec<'scope, Epoch, ()>,
    input: Option<SourceThread>,
    shared: &Shared,
) -> Stream<'scope, Epoch, Batch> {
    let shared = shared.clone();
    let worker = written.scope().worker();
    let mut operator = OperatorBuilder::new("Source".to_owned(), written.scope());
    let mut written = operator.new_input(written, Pipeline);
    let (output, batches) = operator.new_output_connection([]);
    let mut output = OutputBuilder::<Epoch, NoopBuilder<Batch>>::from(output);
    let info = operator.operator_info();
    operator.build(move |mut capabilities| {
        let capability = capabilities.pop().expect("one for the output");
        let activator = worker.sync_activator_for(info.address.to_vec());
        let queue = input.map(|input| {
            shared.work.tokens.wake(activator.clone());
            input.start(&shared, activator)
        });
        // A worker without input must not hold the frontier back.
        let mut capability = queue.is_some().then_some(capability);
        let mut waiting: Option<SourceBatch> = None;
        let mut gate =
            Gate::new(shared.credit, Arc::clone(&shared.work.tokens), shared.loads.clone(), worker.peers());
        move |frontiers| {
            written.for_each(|_, _| {});
            let mut output = output.activate();
            let (Some(queue), Some(open)) = (&queue, capability.as_mut()) else { return };
            // The feedback adds one to every time.
            gate.leave(|epoch| !frontiers[0].less_equal(&(epoch + 1)));
            loop {
                if waiting.is_none() {
                    waiting = match queue.try_recv() {
                        Ok(batch) => Some(batch),
                        Err(TryRecvError::Empty) => break,
                        Err(TryRecvError::Disconnected) => {
                            capability = None;
                            break;
                        }
                    };
                }
                let Some(batch) = waiting.take() else { break };
                let documents = num_documents(&batch);
                let bytes = num_bytes(&batch);
                if !gate.admits(documents, bytes) {
                    waiting = Some(batch);
                    break;
                }
                let epoch = *open.time();
                let revoked = Arc::clone(&batch.revoked);
                shared
                    .epochs
                    .insert(epoch, EpochEnd { position: batch.end, num_documents: documents, revoked });
                gate.enter(epoch, documents, bytes);
                if batch.row_numbers.is_empty() {
                    // Nothing of it will be rendered.
                    shared.work.tokens.add(epoch, 0);
                }
                shared.counters.observe_in_flight(gate.documents());
                shared.counters.documents_read.fetch_add(documents, Ordering::Release);
                output.session_with_builder(&*open).give_container(&mut convert(batch));
                open.downgrade(&(epoch + 1));
            }
            shared.counters.observe_in_flight(gate.documents());
            gate.show(&shared.at_source, waiting.is_some());
        }
    });
    batches
}

/// A batch of the connector as a batch of the dataflow.
fn convert(batch: SourceBatch) -> Batch {
    let file = batch.file;
    let ids = batch.row_numbers.iter().map(|&row| DocumentId { file, row }).collect();
    let rejected_rows = batch.rejected_rows.map(Arc::new);
    let rejected = batch.rejected.into_iter().enumerate().map(|(index, rejected)| {
        let id = DocumentId { file: rejected.file, row: rejected.row };
        let payload = match &rejected_rows {
            Some(rows) => {
                Payload::Row(Box::new(Document::new(id, Arc::clone(rows), index, Lease::default())))
            }
            None => Payload::Raw(rejected.raw),
        };
        RecordError { id, step: None, kind: ErrorKind::Malformed, message: rejected.reason, payload }
    });
    Batch::new(batch.rows, ids, rejected.collect(), Lease::from(batch.revoked))
}

#[cfg(test)]
mod tests {
    use arrow::array::{ArrayRef, RecordBatch, StringArray};
    use arrow::datatypes::Schema;
    use tidemill_connectors::source::{Position, RejectedRow};

    use super::*;

    #[test]
    fn the_gate_never_lets_in_more_than_the_credit() {
        let credit = CreditPlan { documents: 10, bytes: 100, tokens: Some(50) };
        let tokens = Arc::new(TokensInFlight::default());
        let mut gate = Gate::new(credit, Arc::clone(&tokens), Vec::new(), 2);
        assert!(gate.admits(50, 1), "a single batch must not be stuck");
        let mut epoch = 0;
        while gate.admits(3, 20) {
            gate.enter(epoch, 3, 20);
            tokens.add(epoch, 1);
            epoch += 1;
        }
        assert_eq!(gate.documents(), 9);
        assert!(!gate.admits(1, 90), "bytes count too");
        gate.leave(|epoch| epoch < 2);
        assert_eq!(gate.documents(), 3);
        assert!(gate.admits(3, 20));
        tokens.add(2, 49);
        assert!(!gate.admits(3, 20), "tokens count too");
        gate.leave(|_| true);
        assert!(gate.admits(3, 20));
        assert_eq!(tokens.total(), 0);
        assert_eq!((gate.documents(), gate.bytes), (0, 0));
        (3..7).for_each(|epoch| gate.enter(epoch, 1, 1));
        assert!(!gate.admits(1, 1), "four batches of two workers are not rendered yet");
        tokens.add(3, 0);
        assert!(gate.admits(1, 1));
    }

    #[test]
    fn rejected_rows_take_memory_too() {
        let raw = "x".repeat(60_000);
        let row = |row| RejectedRow { file: 0, row, reason: "broken".to_owned(), raw: raw.clone() };
        let kept: ArrayRef = Arc::new(StringArray::from(vec![raw.clone(); 3]));
        let mut batch = SourceBatch {
            rows: RecordBatch::new_empty(Arc::new(Schema::empty())),
            file: 0,
            row_numbers: Vec::new(),
            rejected: (0..3).map(row).collect(),
            rejected_rows: None,
            revoked: Arc::default(),
            start: Position { file: 0, row: 0 },
            end: Position { file: 0, row: 3 },
        };
        assert_eq!((num_documents(&batch), num_bytes(&batch)), (3, 3 * 60_006));
        batch.rejected_rows = Some(RecordBatch::try_from_iter([("value", kept)]).unwrap());
        assert!(num_bytes(&batch) > 6 * 60_000);
    }

    #[test]
    fn a_busy_engine_reads_less_far_ahead() {
        let load = Arc::new(EngineLoad::default());
        load.kv_pages_total.store(10, Ordering::Relaxed);
        load.page_size.store(16, Ordering::Relaxed);
        let credit = CreditPlan { documents: 10, bytes: 100, tokens: None };
        let gate = Gate::new(credit, Arc::default(), vec![Arc::clone(&load)], 1);
        assert_eq!(gate.token_credit(), KV_FILLINGS * 2 * 160);
        load.kv_pages_in_use.store(10, Ordering::Relaxed);
        assert_eq!(gate.token_credit(), KV_FILLINGS * 160);
    }
}
