//! What others can see of a running process: one [`Snapshot`] of all its pipelines, taken at any moment.
//!
//! Metrics and the live view are made of it, so both show the same. Nothing here is on the way of the data: figures
//! are read where they are counted anyway.

pub mod metrics;
pub mod server;
pub mod traces;

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};

use serde::{Deserialize, Serialize};
use tidemill_connectors::kafka::stats::KafkaStats;
use tidemill_operators::counters::Counters;
use tidemill_operators::infer::figures::{EngineFigures, Histogram};
use tidemill_operators::infer::load::EngineLoad;

use self::traces::Tracer;
use crate::plan::Plan;
use crate::render::Shared;

/// All pipelines of a process.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Snapshot {
    pub pipelines: Vec<PipelineSnapshot>,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct PipelineSnapshot {
    pub name: String,
    pub model: String,
    pub failed: Option<String>,
    pub documents_read: u64,
    /// Answered or refused, at the sink.
    pub documents_arrived: u64,
    pub documents_done: u64,
    pub errors: u64,
    pub recalled: u64,
    pub prompt_tokens: u64,
    pub computed_tokens: u64,
    pub reused_tokens: u64,
    pub output_tokens: u64,
    pub epochs_in_flight: u64,
    pub documents_in_flight: u64,
    pub bytes_in_flight: u64,
    pub tokens_in_flight: u64,
    /// Batches of documents that are not rendered yet.
    pub unrendered: u64,
    /// Prompts that wait until an engine has room for them.
    pub grouped: u64,
    pub credit_documents: u64,
    pub credit_bytes: u64,
    /// 0: as many as the KV cache of the engines makes sensible.
    pub credit_tokens: u64,
    /// The credit is used up: what is read waits at the source.
    pub is_held_back: bool,
    pub engines: Vec<EngineSnapshot>,
    pub tenants: BTreeMap<String, TenantSnapshot>,
    pub kafka: Option<KafkaView>,
    pub traces: Option<TracesSnapshot>,
}

