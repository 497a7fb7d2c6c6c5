//! The commit protocol's [`Broker`] over librdkafka.
//!
//! One producer writes both topics. Exactly once it is transactional; at least once it is idempotent, and offsets are
//! committed after everything is acknowledged. Inputs that are files have no group: where they are is then kept in
//! the metadata of an offset of the output topic itself, in a group of the transactional id's name, so the position
//! is in the same transaction as the records.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rdkafka::client::ClientContext;
use rdkafka::config::RDKafkaLogLevel;
use rdkafka::consumer::{CommitMode, ConsumerGroupMetadata};
use rdkafka::error::{KafkaError as Client, KafkaResult};
use rdkafka::message::{DeliveryResult, Header, Message, OwnedHeaders};
use rdkafka::producer::{BaseProducer, BaseRecord, Producer, ProducerContext, PurgeConfig};
use rdkafka::types::RDKafkaErrorCode;
use rdkafka::{Offset, TopicPartitionList};

use super::KafkaError;
use super::assignment::Partition;
use super::commit::{Broker, BrokerError};
use super::config::{Cluster, reason};
use super::group::{SharedGroup, log, offsets_list};
use super::record::{OutRecord, Target};
use crate::source::InputNames;

/// How long one call may block before it is made again.
const CALL_TIMEOUT: Duration = Duration::from_secs(5);
/// How often [`flush`] looks again, and for how long in all: [`CALL_TIMEOUT`].
const FLUSH_WAIT: Duration = Duration::from_millis(1);
const MAX_FLUSH_WAITS: u32 = 5000;
/// How long a commit is still tried after the run was told to stop.
const GRACE: Duration = Duration::from_secs(10);
/// How often in a row a topic may be unknown: for some seconds.
const MAX_UNKNOWN: u32 = 8;
/// The fewest bytes that a topic may be limited to; below it no error record fits.
const MIN_RECORD_BYTES: usize = 1024;

/// Where records go and how.
#[derive(Clone, Debug)]
pub struct ProducerSpec {
    pub cluster: Cluster,
    pub topic: String,
    pub errors_topic: String,
    pub exactly_once: bool,
    pub transactional_id: String,
}

/// Where offsets are committed.
#[derive(Debug)]
pub(super) enum Progress {
    /// In the group that reads.
    Group { group: SharedGroup, names: InputNames },
    /// In a group of our own, as the metadata of one offset.
    Rows { home: SharedGroup, state: String },
}

/// See the module.
pub struct KafkaBroker {
    spec: ProducerSpec,
    /// `[Target]`
    limits: [usize; 2],
    producer: Option<BaseProducer<Deliveries>>,
    pub(super) progress: Progress,
    generation: Option<ConsumerGroupMetadata>,
    /// Since the transaction began.
    num_sent: usize,
    /// Each record in a batch of its own until the next commit: a broker refuses a batch as a whole.
    one_by_one: bool,
    /// The producer was made before that changed.
    is_stale: bool,
    /// Of the results' topic, as far as is known.
    num_partitions: i32,
    /// How often in a row a topic or a partition was not known.
    num_unknown: u32,
    /// At least once: what is committed when all records are acknowledged.
    offsets: Option<TopicPartitionList>,
    is_open: bool,
    stop: Arc<AtomicBool>,
    grace: Duration,
    num_pauses: u32,
}

/// Counts what the broker refuses.
#[derive(Debug, Default)]
pub(super) struct Deliveries {
    failed: Mutex<Option<Failed>>,
}

impl Deliveries {
    /// Why the first record that did not arrive was refused.
    pub(super) fn failure(&self) -> Option<String> {
        let failed = self.failed.lock().unwrap_or_else(PoisonError::into_inner);
        failed.as_ref().map(|failed| failed.reason.clone())
    }
}

#[derive(Clone, Debug)]
struct Failed {
    reason: String,
    code: Option<RDKafkaErrorCode>,
    /// Of the record: its place among those that were sent, its topic and its size.
    index: usize,
    topic: String,
    bytes: usize,
}

