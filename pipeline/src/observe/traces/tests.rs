use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{SocketAddr, TcpListener};

use opentelemetry_proto::tonic::collector::trace::v1::ExportTraceServiceRequest;
use opentelemetry_proto::tonic::common::v1::any_value::Value as Any;
use opentelemetry_proto::tonic::trace::v1::Span;
use prost::Message as _;
use tidemill_kernels::step::SamplingParams;
use tidemill_operators::infer::sequence::FinishReason;

use super::*;

const TRACE_PARENT: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

fn answered(trace_parent: Option<&str>) -> Answered<'_> {
    Answered {
        step: "summary",
        trace_parent,
        prompt_len: 120,
        output_len: 7,
        reused_len: 64,
        max_tokens: 32,
        sampling: SamplingParams { top_k: 5, frequency_penalty: 0.5, ..SamplingParams::GREEDY },
        reason: FinishReason::Stop,
        begun: Duration::from_millis(100),
        first_token: Duration::from_millis(350),
        ended: Duration::from_millis(900),
    }
}

/// Takes `num_requests` requests, answers each with `status`, and returns the spans.
fn collector(status: &'static str, num_requests: usize) -> (SocketAddr, JoinHandle<Vec<Span>>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let thread = std::thread::spawn(move || {
        let mut spans = Vec::new();
        for _ in 0..num_requests {
            let (stream, _) = listener.accept().unwrap();
            let mut reader = BufReader::new(stream);
            let mut len = 0;
            let mut head = String::new();
            while !head.ends_with("\r\n\r\n") {
                let mut line = String::new();
                reader.read_line(&mut line).unwrap();
                if let Some(value) = line.to_lowercase().strip_prefix("content-length:") {
                    len = value.trim().parse().unwrap();
                }
                head.push_str(&line);
            }
            assert!(head.starts_with("POST /v1/traces HTTP/1.1\r\n"), "{head}");
            assert!(head.to_lowercase().contains("content-type: application/x-protobuf\r\n"), "{head}");
            let mut body = vec![0; len];
            reader.read_exact(&mut body).unwrap();
            let request = ExportTraceServiceRequest::decode(body.as_slice()).unwrap();
            for resource in request.resource_spans {
                // The exporter keeps them in a map, so their order differs from run to run.
                let attributes = resource.resource.unwrap().attributes;
                assert!(attributes.iter().any(|attribute| attribute.key == "service.name"), "{attributes:?}");
                spans.extend(resource.scope_spans.into_iter().flat_map(|scope| scope.spans));
            }
            let answer = format!("HTTP/1.1 {status}\r\ncontent-length: 0\r\nconnection: close\r\n\r\n");
            reader.into_inner().write_all(answer.as_bytes()).unwrap();
        }
        spans
    });
    (address, thread)
}

#[test]
fn answers_arrive_as_spans_of_the_genai_conventions() {
    let (address, collected) = collector("200 OK", 1);
    let clock = Clock::start();
    let tracer = Tracer::start(&format!("http://{address}/"), "my-pipeline", clock).unwrap();
    let on_answer = tracer.tracing("smollm2", |_| None).on_answer;
    on_answer(&answered(Some(TRACE_PARENT)));
    on_answer(&answered(None));
    tracer.finish();
    assert_eq!(tracer.snapshot(), TracesSnapshot { exported: 2, dropped: 0 });
    let spans = collected.join().unwrap();
    let [child, root] = spans.as_slice() else { panic!("{} spans", spans.len()) };
    assert_eq!(child.trace_id, 0x0af7_6519_16cd_43dd_8448_eb21_1c80_319c_u128.to_be_bytes());
    assert_eq!(child.parent_span_id, 0xb7ad_6b71_6920_3331_u64.to_be_bytes());
    assert!(root.parent_span_id.is_empty() && root.trace_id != child.trace_id);
    assert_eq!(child.name, "chat smollm2");
    let start = clock.wall_start().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_nanos() as u64;
    assert_eq!(child.start_time_unix_nano, start + 100_000_000);
    assert_eq!(child.end_time_unix_nano - child.start_time_unix_nano, 800_000_000);
    assert_eq!(child.events[0].name, "first_token");
    let attribute = |key: &str| {
        let found = child.attributes.iter().find(|attribute| attribute.key == key);
        found.unwrap_or_else(|| panic!("no {key}")).value.clone().unwrap().value.unwrap()
    };
    assert_eq!(attribute("gen_ai.operation.name"), Any::StringValue("chat".to_owned()));
    assert_eq!(attribute("gen_ai.request.model"), Any::StringValue("smollm2".to_owned()));
    assert_eq!(attribute("gen_ai.prompt.name"), Any::StringValue("summary".to_owned()));
    assert_eq!(attribute("gen_ai.usage.input_tokens"), Any::IntValue(120));
    assert_eq!(attribute("gen_ai.usage.cache_read.input_tokens"), Any::IntValue(64));
    assert_eq!(attribute("gen_ai.usage.output_tokens"), Any::IntValue(7));
    assert_eq!(attribute("gen_ai.request.top_k"), Any::IntValue(5));
    assert_eq!(attribute("gen_ai.request.frequency_penalty"), Any::DoubleValue(0.5));
    assert_eq!(attribute("gen_ai.response.time_to_first_chunk"), Any::DoubleValue(0.25));
    let Any::ArrayValue(reasons) = attribute("gen_ai.response.finish_reasons") else { panic!("no list") };
    assert_eq!(reasons.values[0].value, Some(Any::StringValue("stop".to_owned())));
}

