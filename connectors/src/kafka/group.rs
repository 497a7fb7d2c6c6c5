//! A member of a consumer group: the client, what it is assigned, and what it may still commit.
//!
//! The rebalance callback runs on the thread that polls. It revokes leases *before* the client gives the partitions
//! up, under the lock that [`pin`](Group::pin) takes too, so whoever commits sees either the lease or the revocation,
//! never a generation that is newer than the leases it has checked.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rdkafka::client::ClientContext;
use rdkafka::config::RDKafkaLogLevel;
use rdkafka::consumer::{
    BaseConsumer, CommitMode, Consumer, ConsumerContext, ConsumerGroupMetadata, RebalanceProtocol,
};
use rdkafka::error::KafkaError as Client;
use rdkafka::error::KafkaResult;
use rdkafka::message::BorrowedMessage;
use rdkafka::types::{RDKafkaErrorCode, RDKafkaRespErr};
use rdkafka::{Offset, Statistics, TopicPartitionList};

use super::KafkaError;
use super::assignment::{Assignment, Partition};
use super::config::Cluster;
use super::stats::KafkaStats;
use crate::source::InputNames;

/// How long a question about offsets may take.
pub(super) const QUERY_TIMEOUT: Duration = Duration::from_secs(10);

/// A full queue is looked at again soon: after the default of a second it is long empty.
pub const FETCH_QUEUE_BACKOFF: (&str, &str) = ("fetch.queue.backoff.ms", "5");

/// The most events that one call of [`Group::attend`] takes.
const MAX_ATTENDED: usize = 100_000;
/// It ends when so often in a row nothing came in so long: the client also returns nothing where it had an event that
/// is no record, such as its statistics.
const MAX_EMPTY: usize = 20;
const EMPTY_WAIT: Duration = Duration::from_millis(1);
/// How often the offsets of a start are looked up before the run fails.
const MAX_LOOKUPS: usize = 3;

/// Where to begin in a partition without a committed offset.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Start {
    #[default]
    Earliest,
    Latest,
    /// With the first record of this time or later; milliseconds since 1970.
    Timestamp(i64),
    /// Nowhere: that there is none is an error.
    Committed,
}

/// The client of a member.
pub struct Group {
    consumer: BaseConsumer<GroupContext>,
    cluster: Cluster,
    /// Nobody reads any more: whoever commits must poll, or a rebalance would wait for us for ever.
    is_left: AtomicBool,
}

/// What callbacks work on.
pub(super) struct GroupContext {
    assignment: Mutex<Assignment>,
    stats: KafkaStats,
    start: Start,
    /// Why it is not known where to begin in a partition: to begin elsewhere would lose records.
    no_start: Mutex<Option<RDKafkaErrorCode>>,
}

impl Group {
    /// Makes the client; it connects when it is used.
    pub fn new(
        cluster: &Cluster,
        group: &str,
        start: Start,
        names: InputNames,
        stats: KafkaStats,
    ) -> Result<Self, KafkaError> {
        cluster.check()?;
        let mut config = cluster.client(&[
            ("partition.assignment.strategy", "cooperative-sticky"),
            ("queued.max.messages.kbytes", "4096"),
            FETCH_QUEUE_BACKOFF,
            ("statistics.interval.ms", "1000"),
            ("session.timeout.ms", "10000"),
        ]);
        config
            .set("group.id", group)
            .set("enable.auto.commit", "false")
            .set("enable.auto.offset.store", "false")
            .set("enable.partition.eof", "true")
            .set("isolation.level", "read_committed");
        let reset = match start {
            Start::Earliest => "earliest",
            Start::Latest | Start::Timestamp(_) => "latest",
            Start::Committed => "error",
        };
        config.set("auto.offset.reset", reset);
        let context = GroupContext {
            assignment: Mutex::new(Assignment::new(names)),
            stats,
            start,
            no_start: Mutex::default(),
        };
        let consumer = config.create_with_context(context).map_err(|error| cluster.error("read", &error))?;
        Ok(Self { consumer, cluster: cluster.clone(), is_left: AtomicBool::new(false) })
    }

    pub(super) fn brokers(&self) -> &String {
        &self.cluster.brokers
    }

