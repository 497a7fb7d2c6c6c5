//! Reads topics as a source: records become rows, batches of one partition each.
//!
//! Invariant: every record between two batches of a partition is a row, a rejected row or of no interest to readers of
//! committed records; a batch carries the lease under which it was read. While nobody takes rows, partitions are
//! paused and the client is still polled, so the group keeps us however long a step takes. Pausing throws away what
//! was fetched ahead, so it is done only after a second of holding back.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use arrow::datatypes::SchemaRef;
use rdkafka::Message;
use rdkafka::error::KafkaError as Client;
use rdkafka::message::OwnedMessage;
use rdkafka::types::RDKafkaErrorCode;
use rdkafka::{Offset, TopicPartitionList};

use super::KafkaError;
use super::assignment::Partition;
use super::config::{Cluster, reason};
use super::format::{DecodeError, Decoder};
use super::group::{Group, SharedGroup, Start};
use super::rows::{RowsBuilder, kafka_schema, num_bytes_of};
use super::stats::{KafkaStats, PartitionStats};
use crate::source::{
    BatchLimits, Checkpoint, InputFile, InputNames, Position, Read, Source, SourceBatch, SourceError,
};

/// How long `read` waits for a first record.
const MAX_WAIT: Duration = Duration::from_millis(50);
/// How long to hold back before partitions are paused.
const PAUSE_AFTER: Duration = Duration::from_secs(1);
/// A member that gets no partition waits so long before it counts as being at the end.
const MAX_IDLE: Duration = Duration::from_secs(10);
/// Between two questions to a schema registry that does not answer.
const REGISTRY_WAIT: Duration = Duration::from_millis(500);
/// Between two looks at what others have committed of partitions that were ours.
const COMMITTED_WAIT: Duration = Duration::from_secs(1);
/// The most records that are taken from the client at a time, in all partitions.
const MAX_RECORDS: usize = 4096;

/// What to read.
#[derive(Clone, Debug)]
pub struct KafkaSourceSpec {
    pub cluster: Cluster,
    pub topics: Topics,
    pub group: String,
    pub start: Start,
    /// The end is where the topics ended when they were assigned.
    pub until_end: bool,
    /// Shares partitions with other members of the group. Otherwise all are read, from positions kept elsewhere.
    pub is_member: bool,
}

/// Topics by name or by a regular expression that begins with `^`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Topics {
    Named(Vec<String>),
    Pattern(String),
}

/// See the module.
pub struct KafkaSource {
    spec: KafkaSourceSpec,
    limits: BatchLimits,
    batch_rows: usize,
    decoder: Decoder,
    schema: SchemaRef,
    group: SharedGroup,
    names: InputNames,
    stats: KafkaStats,
    offsets: BTreeMap<String, u64>,
    has_begun: bool,
    is_paused: bool,
    idle: Duration,
    /// Of the assignment that [`ends`](Self::ends) belongs to.
    version: u64,
    /// Where to stop in each partition, and whether it was reached.
    ends: BTreeMap<Partition, End>,
    /// Where the batches that were given out end.
    given: BTreeMap<Partition, Given>,
    /// The same of partitions that were taken away with work of ours.
    lost: BTreeMap<Partition, i64>,
    since_committed: Duration,
    /// Records that came while partitions were being paused, or that wait for the schema registry, with their leases.
    ahead: VecDeque<(OwnedMessage, Option<Arc<AtomicBool>>)>,
    /// The first of them cannot be decoded before it answers.
    awaits_registry: bool,
    ready: VecDeque<SourceBatch>,
}

#[derive(Clone, Debug)]
struct End {
    offset: i64,
    is_reached: bool,
    /// Who comes back under another lease is read again from where it was committed.
    lease: Arc<AtomicBool>,
}

#[derive(Clone, Debug)]
struct Given {
    end: i64,
    lease: Arc<AtomicBool>,
}

/// Rows of one partition under one lease.
struct Chunk {
    revoked: Arc<AtomicBool>,
    input: u32,
    rows: RowsBuilder,
}