impl KafkaBroker {
    pub(super) fn new(
        spec: ProducerSpec,
        limits: [usize; 2],
        progress: Progress,
        stop: Arc<AtomicBool>,
    ) -> Self {
        Self {
            spec,
            limits: limits.map(|limit| limit.max(MIN_RECORD_BYTES)),
            producer: None,
            progress,
            generation: None,
            num_sent: 0,
            one_by_one: false,
            is_stale: false,
            num_partitions: 0,
            num_unknown: 0,
            offsets: None,
            is_open: false,
            stop,
            grace: GRACE,
            num_pauses: 0,
        }
    }

    /// The run is ending: from now on, the broker is not waited for without end.
    pub fn hurry(&mut self) {
        self.stop = Arc::new(AtomicBool::new(true));
    }

    /// The most bytes of a record for a topic.
    pub fn limit(&self, target: Target) -> usize {
        self.limits[target as usize]
    }

    fn create(&self) -> Result<BaseProducer<Deliveries>, KafkaError> {
        let batch_bytes = self.limits[0].min(self.limits[1]).min(1_000_000).to_string();
        let message_bytes =
            self.limits[0].max(self.limits[1]).clamp(MIN_RECORD_BYTES, 1_000_000_000).to_string();
        let mut config = self.spec.cluster.client(&[
            ("linger.ms", "5"),
            ("partitioner", "murmur2_random"),
            ("queue.buffering.max.messages", "200000"),
            ("queue.buffering.max.kbytes", "131072"),
            ("batch.size", &batch_bytes),
            ("message.max.bytes", &message_bytes),
        ]);
        config.set("enable.idempotence", "true");
        if self.one_by_one {
            config.set("batch.num.messages", "1");
        }
        if self.spec.exactly_once {
            config.set("transactional.id", &self.spec.transactional_id);
            if !self.spec.cluster.options.contains_key("transaction.timeout.ms") {
                config.set("transaction.timeout.ms", "30000");
            }
        }
        config
            .create_with_context(Deliveries::default())
            .map_err(|error| self.spec.cluster.error("write", &error))
    }

    /// Finds mistakes in the options before anything runs.
    pub(super) fn check(&self) -> Result<(), KafkaError> {
        self.spec.cluster.check()?;
        self.create().map(drop)
    }

    fn producer(&self) -> &BaseProducer<Deliveries> {
        self.producer.as_ref().expect("made by `init`")
    }

    fn topic(&self, target: Target) -> &str {
        match target {
            Target::Results => &self.spec.topic,
            Target::Errors => &self.spec.errors_topic,
        }
    }

    /// What the broker has refused since the transaction began.
    fn delivered(&mut self) -> Result<(), BrokerError> {
        let failed = self.producer().context().failed.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let Some(Failed { reason, code, index, topic, bytes }) = failed else { return Ok(()) };
        use RDKafkaErrorCode as Code;
        Err(match code {
            Some(
                Code::MessageSizeTooLarge
                | Code::MessageBatchTooLarge
                | Code::InvalidTimestamp
                | Code::InvalidRecord
                | Code::InvalidDifferentRecord
                | Code::InvalidMessage,
            ) if !self.one_by_one => {
                (self.one_by_one, self.is_stale) = (true, true);
                BrokerError::Abort(reason)
            }
            Some(Code::MessageSizeTooLarge | Code::MessageBatchTooLarge) => {
                let target = if topic == self.spec.topic { Target::Results } else { Target::Errors };
                let limit = &mut self.limits[target as usize];
                *limit = (*limit).min(bytes.saturating_sub(1)).max(MIN_RECORD_BYTES);
                BrokerError::Refused { index, reason }
            }
            Some(Code::InvalidTimestamp | Code::InvalidRecord | Code::InvalidMessage) => {
                BrokerError::Refused { index, reason }
            }
            Some(Code::UnknownPartition) => BrokerError::Broken(reason),
            Some(Code::UnknownTopic | Code::UnknownTopicOrPartition) => self.unknown(reason),
            Some(code) if is_forbidden(code) => BrokerError::Broken(reason),
            _ => BrokerError::Abort(reason),
        })
    }

