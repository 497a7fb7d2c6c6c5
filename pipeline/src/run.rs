//! Runs checked plans to their end, side by side, and says how each ended.
//!
//! Each plan is a dataflow on workers of its own. They could share one set of workers, but then a slow template of
//! one would hold up the prompts of another, and a panic in one would end all.

mod ends;
mod engines;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use tidemill_connectors::kafka::KafkaError;
use tidemill_connectors::output::{OutputError, Resume};
use tidemill_connectors::source::{Source, SourceError};
use tidemill_operators::counters::Counters;
use tidemill_operators::group::Demand;
use tidemill_operators::infer::figures::Tracing;
use tidemill_operators::infer::runner::{EngineHandle, WorkContext};
use tidemill_operators::infer::{Failure, Stop};
use tidemill_operators::journal::{Journal, JournalError};
use tidemill_operators::tenants::Tenants;
use tidemill_operators::tokenize::{InputNameFn, PromptBuilder};

use crate::clock::Clock;
use crate::models::load::LoadError;
use crate::observe::Registry;
use crate::observe::server::Server;
use crate::observe::traces::{Tracer, TracesError};
use crate::plan::{Checked, Plan};
use crate::progress::Progress;
use crate::render::sink::records::trace_parent;
use crate::render::sink::{self, SinkLimits, SinkReport, SinkThread, Target};
use crate::render::source::SourceThread;
use crate::render::{EpochLog, Shared, render};
use crate::summary::Summary;
use engines::Lent;

/// A worker without work sleeps this long at most, so that it sees a stop.
const PARK: Duration = Duration::from_millis(50);
/// Prompts an engine has waiting, as a multiple of those it runs.
const QUEUE_FACTOR: usize = 2;
/// The share of those it runs, where there are tenants.
const TENANTS_QUEUE_DIVISOR: usize = 4;

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
    /// Serve metrics here.
    pub listen: Option<SocketAddr>,
    /// Set from outside to end all pipelines early.
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

impl Outcome {
    /// The figures of what was done now.
    pub fn summary(&self) -> Option<&Summary> {
        match self {
            Self::Finished(summary) | Self::Interrupted(summary) | Self::OverBudget { summary, .. } => {
                Some(summary)
            }
            Self::NothingToDo { .. } => None,
        }
    }
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
    #[error("pipelines {:?} and {:?} both use {place}", names[0], names[1])]
    CommonEnd { names: [String; 2], place: String },
    #[error("cannot serve metrics at {address}")]
    Listen {
        address: SocketAddr,
        #[source]
        source: std::io::Error,
    },
    #[error(transparent)]
    Traces(#[from] TracesError),
    #[error("the group took partitions away before their last results were committed")]
    CutShort,
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
            Self::Traces(error) => error.help(),
            Self::CutShort => Some(
                "their new owner goes on there; run again to be sure of the end, answers are kept".to_owned(),
            ),
            Self::Failed(_) => Some("what was finished is kept: mend the cause and run again".to_owned()),
            Self::Listen { .. } => {
                Some("another process uses it: give another address with --listen".to_owned())
            }
            Self::CommonEnd { .. } => Some("give each pipeline ends of its own".to_owned()),
            Self::Journal(_) | Self::Thread(_) | Self::Worker(_) => None,
        }
    }
}

/// Runs a plan.
pub fn run(checked: Checked, options: &RunOptions) -> Result<Outcome, RunError> {
    run_together(vec![checked], options)?.pop().expect("one outcome a plan")
}

