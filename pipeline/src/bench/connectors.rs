//! How fast records go from topic to topic, beside a plain consume-produce loop over the same client, and kcat.
//!
//! The loop is run twice: with the client's defaults, with which it stops for a second when it has read ahead far
//! enough, and without that pause, which is what the machine can do.
//!
//! The model answers at once with one token, and the prompt is the record's number, so what is measured is reading,
//! the dataflow, the journal, writing and committing. The time goes from the first record read to the last one
//! committed, so that joining the group counts for nobody. All of them run on the same broker, one after the other, for
//! some seconds each: a run of one second is over before the loop's client has read ahead as far as it may, and before a
//! pipeline's batches have grown. What was measured is removed, so that the broker's disk is as idle for the last as
//! for the first.

use std::cell::RefCell;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use clap::Args;
use serde::Serialize;
use tidemill_connectors::kafka::config::Cluster;
use tidemill_connectors::kafka::group::FETCH_QUEUE_BACKOFF;
use tidemill_connectors::kafka::stats::KafkaStats;
use tidemill_connectors::kafka::tools::{self, Record};

use super::{BenchError, io_error, median, table};
use crate::clock::Clock;
use crate::plan::{Input, check};
use crate::run::{Outcome, RunOptions, run};
use crate::spec::Definition;
use crate::summary::thousands;

const NUM_PARTITIONS: i32 = 4;
/// Records of a size until they take about this much.
const MAX_BYTES: usize = 256 << 20;

#[derive(Debug, Args)]
#[command(
    after_help = "Example:\n  sh scripts/kafka.sh start\n  KAFKA_BROKERS=… tidemill bench connectors --json connectors.json"
)]
pub struct ConnectorsArgs {
    /// A broker on which topics may be made
    #[arg(long, env = "KAFKA_BROKERS", default_value = "127.0.0.1:9092")]
    brokers: String,
    /// Records of each size, fewer of large ones
    #[arg(long, default_value_t = 400_000, value_parser = clap::value_parser!(u32).range(1000..))]
    records: u32,
    /// Sizes of a record's value, in bytes
    #[arg(long, value_delimiter = ',', default_values_t = [100, 1024, 10_240])]
    sizes: Vec<usize>,
    /// Measure so many times and take the median
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u16).range(1..=100))]
    pub(super) repeat: u16,
    /// Write the figures to a file, as JSON
    #[arg(long, value_name = "FILE")]
    pub(super) json: Option<PathBuf>,
}

/// Records a second, each the median of some repeats.
#[derive(Clone, Debug, Serialize)]
pub(super) struct ConnectorsReport {
    rows: Vec<SizeReport>,
}

#[derive(Clone, Debug, Serialize)]
struct SizeReport {
    record_bytes: usize,
    records: u32,
    /// The plain loop over rdkafka with the client's defaults.
    plain: f64,
    /// The same loop without the client's pauses.
    tuned: f64,
    /// `None` where kcat is not installed.
    kcat: Option<f64>,
    at_least_once: f64,
    exactly_once: f64,
}

pub(super) fn measure(args: &ConnectorsArgs) -> Result<ConnectorsReport, BenchError> {
    let cluster = Cluster { brokers: args.brokers.clone(), ..Cluster::default() };
    let (option, value) = FETCH_QUEUE_BACKOFF;
    let tuned = Cluster { options: [(option.to_owned(), value.to_owned())].into(), ..cluster.clone() };
    let clock = Clock::start();
    // Topics of an earlier run must not be in the way.
    let run_id = std::process::id();
    let mut rows = Vec::new();
    for &size in &args.sizes {
        let size = size.max(40);
        let num_records = args.records.min((MAX_BYTES / size) as u32);
        let input = format!("tidemill-bench-{run_id}-{size}");
        tools::create_topic(&cluster, &input, NUM_PARTITIONS, &[])?;
        tools::produce(&cluster, &input, (0..num_records).map(|number| record(number, size)))?;
        let mut samples: [Vec<f64>; 5] = Default::default();
        for round in 0..args.repeat {
            let made = RefCell::new(Vec::new());
            let topic = |name: &str| -> Result<String, BenchError> {
                let topic = format!("{input}-{name}-{round}");
                tools::create_topic(&cluster, &topic, NUM_PARTITIONS, &[])?;
                made.borrow_mut().push(topic.clone());
                Ok(topic)
            };
            let rate = |seconds: f64| f64::from(num_records) / seconds;
            for (place, name, cluster) in [(0, "plain", &cluster), (1, "tuned", &tuned)] {
                let output = topic(name)?;
                samples[place].push(rate(plain(cluster, &input, &output, num_records, clock)?));
            }
            samples[2].extend(kcat(&args.brokers, &input, &topic("kcat")?, clock).map(rate));
            for (place, delivery) in [(3, "at_least_once"), (4, "exactly_once")] {
                let (output, errors) = (topic(delivery)?, topic(&format!("{delivery}-errors"))?);
                let seconds = pipeline(args, &input, &output, &errors, delivery, num_records, clock)?;
                samples[place].push(rate(seconds));
            }
            let made = made.into_inner();
            tools::delete_topics(&cluster, &made.iter().map(String::as_str).collect::<Vec<_>>())?;
        }
        tools::delete_topics(&cluster, &[&input])?;
        let [plain, tuned, kcat, at_least_once, exactly_once] = samples;
        rows.push(SizeReport {
            record_bytes: size,
            records: num_records,
            plain: median(&plain),
            tuned: median(&tuned),
            kcat: (!kcat.is_empty()).then(|| median(&kcat)),
            at_least_once: median(&at_least_once),
            exactly_once: median(&exactly_once),
        });
    }
    Ok(ConnectorsReport { rows })
}

