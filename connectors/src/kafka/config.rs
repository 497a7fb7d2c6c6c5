//! What a definition says about a cluster, as the client's configuration.
//!
//! Every option of librdkafka passes through, for TLS, SASL and tuning, except the few that the delivery guarantees
//! stand on.

use std::collections::BTreeMap;

use rdkafka::ClientConfig;

use super::KafkaError;

/// Options that are not the user's to set, and what to write instead.
const RESERVED: [(&str, &str); 10] = [
    ("bootstrap.servers", "write it as `brokers`"),
    ("metadata.broker.list", "write it as `brokers`"),
    ("group.id", "write it as `group`"),
    ("enable.auto.commit", "offsets are committed with the results; leave it out"),
    ("enable.auto.offset.store", "offsets are committed with the results; leave it out"),
    ("auto.offset.reset", "write it as `start`"),
    ("enable.partition.eof", "it is always on; leave it out"),
    ("transactional.id", "write it as `transactional_id`"),
    ("enable.idempotence", "it is always on; leave it out"),
    ("isolation.level", "only committed records are read; leave it out"),
];

/// A cluster and how to talk to it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Cluster {
    /// `host:port`, several divided by commas.
    pub brokers: String,
    /// Options of librdkafka, for every client of this cluster.
    pub options: BTreeMap<String, String>,
}

impl Cluster {
    /// Checks that no option is reserved.
    pub fn check(&self) -> Result<(), KafkaError> {
        for (option, instead) in RESERVED {
            if self.options.contains_key(option) {
                return Err(KafkaError::ReservedOption { option: option.to_owned(), instead });
            }
        }
        Ok(())
    }

    /// A client's configuration: `ours` may be overridden by the user, reserved options are not among his.
    pub(super) fn client(&self, ours: &[(&str, &str)]) -> ClientConfig {
        let mut config = ClientConfig::new();
        config.set("bootstrap.servers", &self.brokers).set("client.id", "tidemill");
        for (option, value) in ours {
            config.set(*option, *value);
        }
        for (option, value) in &self.options {
            config.set(option, value);
        }
        config
    }

    pub(super) fn error(&self, action: &'static str, error: &rdkafka::error::KafkaError) -> KafkaError {
        use rdkafka::error::KafkaError as Client;
        match error {
            Client::ClientConfig(_, reason, option, value) => {
                KafkaError::Options { reason: format!("{reason} ({option}={value})") }
            }
            Client::ClientCreation(reason) => KafkaError::Options { reason: reason.clone() },
            error => KafkaError::Broker { action, brokers: self.brokers.clone(), reason: reason(error) },
        }
    }
}

/// A client's error in words.
pub(super) fn reason(error: &rdkafka::error::KafkaError) -> String {
    match error {
        rdkafka::error::KafkaError::Transaction(error) => error.string(),
        error => error.rdkafka_error_code().map_or_else(|| error.to_string(), |code| code.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_guarantees_stand_on_cannot_be_set() {
        let cluster = |option: &str| Cluster {
            brokers: "localhost:9092".to_owned(),
            options: BTreeMap::from([(option.to_owned(), "x".to_owned())]),
        };
        assert!(cluster("sasl.username").check().is_ok());
        for (option, _) in RESERVED {
            assert!(cluster(option).check().is_err(), "{option}");
        }
    }
}