/// Spans handed on, and those dropped since the queue was full or the collector refused them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TracesSnapshot {
    pub exported: u64,
    pub dropped: u64,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct EngineSnapshot {
    pub running: u64,
    pub waiting: u64,
    pub kv_pages_total: u64,
    pub kv_pages_in_use: u64,
    pub kv_pages_cached: u64,
    pub steps: u64,
    pub preemptions: u64,
    pub swapped_out_pages: u64,
    pub swapped_in_pages: u64,
    /// Answers that the model ended, and that reached `max_tokens`.
    pub stopped: u64,
    pub length_limited: u64,
    pub time_to_first_token: Histogram,
    pub e2e_latency: Histogram,
    pub step_seconds: Histogram,
    pub step_tokens: Histogram,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct TenantSnapshot {
    pub documents: u64,
    pub waiting: u64,
    pub prompt_tokens: u64,
    pub output_tokens: u64,
    pub tokens_in_flight: u64,
    /// 0: no limit.
    pub limit_tokens: u64,
    pub wait_seconds: Histogram,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct KafkaView {
    pub partitions: Vec<PartitionView>,
    /// Topics are read, and which partitions of them are ours is not known yet.
    pub awaits_partitions: bool,
    pub is_paused: bool,
    pub rebalances: u64,
    pub records_read: u64,
    pub records_written: u64,
    pub transactions_committed: u64,
    pub transactions_aborted: u64,
    pub producers_fenced: u64,
    pub epochs_canceled: u64,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct PartitionView {
    pub topic: String,
    pub partition: i32,
    pub position: Option<i64>,
    pub committed: Option<i64>,
    pub end: Option<i64>,
    pub lag: Option<i64>,
}

/// One running pipeline.
struct Observed {
    name: String,
    model: String,
    shared: Shared,
    kafka: Option<KafkaStats>,
    tracer: Option<Arc<Tracer>>,
}

/// The pipelines of a process, for whoever looks.
#[derive(Clone, Default)]
pub struct Registry {
    pipelines: Arc<Mutex<Vec<Observed>>>,
}

impl std::fmt::Debug for Registry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Registry").finish_non_exhaustive()
    }
}

impl Registry {
    /// From now on, a pipeline is seen; it stays when it has ended.
    pub fn add(&self, plan: &Plan, shared: &Shared, kafka: Option<KafkaStats>, tracer: Option<Arc<Tracer>>) {
        let (name, model) = (plan.name.clone(), plan.model_name.clone());
        let observed = Observed { name, model, shared: shared.clone(), kafka, tracer };
        self.pipelines.lock().unwrap_or_else(PoisonError::into_inner).push(observed);
    }

    pub fn snapshot(&self) -> Snapshot {
        let pipelines = self.pipelines.lock().unwrap_or_else(PoisonError::into_inner);
        Snapshot { pipelines: pipelines.iter().map(Observed::snapshot).collect() }
    }
}

impl Observed {
    fn snapshot(&self) -> PipelineSnapshot {
        let Shared { counters, at_source, .. } = &self.shared;
        let engine = |(load, figures): (&Arc<EngineLoad>, &Arc<EngineFigures>)| {
            let reading = figures.reading();
            EngineSnapshot {
                running: load.running.load(Ordering::Relaxed),
                waiting: load.waiting.load(Ordering::Relaxed),
                kv_pages_total: load.kv_pages_total.load(Ordering::Relaxed),
                kv_pages_in_use: load.kv_pages_in_use.load(Ordering::Relaxed),
                kv_pages_cached: load.kv_pages_cached.load(Ordering::Relaxed),
                steps: load.steps.load(Ordering::Relaxed),
                preemptions: load.preemptions.load(Ordering::Relaxed),
                swapped_out_pages: load.swapped_out_pages.load(Ordering::Relaxed),
                swapped_in_pages: load.swapped_in_pages.load(Ordering::Relaxed),
                stopped: reading.num_stop,
                length_limited: reading.num_length,
                time_to_first_token: reading.time_to_first_token,
                e2e_latency: reading.e2e_latency,
                step_seconds: reading.step_seconds,
                step_tokens: reading.step_tokens,
            }
        };
        let tenants = self.shared.work.tenants.counts().into_iter().map(|(name, counts)| {
            let tenant = TenantSnapshot {
                documents: counts.documents,
                waiting: counts.waiting,
                prompt_tokens: counts.prompt_tokens,
                output_tokens: counts.output_tokens,
                tokens_in_flight: counts.tokens_in_flight,
                limit_tokens: self.shared.work.tenants.policy().limit(&name).unwrap_or(0),
                wait_seconds: counts.wait,
            };
            (name.to_string(), tenant)
        });
        let tenants: BTreeMap<_, _> = tenants.collect();
        let grouped = tenants.values().map(|tenant| tenant.waiting).sum();
        PipelineSnapshot {
            name: self.name.clone(),
            model: self.model.clone(),
            failed: self.shared.failure.get(),
            documents_read: Counters::get(&counters.documents_read),
            documents_arrived: Counters::get(&counters.arrived),
            documents_done: Counters::get(&counters.documents_done),
            errors: Counters::get(&counters.errors),
            recalled: Counters::get(&counters.recalled),
            prompt_tokens: Counters::get(&counters.prompt_tokens),
            computed_tokens: Counters::get(&counters.computed_tokens),
            reused_tokens: Counters::get(&counters.reused_tokens),
            output_tokens: Counters::get(&counters.output_tokens),
            epochs_in_flight: self.shared.epochs.num_open() as u64,
            documents_in_flight: Counters::get(&counters.documents_in_flight),
            bytes_in_flight: at_source.bytes_in_flight.load(Ordering::Relaxed),
            tokens_in_flight: self.shared.work.tokens.total(),
            unrendered: at_source.num_unrendered.load(Ordering::Relaxed),
            grouped,
            is_held_back: at_source.is_held_back.load(Ordering::Relaxed),
            credit_documents: self.shared.credit.documents,
            credit_bytes: self.shared.credit.bytes,
            credit_tokens: self.shared.credit.tokens.unwrap_or(0),
            engines: self.shared.loads.iter().zip(&self.shared.figures).map(engine).collect(),
            tenants,
            kafka: self.kafka.as_ref().map(view),
            traces: self.tracer.as_ref().map(|tracer| tracer.snapshot()),
        }
    }
}

fn view(stats: &KafkaStats) -> KafkaView {
    let snapshot = stats.snapshot();
    let partition = |(partition, stats): (
        &tidemill_connectors::kafka::assignment::Partition,
        &tidemill_connectors::kafka::stats::PartitionStats,
    )| PartitionView {
        topic: partition.topic.to_string(),
        partition: partition.number,
        position: stats.position,
        committed: stats.committed,
        end: stats.end,
        lag: stats.lag(),
    };
    KafkaView {
        partitions: snapshot.partitions.iter().map(partition).collect(),
        // A member may be given none.
        awaits_partitions: snapshot.reads_topics
            && snapshot.num_rebalances == 0
            && snapshot.partitions.is_empty(),
        is_paused: snapshot.is_paused,
        rebalances: snapshot.num_rebalances,
        records_read: snapshot.records_read,
        records_written: snapshot.records_written,
        transactions_committed: snapshot.transactions_committed,
        transactions_aborted: snapshot.transactions_aborted,
        producers_fenced: snapshot.producers_fenced,
        epochs_canceled: snapshot.epochs_canceled,
    }
}
