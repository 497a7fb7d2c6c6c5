//! `tidemill topics`: make a topic, fill it from a file, look into it.

use std::collections::BTreeMap;
use std::io::{BufRead, Write};
use std::path::PathBuf;

use clap::{Args, Subcommand};
use serde_json::{Map, Value, json};
use tidemill_connectors::kafka::KafkaError;
use tidemill_connectors::kafka::config::Cluster;
use tidemill_connectors::kafka::tools::{self, Record};

/// A line of a file that becomes a record.
const MAX_LINE_BYTES: u64 = 16 << 20;

#[derive(Debug, Subcommand)]
#[command(after_help = "Examples:
  tidemill topics create articles summaries --partitions 4
  tidemill topics write articles --from articles.jsonl --key id
  tidemill topics read summaries --limit 5")]
pub enum Topics {
    /// Make topics that are not there yet
    Create {
        #[arg(required = true)]
        topics: Vec<String>,
        #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(i32).range(1..))]
        partitions: i32,
        #[command(flatten)]
        cluster: ClusterArgs,
    },
    /// Write the lines of a file as records
    Write {
        topic: String,
        /// A file of JSON lines or text
        #[arg(long, value_name = "FILE")]
        from: PathBuf,
        /// The field that becomes the key
        #[arg(long)]
        key: Option<String>,
        #[command(flatten)]
        cluster: ClusterArgs,
    },
    /// Print the committed records that are there, one a line
    Read {
        topic: String,
        /// Print so many at most
        #[arg(long)]
        limit: Option<u64>,
        /// Values alone
        #[arg(long)]
        values: bool,
        #[command(flatten)]
        cluster: ClusterArgs,
    },
}

#[derive(Debug, Args)]
pub struct ClusterArgs {
    /// HOST:PORT, several divided by commas
    #[arg(long, env = "KAFKA_BROKERS", default_value = "127.0.0.1:9092")]
    brokers: String,
    /// Options of librdkafka, such as security.protocol=ssl
    #[arg(long = "option", value_name = "NAME=VALUE", value_parser = option)]
    options: Vec<(String, String)>,
}

impl ClusterArgs {
    fn cluster(&self) -> Cluster {
        let options: BTreeMap<String, String> = self.options.iter().cloned().collect();
        Cluster { brokers: self.brokers.clone(), options }
    }
}

fn option(text: &str) -> Result<(String, String), String> {
    let (name, value) = text.split_once('=').ok_or("write it as NAME=VALUE")?;
    Ok((name.to_owned(), value.to_owned()))
}

#[derive(Debug, thiserror::Error)]
pub enum TopicsError {
    #[error(transparent)]
    Kafka(#[from] KafkaError),
    #[error("cannot read {path}")]
    Read {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("cannot print")]
    Print(#[source] std::io::Error),
}

/// Carries out a command.
pub fn topics(command: &Topics) -> Result<(), TopicsError> {
    match command {
        Topics::Create { topics, partitions, cluster } => {
            for topic in topics {
                let made = tools::create_topic(&cluster.cluster(), topic, *partitions, &[])?;
                eprintln!("{topic} {}", if made { "is made" } else { "is there already" });
            }
            Ok(())
        }
        Topics::Write { topic, from, key, cluster } => {
            let fail = |source| TopicsError::Read { path: from.clone(), source };
            let file = std::io::BufReader::new(std::fs::File::open(from).map_err(fail)?);
            let mut failed = None;
            let records = lines(file, &mut failed).map(|line| record(line, key.as_deref()));
            let num_records = tools::produce(&cluster.cluster(), topic, records)?;
            if let Some(error) = failed {
                return Err(fail(error));
            }
            eprintln!("{} records are in {topic}", crate::summary::thousands(num_records));
            Ok(())
        }
        Topics::Read { topic, limit, values, cluster } => print(topic, *limit, *values, &cluster.cluster()),
    }
}

/// The lines of a file that are not blank, until one cannot be read.
fn lines<'a>(
    mut file: impl BufRead + 'a,
    failed: &'a mut Option<std::io::Error>,
) -> impl Iterator<Item = Vec<u8>> + 'a {
    std::iter::from_fn(move || {
        loop {
            let mut line = Vec::new();
            match std::io::Read::take(&mut file, MAX_LINE_BYTES).read_until(b'\n', &mut line) {
                Ok(0) => return None,
                Ok(_) if line.trim_ascii().is_empty() => {}
                Ok(_) => return Some(line.trim_ascii_end().to_vec()),
                Err(error) => {
                    *failed = Some(error);
                    return None;
                }
            }
        }
    })
}

fn record(line: Vec<u8>, key: Option<&str>) -> Record {
    let key = key.and_then(|key| {
        let object: Map<String, Value> = serde_json::from_slice(&line).ok()?;
        match object.get(key)? {
            Value::String(text) => Some(text.clone().into_bytes()),
            value => Some(value.to_string().into_bytes()),
        }
    });
    Record { key, value: Some(line), ..Record::default() }
}

fn print(topic: &str, limit: Option<u64>, values: bool, cluster: &Cluster) -> Result<(), TopicsError> {
    let mut out = std::io::BufWriter::new(std::io::stdout().lock());
    let mut failed = None;
    let mut num_left = limit.unwrap_or(u64::MAX);
    tools::read(cluster, topic, |record| {
        if num_left == 0 {
            return false;
        }
        num_left -= 1;
        let text =
            |bytes: &Option<Vec<u8>>| bytes.as_ref().map(|bytes| String::from_utf8_lossy(bytes).into_owned());
        let line = if values {
            text(&record.value).unwrap_or_default()
        } else {
            let headers: Map<String, Value> =
                record.headers.iter().map(|(name, value)| (name.clone(), json!(text(value)))).collect();
            json!({
                "partition": record.partition, "offset": record.offset, "timestamp": record.timestamp,
                "key": text(&record.key), "headers": headers, "value": text(&record.value),
            })
            .to_string()
        };
        failed = writeln!(out, "{line}").err();
        failed.is_none()
    })?;
    match failed.or(out.flush().err()) {
        Some(error) if error.kind() != std::io::ErrorKind::BrokenPipe => Err(TopicsError::Print(error)),
        _ => Ok(()),
    }
}