    pub(super) fn assignment(&self) -> MutexGuard<'_, Assignment> {
        self.consumer.context().assignment()
    }

    /// Joins the group.
    pub(super) fn subscribe(&self, topics: &[&str]) -> Result<(), KafkaError> {
        self.consumer.subscribe(topics).map_err(|error| self.cluster.error("subscribe", &error))
    }

    /// Takes all partitions without joining the group, each from its offset if it has one.
    pub(super) fn take_all(
        &self,
        partitions: Vec<Partition>,
        offsets: &BTreeMap<String, u64>,
    ) -> Result<(), KafkaError> {
        let fail = |error| self.cluster.error("read", &error);
        let mut list = TopicPartitionList::new();
        for partition in &partitions {
            let offset = match (offsets.get(&partition.to_string()), self.consumer.context().start) {
                (Some(&offset), _) => Offset::Offset(offset as i64),
                (None, Start::Earliest) => Offset::Beginning,
                (None, Start::Latest) => Offset::End,
                (None, Start::Timestamp(_) | Start::Committed) => Offset::Invalid,
            };
            list.add_partition_offset(&partition.topic, partition.number, offset).map_err(fail)?;
        }
        self.consumer.context().find_timestamps(&self.consumer, &mut list).map_err(fail)?;
        self.assignment().assign(partitions);
        self.consumer.assign(&list).map_err(fail)
    }

    /// The partitions of the topics, or `None` for one that does not exist.
    pub(super) fn partitions_of(&self, topics: &[String]) -> Result<Vec<Partition>, KafkaError> {
        let mut partitions = Vec::new();
        for topic in topics {
            let found = self
                .consumer
                .fetch_metadata(Some(topic), QUERY_TIMEOUT)
                .map_err(|error| self.cluster.error("look up topics", &error))?;
            let found = found.topics().iter().find(|found| found.name() == topic && found.error().is_none());
            let found = found.filter(|found| !found.partitions().is_empty()).ok_or_else(|| {
                KafkaError::NoTopic { topic: topic.clone(), brokers: self.cluster.brokers.clone() }
            })?;
            let numbers = found.partitions().iter().map(|partition| partition.id());
            partitions.extend(numbers.map(|number| Partition::new(topic, number)));
        }
        Ok(partitions)
    }

    /// The topics whose names match.
    pub(super) fn matching(&self, matches: impl Fn(&str) -> bool) -> Result<Vec<String>, KafkaError> {
        let all = self
            .consumer
            .fetch_metadata(None, QUERY_TIMEOUT)
            .map_err(|error| self.cluster.error("look up topics", &error))?;
        Ok(all
            .topics()
            .iter()
            .map(|topic| topic.name())
            .filter(|name| matches(name))
            .map(str::to_owned)
            .collect())
    }

    /// The reader is gone; see [`attend`](Self::attend).
    pub(super) fn leave_polling(&self) {
        self.is_left.store(true, Ordering::Release);
    }

    /// Lets rebalances happen if nobody else does; what is read goes to nobody.
    pub(super) fn attend(&self) {
        if self.is_left.load(Ordering::Acquire) {
            // A rebalance waits behind the records that were fetched before it.
            let mut num_empty = 0;
            for _ in 0..MAX_ATTENDED {
                num_empty = if self.consumer.poll(EMPTY_WAIT).is_none() { num_empty + 1 } else { 0 };
                if num_empty >= MAX_EMPTY {
                    break;
                }
            }
        }
    }

    pub(super) fn poll(&self, wait: Duration) -> Option<KafkaResult<BorrowedMessage<'_>>> {
        let next = self.consumer.poll(wait);
        match self.consumer.context().no_start.lock().unwrap_or_else(PoisonError::into_inner).take() {
            Some(code) => Some(Err(Client::MessageConsumptionFatal(code))),
            None => next,
        }
    }

    /// Tells clusters apart; `None` if the broker does not say.
    pub(super) fn cluster_id(&self) -> Option<String> {
        self.consumer.client().fetch_cluster_id(QUERY_TIMEOUT)
    }

    /// Stops or goes on with fetching all that is assigned.
    pub(super) fn set_paused(&self, paused: bool) -> KafkaResult<()> {
        let mut list = TopicPartitionList::new();
        for (partition, _) in self.assignment().partitions() {
            list.add_partition(&partition.topic, partition.number);
        }
        if list.count() == 0 {
            return Ok(());
        }
        if paused { self.consumer.pause(&list) } else { self.consumer.resume(&list) }
    }

    /// Where a partition ends now, as far as committed records go.
    pub(super) fn end_of(&self, partition: &Partition) -> KafkaResult<i64> {
        let (_, end) = self.consumer.fetch_watermarks(&partition.topic, partition.number, QUERY_TIMEOUT)?;
        Ok(end)
    }

    /// Runs `check` while no partition can be revoked, and returns the group's generation of that moment. `None` if
    /// the group has thrown us out already; the revocations then follow.
    pub(super) fn pin(&self, check: &mut dyn FnMut()) -> Option<ConsumerGroupMetadata> {
        let _no_rebalance = self.assignment();
        check();
        // The client forgets its generation when it is thrown out, and a broker takes offsets without a generation
        // from anybody. That it is out is known from then on, so the order of these two matters.
        let metadata = self.consumer.group_metadata();
        metadata.filter(|_| !self.consumer.assignment_lost())
    }

    /// Commits offsets without a transaction.
    pub(super) fn commit(&self, offsets: &TopicPartitionList, mode: CommitMode) -> KafkaResult<()> {
        self.consumer.commit(offsets, mode)
    }

    /// The group's committed offsets; waits for transactions that are still open.
    pub(super) fn committed(&self, partitions: TopicPartitionList) -> KafkaResult<TopicPartitionList> {
        self.consumer.committed_offsets(partitions, QUERY_TIMEOUT)
    }
}