impl KafkaSource {
    /// Makes the client and checks its options; it connects when it is read.
    pub fn open(
        spec: KafkaSourceSpec,
        decoder: Decoder,
        limits: BatchLimits,
        stats: KafkaStats,
    ) -> Result<Self, KafkaError> {
        let names = InputNames::default();
        stats.lock().reads_topics = true;
        let group = Group::new(&spec.cluster, &spec.group, spec.start, names.clone(), stats.clone())?;
        Ok(Self {
            schema: kafka_schema(decoder.is_json()),
            spec,
            batch_rows: limits.max_rows,
            limits: limits.check(),
            decoder,
            group: Arc::new(group),
            names,
            stats,
            offsets: BTreeMap::new(),
            has_begun: false,
            is_paused: false,
            idle: Duration::ZERO,
            version: 0,
            ends: BTreeMap::new(),
            given: BTreeMap::new(),
            lost: BTreeMap::new(),
            since_committed: COMMITTED_WAIT,
            ahead: VecDeque::new(),
            awaits_registry: false,
            ready: VecDeque::new(),
        })
    }

    /// The group that offsets are committed in.
    pub fn group(&self) -> SharedGroup {
        Arc::clone(&self.group)
    }

    pub fn stats(&self) -> KafkaStats {
        self.stats.clone()
    }

    /// Reads to where the topics end when they are assigned, and no further.
    pub fn set_until_end(&mut self) {
        self.spec.until_end = true;
    }

    /// Looks without joining the group: nobody loses partitions to us, and nothing is committed.
    pub fn set_alone(&mut self) {
        self.spec.is_member = false;
    }

    fn begin(&mut self) -> Result<(), KafkaError> {
        self.has_begun = true;
        let topics = match &self.spec.topics {
            Topics::Named(topics) => topics.clone(),
            Topics::Pattern(pattern) if self.spec.is_member => {
                return self.group.subscribe(&[pattern.as_str()]);
            }
            Topics::Pattern(pattern) => {
                let pattern = regex::Regex::new(pattern)
                    .map_err(|error| KafkaError::Options { reason: error.to_string() })?;
                self.group.matching(|name| pattern.is_match(name))?
            }
        };
        let partitions = self.group.partitions_of(&topics)?;
        if self.spec.is_member {
            let topics: Vec<&str> = topics.iter().map(String::as_str).collect();
            self.group.subscribe(&topics)
        } else {
            self.group.take_all(partitions.clone(), &self.offsets)?;
            // No rebalance will tell of them.
            let mut stats = self.stats.lock();
            stats.partitions =
                partitions.into_iter().map(|partition| (partition, PartitionStats::default())).collect();
            Ok(())
        }
    }

    fn error(&self, error: &Client) -> SourceError {
        self.spec.cluster.error("read", error).into()
    }

    fn set_paused(&mut self, paused: bool) -> Result<(), SourceError> {
        self.group.set_paused(paused).map_err(|error| self.error(&error))?;
        self.is_paused = paused;
        let mut stats = self.stats.lock();
        stats.is_paused = paused;
        // What was fetched ahead is thrown away and fetched again.
        for partition in stats.partitions.values_mut() {
            (partition.fetched, partition.num_reports) = (None, 0);
        }
        Ok(())
    }

    /// Forgets what belongs to an older assignment.
    fn follow_assignment(&mut self) -> Result<(), SourceError> {
        let assignment = self.group.assignment();
        if assignment.version() == self.version {
            return Ok(());
        }
        self.version = assignment.version();
        let is_held = |partition: &Partition, lease: &Arc<AtomicBool>| {
            assignment.get(partition).is_some_and(|assigned| Arc::ptr_eq(&assigned.revoked, lease))
        };
        self.ends.retain(|partition, end| is_held(partition, &end.lease));
        let lost = self.given.extract_if(.., |partition, given| !is_held(partition, &given.lease));
        self.lost.extend(lost.map(|(partition, given)| (partition, given.end)));
        // What comes back is read again.
        self.lost.retain(|partition, _| assignment.get(partition).is_none());
        drop(assignment);
        self.idle = Duration::ZERO;
        // The client remembers of a partition that comes back that it was paused when it went.
        self.set_paused(self.is_paused)
    }