fn record(number: u32, size: usize) -> Record {
    let start = format!("{{\"id\": {number}, \"text\": \"");
    let text = "x".repeat(size.saturating_sub(start.len() + 2));
    Record::new(&number.to_string(), format!("{start}{text}\"}}"))
}

/// Every record read and written again, which is the least that anybody must do; the time from the first one on.
fn plain(
    cluster: &Cluster,
    input: &str,
    output: &str,
    num_records: u32,
    clock: Clock,
) -> Result<f64, BenchError> {
    let mut begun = None;
    let copied = tools::copy(cluster, input, output, || {
        begun.get_or_insert(clock.elapsed());
    })?;
    assert_eq!(copied, u64::from(num_records), "the loop copies all");
    Ok((clock.elapsed() - begun.unwrap_or_default()).as_secs_f64())
}

/// `kcat` reading into a `kcat` that writes, if it is installed.
fn kcat(brokers: &str, input: &str, output: &str, clock: Clock) -> Option<f64> {
    let begun = clock.elapsed();
    let mut reader = Command::new("kcat")
        .args(["-b", brokers, "-t", input, "-C", "-o", "beginning", "-e", "-q"])
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .ok()?;
    let status = Command::new("kcat")
        .args(["-b", brokers, "-t", output, "-P"])
        .stdin(reader.stdout.take()?)
        .stderr(Stdio::null())
        .status()
        .ok()?;
    let is_read = reader.wait().ok()?.success();
    (status.success() && is_read).then(|| (clock.elapsed() - begun).as_secs_f64())
}

fn pipeline(
    args: &ConnectorsArgs,
    input: &str,
    output: &str,
    errors: &str,
    delivery: &str,
    num_records: u32,
    clock: Clock,
) -> Result<f64, BenchError> {
    let folder = std::env::temp_dir().join(format!("{output}.state"));
    let quote = |text: &str| serde_json::to_string(text).expect("a string");
    let text = format!(
        "name: {output}\nmodel: {{ name: fake }}\nstate: {}\n\
         source: {{ kafka: {{ brokers: {}, topics: [{input}] }} }}\n\
         steps:\n  - generate: {{ name: answer, prompt: '{{{{ id }}}}', max_tokens: 1 }}\n\
         sink: {{ kafka: {{ topic: {output}, delivery: {delivery} }} }}\n\
         errors: {{ kafka: {{ topic: {errors} }} }}\nengine: {{ max_num_seqs: 256, max_num_batched_tokens: 8192 }}\n\
         credit: {{ documents: 16384 }}\n",
        quote(&folder.display().to_string()),
        quote(&args.brokers)
    );
    let checked = check(&Definition::parse(Path::new("bench.yaml"), text)?)?;
    let stats = match &checked.source {
        Input::Topics(source) => source.stats(),
        Input::Files(_) => unreachable!("the source is a topic"),
    };
    let is_over = Arc::new(AtomicBool::new(false));
    let watch = std::thread::spawn({
        let is_over = Arc::clone(&is_over);
        move || watch(&stats, u64::from(num_records), clock, &is_over)
    });
    let options = RunOptions {
        num_workers: 1,
        force: false,
        progress: false,
        until_end: true,
        listen: None,
        stop: Arc::new(AtomicBool::new(false)),
    };
    let outcome = run(checked, &options);
    is_over.store(true, Ordering::Release);
    let seconds = watch.join().expect("it only looks");
    // It was made by this run.
    std::fs::remove_dir_all(&folder).map_err(io_error("remove", &folder))?;
    match (outcome?, seconds) {
        (Outcome::Finished(summary), Some(seconds)) if summary.errors == 0 => Ok(seconds),
        (outcome, _) => {
            let errors = outcome.summary().map_or(0, |summary| summary.errors);
            Err(BenchError::Unfinished { errors })
        }
    }
}

/// The time from the first record read to the last one committed.
fn watch(stats: &KafkaStats, num_records: u64, clock: Clock, is_over: &AtomicBool) -> Option<f64> {
    let mut begun = None;
    loop {
        let ends = is_over.load(Ordering::Acquire);
        let now = stats.snapshot();
        if now.records_read > 0 {
            begun.get_or_insert(clock.elapsed());
        }
        if now.records_written >= num_records {
            return Some((clock.elapsed() - begun?).as_secs_f64());
        }
        if ends {
            return None;
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

impl ConnectorsReport {
    pub(super) fn render(&self) -> String {
        let number = |rate: f64| thousands(rate.round() as u64);
        let rows = self.rows.iter().map(|row| {
            let share = |rate: f64| format!("{} ({:.0} %)", number(rate), 100.0 * rate / row.plain);
            vec![
                format!("{} B", thousands(row.record_bytes as u64)),
                thousands(row.records.into()),
                number(row.plain),
                share(row.tuned),
                row.kcat.map_or("–".to_owned(), share),
                share(row.at_least_once),
                share(row.exactly_once),
            ]
        });
        let header =
            ["records/s", "records", "plain loop", "tuned loop", "kcat", "at least once", "exactly once"];
        table(&header, rows)
    }
}