impl GroupContext {
    fn assignment(&self) -> MutexGuard<'_, Assignment> {
        self.assignment.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Decides where to begin in partitions without a committed offset, and commits that, so that whoever has them next
    /// begins there too and not where they end by then.
    fn begin(&self, consumer: &BaseConsumer<Self>, list: &mut TopicPartitionList) -> KafkaResult<()> {
        if matches!(self.start, Start::Earliest | Start::Committed) || list.count() == 0 {
            return Ok(());
        }
        let mut begun = self.find_starts(consumer, list);
        for _ in 1..MAX_LOOKUPS {
            if begun.is_ok() {
                break;
            }
            begun = self.find_starts(consumer, list);
        }
        let begun = begun?;
        for one in begun.elements() {
            list.set_partition_offset(one.topic(), one.partition(), one.offset())?;
        }
        if begun.count() > 0 {
            consumer.commit(&begun, CommitMode::Sync)?;
        }
        Ok(())
    }

    /// Where to begin in those partitions that have no committed offset.
    fn find_starts(
        &self,
        consumer: &BaseConsumer<Self>,
        list: &TopicPartitionList,
    ) -> KafkaResult<TopicPartitionList> {
        let committed = consumer.committed_offsets(list.clone(), QUERY_TIMEOUT)?;
        let mut found = list.clone();
        self.find_timestamps(consumer, &mut found)?;
        let mut starts = TopicPartitionList::new();
        for one in committed.elements() {
            // Whether such a partition has an offset is not known, so it must not be given a new one.
            one.error()?;
            if one.offset() != Offset::Invalid {
                continue;
            }
            let offset = match found.find_partition(one.topic(), one.partition()).map(|found| found.offset())
            {
                Some(Offset::Offset(offset)) => offset,
                _ => consumer.fetch_watermarks(one.topic(), one.partition(), QUERY_TIMEOUT)?.1,
            };
            starts.add_partition_offset(one.topic(), one.partition(), Offset::Offset(offset))?;
        }
        Ok(starts)
    }

    /// Fills in the offsets of partitions which begin at a time and have none committed.
    fn find_timestamps(
        &self,
        consumer: &BaseConsumer<Self>,
        list: &mut TopicPartitionList,
    ) -> KafkaResult<()> {
        let Start::Timestamp(timestamp) = self.start else { return Ok(()) };
        let committed = consumer.committed_offsets(list.clone(), QUERY_TIMEOUT)?;
        let mut times = TopicPartitionList::new();
        for one in committed.elements() {
            let is_open = list
                .find_partition(one.topic(), one.partition())
                .is_some_and(|own| own.offset() == Offset::Invalid);
            if one.offset() == Offset::Invalid && is_open {
                times.add_partition_offset(one.topic(), one.partition(), Offset::Offset(timestamp))?;
            }
        }
        // The client calls an empty list an error; all have offsets wherever a group goes on.
        if times.count() == 0 {
            return Ok(());
        }
        for found in consumer.offsets_for_times(times, QUERY_TIMEOUT)?.elements() {
            list.set_partition_offset(found.topic(), found.partition(), found.offset())?;
        }
        Ok(())
    }
}

fn partitions(list: &TopicPartitionList) -> Vec<Partition> {
    list.elements().iter().map(|one| Partition::new(one.topic(), one.partition())).collect()
}

impl ConsumerContext for GroupContext {
    fn rebalance(&self, consumer: &BaseConsumer<Self>, what: RDKafkaRespErr, list: &mut TopicPartitionList) {
        let is_cooperative = matches!(consumer.rebalance_protocol(), RebalanceProtocol::Cooperative);
        let result = if what == RDKafkaRespErr::RD_KAFKA_RESP_ERR__ASSIGN_PARTITIONS {
            if let Err(error) = self.begin(consumer, list) {
                tracing::warn!(%error, "cannot look up where to begin");
                let code = error.rdkafka_error_code().unwrap_or(RDKafkaErrorCode::Fail);
                *self.no_start.lock().unwrap_or_else(PoisonError::into_inner) = Some(code);
            }
            tracing::info!(partitions = ?partitions(list).iter().map(ToString::to_string).collect::<Vec<_>>(), "assigned");
            self.assignment().assign(partitions(list));
            if is_cooperative { consumer.incremental_assign(list) } else { consumer.assign(list) }
        } else {
            let lost = partitions(list);
            tracing::info!(partitions = ?lost.iter().map(ToString::to_string).collect::<Vec<_>>(), "revoked");
            self.assignment().revoke(&lost);
            if is_cooperative { consumer.incremental_unassign(list) } else { consumer.unassign() }
        };
        if let Err(error) = result {
            tracing::warn!(%error, "rebalance");
        }
        let mut stats = self.stats.lock();
        stats.num_rebalances += 1;
        let assignment = self.assignment();
        stats.partitions.retain(|partition, _| assignment.get(partition).is_some());
        for (partition, _) in assignment.partitions() {
            stats.partitions.entry(partition.clone()).or_default();
        }
    }