    /// The client would wait long for a partition that may still come.
    fn check_partition(&mut self, target: Target, partition: i32) -> Result<(), BrokerError> {
        if partition < self.num_partitions {
            return Ok(());
        }
        let topic = self.topic(target);
        let found = self.producer().client().fetch_metadata(Some(topic), CALL_TIMEOUT);
        let found = found.map_err(|error| BrokerError::Retry(reason(&error)))?;
        let num_partitions = found.topics().first().map_or(0, |topic| topic.partitions().len() as i32);
        if partition >= num_partitions {
            return Err(BrokerError::Broken(format!(
                "topic {topic:?} has {num_partitions} partitions, and a record is of partition {partition}; \
                `partition: input` needs as many as the input has"
            )));
        }
        self.num_partitions = num_partitions;
        Ok(())
    }

    /// A topic may be unknown for a moment, while its broker comes back.
    fn unknown(&mut self, reason: String) -> BrokerError {
        self.num_unknown += 1;
        if self.num_unknown > MAX_UNKNOWN { BrokerError::Broken(reason) } else { BrokerError::Abort(reason) }
    }

    fn home(&self) -> (&SharedGroup, TopicPartitionList) {
        let mut list = TopicPartitionList::new();
        list.add_partition(&self.spec.topic, 0);
        let (Progress::Group { group: home, .. } | Progress::Rows { home, .. }) = &self.progress;
        (home, list)
    }

    /// What [`Progress::Rows`] has committed, if anything.
    pub(super) fn committed_state(&self) -> Result<Option<String>, KafkaError> {
        let (home, list) = self.home();
        let found = home.committed(list).map_err(|error| self.spec.cluster.error("read offsets", &error))?;
        let elements = found.elements();
        let metadata = elements.first().map(|one| one.metadata().to_owned());
        Ok(metadata.filter(|metadata| !metadata.is_empty()))
    }

    fn offsets_list(&self, offsets: &BTreeMap<u32, u64>) -> Result<TopicPartitionList, BrokerError> {
        let refused = |error: Client| BrokerError::Abort(reason(&error));
        match &self.progress {
            Progress::Group { names, .. } => offsets_list(offsets, names).map_err(refused),
            Progress::Rows { state, .. } => {
                let mut list = TopicPartitionList::new();
                let mut element = list.add_partition(&self.spec.topic, 0);
                let row = offsets.values().next_back().copied().unwrap_or_default();
                element.set_offset(Offset::Offset(row as i64)).map_err(refused)?;
                element.set_metadata(state.as_str());
                Ok(list)
            }
        }
    }
}

impl Broker for KafkaBroker {
    fn init(&mut self) -> Result<(), BrokerError> {
        self.is_open = false;
        self.producer = None;
        let producer = self.create().map_err(|error| BrokerError::Fatal(error.to_string()))?;
        if self.spec.exactly_once {
            producer.init_transactions(CALL_TIMEOUT).map_err(sort)?;
        }
        self.producer = Some(producer);
        self.is_stale = false;
        Ok(())
    }

    fn pin_group(&mut self, check: &mut dyn FnMut()) -> bool {
        let (Progress::Group { group, .. } | Progress::Rows { home: group, .. }) = &self.progress;
        self.generation = group.pin(check);
        self.generation.is_some()
    }

    fn begin(&mut self) -> Result<(), BrokerError> {
        if self.is_stale {
            self.init()?;
        }
        *self.producer().context().failed.lock().unwrap_or_else(PoisonError::into_inner) = None;
        if self.spec.exactly_once {
            self.producer().begin_transaction().map_err(sort)?;
        }
        self.offsets = None;
        self.is_open = true;
        self.num_sent = 0;
        Ok(())
    }

