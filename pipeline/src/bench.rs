//! `tidemill bench`: how fast this machine runs a model, and how near that is to what the machine can do.
//!
//! Every measurement prints a table and can write JSON, always with the machine's own peak measured in the same
//! run, since speeds of two machines or of two days cannot be compared. Figures are medians of a few repeats.

mod connectors;
mod engine;
mod gpu;
mod grouping;
mod linear;
mod machine;
mod offline;
mod perplexity;

use std::io::Write;
use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};
use comfy_table::presets::NOTHING;
use comfy_table::{CellAlignment, Table};
use serde::Serialize;
use tidemill_connectors::kafka::KafkaError;
use tidemill_kernels::step::StepError;
use tidemill_operators::infer::engine::SubmitError;
use tidemill_operators::tokenizer::TokenizerError;

use self::connectors::ConnectorsArgs;
use crate::models::catalogue::{CATALOGUE, ModelRef, resolve};
use crate::models::load::LoadError;
use crate::run::RunError;
use crate::spec::SpecError;

/// What is measured.
#[derive(Debug, Subcommand)]
pub enum Bench {
    /// Prefill and decode in shapes that stand for real work, without a pipeline around them
    Engine(EngineArgs),
    /// A whole job as a user would run it: requests from a file, answers to Parquet
    Offline(OfflineArgs),
    /// How often prefixes are computed, beside arrival order and LRU, and how long planning takes; without a model
    Grouping(GroupingArgs),
    /// What the fast path costs in quality: its perplexity on a text, beside that of f32
    Perplexity(PerplexityArgs),
    /// Records a second from topic to topic, beside a plain loop over the same client and kcat; without a model
    Connectors(ConnectorsArgs),
    /// The time from the start to the first token; `engine` starts it as a process of its own
    #[command(hide = true)]
    FirstToken { model: String },
}

#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  tidemill bench engine --repeat 1 --json engine.json\n  \
    tidemill bench engine --device cuda --shape qwen3-8b --dtype fp8 --only decode")]
pub struct EngineArgs {
    /// A name from `tidemill models list`, or the path of a model
    #[arg(long, default_value = CATALOGUE[0].name)]
    model: String,
    /// `cpu`, or a GPU: `cuda` or `cuda:N`
    #[arg(long, default_value = "cpu", value_parser = device)]
    device: Device,
    /// Threads of the engine on a CPU; as many as there are cores if left out
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,
    /// On a GPU: random weights of this shape instead of a model
    #[arg(long, conflicts_with = "model")]
    shape: Option<gpu::Shape>,
    /// On a GPU: the numbers of weights
    #[arg(long, default_value = "bf16")]
    dtype: gpu::Dtype,
    /// On a GPU: the numbers of keys and values, those that the model computes in or fp8
    #[arg(long, default_value = "auto")]
    kv_cache_dtype: gpu::KvDtype,
    /// On a GPU: answers do not depend on the batch
    #[arg(long)]
    deterministic: bool,
    /// On a GPU: requests of each job
    #[arg(long, default_value_t = 256, value_parser = clap::value_parser!(u16).range(1..))]
    requests: u16,
    /// On a GPU: rows and columns of the matrices whose product is the peak; for tests
    #[arg(long, hide = true, default_value_t = 8192)]
    peak_size: usize,
    /// On a GPU: only workloads whose name holds this text; may be repeated
    #[arg(long, value_name = "TEXT")]
    only: Vec<String>,
    #[command(flatten)]
    common: CommonArgs,
}

/// Where an engine alone is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Device {
    Cpu,
    Cuda(usize),
}

fn device(name: &str) -> Result<Device, String> {
    let ordinal = |number: &str| number.parse().map(Device::Cuda).ok();
    match name {
        "cpu" => Some(Device::Cpu),
        "cuda" => Some(Device::Cuda(0)),
        _ => name.strip_prefix("cuda:").and_then(ordinal),
    }
    .ok_or_else(|| "known are: cpu, cuda and cuda:N".to_owned())
}

#[derive(Debug, Args)]
#[command(
    after_help = "Example:\n  python3 scripts/offline_job.py\n  tidemill bench offline --device '[cpu:0, cpu:1]'"
)]
pub struct OfflineArgs {
    /// JSON lines with the columns `system` and `user`
    #[arg(long, value_name = "FILE", default_value = "data/offline-job.jsonl")]
    requests: PathBuf,
    /// A name from `tidemill models list`, or the path of a model
    #[arg(long, default_value = CATALOGUE[0].name)]
    model: String,
    /// The devices, as in `engine.device` of a definition
    #[arg(long, default_value = "auto")]
    device: String,
    /// Dataflow workers
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=256))]
    workers: u16,
    /// Length of every answer, in tokens
    #[arg(long, default_value_t = 48, value_parser = clap::value_parser!(u32).range(1..))]
    max_tokens: u32,
    #[command(flatten)]
    common: CommonArgs,
}

#[derive(Debug, Args)]
#[command(after_help = "Example:\n  tidemill bench grouping --json grouping.json")]
pub struct GroupingArgs {
    /// Prompts of 750 tokens in the queue whose planning is timed
    #[arg(long, default_value_t = 100_000, value_parser = clap::value_parser!(u32).range(1000..=1_000_000))]
    queued: u32,
    #[command(flatten)]
    common: CommonArgs,
}

