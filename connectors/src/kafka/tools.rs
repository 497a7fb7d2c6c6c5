//! A look at topics from the command line, and what tests and the demo need: make a topic, fill it, read it.

use std::collections::BTreeMap;
use std::time::Duration;

use rdkafka::admin::{AdminClient, AdminOptions, NewTopic, TopicReplication};
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::error::KafkaError as Client;
use rdkafka::message::{Header, Message, OwnedHeaders};
use rdkafka::producer::{BaseProducer, BaseRecord, Producer};
use rdkafka::types::RDKafkaErrorCode;
use rdkafka::{Offset, TopicPartitionList};

use super::KafkaError;
use super::broker::{Deliveries, flush};
use super::config::{Cluster, reason};
use super::group::Quiet;
use super::record::Headers;
use super::topics::block_on;

const TIMEOUT: Duration = Duration::from_secs(30);

/// A record as a client writes or reads it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Record {
    /// `None` to write: the partitioner decides.
    pub partition: Option<i32>,
    pub offset: i64,
    pub key: Option<Vec<u8>>,
    pub value: Option<Vec<u8>>,
    pub headers: Headers,
    pub timestamp: Option<i64>,
}

impl Record {
    pub fn new(key: &str, value: impl Into<Vec<u8>>) -> Self {
        Self { key: Some(key.as_bytes().to_vec()), value: Some(value.into()), ..Self::default() }
    }
}

/// Makes a topic with one replica or the broker's default; false if it is there already.
pub fn create_topic(
    cluster: &Cluster,
    topic: &str,
    num_partitions: i32,
    configuration: &[(&str, &str)],
) -> Result<bool, KafkaError> {
    let fail = |error: &Client| cluster.error("make a topic", error);
    let admin: AdminClient<Quiet> =
        cluster.client(&[]).create_with_context(Quiet::default()).map_err(|error| fail(&error))?;
    let mut new = NewTopic::new(topic, num_partitions, TopicReplication::Fixed(-1));
    for (name, value) in configuration {
        new = new.set(name, value);
    }
    let options = AdminOptions::new().operation_timeout(Some(TIMEOUT)).request_timeout(Some(TIMEOUT));
    let results = block_on(admin.create_topics([&new], &options)).map_err(|error| fail(&error))?;
    match results.into_iter().next() {
        Some(Err((_, RDKafkaErrorCode::TopicAlreadyExists))) => Ok(false),
        Some(Err((_, code))) => Err(fail(&Client::AdminOp(code))),
        Some(Ok(_)) | None => Ok(true),
    }
}

/// Removes topics with all that is in them.
pub fn delete_topics(cluster: &Cluster, topics: &[&str]) -> Result<(), KafkaError> {
    let fail = |error: &Client| cluster.error("remove topics", error);
    let admin: AdminClient<Quiet> =
        cluster.client(&[]).create_with_context(Quiet::default()).map_err(|error| fail(&error))?;
    let options = AdminOptions::new().operation_timeout(Some(TIMEOUT)).request_timeout(Some(TIMEOUT));
    for result in block_on(admin.delete_topics(topics, &options)).map_err(|error| fail(&error))? {
        result.map_err(|(_, code)| fail(&Client::AdminOp(code)))?;
    }
    Ok(())
}

