//! The commit protocol: finished batches become visible, and their offsets committed, in one short transaction.
//!
//! Results wait here until their transaction has succeeded, so an aborted one is tried again from memory and nothing
//! is computed or read twice. Which batches may still be written is decided at the moment in which the group's
//! generation is pinned: if a rebalance comes after it, the broker refuses the offsets of the old generation, or the
//! next owner waits for the transaction's end (KIP-447). A producer that was fenced is replaced; since its last commit
//! may have succeeded unseen, the committed offsets then tell what need not be written again.
//!
//! A plain struct over [`Broker`]: the same code runs against librdkafka and in the simulation.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use super::assignment::Partition;
use super::record::{OutRecord, Target};
use super::stats::KafkaStats;
use crate::source::InputNames;

/// A producer is replaced this often without a commit in between; then somebody else goes by the same name.
const MAX_FENCED: u32 = 4;
const MIN_PAUSE: Duration = Duration::from_millis(50);
const MAX_PAUSE: Duration = Duration::from_secs(2);

/// Why a call to the broker did not succeed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BrokerError {
    /// The same call may be made again.
    Retry(String),
    /// The transaction must be aborted; a new one may succeed.
    Abort(String),
    /// The producer is fenced, or of no use any more.
    Fatal(String),
    /// Only of [`Broker::send`]: the topic does not take records of this size.
    TooLarge { limit: usize },
    /// Only of [`Broker::commit`]: the topic does not take one of the records that were sent since the transaction began,
    /// counted from 0. Without it, a new transaction may succeed.
    Refused { index: usize, reason: String },
    /// Nothing that is done here will help: a permission or a topic is missing.
    Broken(String),
}

/// A transactional producer with its group, or something that behaves as one.
pub trait Broker: Send {
    /// Makes the producer anew. Fences all others of its name and ends the transactions that they left open.
    fn init(&mut self) -> Result<(), BrokerError>;
    /// Runs `check` in a moment in which no partition is being taken away, and keeps the group's generation of that
    /// moment for [`send_offsets`](Self::send_offsets). False if the group has lost all already.
    fn pin_group(&mut self, check: &mut dyn FnMut()) -> bool;
    fn begin(&mut self) -> Result<(), BrokerError>;
    fn send(&mut self, record: &OutRecord) -> Result<(), BrokerError>;
    /// By input: the next offset to read.
    fn send_offsets(&mut self, offsets: &BTreeMap<u32, u64>) -> Result<(), BrokerError>;
    /// Waits until all records are with the broker, and commits.
    fn commit(&mut self) -> Result<(), BrokerError>;
    fn abort(&mut self) -> Result<(), BrokerError>;
    /// The committed offsets of these inputs, as soon as no transaction of an old owner is open.
    fn committed(&mut self, inputs: &BTreeSet<u32>) -> Result<BTreeMap<u32, u64>, BrokerError>;
    /// The most bytes of an error record.
    fn errors_limit(&self) -> usize;
    /// Lets some time pass. False when the run should end and waiting is over. `reason` is what is waited for.
    fn pause(&mut self, time: Duration, reason: &str) -> bool;
}

/// A finished batch.
#[derive(Clone, Debug)]
pub struct StagedEpoch {
    pub input: u32,
    /// The offset after its last row.
    pub end: u64,
    pub revoked: Arc<AtomicBool>,
    pub records: Vec<OutRecord>,
    pub num_rows: u64,
    pub num_errors: u64,
}

/// What a commit has brought into the topics.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Committed {
    pub rows: u64,
    pub errors: u64,
}

#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum CommitError {
    /// It was told to stop before the broker took everything.
    #[error("stopped: {0}")]
    Stopped(String),
    #[error("fenced: {0}")]
    Fenced(String),
    #[error("refused: {0}")]
    Broken(String),
}

/// Stages batches and commits them.
#[derive(Debug)]
pub struct Committer<B> {
    broker: B,
    /// In the order of the input, for each of the inputs.
    staged: VecDeque<StagedEpoch>,
    staged_bytes: u64,
    names: InputNames,
    stats: KafkaStats,
    num_fenced: u32,
    /// Found committed after its producer was lost, and not reported yet.
    late: Committed,
}