    fn send(&mut self, record: &OutRecord) -> Result<(), BrokerError> {
        let limit = self.limit(record.target);
        if record.num_bytes() > limit {
            return Err(BrokerError::TooLarge { limit });
        }
        if let Some(partition) = record.partition {
            self.check_partition(record.target, partition)?;
        }
        let mut out =
            BaseRecord::<[u8], [u8], usize>::with_opaque_to(self.topic(record.target), self.num_sent);
        out.key = record.key.as_deref();
        out.payload = record.value.as_deref();
        out.partition = record.partition;
        out.timestamp = record.timestamp;
        if !record.headers.is_empty() {
            let headers = OwnedHeaders::new_with_capacity(record.headers.len());
            out.headers = Some(record.headers.iter().fold(headers, |headers, (key, value)| {
                headers.insert(Header { key, value: value.as_deref() })
            }));
        }
        for _ in 0..100 {
            match self.producer().send(out) {
                Ok(()) => {
                    self.num_sent += 1;
                    return Ok(());
                }
                Err((Client::MessageProduction(RDKafkaErrorCode::QueueFull), back)) => {
                    out = back;
                    self.producer().poll(Duration::from_millis(20));
                }
                Err((Client::MessageProduction(RDKafkaErrorCode::UnknownPartition), _)) => {
                    return Err(BrokerError::Broken(format!(
                        "topic {:?} has no partition {}; `partition: input` needs as many as the input has",
                        self.topic(record.target),
                        record.partition.unwrap_or_default()
                    )));
                }
                Err((error, _)) => return Err(sort(error)),
            }
        }
        Err(BrokerError::Retry("the broker takes no records".to_owned()))
    }

    fn send_offsets(&mut self, offsets: &BTreeMap<u32, u64>) -> Result<(), BrokerError> {
        let list = self.offsets_list(offsets)?;
        if self.spec.exactly_once {
            let generation = self.generation.as_ref().expect("pinned before the transaction began");
            self.producer().send_offsets_to_transaction(&list, generation, CALL_TIMEOUT).map_err(sort)?;
        } else {
            self.offsets = Some(list);
        }
        Ok(())
    }

    fn commit(&mut self) -> Result<(), BrokerError> {
        if let Err(error) = flush(self.producer()) {
            self.delivered()?;
            return Err(sort(error));
        }
        self.delivered()?;
        if self.spec.exactly_once {
            self.producer().commit_transaction(CALL_TIMEOUT).map_err(sort)?;
        } else if let Some(offsets) = &self.offsets {
            let (Progress::Group { group, .. } | Progress::Rows { home: group, .. }) = &self.progress;
            group.commit(offsets, CommitMode::Sync).map_err(sort)?;
        }
        self.is_open = false;
        (self.num_pauses, self.num_unknown) = (0, 0);
        // What was refused is not among the records any more.
        (self.one_by_one, self.is_stale) = (false, self.one_by_one);
        Ok(())
    }

    fn abort(&mut self) -> Result<(), BrokerError> {
        if !self.is_open {
            return Ok(());
        }
        if self.spec.exactly_once {
            self.producer().abort_transaction(CALL_TIMEOUT).map_err(sort)?;
        } else {
            self.producer().purge(PurgeConfig::default().queue());
            flush(self.producer()).map_err(sort)?;
        }
        self.is_open = false;
        Ok(())
    }

    fn committed(&mut self, inputs: &BTreeSet<u32>) -> Result<BTreeMap<u32, u64>, BrokerError> {
        let query = |error: Client| BrokerError::Retry(reason(&error));
        match &self.progress {
            Progress::Group { group, names } => {
                let all = inputs.iter().map(|&input| (input, 0)).collect();
                let list = offsets_list(&all, names).map_err(query)?;
                let found = group.committed(list).map_err(query)?;
                let mut committed = BTreeMap::new();
                for one in found.elements() {
                    one.error().map_err(query)?;
                    if let Offset::Offset(offset) = one.offset() {
                        let name = Partition::new(one.topic(), one.partition()).to_string();
                        committed.insert(names.number(&name), offset as u64);
                    }
                }
                Ok(committed)
            }
            Progress::Rows { state, .. } => {
                let found = self.committed_state().map_err(|error| BrokerError::Retry(error.to_string()))?;
                // One state for all inputs: the last commit has either happened or not.
                let is_committed = found.as_ref() == Some(state);
                Ok(inputs.iter().filter(|_| is_committed).map(|&input| (input, u64::MAX)).collect())
            }
        }
    }