/// Writes records in their order and waits until the broker has them all.
pub fn produce(
    cluster: &Cluster,
    topic: &str,
    records: impl IntoIterator<Item = Record>,
) -> Result<u64, KafkaError> {
    let fail = |error: &Client| cluster.error("write", error);
    let ours = [("linger.ms", "5"), ("enable.idempotence", "true"), ("partitioner", "murmur2_random")];
    let producer: BaseProducer<Deliveries> =
        cluster.client(&ours).create_with_context(Deliveries::default()).map_err(|error| fail(&error))?;
    let mut num_records = 0;
    for record in records {
        let mut out = BaseRecord::<[u8], [u8], usize>::with_opaque_to(topic, 0);
        out.partition = record.partition;
        out.key = record.key.as_deref();
        out.payload = record.value.as_deref();
        out.timestamp = record.timestamp;
        if !record.headers.is_empty() {
            out.headers = Some(record.headers.iter().fold(OwnedHeaders::new(), |headers, (key, value)| {
                headers.insert(Header { key, value: value.as_deref() })
            }));
        }
        loop {
            match producer.send(out) {
                Ok(()) => break,
                Err((Client::MessageProduction(RDKafkaErrorCode::QueueFull), back)) => {
                    out = back;
                    producer.poll(Duration::from_millis(10));
                }
                Err((error, _)) => return Err(fail(&error)),
            }
        }
        num_records += 1;
        producer.poll(Duration::ZERO);
    }
    flush(&producer).map_err(|error| fail(&error))?;
    match producer.context().failure() {
        Some(reason) => Err(KafkaError::Broker { action: "write", brokers: cluster.brokers.clone(), reason }),
        None => Ok(num_records),
    }
}

/// By partition: where committed records end now.
pub fn end_offsets(cluster: &Cluster, topic: &str) -> Result<BTreeMap<i32, i64>, KafkaError> {
    let client = reader(cluster, "read_committed")?;
    end_offsets_of(cluster, &client, topic)
}

/// Whether a transaction that has written to the topic is neither committed nor aborted.
pub fn has_open_transaction(cluster: &Cluster, topic: &str) -> Result<bool, KafkaError> {
    let client = reader(cluster, "read_uncommitted")?;
    Ok(end_offsets_of(cluster, &client, topic)? != end_offsets(cluster, topic)?)
}

fn reader(cluster: &Cluster, isolation: &str) -> Result<BaseConsumer<Quiet>, KafkaError> {
    let mut config = cluster.client(&[]);
    config
        .set("group.id", "tidemill-reader")
        .set("enable.auto.commit", "false")
        .set("isolation.level", isolation)
        .set("enable.partition.eof", "true")
        .set("auto.offset.reset", "earliest");
    config.create_with_context(Quiet::default()).map_err(|error| cluster.error("read", &error))
}

fn end_offsets_of(
    cluster: &Cluster,
    client: &BaseConsumer<Quiet>,
    topic: &str,
) -> Result<BTreeMap<i32, i64>, KafkaError> {
    let fail = |error: Client| cluster.error("read", &error);
    let metadata = client.fetch_metadata(Some(topic), TIMEOUT).map_err(fail)?;
    let found = metadata.topics().iter().find(|found| found.name() == topic && found.error().is_none());
    let found = found
        .ok_or_else(|| KafkaError::NoTopic { topic: topic.to_owned(), brokers: cluster.brokers.clone() })?;
    let mut ends = BTreeMap::new();
    for partition in found.partitions() {
        let (_, end) = client.fetch_watermarks(topic, partition.id(), TIMEOUT).map_err(fail)?;
        ends.insert(partition.id(), end);
    }
    Ok(ends)
}

/// Hands every committed record that is there now to `take`, in order within a partition; stops when it says false.
pub fn read(cluster: &Cluster, topic: &str, mut take: impl FnMut(Record) -> bool) -> Result<(), KafkaError> {
    let fail = |error: Client| cluster.error("read", &error);
    let client = reader(cluster, "read_committed")?;
    let mut open = end_offsets_of(cluster, &client, topic)?;
    open.retain(|_, end| *end > 0);
    let mut list = TopicPartitionList::new();
    for &partition in open.keys() {
        list.add_partition_offset(topic, partition, Offset::Beginning).map_err(fail)?;
    }
    client.assign(&list).map_err(fail)?;
    while !open.is_empty() {
        match client.poll(TIMEOUT) {
            None => {
                let timed_out = Client::MessageConsumption(RDKafkaErrorCode::OperationTimedOut);
                return Err(fail(timed_out));
            }
            Some(Err(Client::PartitionEOF(partition))) => {
                open.remove(&partition);
            }
            Some(Err(error)) => tracing::info!(reason = reason(&error), "reader"),
            Some(Ok(message)) => {
                // What comes after the end that was seen is for the next look.
                if open.get(&message.partition()).is_some_and(|&end| message.offset() < end)
                    && !take(record(&message))
                {
                    return Ok(());
                }
            }
        }
    }
    Ok(())
}