/// Runs plans side by side until all have ended; one outcome each, in their order. None starts unless all can.
///
/// Each has threads, source, sink, journal and credit of its own, so that none waits for another but where they meet:
/// in the engines, which those share that ask for the same.
pub fn run_together(
    all: Vec<Checked>,
    options: &RunOptions,
) -> Result<Vec<Result<Outcome, RunError>>, RunError> {
    let clock = Clock::start();
    refuse_common_ends(&all)?;
    let names_progress = all.len() > 1;
    let registry = Registry::default();
    let serve = |address| {
        Server::start(address, registry.clone()).map_err(|source| RunError::Listen { address, source })
    };
    let server = options.listen.map(serve).transpose()?;
    if let Some(server) = server.as_ref().filter(|_| options.progress) {
        eprintln!("metrics are at http://{}/metrics", server.address);
    }
    let pipelines: Vec<Opened> =
        all.into_iter().map(|checked| open(checked, options)).collect::<Result<_, _>>()?;
    let plans: Vec<&Plan> = pipelines.iter().filter_map(|opened| Some(&opened.as_ref().ok()?.plan)).collect();
    let (running, lent) = engines::start(&plans, options.progress, clock)?;
    let mut lent = lent.into_iter();
    let outcomes = std::thread::scope(|scope| {
        let threads: Vec<_> = pipelines
            .into_iter()
            .map(|opened| {
                let with_engines = opened.map(|pipeline| (pipeline, lent.next().expect("one for each plan")));
                let registry = registry.clone();
                scope.spawn(move || match with_engines {
                    Ok((pipeline, lent)) => pipeline.run(lent, options, &registry, names_progress, clock),
                    Err(done) => Ok(done),
                })
            })
            .collect();
        let join = |thread: std::thread::ScopedJoinHandle<'_, Result<Outcome, RunError>>| {
            thread.join().unwrap_or_else(|_| Err(RunError::Worker("its thread panicked".to_owned())))
        };
        threads.into_iter().map(join).collect()
    });
    drop(lent);
    running.join();
    Ok(outcomes)
}

/// Two pipelines must not write to one place, nor read one stream.
fn refuse_common_ends(all: &[Checked]) -> Result<(), RunError> {
    for (index, one) in all.iter().enumerate() {
        for other in &all[..index] {
            let [one, other] = [&one.plan, &other.plan];
            let outputs = |plan: &Plan| plan.sink.target.names();
            let common = outputs(one).into_iter().find(|output| outputs(other).contains(output));
            let is_stdin = [one, other].iter().all(|plan| plan.reads_stdin);
            if let Some(place) = common.or_else(|| is_stdin.then(|| "standard input".to_owned())) {
                let names = [other.name.clone(), one.name.clone()];
                return Err(RunError::CommonEnd { names, place });
            }
        }
    }
    Ok(())
}

/// A pipeline that is ready to run, or was finished before.
type Opened = Result<Pipeline, Outcome>;

/// A plan with its ends open.
struct Pipeline {
    plan: Plan,
    ends: ends::OpenEnds,
    /// What earlier runs have written.
    before: SinkReport,
    journal: Option<(PathBuf, Journal)>,
}

fn open(checked: Checked, options: &RunOptions) -> Result<Opened, RunError> {
    let Checked { plan, source } = checked;
    // Fences who ran before by the same name, so it comes before anything is read.
    let ends = ends::open(&plan, source, options)?;
    let before = match ends.resume {
        Resume::Finished { rows, errors } => return Ok(Err(Outcome::NothingToDo { rows, errors })),
        Resume::Fresh => SinkReport::default(),
        Resume::Continue { rows, errors, .. } => {
            if options.progress {
                eprintln!("continuing after {rows} rows and {errors} errors");
            }
            SinkReport { rows, errors, ..SinkReport::default() }
        }
    };
    let journal = match &ends.journal_path {
        Some(path) => Some((path.clone(), Journal::open(path)?)),
        None => None,
    };
    Ok(Ok(Pipeline { plan, ends, before, journal }))
}

impl Pipeline {
    fn run(
        self,
        lent: Lent,
        options: &RunOptions,
        registry: &Registry,
        names_progress: bool,
        clock: Clock,
    ) -> Result<Outcome, RunError> {
        let Self { plan, ends, before, journal } = self;
        let ends::OpenEnds { source, target, slot: _slot, kafka, .. } = ends;
        let (journal_path, journal) = journal.unzip();
        let start_tracer = |endpoint: &String| Tracer::start(endpoint, &plan.name, clock);
        let tracer = plan.traces.as_ref().map(start_tracer).transpose()?;
        let tracing = tracer.as_ref().map(|tracer| tracer.tracing(&plan.model_name, trace_parent));
        let reads_topics = kafka.as_ref().is_some_and(|stats| stats.snapshot().reads_topics);
        let device = Arc::clone(&lent.device);
        let shared = share(&plan, journal, &lent, tracing, reads_topics, options, clock);
        registry.add(&plan, &shared, kafka.clone(), tracer.clone());
        let total = source.num_rows().map(|rows| rows.saturating_sub(before.rows + before.errors));
        let removes_journal = matches!(target, Target::Files { may_finish: true, .. });
        let limits = SinkLimits {
            commit_rows: plan.sink.commit_rows,
            commit_interval: plan.sink.commit_interval,
            budget: plan.sink.budget,
        };
        let (sink, sink_thread) = sink::start(target, limits, before, &shared, clock)?;
        let name = names_progress.then(|| plan.name.clone());
        let start_progress = || Progress::start(name, Arc::clone(&shared.counters), total, clock);
        let progress = options.progress.then(start_progress).transpose()?;
        execute(&plan, &shared, Ends { lent, source, sink }, options.num_workers, clock)?;
        drop(progress);
        if let Some(tracer) = tracer {
            tracer.finish();
        }
        // A panic there was reported as a failure already.
        let report = sink_thread.join().unwrap_or_default();
        if let Some(path) = journal_path.filter(|_| report.finished && removes_journal) {
            // All answers are in the output now. What is left behind costs space and nothing else.
            let _ = std::fs::remove_file(path);
        }
        // What was read and is not written is another member's now, and whether it gets done is not known here.
        if report.finished && kafka.is_some_and(|stats| stats.snapshot().is_cut_short()) {
            return Err(RunError::CutShort);
        }
        conclude(&shared, report, &device, clock)
    }
}

