//! OpenTelemetry traces: the one place that knows how our answers become spans of the GenAI conventions.
//!
//! Off unless the definition asks. An answered prompt is a span, a child of the `traceparent` that came with its
//! document if there is one. Text of prompts and answers is never sent. The engine's thread only puts spans into a
//! bounded queue; when it is full, or the collector refuses, spans are dropped and counted, and the run goes on.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime};

use opentelemetry::trace::{Event, SpanContext, SpanId, SpanKind, Status, TraceFlags, TraceId, TraceState};
use opentelemetry::{InstrumentationScope, KeyValue, StringValue, Value};
use opentelemetry_otlp::{RetryPolicy, SpanExporter as OtlpExporter, WithExportConfig, WithHttpConfig};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::trace::{
    IdGenerator, RandomIdGenerator, SpanData, SpanEvents, SpanExporter, SpanLinks,
};
use tidemill_operators::document::Document;
use tidemill_operators::infer::figures::{Answered, Tracing};

use super::TracesSnapshot;
use crate::clock::Clock;

mod client;

/// Spans that wait to be sent; some megabytes at most.
const MAX_WAITING_SPANS: usize = 4096;
const MAX_BATCH_SPANS: usize = 512;
/// A span waits this long for others to go with it.
const BATCH_INTERVAL: Duration = Duration::from_secs(1);
/// For one batch; what the end of a run may wait for a collector that does not answer.
const SEND_TIMEOUT: Duration = Duration::from_secs(3);

#[derive(Debug, thiserror::Error)]
pub enum TracesError {
    #[error("cannot send traces to {endpoint}")]
    Endpoint {
        endpoint: String,
        #[source]
        source: opentelemetry_otlp::ExporterBuildError,
    },
    #[error("cannot start the thread that sends traces")]
    Start(#[source] std::io::Error),
}

impl TracesError {
    /// What the user can do.
    pub fn help(&self) -> Option<String> {
        match self {
            Self::Endpoint { .. } => {
                Some("traces.endpoint is the URL of a collector, such as http://127.0.0.1:4318".to_owned())
            }
            Self::Start(_) => None,
        }
    }
}

/// Sends spans until dropped, and then what still waits.
#[derive(Debug)]
pub struct Tracer {
    clock: Clock,
    queue: Mutex<Option<SyncSender<SpanData>>>,
    counts: Arc<Counts>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

#[derive(Debug, Default)]
struct Counts {
    exported: AtomicU64,
    dropped: AtomicU64,
}

impl Tracer {
    /// Sends to the collector at `endpoint`; whether one is there shows only later, and never matters to the run.
    pub fn start(endpoint: &str, service: &str, clock: Clock) -> Result<Arc<Self>, TracesError> {
        let mut exporter = OtlpExporter::builder()
            .with_http()
            .with_http_client(client::Client::new(SEND_TIMEOUT))
            .with_endpoint(format!("{}/v1/traces", endpoint.trim_end_matches('/')))
            .with_timeout(SEND_TIMEOUT)
            .with_retry_policy(RetryPolicy::disabled())
            .build()
            .map_err(|source| TracesError::Endpoint { endpoint: endpoint.to_owned(), source })?;
        exporter.set_resource(
            &Resource::builder_empty()
                .with_attributes([
                    KeyValue::new("service.name", service.to_owned()),
                    KeyValue::new("service.version", env!("CARGO_PKG_VERSION")),
                ])
                .build(),
        );
        let (queue, spans) = sync_channel(MAX_WAITING_SPANS);
        let counts = Arc::new(Counts::default());
        let counted = Arc::clone(&counts);
        let thread = std::thread::Builder::new()
            .name("traces".to_owned())
            .spawn(move || send(&spans, &exporter, &counted))
            .map_err(TracesError::Start)?;
        Ok(Arc::new(Self { clock, queue: Mutex::new(Some(queue)), counts, thread: Mutex::new(Some(thread)) }))
    }

    /// What engines of this model are to do with each answer; `trace_parent` finds that of a document.
    pub fn tracing(
        self: &Arc<Self>,
        model: &str,
        trace_parent: fn(&Document) -> Option<Arc<str>>,
    ) -> Tracing {
        let (tracer, model) = (Arc::clone(self), model.to_owned());
        Tracing { on_answer: Arc::new(move |answered| tracer.record(&model, answered)), trace_parent }
    }

    fn record(&self, model: &str, answered: &Answered<'_>) {
        let Some(span) = span(model, answered, self.clock.wall_start()) else { return };
        let queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        if queue.as_ref().is_none_or(|queue| queue.try_send(span).is_err()) {
            self.counts.dropped.fetch_add(1, Ordering::Relaxed);
        }
    }

    pub fn snapshot(&self) -> TracesSnapshot {
        TracesSnapshot {
            exported: self.counts.exported.load(Ordering::Relaxed),
            dropped: self.counts.dropped.load(Ordering::Relaxed),
        }
    }

