//! The checked form of topics in a definition. Nothing connects here; options and templates are checked.

use std::collections::BTreeMap;

use arrow::datatypes::Schema;
use tidemill_connectors::kafka::KafkaError;
use tidemill_connectors::kafka::broker::ProducerSpec;
use tidemill_connectors::kafka::config::Cluster;
use tidemill_connectors::kafka::format::{Decoder, Format};
use tidemill_connectors::kafka::group::Start;
use tidemill_connectors::kafka::output::KafkaOutput;
use tidemill_connectors::kafka::pattern;
use tidemill_connectors::kafka::schema::{Encoding, RegistrySpec};
use tidemill_connectors::kafka::source::{KafkaSource, KafkaSourceSpec, Topics};
use tidemill_connectors::kafka::stats::KafkaStats;
use tidemill_connectors::source::BatchLimits;

use super::steps::template;
use super::{GeneratePlan, Result, chain};
use crate::spec::kafka::{
    self, DeliverySpec, FormatName, KafkaTargetSpec, OptionValue, PartitionSpec, StartSpec,
};
use crate::spec::{Definition, SinkSpec, SourceSpec, Spanned, SpecError};

const DEFAULT_COMMIT_MS: u64 = 100;
const DEFAULT_COMMIT_ROWS: u64 = 10_000;

/// How results become records.
#[derive(Clone, Debug)]
pub struct TopicPlan {
    pub producer: ProducerSpec,
    pub commit_rows: u64,
    pub commit_ms: u64,
    /// Sources of templates.
    pub key: Option<String>,
    pub value: Option<String>,
    pub headers: BTreeMap<String, String>,
    pub keeps_partition: bool,
}

/// Makes the client of the source, which checks its options, but does not connect.
pub(super) fn source(
    definition: &Definition,
    spec: &kafka::KafkaSourceSpec,
    limits: BatchLimits,
) -> Result<KafkaSource> {
    let key = "source.kafka";
    let cluster = cluster(&spec.brokers.value, &spec.options);
    let topics = topics(definition, spec)?;
    let start = start(definition, spec.start.as_ref())?;
    let group = spec.group.as_ref().unwrap_or(&definition.spec.name).value.clone();
    let source = KafkaSourceSpec {
        cluster,
        topics,
        group,
        start,
        until_end: false,
        is_member: matches!(definition.spec.sink, SinkSpec::Kafka(_)),
    };
    let decoder = decoder(definition, spec)?;
    KafkaSource::open(source, decoder, limits, KafkaStats::default())
        .map_err(|error| kafka_error(definition, &spec.brokers, key, &error))
}

/// What is read, for people.
pub(super) fn name(spec: &kafka::KafkaSourceSpec) -> String {
    let topics = match (&spec.topics, &spec.pattern) {
        (Some(topics), _) => {
            topics.value.iter().map(|topic| topic.value.as_str()).collect::<Vec<_>>().join(", ")
        }
        (None, pattern) => pattern.as_ref().map(|pattern| pattern.value.clone()).unwrap_or_default(),
    };
    format!("{topics} (kafka at {})", spec.brokers.value)
}

fn topics(definition: &Definition, spec: &kafka::KafkaSourceSpec) -> Result<Topics> {
    let key = "source.kafka.topics";
    match (&spec.topics, &spec.pattern) {
        (Some(topics), None) if !topics.value.is_empty() => {
            for (index, topic) in topics.value.iter().enumerate() {
                check_topic(definition, topic, &format!("{key}[{index}]"))?;
            }
            Ok(Topics::Named(topics.value.iter().map(|topic| topic.value.clone()).collect()))
        }
        (None, Some(pattern)) => {
            if !pattern.value.starts_with('^') {
                let message = "a pattern of topics begins with ^";
                let help = Some(format!("write ^{}", pattern.value));
                return Err(definition.error(pattern, "source.kafka.pattern", message, help));
            }
            pattern::check(&pattern.value)
                .map_err(|reason| definition.error(pattern, "source.kafka.pattern", reason, None))?;
            Ok(Topics::Pattern(pattern.value.clone()))
        }
        (Some(_), Some(pattern)) => {
            let help = Some("keep one of topics and pattern".to_owned());
            Err(definition.error(pattern, "source.kafka.pattern", "there are topics and a pattern", help))
        }
        (Some(topics), None) => Err(definition.error(topics, key, "no topics are named", None)),
        (None, None) => {
            let help = Some("add `topics: [articles]`, or `pattern: ^news-`".to_owned());
            Err(definition.error(&spec.brokers, key, "no topics are named", help))
        }
    }
}