/// Reads every record that is there and writes it to another topic: what a program without Tidemill would do.
pub fn copy(cluster: &Cluster, from: &str, to: &str, mut begun: impl FnMut()) -> Result<u64, KafkaError> {
    let fail = |error: Client| cluster.error("copy", &error);
    let client = reader(cluster, "read_committed")?;
    let mut open = end_offsets_of(cluster, &client, from)?;
    open.retain(|_, end| *end > 0);
    let mut list = TopicPartitionList::new();
    for &partition in open.keys() {
        list.add_partition_offset(from, partition, Offset::Beginning).map_err(fail)?;
    }
    let ours = [("linger.ms", "5"), ("enable.idempotence", "true"), ("partitioner", "murmur2_random")];
    let producer: BaseProducer<Deliveries> =
        cluster.client(&ours).create_with_context(Deliveries::default()).map_err(fail)?;
    client.assign(&list).map_err(fail)?;
    let mut num_records = 0;
    while !open.is_empty() {
        let message = match client.poll(TIMEOUT) {
            None => return Err(fail(Client::MessageConsumption(RDKafkaErrorCode::OperationTimedOut))),
            Some(Err(Client::PartitionEOF(partition))) => {
                open.remove(&partition);
                continue;
            }
            Some(message) => message.map_err(fail)?,
        };
        begun();
        let mut out = BaseRecord::<[u8], [u8], usize>::with_opaque_to(to, 0);
        (out.key, out.payload) = (message.key(), message.payload());
        while let Err((error, back)) = producer.send(out) {
            if !matches!(error, Client::MessageProduction(RDKafkaErrorCode::QueueFull)) {
                return Err(fail(error));
            }
            out = back;
            producer.poll(Duration::from_millis(10));
        }
        num_records += 1;
        producer.poll(Duration::ZERO);
    }
    flush(&producer).map_err(fail)?;
    match producer.context().failure() {
        Some(reason) => Err(KafkaError::Broker { action: "copy", brokers: cluster.brokers.clone(), reason }),
        None => Ok(num_records),
    }
}

/// All committed records of a topic, by partition and offset.
pub fn read_all(cluster: &Cluster, topic: &str) -> Result<Vec<Record>, KafkaError> {
    let mut records = Vec::new();
    read(cluster, topic, |record| {
        records.push(record);
        true
    })?;
    records.sort_by_key(|record| (record.partition, record.offset));
    Ok(records)
}

fn record(message: &impl Message) -> Record {
    let headers = super::rows::headers(message).unwrap_or_default();
    Record {
        partition: Some(message.partition()),
        offset: message.offset(),
        key: message.key().map(<[u8]>::to_vec),
        value: message.payload().map(<[u8]>::to_vec),
        headers: headers
            .into_iter()
            .map(|(name, value)| (name.to_owned(), value.map(<[u8]>::to_vec)))
            .collect(),
        timestamp: message.timestamp().to_millis(),
    }
}

/// By partition: the committed offsets of a group.
pub fn committed_offsets(
    cluster: &Cluster,
    group: &str,
    topic: &str,
) -> Result<BTreeMap<i32, i64>, KafkaError> {
    let fail = |error: Client| cluster.error("read offsets", &error);
    let mut config = cluster.client(&[]);
    config.set("group.id", group).set("isolation.level", "read_committed");
    let client: BaseConsumer<Quiet> = config.create_with_context(Quiet::default()).map_err(fail)?;
    let mut list = TopicPartitionList::new();
    for partition in end_offsets_of(cluster, &client, topic)?.into_keys() {
        list.add_partition(topic, partition);
    }
    let found = client.committed_offsets(list, TIMEOUT).map_err(fail)?;
    let offsets = found.elements().into_iter().filter_map(|one| match one.offset() {
        Offset::Offset(offset) => Some((one.partition(), offset)),
        _ => None,
    });
    Ok(offsets.collect())
}
