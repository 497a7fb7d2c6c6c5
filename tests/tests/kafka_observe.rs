//! What a run on topics shows of itself: metrics, readiness, and spans that go on with the trace of a record.
#![expect(clippy::unwrap_used, reason = "helpers of tests may panic")]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpListener;
use std::process::{Child, Command};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tidemill_connectors::kafka::tools::Record;
use tidemill_tests::kafka::Broker;
use tidemill_tests::{Pipeline, http_get};

const TRACE_ID: u128 = 0x0af7_6519_16cd_43dd_8448_eb21_1c80_319c;

/// Takes what is sent to a collector of OpenTelemetry.
fn collector() -> (u16, Arc<Mutex<Vec<u8>>>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let all = Arc::new(Mutex::new(Vec::new()));
    let taken = Arc::clone(&all);
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut reader = BufReader::new(stream.unwrap());
            let (mut len, mut line) = (0, String::new());
            while reader.read_line(&mut line).unwrap() > 2 {
                if let Some(value) = line.to_lowercase().strip_prefix("content-length:") {
                    len = value.trim().parse().unwrap();
                }
                line.clear();
            }
            let mut body = vec![0; len];
            reader.read_exact(&mut body).unwrap();
            taken.lock().unwrap().extend(body);
            let answer = b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\nconnection: close\r\n\r\n";
            reader.into_inner().write_all(answer).unwrap();
        }
    });
    (port, all)
}

/// The value of a metric, summed over its labels.
fn metric(text: &str, name: &str) -> f64 {
    let of_name = text.lines().filter(|line| line.starts_with(&format!("{name}{{")));
    of_name.map(|line| line.rsplit(' ').next().unwrap().parse::<f64>().unwrap()).sum()
}

fn await_metrics(port: u16, child: &mut Child, is_there: impl Fn(&str) -> bool) -> String {
    loop {
        assert!(child.try_wait().unwrap().is_none(), "the run has ended");
        match http_get(port, "/metrics").filter(|text| is_there(text)) {
            Some(text) => return text,
            None => std::thread::sleep(Duration::from_millis(50)),
        }
    }
}

#[test]
fn a_run_shows_its_figures_and_traces() {
    let broker = Broker::shared();
    for topic in ["seen-in", "seen-out", "seen-errors"] {
        broker.create_topic(topic, 2);
    }
    let (collector, spans) = collector();
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let pipeline = Pipeline::new(&format!(
        "name: seen\nmodel: {{ name: fake }}\n\
         source: {{ kafka: {{ brokers: '{}', topics: [seen-in] }} }}\n\
         steps:\n  - generate: {{ name: answer, prompt: 'Summarize {{{{ text }}}}', max_tokens: 8 }}\n\
         sink: {{ kafka: {{ topic: seen-out }} }}\nerrors: {{ kafka: {{ topic: seen-errors }} }}\n\
         tenants: {{ by: '{{{{ who }}}}' }}\ntraces: {{ endpoint: 'http://127.0.0.1:{collector}' }}\n",
        broker.address()
    ));
    let mut child = pipeline.start(&["run", "--quiet", "--listen", &format!("127.0.0.1:{port}")], "seen.log");
    broker.produce(
        "seen-in",
        (0..100).map(|id| Record {
            headers: vec![(
                "traceparent".to_owned(),
                Some(format!("00-{TRACE_ID:032x}-{:016x}-01", id + 1).into_bytes()),
            )],
            ..Record::new(&id.to_string(), format!("{{\"text\": \"news {id}\", \"who\": \"w{}\"}}", id % 3))
        }),
    );
    let text = await_metrics(port, &mut child, |text| {
        metric(text, "tidemill_documents_done_total") == 100.0
            && metric(text, "tidemill_spans_exported_total") == 100.0
            && text.contains("tidemill_kafka_lag{")
            && metric(text, "tidemill_kafka_lag") == 0.0
    });
    for (name, at_least) in [
        ("vllm:time_to_first_token_seconds_count", 100.0),
        ("vllm:e2e_request_latency_seconds_count", 100.0),
        ("vllm:request_success_total", 100.0),
        ("vllm:prompt_tokens_total", 1000.0),
        ("vllm:iteration_tokens_total_sum", 1000.0),
        ("tidemill_tenant_documents_total", 100.0),
        ("tidemill_tenant_wait_seconds_count", 100.0),
        ("tidemill_kafka_transactions_committed_total", 1.0),
        ("tidemill_credit_bytes", 1.0),
    ] {
        assert!(metric(&text, name) >= at_least, "{name} is {}", metric(&text, name));
    }
    assert_eq!(metric(&text, "tidemill_kafka_transactions_aborted_total"), 0.0);
    for path in ["/healthz", "/readyz"] {
        assert!(http_get(port, path).unwrap().starts_with("HTTP/1.1 200"), "{path}");
    }
    assert!(Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap().success());
    assert_eq!(child.wait().unwrap().code(), Some(130));
    let sent = spans.lock().unwrap().clone();
    let count = |bytes: &[u8]| sent.windows(bytes.len()).filter(|window| *window == bytes).count();
    assert_eq!(count(&TRACE_ID.to_be_bytes()), 100, "each span belongs to the trace of its record");
    assert_eq!(count(&7_u64.to_be_bytes()), 1, "and is a child of the span that wrote the record");
    assert!(count(b"gen_ai.usage.input_tokens") >= 100);
    assert_eq!(count(b"news 7"), 0, "text is not sent");
}