/// The rule of Kafka itself.
fn check_topic(definition: &Definition, topic: &Spanned<String>, key: &str) -> Result<()> {
    let name = &topic.value;
    let is_legal = !name.is_empty()
        && name.len() <= 249
        && name != "."
        && name != ".."
        && name.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-'));
    if is_legal {
        return Ok(());
    }
    let help = Some("letters, digits, dots, _ and -, at most 249".to_owned());
    Err(definition.error(topic, key, format!("{name:?} cannot name a topic"), help))
}

fn start(definition: &Definition, spec: Option<&Spanned<StartSpec>>) -> Result<Start> {
    let Some(spec) = spec else { return Ok(Start::Earliest) };
    Ok(match &spec.value {
        StartSpec::Earliest => Start::Earliest,
        StartSpec::Latest => Start::Latest,
        StartSpec::Committed => Start::Committed,
        StartSpec::Timestamp(text) => {
            let millis = text.trim().parse::<i64>().ok().filter(|&millis| millis >= 0);
            let parsed = millis.or_else(|| {
                let nanos = arrow::compute::kernels::cast_utils::string_to_timestamp_nanos(text).ok()?;
                (nanos >= 0).then_some(nanos / 1_000_000)
            });
            Start::Timestamp(parsed.ok_or_else(|| {
                let help = Some("such as 2026-11-23T08:00:00Z, or milliseconds since 1970".to_owned());
                definition.error(spec, "source.kafka.start", format!("{text:?} is no time"), help)
            })?)
        }
    })
}

fn decoder(definition: &Definition, spec: &kafka::KafkaSourceSpec) -> Result<Decoder> {
    let (format, encoding) = match &spec.format {
        Some(format) if format.value == FormatName::Avro => (format, Encoding::Avro),
        Some(format) if format.value == FormatName::Protobuf => (format, Encoding::Protobuf),
        format => {
            if let Some(registry) = &spec.registry {
                let help = "leave it out: only avro and protobuf have their schemas there".to_owned();
                let message = "the format needs no schema registry";
                return Err(definition.error(&registry.url, "source.kafka.registry", message, Some(help)));
            }
            let is_text = format.as_ref().is_some_and(|format| format.value == FormatName::Text);
            return Ok(Decoder::new(&if is_text { Format::Text } else { Format::Json }));
        }
    };
    let Some(registry) = &spec.registry else {
        let help = "add registry: { url: 'http://127.0.0.1:8081' }".to_owned();
        let message = "the format needs a schema registry";
        return Err(definition.error(format, "source.kafka.format", message, Some(help)));
    };
    let url = &registry.url;
    if !["http://", "https://"].iter().any(|scheme| url.value.starts_with(scheme)) {
        let help = "such as http://127.0.0.1:8081".to_owned();
        let message = format!("{:?} is no address of a schema registry", url.value);
        return Err(definition.error(url, "source.kafka.registry.url", message, Some(help)));
    }
    let registry = RegistrySpec {
        url: url.value.clone(),
        username: registry.username.clone(),
        password: registry.password.clone(),
    };
    Ok(Decoder::new(&Format::Registered(registry, encoding)))
}

