//! Kafka topics as source and sink, through librdkafka.
//!
//! Reading follows the group protocol ([`group`], [`assignment`]): a partition that is taken away takes all work on it
//! along. Writing is one short transaction for some finished batches, records and offsets together ([`commit`]); how
//! that talks to a broker is in [`broker`], so the protocol is also tested without one.

pub mod assignment;
pub mod broker;
pub mod commit;
pub mod config;
pub mod encode;
pub mod format;
pub mod group;
pub mod output;
pub mod pattern;
pub mod record;
pub mod rows;
pub mod schema;
pub mod source;
pub mod stats;
pub mod tools;
mod topics;

/// Why a topic cannot be read or written as a whole.
#[derive(Debug, thiserror::Error)]
pub enum KafkaError {
    #[error("Kafka option {option:?} is set by Tidemill itself")]
    ReservedOption { option: String, instead: &'static str },
    #[error("Kafka does not accept the options: {reason}")]
    Options { reason: String },
    #[error("cannot {action} at Kafka broker {brokers}: {reason}")]
    Broker { action: &'static str, brokers: String, reason: String },
    #[error("no topic {topic:?} at Kafka broker {brokers}")]
    NoTopic { topic: String, brokers: String },
    #[error("topic {topic:?} was written by another definition")]
    OtherDefinition { topic: String },
    #[error("transactional id {id:?} is used by somebody else at the same time: {reason}")]
    Fenced { id: String, reason: String },
    #[error("the topics {topics} cannot be written: {reason}")]
    Refused { topics: String, reason: String },
    #[error("the sink's brokers {brokers} are of another Kafka cluster than the source's")]
    OtherCluster { brokers: String },
    #[error("stopped before all that was finished could be committed: {reason}")]
    Unfinished { reason: String },
    #[error("cannot use state folder {path:?}")]
    State {
        path: std::path::PathBuf,
        #[source]
        source: std::io::Error,
    },
}

impl KafkaError {
    /// What the user can do.
    pub fn help(&self) -> Option<String> {
        Some(match self {
            Self::ReservedOption { instead, .. } => (*instead).to_owned(),
            Self::Options { .. } => {
                "options are those of librdkafka: see its CONFIGURATION.md for names and values".to_owned()
            }
            Self::Broker { .. } => {
                "check that the broker runs, that the address is right, and the security options".to_owned()
            }
            Self::NoTopic { topic, brokers } => format!(
                "create it: kafka-topics.sh --bootstrap-server {brokers} --create --topic {topic} --partitions 4"
            ),
            Self::OtherDefinition { .. } => {
                "give the sink another topic, or start anew with --force".to_owned()
            }
            Self::Fenced { .. } => {
                "give each process a transactional_id of its own, or leave it out".to_owned()
            }
            Self::Refused { .. } => "check that the topics exist, with as many partitions as the input where \
                `partition: input` is set, that this user may write them and use the transactional id, and that \
                transaction_timeout_ms is within the broker's transaction.max.timeout.ms; then run again: nothing is lost"
                .to_owned(),
            Self::OtherCluster { .. } => {
                "a transaction is of one cluster: set `delivery: at_least_once`, or write to the source's cluster".to_owned()
            }
            Self::Unfinished { .. } => "run again: answers are journaled and not computed again".to_owned(),
            Self::State { .. } => "check that it is a folder and may be written".to_owned(),
        })
    }
}