    fn errors_limit(&self) -> usize {
        self.limit(Target::Errors)
    }

    fn pause(&mut self, time: Duration, reason: &str) -> bool {
        self.num_pauses += 1;
        if self.num_pauses.is_multiple_of(20) {
            tracing::warn!(
                brokers = self.spec.cluster.brokers,
                reason,
                "still waiting for the broker to take results"
            );
        }
        if let Progress::Group { group, .. } = &self.progress {
            group.attend();
        }
        if self.stop.load(Ordering::Acquire) {
            self.grace = self.grace.saturating_sub(time);
            if self.grace.is_zero() {
                return false;
            }
        }
        match &self.producer {
            Some(producer) => producer.poll(time),
            None => std::thread::sleep(time),
        }
        true
    }
}

/// Waits until nothing is left to send. The client's own flush looks again only after 100 ms.
pub(super) fn flush<C: ProducerContext>(producer: &BaseProducer<C>) -> KafkaResult<()> {
    let mut num_waits = 0;
    loop {
        match producer.flush(Duration::ZERO) {
            Err(Client::Flush(RDKafkaErrorCode::OperationTimedOut)) if num_waits < MAX_FLUSH_WAITS => {
                num_waits += 1;
                producer.poll(Duration::ZERO);
                // The client would wait for the last millisecond in a loop.
                std::thread::sleep(FLUSH_WAIT);
            }
            result => return result,
        }
    }
}

/// Whether it is the same as often as it is tried.
fn is_forbidden(code: RDKafkaErrorCode) -> bool {
    matches!(
        code,
        RDKafkaErrorCode::TopicAuthorizationFailed
            | RDKafkaErrorCode::GroupAuthorizationFailed
            | RDKafkaErrorCode::ClusterAuthorizationFailed
            | RDKafkaErrorCode::TransactionalIdAuthorizationFailed
            | RDKafkaErrorCode::InvalidTransactionTimeout
    )
}

/// What can be done about an error.
fn sort(error: Client) -> BrokerError {
    match &error {
        Client::Transaction(inner) if is_forbidden(inner.code()) => BrokerError::Broken(inner.string()),
        Client::Transaction(inner) if inner.is_fatal() => BrokerError::Fatal(inner.string()),
        Client::Transaction(inner) if inner.txn_requires_abort() => BrokerError::Abort(inner.string()),
        Client::Transaction(inner) if inner.is_retriable() => BrokerError::Retry(inner.string()),
        Client::Transaction(inner) if inner.code() == RDKafkaErrorCode::State => {
            BrokerError::Fatal(inner.string())
        }
        Client::MessageProduction(RDKafkaErrorCode::Fatal) => BrokerError::Fatal(reason(&error)),
        Client::Flush(_) => BrokerError::Retry(reason(&error)),
        _ if error.rdkafka_error_code().is_some_and(is_forbidden) => BrokerError::Broken(reason(&error)),
        _ => BrokerError::Abort(reason(&error)),
    }
}

impl ClientContext for Deliveries {
    fn log(&self, level: RDKafkaLogLevel, fac: &str, message: &str) {
        log(level, fac, message);
    }

    fn error(&self, error: Client, reason: &str) {
        tracing::info!(%error, reason, "producer");
    }
}

impl ProducerContext for Deliveries {
    /// The record's place among those that were sent.
    type DeliveryOpaque = usize;

    fn delivery(&self, result: &DeliveryResult<'_>, index: usize) {
        let Err((error, message)) = result else { return };
        let failed = Failed {
            reason: reason(error),
            code: error.rdkafka_error_code(),
            index,
            topic: message.topic().to_owned(),
            bytes: message.payload_len() + message.key_len(),
        };
        self.failed.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(failed);
    }
}
