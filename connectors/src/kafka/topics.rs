//! What the output has to know of its topics: that they are there, and how large a record may be.

use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Poll, Wake, Waker};
use std::thread::Thread;
use std::time::Duration;

use rdkafka::admin::{AdminClient, AdminOptions, ResourceSpecifier};
use rdkafka::consumer::{BaseConsumer, Consumer};

use super::KafkaError;
use super::config::Cluster;
use super::group::Quiet;

/// What a broker that does not tell is taken to have: Kafka's default.
const DEFAULT_MAX_BYTES: usize = 1_048_588;
const TIMEOUT: Duration = Duration::from_secs(10);
/// A broker that makes topics by itself needs a moment for it.
const NUM_TRIES: u32 = 5;

/// The most bytes that a record may have in each of the topics, which must exist.
pub(super) fn limits(cluster: &Cluster, topics: [&str; 2]) -> Result<[usize; 2], KafkaError> {
    let config = cluster.client(&[]);
    let client: BaseConsumer<Quiet> =
        config.create_with_context(Quiet::default()).map_err(|error| cluster.error("write", &error))?;
    for topic in topics {
        await_topic(cluster, &client, topic)?;
    }
    let admin: AdminClient<Quiet> =
        config.create_with_context(Quiet::default()).map_err(|error| cluster.error("write", &error))?;
    let resources = topics.map(ResourceSpecifier::Topic);
    let options = AdminOptions::new().request_timeout(Some(TIMEOUT));
    let found = block_on(admin.describe_configs(&resources, &options));
    let mut limits = [DEFAULT_MAX_BYTES; 2];
    // Who may write a topic need not be allowed to ask for its configuration.
    for (limit, found) in limits.iter_mut().zip(found.unwrap_or_default()) {
        let value = found.ok().and_then(|found| found.get("max.message.bytes")?.value.clone());
        *limit = value.and_then(|value| value.parse().ok()).unwrap_or(DEFAULT_MAX_BYTES);
    }
    Ok(limits)
}

fn await_topic(cluster: &Cluster, client: &BaseConsumer<Quiet>, topic: &str) -> Result<(), KafkaError> {
    for _ in 0..NUM_TRIES {
        let metadata = client
            .fetch_metadata(Some(topic), TIMEOUT)
            .map_err(|error| Quiet::explain(client, cluster.error("look up topics", &error)))?;
        let is_there = |found: &rdkafka::metadata::MetadataTopic| {
            found.name() == topic && found.error().is_none() && !found.partitions().is_empty()
        };
        if metadata.topics().iter().any(is_there) {
            return Ok(());
        }
        std::thread::sleep(Duration::from_millis(200));
    }
    Err(KafkaError::NoTopic { topic: topic.to_owned(), brokers: cluster.brokers.clone() })
}

struct Unpark(Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

/// Waits for one future: the admin client has no other calls, and a runtime would be too much for it.
pub(super) fn block_on<F: Future>(future: F) -> F::Output {
    let mut future = pin!(future);
    let waker = Waker::from(Arc::new(Unpark(std::thread::current())));
    let mut context = Context::from_waker(&waker);
    loop {
        match future.as_mut().poll(&mut context) {
            Poll::Ready(value) => return value,
            Poll::Pending => std::thread::park(),
        }
    }
}
