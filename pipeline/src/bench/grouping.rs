//! Grouping: how often a prefix is computed, and how long it takes to order a long queue.
//!
//! Three workloads arrive shuffled and run on fake engines, which answer at once but keep real pages, under Tidemill's
//! order and eviction and under plainer ones. 1 is the optimum: every token of the prefix tree computed once. The
//! counts are exact and the same on every machine; only the planning times are not.

mod workload;

use std::collections::VecDeque;
use std::sync::Arc;

use serde::Serialize;
use tidemill_kernels::models::{FakeConfig, FakeModel};
use tidemill_kernels::step::{Model, ModelInfo, SamplingParams, StepBatch, StepError, StepOutput};
use tidemill_operators::group::distinct::{DistinctTokens, distinct_tokens};
use tidemill_operators::group::window::{Window, WindowLimits};
use tidemill_operators::infer::engine::{Engine, EngineConfig, EngineStats};
use tidemill_operators::infer::sequence::{SequenceId, SequenceRequest, SharedPrefix};

use super::{BenchError, GroupingArgs, median, table};
use crate::clock::Clock;
use crate::summary::thousands;
use workload::Workload;

const PAGE_SIZE: u32 = 16;
const MAX_TOKENS: u32 = 48;
const CONFIG: EngineConfig =
    EngineConfig { max_num_seqs: 32, max_num_batched_tokens: 512, enable_prefix_cache: true };
/// Prompts that an engine has running and waiting, as in a run.
const MAX_OUTSTANDING: usize = 2 * CONFIG.max_num_seqs;
/// How many more prompts arrive in the queue that is timed.
const NUM_MORE: usize = 1000;

type Prompt = Arc<[u32]>;

/// How prompts are ordered and pages given up.
#[derive(Clone, Copy, Debug)]
struct Strategy {
    name: &'static str,
    is_grouped: bool,
    is_pinned: bool,
    copies_pages: bool,
    num_engines: usize,
}

const TIDEMILL: Strategy =
    Strategy { name: "tidemill", is_grouped: true, is_pinned: true, copies_pages: true, num_engines: 1 };
const STRATEGIES: [Strategy; 5] = [
    Strategy {
        name: "arrival order, LRU",
        is_grouped: false,
        is_pinned: false,
        copies_pages: false,
        ..TIDEMILL
    },
    Strategy { name: "grouped, LRU", is_pinned: false, copies_pages: false, ..TIDEMILL },
    Strategy { name: "grouped, LRU, page copies", is_pinned: false, ..TIDEMILL },
    TIDEMILL,
    Strategy { name: "tidemill, two engines", num_engines: 2, ..TIDEMILL },
];

#[derive(Debug, Serialize)]
pub(super) struct GroupingReport {
    workloads: Vec<WorkloadReport>,
    planning: Planning,
}

#[derive(Debug, Serialize)]
struct WorkloadReport {
    name: &'static str,
    prompts: usize,
    prompt_tokens: u64,
    distinct_tokens: u64,
    kv_cache_tokens: u64,
    runs: Vec<RunReport>,
}

#[derive(Debug, Serialize)]
struct RunReport {
    strategy: &'static str,
    computed_tokens: u64,
    /// Computed by distinct tokens.
    ratio: f64,
    /// Prompt and answer tokens computed again after preemptions, of all computed ones, in percent.
    recomputed_percent: f64,
    preemptions: u64,
    steps: u64,
    tokens_per_step: f64,
}

/// Times on one core.
#[derive(Debug, Serialize)]
struct Planning {
    prompts: usize,
    prompt_tokens: u64,
    /// Into the tree.
    insert_ms: f64,
    /// Out of the tree, in order.
    order_ms: f64,
    /// So many more in and out while all others wait.
    more: usize,
    more_ms: f64,
    /// The summary's estimate of distinct tokens.
    count_ms: f64,
}

pub(super) fn measure(args: &GroupingArgs) -> Result<GroupingReport, BenchError> {
    let workloads = [workload::template(1000), workload::questions(300), workload::three_levels()];
    let workloads = workloads.into_iter().map(|workload| compare(&workload)).collect::<Result<_, _>>()?;
    Ok(GroupingReport { workloads, planning: plan(args.queued as usize, args.common.repeat) })
}