fn share(
    plan: &Plan,
    journal: Option<Journal>,
    lent: &Lent,
    tracing: Option<Tracing>,
    reads_topics: bool,
    options: &RunOptions,
    clock: Clock,
) -> Shared {
    let max_num_seqs = lent.max_num_seqs as usize;
    // What an engine has in its queue stands before every tenant that comes later.
    let target = match &plan.tenants {
        Some(_) => max_num_seqs + max_num_seqs.div_ceil(TENANTS_QUEUE_DIVISOR),
        None => max_num_seqs * QUEUE_FACTOR,
    };
    // Half of the queue at a time: fewer messages, larger steps, and never a step with a place left empty.
    let short = target - ((target - max_num_seqs) / 2).max(1);
    let policy = plan.tenants.clone().unwrap_or_default();
    let tenants = Arc::new(Tenants::new(policy, move || clock.elapsed()));
    let counters = Arc::new(Counters::default());
    let failure = Failure::caused_by(lent.handles.iter().map(|engine| engine.failure().clone()));
    let stop = Stop::new(Arc::clone(&options.stop));
    Shared {
        counters: Arc::clone(&counters),
        failure: failure.clone(),
        stop: stop.clone(),
        journal: journal.clone(),
        work: Arc::new(WorkContext {
            priority: plan.priority,
            journal,
            counters,
            tenants,
            tokens: Arc::default(),
            failure,
            stop,
            tracing,
        }),
        epochs: Arc::new(EpochLog::new(reads_topics)),
        demands: plan
            .steps
            .iter()
            .map(|_| Arc::new(Demand::new(plan.devices.num_engines(), target, short)))
            .collect(),
        credit: plan.credit,
        at_source: Arc::default(),
        loads: lent.handles.iter().map(|engine| Arc::clone(engine.load())).collect(),
        figures: lent.handles.iter().map(|engine| Arc::clone(engine.figures())).collect(),
    }
}

fn conclude(shared: &Shared, report: SinkReport, device: &str, clock: Clock) -> Result<Outcome, RunError> {
    if let Some(message) = shared.failure.get() {
        return Err(RunError::Failed(message));
    }
    let summary = Summary::new(device, &shared.counters, shared.work.tokens.peak(), clock.elapsed());
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
    lent: Lent,
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
    clock: Clock,
) -> Result<(), RunError> {
    let reading: Arc<Mutex<Vec<JoinHandle<()>>>> = Arc::default();
    let Ends { lent: Lent { handles, text, .. }, source, sink } = ends;
    // Partitions are numbered as they are assigned.
    let names = source.names();
    let input_names =
        source.inputs().is_empty().then(|| InputNameFn(Arc::new(move |number| names.get(number))));
    let mut first = Some((SourceThread::new(source, Arc::clone(&reading), clock), sink));
    let parts: Vec<Mutex<Option<WorkerPart>>> = (0..num_workers)
        .map(|_| Mutex::new(Some(WorkerPart { engines: handles.clone(), ends: first.take() })))
        .collect();
    drop(handles);
    let steps = plan.steps.clone();
    let shared = shared.clone();
    let guards = timely::execute(timely::Config::process(num_workers), move |worker| {
        let part = parts[worker.index()].lock().unwrap_or_else(PoisonError::into_inner).take();
        let part = part.expect("each worker starts once");
        let builders = steps.iter().map(|step| step.builder(&text, input_names.clone())).collect();
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
    Ok(())
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