    fn main_queue_min_poll_interval(&self) -> rdkafka::util::Timeout {
        Duration::from_millis(50).into()
    }
}

impl ClientContext for GroupContext {
    fn log(&self, level: RDKafkaLogLevel, fac: &str, message: &str) {
        log(level, fac, message);
    }

    fn error(&self, error: rdkafka::error::KafkaError, reason: &str) {
        if !matches!(error.rdkafka_error_code(), Some(RDKafkaErrorCode::PartitionEOF)) {
            tracing::info!(%error, reason, "consumer");
        }
    }

    fn stats(&self, statistics: Statistics) {
        let mut stats = self.stats.lock();
        for (topic, found) in &statistics.topics {
            for (number, found) in &found.partitions {
                let partition = Partition::new(topic, *number);
                let Some(known) = stats.partitions.get_mut(&partition) else { continue };
                let given = |offset: i64| (offset >= 0).then_some(offset);
                known.fetched = given(found.next_offset).filter(|_| found.fetchq_cnt == 0);
                known.num_reports += 1;
                known.committed = known.committed.or(given(found.committed_offset));
                known.end = given(found.ls_offset).or(given(found.hi_offset)).or(known.end);
            }
        }
    }
}

/// Callbacks of a client that only looks things up.
#[derive(Default)]
pub(super) struct Quiet {
    /// Why it could not, in more words than its calls return.
    trouble: Mutex<Option<String>>,
}

impl Quiet {
    /// Makes a call's error tell what was behind it, such as a login that was refused.
    pub(super) fn explain(client: &BaseConsumer<Self>, error: KafkaError) -> KafkaError {
        // What has happened is told while the client is polled.
        let _ = client.poll(Duration::from_millis(10));
        let trouble = client.context().trouble.lock().unwrap_or_else(PoisonError::into_inner).take();
        match (error, trouble) {
            (KafkaError::Broker { action, brokers, .. }, Some(reason)) => {
                KafkaError::Broker { action, brokers, reason }
            }
            (error, _) => error,
        }
    }
}

impl ClientContext for Quiet {
    fn log(&self, level: RDKafkaLogLevel, fac: &str, message: &str) {
        log(level, fac, message);
    }

    fn error(&self, error: rdkafka::error::KafkaError, reason: &str) {
        tracing::debug!(%error, reason, "client");
        // That all brokers are away is said last, after why.
        if error.rdkafka_error_code() != Some(RDKafkaErrorCode::AllBrokersDown) {
            *self.trouble.lock().unwrap_or_else(PoisonError::into_inner) = Some(reason.to_owned());
        }
    }
}

impl ConsumerContext for Quiet {}

/// The client's own messages: what it does about them is shown by what follows, so they are details.
pub(super) fn log(level: RDKafkaLogLevel, fac: &str, message: &str) {
    match level {
        RDKafkaLogLevel::Emerg | RDKafkaLogLevel::Alert | RDKafkaLogLevel::Critical => {
            tracing::warn!(target: "librdkafka", fac, message);
        }
        RDKafkaLogLevel::Error | RDKafkaLogLevel::Warning => {
            tracing::info!(target: "librdkafka", fac, message);
        }
        _ => tracing::debug!(target: "librdkafka", fac, message),
    }
}

impl std::fmt::Debug for Group {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Group").field("cluster", &self.cluster).finish_non_exhaustive()
    }
}

/// The list of a client from offsets by input.
pub(super) fn offsets_list(
    offsets: &BTreeMap<u32, u64>,
    names: &InputNames,
) -> KafkaResult<TopicPartitionList> {
    let mut list = TopicPartitionList::new();
    for (&input, &offset) in offsets {
        let partition = Partition::parse(&names.get(input)).expect("inputs of a topic are partitions");
        list.add_partition_offset(&partition.topic, partition.number, Offset::Offset(offset as i64))?;
    }
    Ok(list)
}

/// Kept by source and output alike.
pub type SharedGroup = Arc<Group>;