#[test]
fn a_collector_that_refuses_or_is_gone_costs_spans_and_nothing_else() {
    let (address, collected) = collector("503 Service Unavailable", 1);
    let refused = Tracer::start(&format!("http://{address}"), "p", Clock::start()).unwrap();
    (refused.tracing("m", |_| None).on_answer)(&answered(None));
    refused.finish();
    assert_eq!(refused.snapshot(), TracesSnapshot { exported: 0, dropped: 1 });
    collected.join().unwrap();
    // The port was given back: nobody listens there.
    let gone = Tracer::start(&format!("http://{address}"), "p", Clock::start()).unwrap();
    let on_answer = gone.tracing("m", |_| None).on_answer;
    on_answer(&answered(None));
    gone.finish();
    on_answer(&answered(None));
    assert_eq!(gone.snapshot(), TracesSnapshot { exported: 0, dropped: 2 });
}

#[test]
fn a_full_queue_drops_at_once() {
    // Accepts nothing, so the first batch waits until its time is over.
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    let tracer = Tracer::start(&endpoint, "p", Clock::start()).unwrap();
    let on_answer = tracer.tracing("m", |_| None).on_answer;
    let most = MAX_WAITING_SPANS + 2 * MAX_BATCH_SPANS;
    for _ in 0..2 * most {
        on_answer(&answered(None));
    }
    assert!(tracer.snapshot().dropped >= (2 * most - most) as u64);
    drop(listener);
    tracer.finish();
    assert_eq!(tracer.snapshot().exported + tracer.snapshot().dropped, 2 * most as u64);
}

#[test]
fn only_a_valid_parent_counts_and_one_that_is_not_sampled_is_respected() {
    assert!(parse_trace_parent(TRACE_PARENT).is_some_and(|(_, _, flags)| flags.is_sampled()));
    assert!(parse_trace_parent(&format!("{}-more", TRACE_PARENT.replacen("00", "01", 1))).is_some());
    for bad in [
        "",
        "garbage",
        "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331",
        "00-0AF7651916CD43DD8448EB211C80319C-b7ad6b7169203331-01",
        "00-00000000000000000000000000000000-b7ad6b7169203331-01",
        "00-0af7651916cd43dd8448eb211c80319c-0000000000000000-01",
        "ff-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
        "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01-more",
        "00-0af7651916cd43dd8448eb211c80319c-b7ad6b716920333é-01",
    ] {
        assert!(parse_trace_parent(bad).is_none(), "{bad:?}");
    }
    let not_sampled = TRACE_PARENT.replace("-01", "-00");
    assert!(span("m", &answered(Some(&not_sampled)), SystemTime::UNIX_EPOCH).is_none());
    let orphan = span("m", &answered(Some("garbage")), SystemTime::UNIX_EPOCH).unwrap();
    assert_eq!(orphan.parent_span_id, SpanId::INVALID);
}