impl<B: Broker> Committer<B> {
    /// Fences first: what an earlier process of this name left open is ended before anything is read.
    pub fn start(mut broker: B, names: InputNames, stats: KafkaStats) -> Result<Self, CommitError> {
        retry(&mut broker, B::init).map_err(Failed::give_up)?;
        Ok(Self {
            broker,
            staged: VecDeque::new(),
            staged_bytes: 0,
            names,
            stats,
            num_fenced: 0,
            late: Committed::default(),
        })
    }

    pub fn broker(&mut self) -> &mut B {
        &mut self.broker
    }

    pub fn staged(&self) -> impl Iterator<Item = &StagedEpoch> {
        self.staged.iter()
    }

    pub fn stage(&mut self, epoch: StagedEpoch) {
        self.staged_bytes += epoch_bytes(&epoch);
        self.staged.push_back(epoch);
    }

    pub fn staged_rows(&self) -> u64 {
        self.staged.iter().map(|epoch| epoch.num_rows + epoch.num_errors).sum()
    }

    pub fn staged_bytes(&self) -> u64 {
        self.staged_bytes
    }

    /// Commits all that is staged, whatever it takes; after an error, what is staged still is.
    pub fn commit(&mut self) -> Result<Committed, CommitError> {
        let mut pause = MIN_PAUSE;
        loop {
            if self.staged.is_empty() {
                return Ok(std::mem::take(&mut self.late));
            }
            let reason = match self.attempt() {
                Ok(Committed { rows, errors }) => {
                    self.num_fenced = 0;
                    let late = std::mem::take(&mut self.late);
                    return Ok(Committed { rows: rows + late.rows, errors: errors + late.errors });
                }
                Err(Failed::Abort(reason)) => self.abort(reason)?,
                Err(Failed::Fatal(reason)) => self.replace(reason)?,
                Err(Failed::Refused { index, reason }) => {
                    self.refuse(index, &reason)?;
                    self.abort(reason)?;
                    // It will not be sent there again, so there is nothing to wait for.
                    continue;
                }
                Err(error) => return Err(error.give_up()),
            };
            tracing::debug!(reason, "transaction is tried again");
            if !self.broker.pause(pause, &reason) {
                return Err(CommitError::Stopped(reason));
            }
            pause = (pause * 2).min(MAX_PAUSE);
        }
    }

    /// The record goes to the errors instead.
    fn refuse(&mut self, index: usize, reason: &str) -> Result<(), CommitError> {
        let limit = self.broker.errors_limit();
        let mut records = self.staged.iter_mut().flat_map(|epoch| &mut epoch.records);
        let Some(record) = records.nth(index) else { return Ok(()) };
        if record.is_hopeless() {
            return Err(CommitError::Broken(reason.to_owned()));
        }
        let reason = format!("the topic refuses it: {reason}");
        record.refuse("refused", reason, limit, &self.names.get(record.input));
        Ok(())
    }

    fn attempt(&mut self) -> Result<Committed, Failed> {
        let mut staged = std::mem::take(&mut self.staged);
        let num_staged = staged.len();
        let is_member = self.broker.pin_group(&mut || {
            staged.retain(|epoch| !epoch.revoked.load(Ordering::Acquire));
        });
        self.stats.lock().epochs_canceled += (num_staged - staged.len()) as u64;
        self.staged = staged;
        self.staged_bytes = self.staged.iter().map(epoch_bytes).sum();
        if self.staged.is_empty() {
            return Ok(Committed::default());
        }
        if !is_member {
            return Err(Failed::Abort("the group has taken all partitions away".to_owned()));
        }
        let mut offsets = BTreeMap::new();
        let mut committed = Committed::default();
        for epoch in &self.staged {
            offsets.insert(epoch.input, epoch.end);
            committed.rows += epoch.num_rows;
            committed.errors += epoch.num_errors;
        }
        retry(&mut self.broker, B::begin)?;
        let num_records = self.staged.iter().map(|epoch| epoch.records.len() as u64).sum::<u64>();
        for epoch in &mut self.staged {
            for record in &mut epoch.records {
                send(&mut self.broker, record, &self.names)?;
            }
        }
        retry(&mut self.broker, |broker| broker.send_offsets(&offsets))?;
        retry(&mut self.broker, B::commit)?;
        self.staged.clear();
        self.staged_bytes = 0;
        let mut stats = self.stats.lock();
        stats.transactions_committed += 1;
        stats.records_written += num_records;
        // The client does not hear of offsets that a transaction commits.
        for (&input, &offset) in &offsets {
            let partition = Partition::parse(&self.names.get(input));
            if let Some(known) = partition.and_then(|partition| stats.partitions.get_mut(&partition)) {
                known.committed = Some(offset as i64);
            }
        }
        Ok(committed)
    }