fn compare(workload: &Workload) -> Result<WorkloadReport, BenchError> {
    let distinct = distinct_tokens(&workload.prompts);
    let runs = STRATEGIES.map(|strategy| {
        let stats = run(workload, &strategy)?;
        let sum = |value: fn(&EngineStats) -> u64| stats.iter().map(value).sum::<u64>();
        let (computed, steps, step_tokens) =
            (sum(|one| one.computed_tokens), sum(|one| one.steps), sum(|one| one.step_tokens));
        let recomputed = sum(|one| one.recomputed_tokens + one.recomputed_output_tokens);
        Ok(RunReport {
            strategy: strategy.name,
            computed_tokens: computed,
            ratio: computed as f64 / distinct as f64,
            recomputed_percent: recomputed as f64 * 100.0 / step_tokens as f64,
            preemptions: sum(|one| one.preemptions),
            steps,
            tokens_per_step: step_tokens as f64 / steps as f64,
        })
    });
    Ok(WorkloadReport {
        name: workload.name,
        prompts: workload.prompts.len(),
        prompt_tokens: workload.prompts.iter().map(|prompt| prompt.len() as u64).sum(),
        distinct_tokens: distinct,
        kv_cache_tokens: workload.kv_cache_tokens(distinct),
        runs: runs.into_iter().collect::<Result<_, BenchError>>()?,
    })
}

/// Hands prompts to engines as `group` does, until all are answered.
fn run(workload: &Workload, strategy: &Strategy) -> Result<Vec<EngineStats>, BenchError> {
    let num_pages = workload.kv_cache_tokens(distinct_tokens(&workload.prompts)) as u32 / PAGE_SIZE;
    let mut engines: Vec<Engine> = (0..strategy.num_engines)
        .map(|_| Engine::new(Box::new(Pages::new(num_pages, strategy.copies_pages)), CONFIG))
        .collect();
    let mut queue = Queue::new(strategy);
    workload.prompts.iter().for_each(|prompt| queue.push(prompt));
    let mut num_submitted = 0;
    while !queue.is_empty() || engines.iter().any(Engine::has_work) {
        for (index, engine) in engines.iter_mut().enumerate() {
            while engine.num_waiting() + engine.num_running() < MAX_OUTSTANDING {
                let Some((prompt, shared)) = queue.next_for(index) else { break };
                let id = SequenceId(num_submitted);
                num_submitted += 1;
                let request = SequenceRequest::new(id, prompt, MAX_TOKENS, SamplingParams::GREEDY);
                let shared = if strategy.is_pinned { shared.into() } else { Arc::default() };
                engine.submit(SequenceRequest { shared, ..request })?;
            }
            engine.step()?;
        }
    }
    Ok(engines.iter().map(Engine::stats).collect())
}

enum Queue {
    Arrival(VecDeque<Prompt>),
    Grouped(Box<Window<Prompt>>),
}

impl Queue {
    fn new(strategy: &Strategy) -> Self {
        match strategy.is_grouped {
            true => {
                Self::Grouped(Box::new(Window::new(strategy.num_engines, WindowLimits::new(4096, 256 << 20))))
            }
            false => Self::Arrival(VecDeque::new()),
        }
    }

    fn push(&mut self, prompt: &Prompt) {
        match self {
            Self::Arrival(queue) => queue.push_back(Arc::clone(prompt)),
            Self::Grouped(window) => window.insert(Arc::clone(prompt), Arc::clone(prompt)),
        }
    }

    fn is_empty(&self) -> bool {
        match self {
            Self::Arrival(queue) => queue.is_empty(),
            Self::Grouped(window) => window.is_empty(),
        }
    }

    fn next_for(&mut self, engine: usize) -> Option<(Prompt, Vec<SharedPrefix>)> {
        match self {
            Self::Arrival(queue) => queue.pop_front().map(|prompt| (prompt, Vec::new())),
            Self::Grouped(window) => window.next_for(engine),
        }
    }
}

/// The fake model, with page copies or without.
struct Pages {
    model: FakeModel,
    copies_pages: bool,
}