    /// Whether a record lies before the end that is read to.
    fn is_wanted(&mut self, partition: &Partition, offset: i64) -> Result<bool, SourceError> {
        if !self.spec.until_end {
            return Ok(true);
        }
        // What the broker does not tell now it tells later; a record that is here lies before the end.
        let Some(end) = self.end_of(partition)? else { return Ok(true) };
        if offset + 1 >= end.offset {
            end.is_reached = true;
        }
        Ok(offset < end.offset)
    }

    /// `None` if the broker cannot be asked now.
    fn end_of(&mut self, partition: &Partition) -> Result<Option<&mut End>, SourceError> {
        if !self.ends.contains_key(partition) {
            let lease = self.group.assignment().get(partition).map(|assigned| Arc::clone(&assigned.revoked));
            let Some(lease) = lease else { return Ok(None) };
            match self.group.end_of(partition) {
                Ok(offset) => {
                    self.ends.insert(partition.clone(), End { offset, is_reached: offset == 0, lease });
                }
                Err(error) => self.bear(&error)?,
            }
        }
        Ok(self.ends.get_mut(partition))
    }

    /// Whether all that is assigned was read to its end.
    fn is_at_end(&mut self) -> Result<bool, SourceError> {
        if !self.spec.until_end {
            return Ok(false);
        }
        let assigned: Vec<Partition> =
            self.group.assignment().partitions().map(|(partition, _)| partition.clone()).collect();
        for partition in &assigned {
            let stats = self.stats.lock().partitions.get(partition).cloned().unwrap_or_default();
            let Some(end) = self.end_of(partition)? else { return Ok(false) };
            // Only asked when the client has nothing more to give.
            end.is_reached |= stats.has_reached(end.offset);
            if !end.is_reached {
                return Ok(false);
            }
        }
        Ok((!assigned.is_empty() || self.idle >= MAX_IDLE) && self.is_lost_work_done()?)
    }

    /// Whether others have done what was taken away from us; if they do not, it comes back.
    fn is_lost_work_done(&mut self) -> Result<bool, SourceError> {
        if self.lost.is_empty() {
            return Ok(true);
        }
        self.since_committed += MAX_WAIT;
        if self.since_committed < COMMITTED_WAIT {
            return Ok(false);
        }
        self.since_committed = Duration::ZERO;
        tracing::info!(
            partitions = self.lost.len(),
            "waiting for others to commit what they have taken over"
        );
        let mut list = TopicPartitionList::new();
        for partition in self.lost.keys() {
            list.add_partition(&partition.topic, partition.number);
        }
        match self.group.committed(list) {
            Ok(found) => self.lost.retain(|partition, end| {
                let committed = found.find_partition(&partition.topic, partition.number);
                !committed.is_some_and(|one| matches!(one.offset(), Offset::Offset(offset) if offset >= *end))
            }),
            Err(error) => self.bear(&error)?,
        }
        Ok(self.lost.is_empty())
    }

    /// Takes what the client has and makes batches of it.
    fn fill(&mut self) -> Result<(), SourceError> {
        self.awaits_registry = false;
        // However long what is here already lasts, the group wants to hear of us.
        if !self.ahead.is_empty() {
            self.poll_ahead()?;
        }
        let mut chunks: BTreeMap<Partition, Chunk> = BTreeMap::new();
        let mut wait = MAX_WAIT;
        let mut num_bytes = 0;
        let group = Arc::clone(&self.group);
        for _ in 0..MAX_RECORDS {
            let is_full = if let Some((message, lease)) = self.ahead.pop_front() {
                // A partition that went and came back is read again from where it was committed.
                if self
                    .lease_of(&message)
                    .is_none_or(|now| !lease.as_ref().is_some_and(|old| Arc::ptr_eq(old, &now)))
                {
                    continue;
                }
                match self.take(&message, &mut chunks, &mut num_bytes)? {
                    Some(is_full) => is_full,
                    None => {
                        self.awaits_registry = true;
                        self.ahead.push_front((message, lease));
                        break;
                    }
                }
            } else {
                match group.poll(wait) {
                    None => break,
                    Some(Ok(message)) => match self.take(&message, &mut chunks, &mut num_bytes)? {
                        Some(is_full) => is_full,
                        None => {
                            self.awaits_registry = true;
                            self.keep(message.detach());
                            break;
                        }
                    },
                    Some(Err(Client::PartitionEOF(number))) => {
                        self.reach_end(number)?;
                        false
                    }
                    Some(Err(error)) => {
                        self.bear(&error)?;
                        false
                    }
                }
            };
            wait = Duration::ZERO;
            if is_full {
                break;
            }
        }
        // A partition that came back paused gives no record that would remind us.
        self.follow_assignment()?;
        for (_, chunk) in chunks {
            if let Some(batch) = chunk.rows.finish(chunk.input, chunk.revoked) {
                self.ready.push_back(batch);
            }
        }
        Ok(())
    }