    fn abort(&mut self, reason: String) -> Result<String, CommitError> {
        self.stats.lock().transactions_aborted += 1;
        match retry(&mut self.broker, B::abort) {
            Ok(()) => Ok(reason),
            Err(Failed::Abort(reason) | Failed::Fatal(reason) | Failed::Refused { reason, .. }) => {
                self.replace(reason)
            }
            Err(error) => Err(error.give_up()),
        }
    }

    /// Goes on with a new producer.
    fn replace(&mut self, reason: String) -> Result<String, CommitError> {
        self.num_fenced += 1;
        self.stats.lock().producers_fenced += 1;
        if self.num_fenced > MAX_FENCED {
            return Err(CommitError::Fenced(reason));
        }
        tracing::warn!(reason, "the producer was fenced and is replaced");
        retry(&mut self.broker, B::init).map_err(Failed::give_up)?;
        let inputs = BTreeSet::from_iter(self.staged.iter().map(|epoch| epoch.input));
        let committed =
            retry(&mut self.broker, |broker| broker.committed(&inputs)).map_err(Failed::give_up)?;
        // The lost answer to the last commit may have been yes.
        let late = &mut self.late;
        self.staged.retain(|epoch| {
            let is_committed = committed.get(&epoch.input).is_some_and(|&offset| offset >= epoch.end);
            late.rows += if is_committed { epoch.num_rows } else { 0 };
            late.errors += if is_committed { epoch.num_errors } else { 0 };
            !is_committed
        });
        self.staged_bytes = self.staged.iter().map(epoch_bytes).sum();
        Ok(reason)
    }
}

/// Why a call that is made again and again did not succeed.
#[derive(Debug)]
enum Failed {
    Stopped(String),
    Abort(String),
    Fatal(String),
    TooLarge { limit: usize },
    Refused { index: usize, reason: String },
    Broken(String),
}

impl Failed {
    /// As the end of it all.
    fn give_up(self) -> CommitError {
        match self {
            Self::Stopped(reason) => CommitError::Stopped(reason),
            Self::Abort(reason) | Self::Fatal(reason) | Self::Refused { reason, .. } => {
                CommitError::Fenced(reason)
            }
            Self::TooLarge { limit } => {
                CommitError::Broken(format!("the errors topic takes no more than {limit} bytes a record"))
            }
            Self::Broken(reason) => CommitError::Broken(reason),
        }
    }
}

/// A record that turns out to be too large goes to the errors instead.
fn send<B: Broker>(broker: &mut B, record: &mut OutRecord, names: &InputNames) -> Result<(), Failed> {
    loop {
        match retry(broker, |broker| broker.send(record)) {
            Err(Failed::TooLarge { limit }) if !record.is_hopeless() => {
                let what = if record.target == Target::Results { "result" } else { "error" };
                let reason =
                    format!("the {what} takes {} bytes, the topic's limit is {limit}", record.num_bytes());
                let limit = broker.errors_limit();
                record.refuse("too_large", reason, limit, &names.get(record.input));
            }
            result => return result,
        }
    }
}

fn retry<B: Broker, T>(
    broker: &mut B,
    mut call: impl FnMut(&mut B) -> Result<T, BrokerError>,
) -> Result<T, Failed> {
    let mut pause = MIN_PAUSE;
    loop {
        let reason = match call(broker) {
            Ok(value) => return Ok(value),
            Err(BrokerError::Abort(reason)) => return Err(Failed::Abort(reason)),
            Err(BrokerError::Fatal(reason)) => return Err(Failed::Fatal(reason)),
            Err(BrokerError::TooLarge { limit }) => return Err(Failed::TooLarge { limit }),
            Err(BrokerError::Refused { index, reason }) => return Err(Failed::Refused { index, reason }),
            Err(BrokerError::Broken(reason)) => return Err(Failed::Broken(reason)),
            Err(BrokerError::Retry(reason)) => reason,
        };
        if !broker.pause(pause, &reason) {
            return Err(Failed::Stopped(reason));
        }
        pause = (pause * 2).min(MAX_PAUSE);
    }
}

fn epoch_bytes(epoch: &StagedEpoch) -> u64 {
    epoch.records.iter().map(|record| record.num_bytes() as u64).sum()
}