#[derive(Debug, Args)]
#[command(after_help = "Example:\n  tidemill bench perplexity --text article.txt --model gemma-3-270m")]
pub struct PerplexityArgs {
    /// A text file
    #[arg(long, value_name = "FILE")]
    text: PathBuf,
    /// A name from `tidemill models list`, or the path of a model
    #[arg(long, default_value = CATALOGUE[0].name)]
    model: String,
    /// Tokens that are scored together
    #[arg(long, default_value_t = 512, value_parser = clap::value_parser!(u16).range(3..))]
    window: u16,
    /// Write the figures to a file, as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

#[derive(Debug, Args)]
struct CommonArgs {
    /// Measure so many times and take the median
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u16).range(1..=1000))]
    repeat: u16,
    /// Write the figures to a file, as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

#[derive(Debug, thiserror::Error)]
pub enum BenchError {
    #[error("no model {name:?}")]
    UnknownModel { name: String, nearest: String },
    #[error(transparent)]
    Load(#[from] LoadError),
    #[error(transparent)]
    Step(#[from] StepError),
    #[error("the model is too small for the measurement")]
    Submit(#[from] SubmitError),
    #[error("cannot encode a prompt")]
    Encode(#[from] TokenizerError),
    #[error("no requests file {path}")]
    NoRequests { path: PathBuf },
    #[error("text file {path} has less than two tokens")]
    NoText { path: PathBuf },
    #[error("cannot start {num_threads} threads")]
    Threads {
        num_threads: usize,
        #[source]
        source: std::io::Error,
    },
    #[error("the model {name:?} has no weights to score with")]
    NoWeights { name: String },
    #[error("random weights of a shape are made on a GPU only")]
    ShapeOnCpu,
    #[error(transparent)]
    Definition(#[from] Box<SpecError>),
    #[error(transparent)]
    Kafka(#[from] KafkaError),
    #[error(transparent)]
    Run(#[from] RunError),
    #[error("the run was not finished: {errors} documents failed")]
    Unfinished { errors: u64 },
    #[error("cannot {action} {path}")]
    Io {
        action: &'static str,
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("the process that is timed ended before its first token")]
    NoToken,
}

impl BenchError {
    /// What the user can do.
    pub fn help(&self) -> Option<String> {
        match self {
            Self::UnknownModel { nearest, .. } => Some(format!("known are: {nearest}")),
            Self::Load(error) => error.help(),
            Self::Kafka(error) => error.help(),
            Self::Run(error) => error.help(),
            Self::Definition(error) => error.help.clone(),
            Self::ShapeOnCpu => Some("add --device cuda, or name a --model instead".to_owned()),
            Self::NoRequests { .. } => {
                Some("make the requests with: python3 scripts/offline_job.py".to_owned())
            }
            _ => None,
        }
    }
}

/// Measures, prints a table and writes JSON.
pub fn bench(command: &Bench) -> Result<(), BenchError> {
    match command {
        Bench::Engine(args) => {
            let json = args.common.json.as_deref();
            match args.device {
                Device::Cpu if args.shape.is_some() => Err(BenchError::ShapeOnCpu),
                Device::Cpu => {
                    let report = engine::measure(args)?;
                    finish(&report.render(), &report, json)
                }
                Device::Cuda(ordinal) => {
                    let report = gpu::measure(args, ordinal)?;
                    finish(&report.render(), &report, json)
                }
            }
        }
        Bench::Offline(args) => {
            let report = offline::measure(args)?;
            finish(&report.render(), &report, args.common.json.as_deref())
        }
        Bench::Grouping(args) => {
            let report = grouping::measure(args)?;
            finish(&report.render(), &report, args.common.json.as_deref())
        }
        Bench::Perplexity(args) => {
            let report = perplexity::measure(args)?;
            finish(&report.render(), &report, args.json.as_deref())
        }
        Bench::Connectors(args) => {
            let report = connectors::measure(args)?;
            finish(&report.render(), &report, args.json.as_deref())
        }
        Bench::FirstToken { model } => engine::first_token(model),
    }
}

fn finish(table: &str, report: &impl Serialize, json: Option<&Path>) -> Result<(), BenchError> {
    let mut stdout = std::io::stdout().lock();
    // That nobody reads on is no error.
    let _ = writeln!(stdout, "{table}").and_then(|()| stdout.flush());
    let Some(path) = json else { return Ok(()) };
    let text = serde_json::to_string_pretty(report).expect("plain data");
    std::fs::write(path, text + "\n").map_err(io_error("write", path))
}

fn io_error(action: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> BenchError {
    let path = path.to_owned();
    move |source| BenchError::Io { action, path, source }
}

fn model(name: &str) -> Result<ModelRef, BenchError> {
    resolve(name, Path::new(""))
        .map_err(|nearest| BenchError::UnknownModel { name: name.to_owned(), nearest: nearest.join(", ") })
}

/// The middle of some measurements, the mean of two if there is no one middle.
fn median(samples: &[f64]) -> f64 {
    assert!(!samples.is_empty());
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    if sorted.len() % 2 == 1 { sorted[middle] } else { (sorted[middle - 1] + sorted[middle]) / 2.0 }
}

/// A table of a name and numbers to the right of it.
fn table(header: &[&str], rows: impl IntoIterator<Item = Vec<String>>) -> String {
    let mut table = Table::new();
    table.load_style(NOTHING);
    table.set_header(header.to_vec());
    table.add_rows(rows);
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_the_middle() {
        assert_eq!(median(&[3.0]), 3.0);
        assert_eq!(median(&[9.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), 2.5);
    }
}
