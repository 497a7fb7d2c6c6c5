//! Topics in a definition, as the user wrote them.

use std::collections::BTreeMap;
use std::fmt;

use serde::Deserialize;
use serde::de::{self, Deserializer, Visitor};

use super::Spanned;

/// Topics to read.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KafkaSourceSpec {
    /// `host:port`, several divided by commas.
    pub brokers: Spanned<String>,
    pub topics: Option<Spanned<Vec<Spanned<String>>>>,
    /// A regular expression instead of names.
    pub pattern: Option<Spanned<String>>,
    /// The consumer group; the pipeline's name if left out.
    pub group: Option<Spanned<String>>,
    /// JSON if left out.
    pub format: Option<Spanned<FormatName>>,
    pub registry: Option<RegistryUrl>,
    pub start: Option<Spanned<StartSpec>>,
    /// Options of librdkafka.
    #[serde(default)]
    pub options: BTreeMap<String, OptionValue>,
}

/// What a record's value holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FormatName {
    Json,
    Text,
    Avro,
    Protobuf,
}

/// Where schemas are registered.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RegistryUrl {
    pub url: Spanned<String>,
    pub username: Option<String>,
    pub password: Option<String>,
}

/// Where to begin in a partition without a committed offset.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StartSpec {
    Earliest,
    Latest,
    Committed,
    /// RFC 3339, or milliseconds since 1970.
    Timestamp(String),
}

/// A topic to write.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KafkaTargetSpec {
    /// Those of the source if left out.
    pub brokers: Option<Spanned<String>>,
    pub topic: Spanned<String>,
    /// A template; the key of the record that was read if left out.
    pub key: Option<Spanned<String>>,
    /// A template; the row with its results as JSON if left out.
    pub value: Option<Spanned<String>>,
    /// Templates of headers, besides those of the record that was read.
    #[serde(default)]
    pub headers: BTreeMap<String, Spanned<String>>,
    #[serde(default)]
    pub partition: PartitionSpec,
    #[serde(default)]
    pub delivery: DeliverySpec,
    /// Results are committed at the latest after this many milliseconds.
    pub commit_ms: Option<Spanned<u64>>,
    /// Results are committed at the latest when this many wait.
    pub commit_rows: Option<Spanned<u64>>,
    /// How long the producer waits for a batch to fill.
    pub linger_ms: Option<u64>,
    pub batch_bytes: Option<u64>,
    pub transaction_timeout_ms: Option<Spanned<u64>>,
    pub transactional_id: Option<Spanned<String>>,
    /// Options of librdkafka; those of the source if left out together with `brokers`.
    #[serde(default)]
    pub options: BTreeMap<String, OptionValue>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DeliverySpec {
    #[default]
    ExactlyOnce,
    AtLeastOnce,
}

/// Which partition a result goes to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PartitionSpec {
    /// By a hash of the key, as Java clients do.
    #[default]
    Key,
    /// The number of the partition that the record was read from.
    Input,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KafkaTopicSpec {
    pub topic: Spanned<String>,
}

/// A value as librdkafka takes it: text, whatever YAML makes of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OptionValue(pub String);

impl<'de> Deserialize<'de> for OptionValue {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct ValueVisitor;
        impl Visitor<'_> for ValueVisitor {
            type Value = OptionValue;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("text, a number, true or false")
            }

            fn visit_str<E: de::Error>(self, value: &str) -> Result<OptionValue, E> {
                Ok(OptionValue(value.to_owned()))
            }

            fn visit_bool<E: de::Error>(self, value: bool) -> Result<OptionValue, E> {
                Ok(OptionValue(value.to_string()))
            }

            fn visit_i64<E: de::Error>(self, value: i64) -> Result<OptionValue, E> {
                Ok(OptionValue(value.to_string()))
            }

            fn visit_u64<E: de::Error>(self, value: u64) -> Result<OptionValue, E> {
                Ok(OptionValue(value.to_string()))
            }

            fn visit_f64<E: de::Error>(self, value: f64) -> Result<OptionValue, E> {
                Ok(OptionValue(value.to_string()))
            }
        }
        deserializer.deserialize_any(ValueVisitor)
    }
}
