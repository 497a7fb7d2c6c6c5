use std::path::Path;

use super::*;

fn full() -> Snapshot {
    let partition = PartitionView {
        topic: "articles".to_owned(),
        partition: 3,
        position: Some(40),
        committed: Some(30),
        end: Some(50),
        lag: Some(20),
    };
    let mut time_to_first_token = Histogram::new(&[0.5]);
    [0.2, 0.7].into_iter().for_each(|seconds| time_to_first_token.observe(seconds));
    let mut wait = Histogram::new(&[1.0]);
    wait.observe(0.5);
    let pipeline = PipelineSnapshot {
        name: "news".to_owned(),
        model: "fake".to_owned(),
        prompt_tokens: 7,
        engines: vec![EngineSnapshot {
            kv_pages_total: 4,
            kv_pages_in_use: 1,
            stopped: 3,
            swapped_out_pages: 5,
            e2e_latency: time_to_first_token.clone(),
            time_to_first_token,
            ..EngineSnapshot::default()
        }],
        tenants: [("acme".to_owned(), TenantSnapshot { wait_seconds: wait, ..TenantSnapshot::default() })]
            .into(),
        kafka: Some(KafkaView { partitions: vec![partition], ..KafkaView::default() }),
        ..PipelineSnapshot::default()
    };
    Snapshot { pipelines: vec![pipeline] }
}

#[test]
fn figures_have_their_names_and_labels() {
    let text = encode(full());
    for line in [
        "vllm:prompt_tokens_total{pipeline=\"news\",model_name=\"fake\"} 7",
        "vllm:kv_cache_usage_perc{pipeline=\"news\",model_name=\"fake\",engine=\"0\"} 0.25",
        "tidemill_kv_pages_swapped_out_total{pipeline=\"news\",model_name=\"fake\",engine=\"0\"} 5",
        "vllm:request_success_total{pipeline=\"news\",model_name=\"fake\",engine=\"0\",finished_reason=\"stop\"} 3",
        "vllm:time_to_first_token_seconds_bucket{le=\"0.5\",pipeline=\"news\",model_name=\"fake\",engine=\"0\"} 1",
        "vllm:time_to_first_token_seconds_bucket{le=\"+Inf\",pipeline=\"news\",model_name=\"fake\",engine=\"0\"} 2",
        "tidemill_kafka_lag{pipeline=\"news\",topic=\"articles\",partition=\"3\"} 20",
        "tidemill_tenant_wait_seconds_bucket{le=\"1.0\",pipeline=\"news\",tenant=\"acme\"} 1",
        "tidemill_tenant_documents_total{pipeline=\"news\",tenant=\"acme\"} 0",
    ] {
        assert!(text.contains(line), "{line} is not in\n{text}");
    }
    assert!(text.ends_with("# EOF\n"));
}

#[test]
fn dashboard_and_alerts_ask_for_metrics_that_exist() {
    let deploy = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy");
    let read = |name: &str| std::fs::read_to_string(deploy.join(name)).unwrap();
    let dashboard: serde_json::Value = serde_json::from_str(&read("grafana/tidemill.json")).unwrap();
    let panels = dashboard["panels"].as_array().unwrap().iter();
    let targets = panels.flat_map(|panel| panel["targets"].as_array().unwrap());
    let mut queries: Vec<String> =
        targets.map(|target| target["expr"].as_str().unwrap().to_owned()).collect();
    let alerts = read("prometheus-alerts.yaml");
    queries.extend(alerts.lines().filter_map(|line| line.trim().strip_prefix("expr:")).map(str::to_owned));
    let text = encode(full());
    let mut num_names = 0;
    for query in &queries {
        let is_name = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == ':';
        let names = query
            .split(|c| !is_name(c))
            .filter(|name| name.starts_with("vllm:") || name.starts_with("tidemill_"));
        for name in names {
            num_names += 1;
            assert!(text.contains(&format!("\n{name}{{")), "{name} is asked for and does not exist");
        }
    }
    assert!(num_names > 11, "{queries:?}");
}