/// The sink's topics; `errors` is where refused records go.
pub(super) fn target(
    definition: &Definition,
    spec: &KafkaTargetSpec,
    schema: &Schema,
    steps: &[GeneratePlan],
) -> Result<TopicPlan> {
    let key = "sink.kafka";
    for (part, source) in [("key", &spec.key), ("value", &spec.value)] {
        if let Some(source) = source {
            template(definition, source, &format!("{key}.{part}"), schema, steps)?;
        }
    }
    for (name, source) in &spec.headers {
        template(definition, source, &format!("{key}.headers.{name}"), schema, steps)?;
    }
    check_topic(definition, &spec.topic, &format!("{key}.topic"))?;
    let errors = definition.spec.errors.as_ref();
    if let Some(files) = errors.and_then(|errors| errors.parquet.as_ref().or(errors.jsonl.as_ref())) {
        let help =
            Some("errors: { kafka: { topic: … } } is in the same transaction as the results".to_owned());
        return Err(definition.error(
            &files.path,
            "errors",
            "results go to a topic and errors to a file",
            help,
        ));
    }
    let errors_topic = match errors.and_then(|errors| errors.kafka.as_ref()) {
        Some(errors) => {
            check_topic(definition, &errors.topic, "errors.kafka.topic")?;
            if errors.topic.value == spec.topic.value {
                let message = "errors and results have the same topic";
                return Err(definition.error(&errors.topic, "errors.kafka.topic", message, None));
            }
            errors.topic.value.clone()
        }
        None => format!("{}-errors", spec.topic.value),
    };
    if let SourceSpec::Kafka(source) = &definition.spec.source {
        for topic in source.topics.iter().flat_map(|topics| &topics.value) {
            if topic.value == spec.topic.value || topic.value == errors_topic {
                let message = format!("output goes to the topic {:?} that is read", topic.value);
                return Err(definition.error(&spec.topic, &format!("{key}.topic"), message, None));
            }
        }
        if let Some(pattern) = &source.pattern {
            let names = [&spec.topic.value, &errors_topic];
            if let Some(topic) = names.into_iter().find(|name| pattern::matches(&pattern.value, name)) {
                let message =
                    format!("output goes to the topic {topic:?}, which the pattern of the source matches");
                let help = Some(
                    "it would read what it writes: name the topic otherwise, or narrow the pattern"
                        .to_owned(),
                );
                return Err(definition.error(pattern, "source.kafka.pattern", message, help));
            }
        }
    } else if spec.partition == PartitionSpec::Input {
        let message = "`partition: input` needs a topic as the source";
        return Err(definition.error(&spec.topic, &format!("{key}.partition"), message, None));
    }
    let producer = ProducerSpec {
        cluster: target_cluster(definition, spec)?,
        topic: spec.topic.value.clone(),
        errors_topic,
        exactly_once: spec.delivery == DeliverySpec::ExactlyOnce,
        transactional_id: spec.transactional_id.as_ref().map(|id| id.value.clone()).unwrap_or_default(),
    };
    KafkaOutput::check(&producer).map_err(|error| kafka_error(definition, &spec.topic, key, &error))?;
    let commit_ms =
        super::at_least(definition, spec.commit_ms.as_ref(), 1, &format!("{key}.commit_ms"), |ms| *ms)?;
    let commit_rows =
        super::at_least(definition, spec.commit_rows.as_ref(), 1, &format!("{key}.commit_rows"), |rows| {
            *rows
        })?;
    Ok(TopicPlan {
        producer,
        commit_rows: commit_rows.unwrap_or(DEFAULT_COMMIT_ROWS),
        commit_ms: commit_ms.unwrap_or(DEFAULT_COMMIT_MS),
        key: spec.key.as_ref().map(|key| key.value.clone()),
        value: spec.value.as_ref().map(|value| value.value.clone()),
        headers: spec.headers.iter().map(|(name, value)| (name.clone(), value.value.clone())).collect(),
        keeps_partition: spec.partition == PartitionSpec::Input,
    })
}

fn target_cluster(definition: &Definition, spec: &KafkaTargetSpec) -> Result<Cluster> {
    let source = match &definition.spec.source {
        SourceSpec::Kafka(source) => Some(source),
        SourceSpec::Parquet(_) | SourceSpec::Jsonl(_) => None,
    };
    let mut cluster = match (&spec.brokers, source) {
        (Some(brokers), _) => cluster(&brokers.value, &BTreeMap::new()),
        (None, Some(source)) => {
            // What is only for consumers is no matter for a producer.
            let shared = |option: &str| {
                ["security.", "sasl.", "ssl.", "client.", "socket.", "broker.", "enable.ssl"]
                    .iter()
                    .any(|prefix| option.starts_with(prefix))
            };
            let options = source.options.iter().filter(|(option, _)| shared(option));
            cluster(
                &source.brokers.value,
                &options.map(|(option, value)| (option.clone(), value.clone())).collect(),
            )
        }
        (None, None) => {
            let help = Some("add `brokers: 127.0.0.1:9092`".to_owned());
            return Err(definition.error(&spec.topic, "sink.kafka.brokers", "no brokers are named", help));
        }
    };
    let mut set = |option: &str, value: Option<u64>| {
        if let Some(value) = value {
            cluster.options.insert(option.to_owned(), value.to_string());
        }
    };
    set("linger.ms", spec.linger_ms);
    set("batch.size", spec.batch_bytes);
    set("transaction.timeout.ms", spec.transaction_timeout_ms.as_ref().map(|ms| ms.value));
    for (option, OptionValue(value)) in &spec.options {
        cluster.options.insert(option.clone(), value.clone());
    }
    Ok(cluster)
}

fn cluster(brokers: &str, options: &BTreeMap<String, OptionValue>) -> Cluster {
    let options =
        options.iter().map(|(option, OptionValue(value))| (option.clone(), value.clone())).collect();
    Cluster { brokers: brokers.to_owned(), options }
}

fn kafka_error<T>(
    definition: &Definition,
    value: &Spanned<T>,
    key: &str,
    error: &KafkaError,
) -> Box<SpecError> {
    let key = match error {
        KafkaError::ReservedOption { .. } | KafkaError::Options { .. } => format!("{key}.options"),
        _ => key.to_owned(),
    };
    definition.error(value, &key, chain(error), error.help())
}
