//! The offline job: a file of requests in, answers to Parquet, one process, everything that a run does included.
//!
//! It is a pipeline like any other, so what is measured is what a user gets: reading, rendering, tokenizing,
//! grouping, the journal and the sink. Answers have one length (`ignore_eos`), so two engines do the same work.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use serde::Serialize;

use super::machine::Machine;
use super::{BenchError, OfflineArgs, io_error, median, table};
use crate::clock::Clock;
use crate::cores::Cores;
use crate::plan::check;
use crate::run::{Outcome, RunOptions, run};
use crate::spec::Definition;
use crate::summary::{Summary, thousands};

#[derive(Debug, Serialize)]
pub(super) struct OfflineReport {
    model: String,
    device: String,
    machine: Machine,
    wall_seconds: f64,
    requests_per_second: f64,
    prompt_tokens_per_second: f64,
    output_tokens_per_second: f64,
    peak_memory_mib: u64,
    /// Of the last run; counts are the same in all of them.
    summary: Summary,
    samples: Vec<f64>,
}

pub(super) fn measure(args: &OfflineArgs) -> Result<OfflineReport, BenchError> {
    let clock = Clock::start();
    let requests = std::path::absolute(&args.requests).map_err(io_error("find", &args.requests))?;
    if !requests.is_file() {
        return Err(BenchError::NoRequests { path: args.requests.clone() });
    }
    let folder = std::env::temp_dir().join(format!("tidemill-bench-{}", std::process::id()));
    std::fs::create_dir_all(&folder).map_err(io_error("create", &folder))?;
    let text = definition(args, &requests.to_string_lossy());
    let runs = Definition::parse(&folder.join("offline.yaml"), text)
        .map_err(BenchError::from)
        .and_then(|definition| (0..args.common.repeat).map(|_| once(&definition, args)).collect());
    // Whatever happened, nobody needs the answers.
    let _ = std::fs::remove_dir_all(&folder);
    let runs: Vec<Summary> = runs?;
    let samples: Vec<f64> = runs.iter().map(|summary| summary.wall_ms as f64 / 1000.0).collect();
    let wall_seconds = median(&samples).max(0.001);
    let summary = runs.into_iter().next_back().expect("at least one run");
    let rate = |count: u64| count as f64 / wall_seconds;
    Ok(OfflineReport {
        model: args.model.clone(),
        device: args.device.clone(),
        machine: Machine::measure(Cores::available().num_cores(), clock),
        wall_seconds,
        requests_per_second: rate(summary.documents),
        prompt_tokens_per_second: rate(summary.prompt_tokens),
        output_tokens_per_second: rate(summary.output_tokens),
        peak_memory_mib: summary.peak_memory_bytes >> 20,
        summary,
        samples,
    })
}

/// Strings are written as JSON, which is YAML too, so that no name can break out of its place.
fn definition(args: &OfflineArgs, requests: &str) -> String {
    let quote = |text: &str| serde_json::to_string(text).expect("a string");
    format!(
        "name: offline\nmodel: {{ name: {} }}\nengine: {{ device: {} }}\nsource: {{ jsonl: {{ path: {} }} }}\n\
         steps:\n  - generate:\n      name: answer\n      system: '{{{{ system }}}}'\n      prompt: '{{{{ user }}}}'\n\
         \x20     max_tokens: {}\n      ignore_eos: true\nsink: {{ parquet: {{ path: answers }} }}\n",
        quote(&args.model),
        args.device,
        quote(requests),
        args.max_tokens
    )
}

fn once(definition: &Definition, args: &OfflineArgs) -> Result<Summary, BenchError> {
    let options = RunOptions {
        num_workers: args.workers.into(),
        force: true,
        progress: false,
        until_end: false,
        listen: None,
        stop: Arc::new(AtomicBool::new(false)),
    };
    match run(check(definition)?, &options)? {
        Outcome::Finished(summary) if summary.errors == 0 => Ok(summary),
        Outcome::Finished(summary) | Outcome::Interrupted(summary) | Outcome::OverBudget { summary, .. } => {
            Err(BenchError::Unfinished { errors: summary.errors })
        }
        Outcome::NothingToDo { errors, .. } => Err(BenchError::Unfinished { errors }),
    }
}

impl OfflineReport {
    pub(super) fn render(&self) -> String {
        let rows = [
            ("wall time", format!("{:.1} s", self.wall_seconds)),
            ("requests", thousands(self.summary.documents)),
            ("requests/s", format!("{:.2}", self.requests_per_second)),
            ("prompt tokens", thousands(self.summary.prompt_tokens)),
            ("  computed", thousands(self.summary.computed_tokens)),
            ("prompt tokens/s", format!("{:.0}", self.prompt_tokens_per_second)),
            ("output tokens", thousands(self.summary.output_tokens)),
            ("output tokens/s", format!("{:.0}", self.output_tokens_per_second)),
            ("peak memory", format!("{} MiB", self.peak_memory_mib)),
            ("ran on", self.summary.device.clone()),
        ];
        let title = format!("{} on {}", self.model, self.device);
        let rows = rows.map(|(name, value)| vec![name.to_owned(), value]);
        format!("{}\n\n{}", table(&[&title, ""], rows), self.machine.render())
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        args: OfflineArgs,
    }

    #[test]
    fn the_definition_is_valid_whatever_the_names() {
        let line =
            Line::parse_from(["bench", "--model", "it's \"mine\": a.gguf", "--device", "[cpu:0, cpu:1]"]);
        let text = definition(&line.args, "a folder/{requests}: 1.jsonl");
        let definition = Definition::parse(Path::new("offline.yaml"), text).unwrap();
        assert_eq!(definition.spec.model.name.value, "it's \"mine\": a.gguf");
        assert_eq!(definition.spec.engine.device.unwrap().value.0, ["cpu:0", "cpu:1"]);
        assert_eq!(definition.spec.steps.value.len(), 1);
    }
}