    fn lease_of(&self, message: &impl Message) -> Option<Arc<AtomicBool>> {
        let partition = Partition::new(message.topic(), message.partition());
        self.group.assignment().get(&partition).map(|assigned| Arc::clone(&assigned.revoked))
    }

    /// Takes one event from the client, and keeps it if it is a record. False if there is none.
    fn poll_ahead(&mut self) -> Result<bool, SourceError> {
        let group = Arc::clone(&self.group);
        match group.poll(Duration::ZERO) {
            None => return Ok(false),
            Some(Ok(message)) => {
                let message = message.detach();
                self.keep(message);
            }
            // It may be from before the pause; the statistics tell of it later.
            Some(Err(Client::PartitionEOF(_))) => {}
            Some(Err(error)) => self.bear(&error)?,
        }
        Ok(true)
    }

    /// Keeps a record for later.
    fn keep(&mut self, message: OwnedMessage) {
        let lease = self.lease_of(&message);
        self.ahead.push_back((message, lease));
    }

    /// Adds a record to the rows of its partition; says whether a batch is full, or `None` if the record cannot be
    /// decoded now.
    fn take(
        &mut self,
        message: &impl Message,
        chunks: &mut BTreeMap<Partition, Chunk>,
        num_bytes: &mut usize,
    ) -> Result<Option<bool>, SourceError> {
        self.follow_assignment()?;
        let partition = Partition::new(message.topic(), message.partition());
        let Some(assigned) = self.group.assignment().get(&partition).cloned() else { return Ok(Some(false)) };
        if !self.is_wanted(&partition, message.offset())? {
            return Ok(Some(false));
        }
        let decoded = match message.payload() {
            None => Err("the record has no value (a tombstone)".to_owned()),
            Some(payload) => match self.decoder.decode(payload) {
                Ok(text) => Ok(text),
                Err(DecodeError::Record(reason)) => Err(reason),
                Err(DecodeError::Registry(reason)) => {
                    tracing::warn!(reason, "waiting for the schema registry");
                    return Ok(None);
                }
            },
        };
        if chunks.get(&partition).is_some_and(|chunk| !Arc::ptr_eq(&chunk.revoked, &assigned.revoked)) {
            chunks.remove(&partition);
        }
        let chunk = chunks.entry(partition).or_insert_with(|| Chunk {
            revoked: assigned.revoked,
            input: assigned.input,
            rows: RowsBuilder::new(Arc::clone(&self.schema), self.batch_rows),
        });
        *num_bytes += num_bytes_of(message);
        chunk.rows.push(message, decoded);
        Ok(Some(chunk.rows.len() >= self.batch_rows || *num_bytes >= self.limits.max_bytes))
    }

    /// A partition of this number was read to its end. The client does not say of which topic; where that is open,
    /// its statistics will tell.
    fn reach_end(&mut self, number: i32) -> Result<(), SourceError> {
        self.follow_assignment()?;
        if !self.spec.until_end {
            return Ok(());
        }
        let mut candidates: Vec<Partition> =
            self.group.assignment().partitions().map(|(partition, _)| partition.clone()).collect();
        candidates.retain(|partition| partition.number == number);
        if let [partition] = candidates.as_slice()
            && let Some(end) = self.end_of(partition)?
        {
            end.is_reached = true;
        }
        Ok(())
    }

