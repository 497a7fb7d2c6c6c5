//! Runs a checked plan to its end and says how it ended.

mod ends;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use tidemill_connectors::kafka::KafkaError;
use tidemill_connectors::output::{OutputError, Resume};
use tidemill_connectors::source::{Source, SourceError};
use tidemill_operators::counters::Counters;
use tidemill_operators::group::Demand;
use tidemill_operators::infer::Failure;
use tidemill_operators::infer::engine::EngineStats;
use tidemill_operators::infer::runner::{EngineHandle, Runner, RunnerContext};
use tidemill_operators::journal::{Journal, JournalError};
use tidemill_operators::tokenize::PromptBuilder;

use crate::clock::Clock;
use crate::models::load::{Engines, LoadError, load};
use crate::plan::{Checked, Plan};
use crate::progress::Progress;
use crate::render::sink::{self, SinkLimits, SinkReport, SinkThread, Target};
use crate::render::source::SourceThread;
use crate::render::{EpochLog, Shared, render};
use crate::run::ends::Opened;
use crate::summary::Summary;

/// A worker without work sleeps this long at most, so that it sees a stop.
const PARK: Duration = Duration::from_millis(50);
/// Prompts an engine has waiting, as a multiple of those it runs.
const QUEUE_FACTOR: usize = 2;

/// What the command line adds to a plan.
#[derive(Clone, Debug)]
pub struct RunOptions {
    pub num_workers: usize,
    /// Replace finished or foreign output.
    pub force: bool,
    /// Show progress.
    pub progress: bool,
    /// Read topics to where they end now, and no further.
    pub until_end: bool,
    /// Set from outside to end the run early.
    pub stop: Arc<AtomicBool>,
}

/// How a run ended without a failure.
#[derive(Clone, Debug, PartialEq)]
pub enum Outcome {
    /// Everything is written.
    Finished(Summary),
    /// Everything was written before.
    NothingToDo { rows: u64, errors: u64 },
    /// The user stopped it; what was finished is kept.
    Interrupted(Summary),
    /// More documents failed than the budget allows; what was finished is kept.
    OverBudget { summary: Summary, errors: u64, total: u64 },
}

