//! A snapshot in the text format of Prometheus. Figures of the engine have vLLM's names, all others begin with
//! `tidemill_`; pipelines that share an engine each show it under their own name.

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric as _};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::Registry;

use tidemill_operators::infer::figures::Histogram;

use super::{EngineSnapshot, KafkaView, PartitionView, PipelineSnapshot, Snapshot, TenantSnapshot};

/// Encodes a snapshot.
pub fn encode(snapshot: Snapshot) -> String {
    let mut registry = Registry::default();
    registry.register_collector(Box::new(SnapshotCollector(snapshot)));
    let mut text = String::new();
    prometheus_client::encoding::text::encode(&mut text, &registry).expect("text takes everything");
    text
}

/// Names and values of labels.
type Labels = Vec<(&'static str, String)>;

/// One metric: its name without `_total`, what it says, and its value for each set of labels.
struct Metric {
    name: &'static str,
    help: &'static str,
    is_counter: bool,
    samples: Vec<(Labels, f64)>,
}

#[derive(Debug)]
struct SnapshotCollector(Snapshot);

impl Collector for SnapshotCollector {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        for metric in metrics(&self.0) {
            let kind = if metric.is_counter { MetricType::Counter } else { MetricType::Gauge };
            let mut family = encoder.encode_descriptor(metric.name, metric.help, None, kind)?;
            for (labels, value) in &metric.samples {
                let encoder = family.encode_family(labels)?;
                if metric.is_counter {
                    ConstCounter::new(*value).encode(encoder)?;
                } else {
                    ConstGauge::new(*value).encode(encoder)?;
                }
            }
        }
        let engines = labeled_engines(&self.0);
        for (name, help, histogram) in HISTOGRAMS {
            let samples = engines.iter().map(|(labels, engine)| (labels, histogram(engine)));
            encode_histograms(&mut encoder, name, help, samples)?;
        }
        let tenants = labeled_tenants(&self.0);
        let waits = tenants.iter().map(|(labels, tenant)| (labels, &tenant.wait_seconds));
        encode_histograms(&mut encoder, "tidemill_tenant_wait_seconds", "How long prompts have waited", waits)
    }
}

fn encode_histograms<'a>(
    encoder: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    samples: impl Iterator<Item = (&'a Labels, &'a Histogram)>,
) -> Result<(), std::fmt::Error> {
    let mut family = encoder.encode_descriptor(name, help, None, MetricType::Histogram)?;
    for (labels, histogram) in samples {
        let bounds = histogram.bounds.iter().copied().chain([f64::INFINITY]);
        let buckets: Vec<(f64, u64)> = bounds.zip(histogram.counts.iter().copied()).collect();
        let mut encoder = family.encode_family(labels)?;
        encoder.encode_histogram::<Labels>(histogram.sum, histogram.count(), &buckets, None)?;
    }
    Ok(())
}

type OfEngine = fn(&EngineSnapshot) -> &Histogram;
const HISTOGRAMS: [(&str, &str, OfEngine); 4] = [
    ("vllm:time_to_first_token_seconds", "From the engine's taking a prompt to its first token", |engine| {
        &engine.time_to_first_token
    }),
    ("vllm:e2e_request_latency_seconds", "From the engine's taking a prompt to the whole answer", |engine| {
        &engine.e2e_latency
    }),
    ("vllm:iteration_tokens_total", "Tokens of a forward pass", |engine| &engine.step_tokens),
    ("tidemill_step_seconds", "Time of a forward pass", |engine| &engine.step_seconds),
];

fn metrics(snapshot: &Snapshot) -> Vec<Metric> {
    let mut all = pipelines(snapshot);
    all.extend(engines(snapshot));
    all.extend(tenants(snapshot));
    all.extend(kafka(snapshot));
    all
}