    /// Tells what mends itself from what does not.
    fn bear(&self, error: &Client) -> Result<(), SourceError> {
        let fatal = matches!(error, Client::MessageConsumptionFatal(_))
            || matches!(
                error.rdkafka_error_code(),
                Some(
                    RDKafkaErrorCode::TopicAuthorizationFailed
                        | RDKafkaErrorCode::GroupAuthorizationFailed
                        | RDKafkaErrorCode::AutoOffsetReset
                        | RDKafkaErrorCode::InconsistentGroupProtocol
                )
            );
        if fatal {
            return Err(self.error(error));
        }
        tracing::info!(reason = reason(error), "consumer");
        Ok(())
    }
}

impl Drop for KafkaSource {
    fn drop(&mut self) {
        {
            let mut stats = self.stats.lock();
            stats.canceled_at_end = Some(stats.epochs_canceled);
        }
        self.group.leave_polling();
    }
}

impl Source for KafkaSource {
    fn schema(&self) -> SchemaRef {
        Arc::clone(&self.schema)
    }

    fn inputs(&self) -> &[InputFile] {
        &[]
    }

    fn names(&self) -> InputNames {
        self.names.clone()
    }

    fn num_rows(&self) -> Option<u64> {
        None
    }

    fn seek(&mut self, _position: Position) -> Result<(), SourceError> {
        Err(SourceError::OtherKind)
    }

    fn resume(&mut self, checkpoint: &Checkpoint) -> Result<(), SourceError> {
        match checkpoint {
            Checkpoint::Row(_) => Err(SourceError::OtherKind),
            Checkpoint::Offsets(offsets) => {
                self.offsets = offsets.clone();
                Ok(())
            }
        }
    }

    fn reads_on(&self) -> bool {
        self.spec.is_member
    }

    fn next_batch(&mut self) -> Result<Option<SourceBatch>, SourceError> {
        loop {
            match self.read()? {
                Read::Batch(batch) => return Ok(Some(batch)),
                Read::Idle => {}
                Read::End => return Ok(None),
            }
        }
    }

    fn read(&mut self) -> Result<Read, SourceError> {
        if !self.has_begun {
            self.begin()?;
        }
        if self.awaits_registry {
            // The group is still polled, so it keeps us.
            self.hold_back(PAUSE_AFTER)?;
            std::thread::sleep(REGISTRY_WAIT);
        } else if self.is_paused {
            self.set_paused(false)?;
        }
        if self.ready.is_empty() {
            self.fill()?;
        }
        while let Some(batch) = self.ready.pop_front() {
            if !batch.revoked.load(Ordering::Acquire) {
                self.idle = Duration::ZERO;
                let mut stats = self.stats.lock();
                stats.records_read += (batch.row_numbers.len() + batch.rejected.len()) as u64;
                if let Some(partition) = Partition::parse(&self.names.get(batch.file)) {
                    let end = batch.end.row as i64;
                    stats.partitions.entry(partition.clone()).or_default().position = Some(end);
                    self.given.insert(partition, Given { end, lease: Arc::clone(&batch.revoked) });
                }
                return Ok(Read::Batch(batch));
            }
        }
        if self.awaits_registry {
            return Ok(Read::Idle);
        }
        // Before the group has answered, there is nothing to be at the end of.
        if self.group.assignment().version() > 0 {
            self.idle += MAX_WAIT;
        }
        Ok(if self.is_at_end()? { Read::End } else { Read::Idle })
    }

    fn set_batch_rows(&mut self, max_rows: usize) {
        self.batch_rows = max_rows.clamp(1, self.limits.max_rows);
    }

    fn hold_back(&mut self, held_back: Duration) -> Result<(), SourceError> {
        if held_back < PAUSE_AFTER {
            return Ok(());
        }
        if !self.is_paused {
            self.set_paused(true)?;
        }
        for _ in 0..MAX_RECORDS {
            if !self.poll_ahead()? {
                break;
            }
        }
        self.follow_assignment()
    }
}
