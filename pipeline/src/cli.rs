//! The command line: what it takes, and what each command prints.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use clap::{Args, CommandFactory, Parser, Subcommand};
use clap_complete::Shell;
use serde::Serialize;

use crate::bench::{Bench, BenchError, bench};
use crate::explain::{ExplainError, explain, graph};
use crate::models::catalogue::{ModelRef, OTHER_NAMES, resolve};
use crate::models::load::{LoadError, fetched};
use crate::models::show::{inspect, list};
use crate::plan::{Checked, Target, chain, check};
use crate::run::{Outcome, RunError, RunOptions, run_together, stop_on_signal};
use crate::spec::{Definition, SpecError};
use crate::summary::{Summary, thousands};
use crate::top::{TopArgs, TopError, top};
use crate::topics::{Topics, TopicsError, topics};

/// Exit codes; `README.md` documents them.
pub mod exit {
    pub const OK: i32 = 0;
    /// The world is broken: files, disk, model.
    pub const FAILED: i32 = 1;
    /// The command line or the definition is wrong.
    pub const USAGE: i32 = 2;
    /// More documents failed than the definition allows.
    pub const OVER_BUDGET: i32 = 3;
    pub const INTERRUPTED: i32 = 130;
}

const EXAMPLES: &str = "\
Examples:
  tidemill check pipeline.yaml         find mistakes before anything runs
  tidemill explain pipeline.yaml       count tokens and shared prefixes beforehand
  tidemill run pipeline.yaml           run it; after a crash, run it again to go on
  tidemill run a.yaml b.yaml           run both at once, on the same engines
  tidemill bench engine                prefill and decode speed, beside what the machine can do
  tidemill models pull smollm2-135m-instruct

Exit codes: 0 done, 1 failed, 2 wrong definition or command line, 3 error budget exceeded, 130 interrupted.";

/// Streams documents from Parquet, JSONL or Kafka through a language model and writes the answers.
#[derive(Debug, Parser)]
#[command(name = "tidemill", version, after_help = EXAMPLES)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run pipelines; a run that was interrupted goes on where it was
    Run(RunArgs),
    /// Check a definition without running it
    Check { file: PathBuf },
    /// Show the graph and count the input's tokens, without running the model
    Explain(ExplainArgs),
    /// Measure how fast this machine runs a model
    #[command(subcommand)]
    Bench(Bench),
    /// Fetch and look at models
    #[command(subcommand)]
    Models(ModelsCommand),
    /// Watch running pipelines
    Top(TopArgs),
    /// Make, fill and look into Kafka topics
    #[command(subcommand)]
    Topics(Topics),
    /// Print a completion script for a shell
    Completions { shell: Shell },
}

#[derive(Debug, Args)]
#[command(after_help = "Example:\n  tidemill run --workers 2 examples/news-summaries/pipeline.yaml")]
struct RunArgs {
    /// The pipelines' definitions; several run side by side and share the engines if they ask for the same
    #[arg(required = true, value_name = "FILE")]
    files: Vec<PathBuf>,
    /// Dataflow workers of each pipeline, which render and tokenize; the engines are the definition's, whatever their number
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=256))]
    workers: u16,
    /// Replace output that is finished or was made by another definition
    #[arg(long)]
    force: bool,
    /// Read topics to where they end now, then end
    #[arg(long)]
    until_end: bool,
    /// Serve metrics for Prometheus and `tidemill top` here, such as 127.0.0.1:9464
    #[arg(long, value_name = "ADDRESS")]
    listen: Option<std::net::SocketAddr>,
    /// No progress and no summary
    #[arg(long, short)]
    quiet: bool,
    /// Write the summary to a file, as JSON; of several pipelines a list
    #[arg(long, value_name = "FILE")]
    summary: Option<PathBuf>,
}

#[derive(Debug, Args)]
struct ExplainArgs {
    /// The pipeline's definition
    file: PathBuf,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Subcommand)]
enum ModelsCommand {
    /// List the models known by name
    List,
    /// Fetch a model, verify it and keep it
    Pull {
        name: String,
        /// Fetch it even if it is here
        #[arg(long)]
        force: bool,
    },
    /// Show what a model file holds
    Inspect { name: String },
}