/// A metric with one sample for each item.
fn metric<'a, T: 'a>(
    items: &[(Labels, &'a T)],
    is_counter: bool,
    name: &'static str,
    help: &'static str,
    value: impl Fn(&'a T) -> Option<f64>,
) -> Metric {
    let samples = items.iter().filter_map(|(labels, item)| Some((labels.clone(), value(item)?)));
    Metric { name, help, is_counter, samples: samples.collect() }
}

fn labels(pipeline: &PipelineSnapshot) -> Labels {
    vec![("pipeline", pipeline.name.clone()), ("model_name", pipeline.model.clone())]
}

fn pipelines(snapshot: &Snapshot) -> Vec<Metric> {
    let items: Vec<_> = snapshot.pipelines.iter().map(|pipeline| (labels(pipeline), pipeline)).collect();
    let counter = |name, help, value: fn(&PipelineSnapshot) -> u64| {
        metric(&items, true, name, help, move |pipeline| Some(value(pipeline) as f64))
    };
    let gauge = |name, help, value: fn(&PipelineSnapshot) -> u64| {
        metric(&items, false, name, help, move |pipeline| Some(value(pipeline) as f64))
    };
    vec![
        counter("vllm:prompt_tokens", "Prompt tokens, computed or reused", |one| one.prompt_tokens),
        counter("vllm:generation_tokens", "Answer tokens", |one| one.output_tokens),
        counter("vllm:prefix_cache_queries", "Prompt tokens looked up in the prefix cache", |one| {
            one.prompt_tokens
        }),
        counter("vllm:prefix_cache_hits", "Prompt tokens found in the prefix cache", |one| one.reused_tokens),
        counter("tidemill_documents_read", "Documents let into the dataflow", |one| one.documents_read),
        counter("tidemill_documents_done", "Documents with their answers at the output", |one| {
            one.documents_done
        }),
        counter("tidemill_documents_refused", "Documents at the errors output", |one| one.errors),
        counter("tidemill_documents_recalled", "Answers taken from the journal", |one| one.recalled),
        counter("tidemill_computed_tokens", "Prompt tokens that went through the model", |one| {
            one.computed_tokens
        }),
        gauge("tidemill_epochs_in_flight", "Source batches that are not at the output yet", |one| {
            one.epochs_in_flight
        }),
        gauge("tidemill_documents_in_flight", "Documents read and not written", |one| {
            one.documents_in_flight
        }),
        gauge("tidemill_bytes_in_flight", "Bytes of the rows in flight", |one| one.bytes_in_flight),
        gauge("tidemill_batches_unrendered", "Batches that wait for their prompts", |one| one.unrendered),
        gauge("tidemill_prompts_grouped", "Prompts that wait until an engine has room", |one| one.grouped),
        gauge("tidemill_held_back", "1 while what is read waits for credit", |one| {
            u64::from(one.is_held_back)
        }),
        gauge("tidemill_tokens_in_flight", "Tokens of the prompts in flight", |one| one.tokens_in_flight),
        gauge("tidemill_credit_documents", "The most documents that may be in flight", |one| {
            one.credit_documents
        }),
        gauge("tidemill_credit_bytes", "The most bytes of rows that may be in flight", |one| {
            one.credit_bytes
        }),
        gauge(
            "tidemill_credit_tokens",
            "The most tokens that may be in flight; 0: as the KV cache has room",
            |one| one.credit_tokens,
        ),
        counter("tidemill_spans_exported", "Spans that the collector took", |one| {
            one.traces.map_or(0, |traces| traces.exported)
        }),
        counter("tidemill_spans_dropped", "Spans that it did not take, or that came too fast", |one| {
            one.traces.map_or(0, |traces| traces.dropped)
        }),
        gauge("tidemill_failed", "1 when the pipeline has failed", |one| u64::from(one.failed.is_some())),
    ]
}

fn labeled_engines(snapshot: &Snapshot) -> Vec<(Labels, &EngineSnapshot)> {
    let of_pipeline = |pipeline: &PipelineSnapshot, number: usize| {
        let mut labels = labels(pipeline);
        labels.push(("engine", number.to_string()));
        labels
    };
    let engines = snapshot.pipelines.iter().flat_map(|pipeline| {
        pipeline
            .engines
            .iter()
            .enumerate()
            .map(move |(number, engine)| (of_pipeline(pipeline, number), engine))
    });
    engines.collect()
}

fn engines(snapshot: &Snapshot) -> Vec<Metric> {
    let items = labeled_engines(snapshot);
    let reasons = items.iter().flat_map(|(labels, engine)| {
        [("stop", engine.stopped), ("length", engine.length_limited)].map(|(reason, count)| {
            let mut labels = labels.clone();
            labels.push(("finished_reason", reason.to_owned()));
            (labels, count as f64)
        })
    });
    let success = Metric {
        name: "vllm:request_success",
        help: "Answered sequences",
        is_counter: true,
        samples: reasons.collect(),
    };
    let gauge = |name, help, value: fn(&EngineSnapshot) -> f64| {
        metric(&items, false, name, help, move |engine| Some(value(engine)))
    };
    let counter = |name, help, value: fn(&EngineSnapshot) -> f64| {
        metric(&items, true, name, help, move |engine| Some(value(engine)))
    };
    vec![
        success,
        gauge("vllm:num_requests_running", "Sequences in the batch", |one| one.running as f64),
        gauge("vllm:num_requests_waiting", "Sequences that wait for the engine", |one| one.waiting as f64),
        gauge("vllm:kv_cache_usage_perc", "Share of the KV pages that sequences hold; 1 is all", |one| {
            one.kv_pages_in_use as f64 / one.kv_pages_total.max(1) as f64
        }),
        gauge("tidemill_kv_pages_cached", "KV pages that only the prefix cache holds", |one| {
            one.kv_pages_cached as f64
        }),
        counter("vllm:num_preemptions", "Sequences that gave up their KV pages", |one| {
            one.preemptions as f64
        }),
        counter("tidemill_kv_pages_swapped_out", "KV pages copied to the host's memory", |one| {
            one.swapped_out_pages as f64
        }),
        counter("tidemill_kv_pages_swapped_in", "KV pages copied back from it", |one| {
            one.swapped_in_pages as f64
        }),
        counter("tidemill_engine_steps", "Forward passes", |one| one.steps as f64),
    ]
}

fn labeled_tenants(snapshot: &Snapshot) -> Vec<(Labels, &TenantSnapshot)> {
    let of_pipeline = |pipeline: &PipelineSnapshot, name: &String| {
        vec![("pipeline", pipeline.name.clone()), ("tenant", name.clone())]
    };
    let tenants = snapshot.pipelines.iter().flat_map(|pipeline| {
        pipeline.tenants.iter().map(move |(name, tenant)| (of_pipeline(pipeline, name), tenant))
    });
    tenants.collect()
}

fn tenants(snapshot: &Snapshot) -> Vec<Metric> {
    let items = labeled_tenants(snapshot);
    let value = |is_counter, name, help, value: fn(&TenantSnapshot) -> f64| {
        metric(&items, is_counter, name, help, move |tenant| Some(value(tenant)))
    };
    vec![
        value(true, "tidemill_tenant_documents", "Documents answered", |one| one.documents as f64),
        value(true, "tidemill_tenant_prompt_tokens", "Prompt tokens", |one| one.prompt_tokens as f64),
        value(true, "tidemill_tenant_generation_tokens", "Answer tokens", |one| one.output_tokens as f64),
        value(false, "tidemill_tenant_waiting", "Prompts that wait", |one| one.waiting as f64),
        value(false, "tidemill_tenant_tokens_in_flight", "Tokens in engines", |one| {
            one.tokens_in_flight as f64
        }),
        value(false, "tidemill_tenant_limit_tokens", "The most tokens in engines; 0: no limit", |one| {
            one.limit_tokens as f64
        }),
    ]
}

fn kafka(snapshot: &Snapshot) -> Vec<Metric> {
    let with_kafka: Vec<(&PipelineSnapshot, &KafkaView)> =
        snapshot.pipelines.iter().filter_map(|pipeline| Some((pipeline, pipeline.kafka.as_ref()?))).collect();
    let partitions: Vec<(Labels, &PartitionView)> = with_kafka
        .iter()
        .flat_map(|(pipeline, kafka)| {
            kafka.partitions.iter().map(|partition| {
                let labels = vec![
                    ("pipeline", pipeline.name.clone()),
                    ("topic", partition.topic.clone()),
                    ("partition", partition.partition.to_string()),
                ];
                (labels, partition)
            })
        })
        .collect();
    let clients: Vec<(Labels, &KafkaView)> = with_kafka
        .iter()
        .map(|(pipeline, kafka)| (vec![("pipeline", pipeline.name.clone())], *kafka))
        .collect();
    let offset = |name, help, value: fn(&PartitionView) -> Option<i64>| {
        metric(&partitions, false, name, help, move |partition| value(partition).map(|offset| offset as f64))
    };
    let count = |name, help, value: fn(&KafkaView) -> u64| {
        metric(&clients, true, name, help, move |kafka| Some(value(kafka) as f64))
    };
    vec![
        offset("tidemill_kafka_lag", "Records behind the group's committed offset", |one| one.lag),
        offset("tidemill_kafka_position", "The next offset to read", |one| one.position),
        offset("tidemill_kafka_end_offset", "Where the partition ends", |one| one.end),
        metric(&clients, false, "tidemill_kafka_paused", "1 while partitions are held back", |one| {
            Some(f64::from(u8::from(one.is_paused)))
        }),
        count("tidemill_kafka_records_read", "Records read", |one| one.records_read),
        count("tidemill_kafka_records_written", "Records written and committed", |one| one.records_written),
        count("tidemill_kafka_transactions_committed", "Transactions committed", |one| {
            one.transactions_committed
        }),
        count("tidemill_kafka_transactions_aborted", "Transactions aborted and tried again", |one| {
            one.transactions_aborted
        }),
        count("tidemill_kafka_producers_fenced", "Producers replaced after they were fenced", |one| {
            one.producers_fenced
        }),
        count("tidemill_kafka_epochs_canceled", "Batches of lost partitions thrown away", |one| {
            one.epochs_canceled
        }),
        count("tidemill_kafka_rebalances", "Changes of the assignment", |one| one.rebalances),
    ]
}

#[cfg(test)]
mod tests;
