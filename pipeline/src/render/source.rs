//! Reads the input on a thread of its own and lets it into the dataflow while there is credit.
//!
//! The source is the gate. It looks at the frontier of what the sink has written, and emits a batch only
//! while documents and bytes in flight stay within the credit; otherwise batches wait in a short channel
//! and the reading thread waits with them. So memory does not depend on the length of the input.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, TryRecvError, sync_channel};
use std::thread::JoinHandle;

use tidemill_connectors::source::{Source, SourceBatch};
use tidemill_operators::Epoch;
use tidemill_operators::batch::Batch;
use tidemill_operators::counters::Counters;
use tidemill_operators::document::{DocumentId, ErrorKind, Lease, Payload, RecordError};
use tidemill_operators::infer::Failure;
use timely::container::NoopBuilder;
use timely::dataflow::channels::pact::Pipeline;
use timely::dataflow::operators::Operator;
use timely::dataflow::{Stream, StreamVec};
use timely::scheduling::SyncActivator;

use super::Shared;
use crate::plan::CreditPlan;

/// Batches that wait outside the dataflow.
const MAX_BATCHES_AHEAD: usize = 2;

/// A source that is ready to be read.
pub struct SourceThread {
    source: Box<dyn Source>,
    threads: Arc<std::sync::Mutex<Vec<JoinHandle<()>>>>,
}

impl SourceThread {
    /// `threads` gets the reading thread once it runs.
    pub fn new(source: Box<dyn Source>, threads: Arc<std::sync::Mutex<Vec<JoinHandle<()>>>>) -> Self {
        Self { source, threads }
    }

    fn start(mut self, failure: Failure, operator: SyncActivator) -> Receiver<SourceBatch> {
        let (batches, queue) = sync_channel(MAX_BATCHES_AHEAD);
        let reported = failure.clone();
        let thread = std::thread::Builder::new().name("source".to_owned()).spawn(move || {
            let _watch = failure.watch("source");
            pump(self.source.as_mut(), &batches, &operator, &failure);
            drop(batches);
            // Fails only when the worker is gone, and then nobody needs waking.
            let _ = operator.activate();
        });
        match thread {
            Ok(thread) => {
                self.threads.lock().unwrap_or_else(std::sync::PoisonError::into_inner).push(thread);
            }
            Err(error) => reported.fail(&error),
        }
        queue
    }
}

fn pump(
    source: &mut dyn Source,
    batches: &SyncSender<SourceBatch>,
    operator: &SyncActivator,
    failure: &Failure,
) {
    loop {
        match source.next_batch() {
            Ok(Some(batch)) => {
                // The operator is gone: the run is over.
                if batches.send(batch).is_err() {
                    return;
                }
                let _ = operator.activate();
            }
            Ok(None) => return,
            Err(error) => return failure.fail(&error),
        }
    }
}

/// Counts what is in flight against the credit.
#[derive(Debug)]
pub struct Gate {
    credit: CreditPlan,
    /// Oldest first: epoch, documents, bytes.
    open: VecDeque<(Epoch, u64, u64)>,
    documents: u64,
    bytes: u64,
}

impl Gate {
    pub fn new(credit: CreditPlan) -> Self {
        Self { credit, open: VecDeque::new(), documents: 0, bytes: 0 }
    }

    /// One batch may always go, so that a batch beyond the credit is slow but not stuck.
    pub fn admits(&self, documents: u64, bytes: u64) -> bool {
        self.open.is_empty()
            || (self.documents + documents <= self.credit.documents
                && self.bytes + bytes <= self.credit.bytes)
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
            self.documents -= documents;
            self.bytes -= bytes;
        }
    }

    pub fn documents(&self) -> u64 {
        self.documents
    }
}

/// The source operator; `written` is the feedback of the sink.
pub fn read<'scope>(
    written: StreamVec<'scope, Epoch, ()>,
    input: Option<SourceThread>,
    shared: &Shared,
) -> Stream<'scope, Epoch, Batch> {
    let shared = shared.clone();
    let worker = written.scope().worker();
    written.unary_frontier::<NoopBuilder<Batch>, _, _, _>(Pipeline, "Source", move |capability, info| {
        let activator = worker.sync_activator_for(info.address.to_vec());
        let queue = input.map(|input| input.start(shared.failure.clone(), activator));
        // A worker without input must not hold the frontier back.
        let mut capability = queue.is_some().then_some(capability);
        let mut waiting: Option<SourceBatch> = None;
        let mut gate = Gate::new(shared.credit);
        move |(input, frontier), output| {
            input.for_each(|_, _| {});
            let (Some(queue), Some(open)) = (&queue, capability.as_mut()) else { return };
            // The feedback adds one to every time.
            gate.leave(|epoch| !frontier.frontier().less_equal(&(epoch + 1)));
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
                let documents = (batch.row_numbers.len() + batch.rejected.len()) as u64;
                let bytes = batch.rows.get_array_memory_size() as u64;
                if !gate.admits(documents, bytes) {
                    waiting = Some(batch);
                    break;
                }
                let epoch = *open.time();
                shared.epochs.insert(epoch, batch.end);
                gate.enter(epoch, documents, bytes);
                Counters::add(&shared.counters.documents_read, documents);
                shared.counters.observe_in_flight(gate.documents());
                output.session_with_builder(&*open).give_container(&mut convert(batch));
                open.downgrade(&(epoch + 1));
            }
            shared.counters.observe_in_flight(gate.documents());
        }
    })
}

/// A batch of the connector as a batch of the dataflow.
fn convert(batch: SourceBatch) -> Batch {
    let file = batch.file;
    let ids = batch.row_numbers.iter().map(|&row| DocumentId { file, row }).collect();
    let rejected = batch.rejected.into_iter().map(|rejected| RecordError {
        id: DocumentId { file: rejected.file, row: rejected.row },
        step: None,
        kind: ErrorKind::Malformed,
        message: rejected.reason,
        payload: Payload::Raw(rejected.raw),
    });
    Batch::new(batch.rows, ids, rejected.collect(), Lease::default())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_gate_never_lets_in_more_than_the_credit() {
        let mut gate = Gate::new(CreditPlan { documents: 10, bytes: 100 });
        assert!(gate.admits(50, 1), "a single batch must not be stuck");
        let mut epoch = 0;
        while gate.admits(3, 20) {
            gate.enter(epoch, 3, 20);
            epoch += 1;
        }
        assert_eq!(gate.documents(), 9);
        assert!(!gate.admits(1, 90), "bytes count too");
        gate.leave(|epoch| epoch < 2);
        assert_eq!(gate.documents(), 3);
        gate.leave(|_| true);
        assert_eq!((gate.documents(), gate.bytes), (0, 0));
    }
}