#[derive(Debug, thiserror::Error)]
pub enum RunError {
    #[error(transparent)]
    Output(#[from] OutputError),
    #[error(transparent)]
    Load(#[from] LoadError),
    #[error(transparent)]
    Source(#[from] SourceError),
    #[error(transparent)]
    Kafka(#[from] KafkaError),
    #[error(transparent)]
    Journal(#[from] JournalError),
    #[error("cannot start a thread")]
    Thread(#[from] std::io::Error),
    #[error("the run failed: {0}")]
    Failed(String),
    #[error("a worker failed: {0}")]
    Worker(String),
}

impl RunError {
    /// What the user can do.
    pub fn help(&self) -> Option<String> {
        match self {
            Self::Output(error) => error.help(),
            Self::Load(error) => error.help(),
            Self::Source(error) => error.help(),
            Self::Kafka(error) => error.help(),
            Self::Failed(_) => Some("what was finished is kept: mend the cause and run again".to_owned()),
            Self::Journal(_) | Self::Thread(_) | Self::Worker(_) => None,
        }
    }
}

/// Runs a plan.
pub fn run(checked: Checked, options: &RunOptions) -> Result<Outcome, RunError> {
    let clock = Clock::start();
    let Checked { plan, source } = checked;
    // Fences who ran before by the same name, so it comes before anything is read.
    let opened = ends::open(&plan, source, options)?;
    let Opened { source, target, resume, journal_path, slot: _slot } = opened;
    let before = match resume {
        Resume::Finished { rows, errors } => return Ok(Outcome::NothingToDo { rows, errors }),
        Resume::Fresh => SinkReport::default(),
        Resume::Continue { rows, errors, .. } => {
            if options.progress {
                eprintln!("continuing after {rows} rows and {errors} errors");
            }
            SinkReport { rows, errors, ..SinkReport::default() }
        }
    };
    let journal = journal_path.as_deref().map(Journal::open).transpose()?;
    let loaded = load(&plan.model, &plan.model_name, plan.devices, &|what| eprintln!("{what} …"))?;
    let engines = loaded.engines(&plan.engine, plan.devices)?;
    let shared = share(&plan, journal, options);
    let total = source.num_rows().map(|rows| rows.saturating_sub(before.rows + before.errors));
    let removes_journal = matches!(target, Target::Files { may_finish: true, .. });
    let limits = SinkLimits {
        commit_rows: plan.sink.commit_rows,
        commit_interval: plan.sink.commit_interval,
        budget: plan.sink.budget,
    };
    let (sink, sink_thread) = sink::start(target, limits, before, &shared, clock)?;
    let progress =
        options.progress.then(|| Progress::start(Arc::clone(&shared.counters), total, clock)).transpose()?;
    let ends = Ends { engines, source, sink };
    let stats = execute(&plan, &shared, ends, options.num_workers)?;
    drop(progress);
    // A panic there was reported as a failure already.
    let report = sink_thread.join().unwrap_or_default();
    if let Some(path) = journal_path.filter(|_| report.finished && removes_journal) {
        // All answers are in the output now. What is left behind costs space and nothing else.
        let _ = std::fs::remove_file(path);
    }
    Counters::add(&shared.counters.preemptions, stats.iter().map(|stats| stats.preemptions).sum());
    conclude(&shared, report, clock)
}

fn share(plan: &Plan, journal: Option<Journal>, options: &RunOptions) -> Shared {
    let target = plan.engine.max_num_seqs as usize * QUEUE_FACTOR;
    Shared {
        counters: Arc::new(Counters::default()),
        failure: Failure::default(),
        stop: Arc::clone(&options.stop),
        journal,
        epochs: Arc::new(EpochLog::default()),
        demands: plan
            .steps
            .iter()
            .map(|_| Arc::new(Demand::new(plan.devices.num_engines(), target)))
            .collect(),
        credit: plan.credit,
    }
}

fn conclude(shared: &Shared, report: SinkReport, clock: Clock) -> Result<Outcome, RunError> {
    if let Some(message) = shared.failure.get() {
        return Err(RunError::Failed(message));
    }
    let summary = Summary::new(&shared.counters, clock.elapsed());
    Ok(if report.over_budget {
        let total = report.rows + report.errors;
        Outcome::OverBudget { summary, errors: report.errors, total }
    } else if report.finished {
        Outcome::Finished(summary)
    } else {
        Outcome::Interrupted(summary)
    })
}

/// What enters the dataflow from outside.
struct Ends {
    engines: Engines,
    source: Box<dyn Source>,
    sink: SinkThread,
}

/// What one worker takes with it.
struct WorkerPart {
    engines: Vec<EngineHandle>,
    ends: Option<(SourceThread, SinkThread)>,
}

/// Runs the dataflow on all workers until it is done or stopped.
fn execute(
    plan: &Plan,
    shared: &Shared,
    ends: Ends,
    num_workers: usize,
) -> Result<Vec<EngineStats>, RunError> {
    let reading: Arc<Mutex<Vec<JoinHandle<()>>>> = Arc::default();
    let text = Arc::clone(&ends.engines.text);
    let (runners, handles) = start_engines(ends.engines, shared)?;
    let mut first = Some((SourceThread::new(ends.source, Arc::clone(&reading)), ends.sink));
    let parts: Vec<Mutex<Option<WorkerPart>>> = (0..num_workers)
        .map(|_| Mutex::new(Some(WorkerPart { engines: handles.clone(), ends: first.take() })))
        .collect();
    drop(handles);
    let steps = plan.steps.clone();
    let shared = shared.clone();
    let guards = timely::execute(timely::Config::process(num_workers), move |worker| {
        let part = parts[worker.index()].lock().unwrap_or_else(PoisonError::into_inner).take();
        let part = part.expect("each worker starts once");
        let builders = steps.iter().map(|step| step.builder(&text)).collect();
        drive(worker, &shared, part, builders);
    })
    .map_err(RunError::Worker)?;
    for result in guards.join() {
        result.map_err(RunError::Worker)?;
    }
    for thread in reading.lock().unwrap_or_else(PoisonError::into_inner).drain(..) {
        // A panic there was reported as a failure already.
        let _ = thread.join();
    }
    Ok(runners.into_iter().map(Runner::join).collect())
}

/// Starts the threads of all engines, each on its cores.
fn start_engines(engines: Engines, shared: &Shared) -> Result<(Vec<Runner>, Vec<EngineHandle>), RunError> {
    let mut started = (Vec::new(), Vec::new());
    for (engine, cores) in engines.engines {
        let context = RunnerContext {
            text: Arc::clone(&engines.text),
            journal: shared.journal.clone(),
            counters: Arc::clone(&shared.counters),
            failure: shared.failure.clone(),
            cancel: Arc::clone(&shared.stop),
        };
        let start = || Runner::start(engine, context);
        let (runner, handle) = match cores {
            Some(cores) => cores.pinned(start),
            None => start(),
        }?;
        started.0.push(runner);
        started.1.push(handle);
    }
    Ok(started)
}

fn drive(
    worker: &mut timely::worker::Worker,
    shared: &Shared,
    part: WorkerPart,
    builders: Vec<PromptBuilder>,
) {
    let _watch = shared.failure.watch("worker");
    let (input, output) = part.ends.unzip();
    let dataflow = worker.next_dataflow_index();
    let probe = worker.dataflow(|scope| render(scope, shared, builders, &part.engines, input, output));
    drop(part.engines);
    while !probe.done() && !shared.should_stop() {
        worker.step_or_park(Some(PARK));
    }
    // Ends the operators, and with them the threads that they feed.
    worker.drop_dataflow(dataflow);
}

/// Asks a run to end; the second time, ends the process.
pub fn stop_on_signal(stop: &Arc<AtomicBool>) -> Result<(), ctrlc::Error> {
    let stop = Arc::clone(stop);
    ctrlc::set_handler(move || {
        if stop.swap(true, Ordering::AcqRel) {
            std::process::exit(crate::cli::exit::INTERRUPTED);
        }
        eprintln!("stopping: what is finished is kept (again to stop at once)");
    })
}