    /// Sends what waits and ends; later spans are dropped.
    pub fn finish(&self) {
        drop(self.queue.lock().unwrap_or_else(PoisonError::into_inner).take());
        if let Some(thread) = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take() {
            // A panic there is no reason to fail a run.
            let _ = thread.join();
        }
    }
}

fn send(spans: &Receiver<SpanData>, exporter: &OtlpExporter, counts: &Counts) {
    let mut is_open = true;
    while is_open {
        let mut batch = Vec::new();
        match spans.recv() {
            Ok(span) => batch.push(span),
            Err(_) => return,
        }
        while batch.len() < MAX_BATCH_SPANS {
            match spans.recv_timeout(BATCH_INTERVAL) {
                Ok(span) => batch.push(span),
                Err(RecvTimeoutError::Timeout) => break,
                Err(RecvTimeoutError::Disconnected) => {
                    is_open = false;
                    break;
                }
            }
        }
        let len = batch.len() as u64;
        match client::block_on(exporter.export(batch)) {
            Ok(()) => counts.exported.fetch_add(len, Ordering::Relaxed),
            Err(error) => {
                tracing::debug!(target: "tidemill::traces", %error, "spans were not sent");
                counts.dropped.fetch_add(len, Ordering::Relaxed)
            }
        };
    }
}

/// The mapping; `None` if who began the trace does not want it recorded.
fn span(model: &str, answered: &Answered<'_>, start: SystemTime) -> Option<SpanData> {
    let parent = answered.trace_parent.and_then(parse_trace_parent);
    if parent.is_some_and(|(_, _, flags)| !flags.is_sampled()) {
        return None;
    }
    let ids = RandomIdGenerator::default();
    let trace_id = parent.map_or_else(|| ids.new_trace_id(), |(trace_id, _, _)| trace_id);
    let context =
        SpanContext::new(trace_id, ids.new_span_id(), TraceFlags::SAMPLED, false, TraceState::default());
    let mut events = SpanEvents::default();
    events.events.push(Event::new("first_token", start + answered.first_token, Vec::new(), 0));
    Some(SpanData {
        span_context: context,
        parent_span_id: parent.map_or(SpanId::INVALID, |(_, span_id, _)| span_id),
        parent_span_is_remote: parent.is_some(),
        // The model runs in this process.
        span_kind: SpanKind::Internal,
        name: format!("chat {model}").into(),
        start_time: start + answered.begun,
        end_time: start + answered.ended,
        attributes: attributes(model, answered),
        dropped_attributes_count: 0,
        events,
        links: SpanLinks::default(),
        status: Status::Unset,
        instrumentation_scope: InstrumentationScope::builder("tidemill").build(),
    })
}

/// <https://github.com/open-telemetry/semantic-conventions-genai>, client inference spans.
fn attributes(model: &str, answered: &Answered<'_>) -> Vec<KeyValue> {
    let sampling = &answered.sampling;
    let reasons = vec![StringValue::from(answered.reason.as_str())];
    let first_token = answered.first_token.saturating_sub(answered.begun);
    let mut attributes = vec![
        KeyValue::new("gen_ai.operation.name", "chat"),
        KeyValue::new("gen_ai.provider.name", "tidemill"),
        KeyValue::new("gen_ai.request.model", model.to_owned()),
        KeyValue::new("gen_ai.response.model", model.to_owned()),
        KeyValue::new("gen_ai.prompt.name", answered.step.to_owned()),
        KeyValue::new("gen_ai.request.max_tokens", i64::from(answered.max_tokens)),
        KeyValue::new("gen_ai.request.temperature", f64::from(sampling.temperature)),
        KeyValue::new("gen_ai.request.top_p", f64::from(sampling.top_p)),
        KeyValue::new("gen_ai.request.seed", sampling.seed as i64),
        KeyValue::new("gen_ai.response.finish_reasons", Value::Array(reasons.into())),
        KeyValue::new("gen_ai.response.time_to_first_chunk", first_token.as_secs_f64()),
        KeyValue::new("gen_ai.usage.input_tokens", i64::from(answered.prompt_len)),
        KeyValue::new("gen_ai.usage.cache_read.input_tokens", i64::from(answered.reused_len)),
        KeyValue::new("gen_ai.usage.output_tokens", i64::from(answered.output_len)),
    ];
    if sampling.top_k > 0 {
        attributes.push(KeyValue::new("gen_ai.request.top_k", i64::from(sampling.top_k)));
    }
    for (name, penalty) in [
        ("gen_ai.request.presence_penalty", sampling.presence_penalty),
        ("gen_ai.request.frequency_penalty", sampling.frequency_penalty),
    ] {
        if penalty != 0.0 {
            attributes.push(KeyValue::new(name, f64::from(penalty)));
        }
    }
    attributes
}

/// W3C Trace Context, `version-trace_id-parent_id-flags` in lower-case hex; anything else begins a trace of its own.
fn parse_trace_parent(text: &str) -> Option<(TraceId, SpanId, TraceFlags)> {
    let mut parts = text.trim().split('-');
    let mut hex = |len: usize| {
        let part = parts.next()?;
        let is_hex = part.bytes().all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte));
        (part.len() == len && is_hex).then_some(part)
    };
    let (version, trace_id, span_id, flags) = (hex(2)?, hex(32)?, hex(16)?, hex(2)?);
    // Later versions may have more parts, the first may not; the last version is none.
    if version == "ff" || (version == "00" && parts.next().is_some()) {
        return None;
    }
    let trace_id = TraceId::from_hex(trace_id).ok()?;
    let span_id = SpanId::from_hex(span_id).ok()?;
    let flags = TraceFlags::new(u8::from_str_radix(flags, 16).ok()?);
    (trace_id != TraceId::INVALID && span_id != SpanId::INVALID).then_some((trace_id, span_id, flags))
}

#[cfg(test)]
mod tests;