/// Whatever a command can fail with.
#[derive(Debug, thiserror::Error)]
pub enum CliError {
    #[error(transparent)]
    Spec(#[from] Box<SpecError>),
    #[error(transparent)]
    Run(#[from] RunError),
    #[error(transparent)]
    Explain(#[from] ExplainError),
    #[error(transparent)]
    Bench(#[from] BenchError),
    #[error(transparent)]
    Load(#[from] LoadError),
    #[error(transparent)]
    Top(#[from] TopError),
    #[error(transparent)]
    Topics(#[from] TopicsError),
    #[error("no model {name:?}")]
    UnknownModel { name: String, nearest: String },
    #[error("cannot handle signals")]
    Signal(#[from] ctrlc::Error),
    #[error("cannot write {path}")]
    Write {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("{errors} of {total} documents failed, more than the error budget allows")]
    OverBudget { errors: u64, total: u64 },
    #[error("interrupted")]
    Interrupted,
    /// One of several that ran together.
    #[error("pipeline {name:?} did not finish")]
    Pipeline {
        name: String,
        #[source]
        source: Box<CliError>,
    },
}

impl CliError {
    pub fn exit_code(&self) -> i32 {
        match self {
            Self::Spec(_)
            | Self::UnknownModel { .. }
            | Self::Run(RunError::CommonEnd { .. })
            | Self::Bench(BenchError::UnknownModel { .. } | BenchError::Definition(_)) => exit::USAGE,
            Self::OverBudget { .. } => exit::OVER_BUDGET,
            Self::Interrupted => exit::INTERRUPTED,
            Self::Pipeline { source, .. } => source.exit_code(),
            _ => exit::FAILED,
        }
    }

    /// What the user can do.
    pub fn help(&self) -> Option<String> {
        match self {
            Self::Spec(error) => error.help.clone(),
            Self::Run(error) => error.help(),
            Self::Explain(error) => error.help(),
            Self::Bench(error) => error.help(),
            Self::Load(error) => error.help(),
            Self::Top(error) => error.help(),
            Self::Topics(TopicsError::Kafka(error)) => error.help(),
            Self::Topics(_) => None,
            Self::UnknownModel { nearest, .. } => Some(format!("known are: {nearest}")),
            Self::OverBudget { .. } => {
                Some("look at the errors sink for the reasons; what was finished is kept".to_owned())
            }
            Self::Interrupted => Some("run the same command again to go on".to_owned()),
            Self::Pipeline { source, .. } => source.help(),
            Self::Signal(_) | Self::Write { .. } => None,
        }
    }
}

/// Carries out a command.
pub fn execute(cli: Cli) -> Result<(), CliError> {
    match cli.command {
        Command::Run(args) => run_command(&args),
        Command::Check { file } => {
            let Checked { plan, .. } = checked(&file)?;
            let (num_steps, model) = (plan.steps.len(), plan.model_name);
            print(&format!("{} is fine: {num_steps} steps, model {model}\n", file.display()))
        }
        Command::Explain(args) => explain_command(&args),
        Command::Bench(command) => Ok(bench(&command)?),
        Command::Models(command) => models_command(command),
        Command::Top(args) => Ok(top(&args)?),
        Command::Topics(command) => Ok(topics(&command)?),
        Command::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "tidemill", &mut script);
            print(&String::from_utf8_lossy(&script))
        }
    }
}

/// Prints to standard output; that nobody reads on is no error.
fn print(text: &str) -> Result<(), CliError> {
    let mut stdout = std::io::stdout().lock();
    match stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()) {
        Err(source) if source.kind() != std::io::ErrorKind::BrokenPipe => {
            Err(CliError::Write { path: "standard output".into(), source })
        }
        _ => Ok(()),
    }
}

fn checked(file: &Path) -> Result<Checked, CliError> {
    Ok(check(&Definition::load(file)?)?)
}

fn run_command(args: &RunArgs) -> Result<(), CliError> {
    let all = args.files.iter().map(|file| checked(file)).collect::<Result<Vec<_>, _>>()?;
    let plans: Vec<_> = all.iter().map(|one| (one.plan.name.clone(), one.plan.sink.target.clone())).collect();
    let stop = Arc::new(AtomicBool::new(false));
    stop_on_signal(&stop)?;
    let options = RunOptions {
        num_workers: args.workers.into(),
        force: args.force,
        progress: !args.quiet,
        until_end: args.until_end,
        listen: args.listen,
        stop,
    };
    let is_one = all.len() == 1;
    let outcomes = run_together(all, &options)?;
    let mut summaries = Vec::new();
    let mut failed = Vec::new();
    for ((name, target), outcome) in plans.into_iter().zip(outcomes) {
        if let Ok(outcome) = &outcome
            && !args.quiet
        {
            let heading = if is_one { String::new() } else { format!("{name}\n") };
            eprintln!("{heading}{}", report(outcome, &target));
        }
        let summary = outcome.as_ref().ok().and_then(Outcome::summary).cloned();
        summaries.extend(summary.map(|summary| NamedSummary { name: name.clone(), summary }));
        if let Err(error) = conclude(outcome) {
            failed.push(match is_one {
                true => error,
                false => CliError::Pipeline { name, source: Box::new(error) },
            });
        }
    }
    if let Some(path) = &args.summary {
        write_summaries(path, &summaries, is_one)?;
    }
    let mut failed = failed.into_iter();
    let Some(first) = failed.next() else { return Ok(()) };
    failed.for_each(|error| eprintln!("error: {}", chain(&error)));
    Err(first)
}

/// What the user is told of a run that did not fail.
fn report(outcome: &Outcome, target: &Target) -> String {
    match outcome {
        Outcome::NothingToDo { rows, errors } => {
            let done = format!("{} rows, {} errors", thousands(*rows), thousands(*errors));
            format!("nothing to do: {done} are in {target} already (--force to make them anew)")
        }
        Outcome::Finished(summary) | Outcome::Interrupted(summary) => summary.render(),
        Outcome::OverBudget { summary, .. } => summary.render(),
    }
}

fn conclude(outcome: Result<Outcome, RunError>) -> Result<(), CliError> {
    match outcome? {
        Outcome::OverBudget { errors, total, .. } => Err(CliError::OverBudget { errors, total }),
        Outcome::Interrupted(_) => Err(CliError::Interrupted),
        Outcome::Finished(_) | Outcome::NothingToDo { .. } => Ok(()),
    }
}

/// One of several in a file.
#[derive(Serialize)]
struct NamedSummary {
    name: String,
    #[serde(flatten)]
    summary: Summary,
}

/// One run writes its summary, several a list of those that had something to do.
fn write_summaries(path: &Path, summaries: &[NamedSummary], is_one: bool) -> Result<(), CliError> {
    let text = match (is_one, summaries) {
        (true, []) => return Ok(()),
        (true, [one, ..]) => serde_json::to_string_pretty(&one.summary),
        (false, all) => serde_json::to_string_pretty(all),
    };
    let text = text.expect("plain data") + "\n";
    std::fs::write(path, text).map_err(|source| CliError::Write { path: path.to_owned(), source })
}

fn explain_command(args: &ExplainArgs) -> Result<(), CliError> {
    let checked = checked(&args.file)?;
    let graph = graph(&checked.plan);
    let explanation = explain(checked, &|what| eprintln!("{what} …"))?;
    if args.json {
        let text = serde_json::to_string_pretty(&explanation).expect("plain data");
        return print(&(text + "\n"));
    }
    print(&format!("{graph}\n{}", explanation.render()))
}

fn models_command(command: ModelsCommand) -> Result<(), CliError> {
    match command {
        ModelsCommand::List => print(&list()),
        ModelsCommand::Pull { name, force } => {
            match fetched(&model(&name)?, force, &|what| eprintln!("{what} …"))? {
                Some(path) => print(&format!("{name} is at {}\n", path.display())),
                None => print(&format!("{name} needs no fetching\n")),
            }
        }
        ModelsCommand::Inspect { name } => print(&inspect(&name, &model(&name)?)?),
    }
}

fn model(name: &str) -> Result<ModelRef, CliError> {
    resolve(name, Path::new("")).map_err(|nearest| CliError::UnknownModel {
        name: name.to_owned(),
        nearest: format!("{}; or {OTHER_NAMES}", nearest.join(", ")),
    })
}