impl Pages {
    fn new(num_pages: u32, copies_pages: bool) -> Self {
        let model = FakeModel::new(FakeConfig {
            vocab_size: workload::VOCAB_SIZE,
            eos_probability: 0.02,
            page_size: PAGE_SIZE,
            num_pages,
            ..FakeConfig::default()
        });
        Self { model, copies_pages }
    }
}

impl Model for Pages {
    fn info(&self) -> &ModelInfo {
        self.model.info()
    }

    fn start(&mut self, batch: &StepBatch) -> Result<(), StepError> {
        self.model.start(batch)
    }

    fn finish(&mut self) -> Result<StepOutput, StepError> {
        self.model.finish()
    }

    fn copies_pages(&self) -> bool {
        self.copies_pages
    }
}

/// Times the window alone.
fn plan(num_prompts: usize, repeat: u16) -> Planning {
    let prompts = workload::long_queue(num_prompts + NUM_MORE);
    let (queued, more) = prompts.split_at(num_prompts);
    let clock = Clock::start();
    let mut times = [const { Vec::new() }; 4];
    for _ in 0..repeat {
        let mut laps = Vec::new();
        let mut window: Window<usize> = Window::new(1, WindowLimits::new(prompts.len(), u64::MAX));
        laps.push(clock.elapsed());
        queued.iter().enumerate().for_each(|(index, prompt)| window.insert(Arc::clone(prompt), index));
        laps.push(clock.elapsed());
        for (index, prompt) in more.iter().enumerate() {
            window.insert(Arc::clone(prompt), index);
            assert!(window.next_for(0).is_some(), "prompts wait");
        }
        laps.push(clock.elapsed());
        while window.next_for(0).is_some() {}
        laps.push(clock.elapsed());
        let mut distinct = DistinctTokens::default();
        queued.iter().for_each(|prompt| distinct.insert(prompt));
        laps.push(clock.elapsed());
        for (times, lap) in times.iter_mut().zip(laps.windows(2)) {
            times.push((lap[1] - lap[0]).as_secs_f64() * 1000.0);
        }
    }
    let [insert_ms, more_ms, order_ms, count_ms] = times.map(|times| median(&times));
    Planning {
        prompts: num_prompts,
        prompt_tokens: queued.iter().map(|prompt| prompt.len() as u64).sum(),
        insert_ms,
        order_ms,
        more: NUM_MORE,
        more_ms,
        count_ms,
    }
}

impl GroupingReport {
    pub(super) fn render(&self) -> String {
        let mut parts: Vec<String> = self.workloads.iter().map(WorkloadReport::render).collect();
        let Planning { prompts, prompt_tokens, insert_ms, order_ms, more, more_ms, count_ms } =
            &self.planning;
        let title =
            format!("planning {} prompts, {} tokens", thousands(*prompts as u64), thousands(*prompt_tokens));
        let rows = [
            ("insert all".to_owned(), insert_ms),
            ("hand out all, in order".to_owned(), order_ms),
            (format!("{} more in and out", thousands(*more as u64)), more_ms),
            ("count distinct tokens".to_owned(), count_ms),
        ];
        parts.push(table(&[&title, "ms"], rows.map(|(name, time)| vec![name, format!("{time:.1}")])));
        parts.join("\n\n")
    }
}

impl WorkloadReport {
    fn render(&self) -> String {
        let title = format!(
            "{}: {} prompts, {} tokens, {} distinct, KV cache {}",
            self.name,
            thousands(self.prompts as u64),
            thousands(self.prompt_tokens),
            thousands(self.distinct_tokens),
            thousands(self.kv_cache_tokens)
        );
        let rows = self.runs.iter().map(|run| {
            vec![
                run.strategy.to_owned(),
                thousands(run.computed_tokens),
                format!("{:.3}", run.ratio),
                format!("{:.2} %", run.recomputed_percent),
                thousands(run.preemptions),
                thousands(run.steps),
                format!("{:.0}", run.tokens_per_step),
            ]
        });
        let header = [
            "order, eviction",
            "computed",
            "÷ distinct",
            "recomputed",
            "preempted",
            "steps",
            "tokens a step",
        ];
        format!("{title}\n{}", table(&header, rows))
    }
}

#[cfg(test)]
mod tests;
