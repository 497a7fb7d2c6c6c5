//! How topics are read: by pattern, from a time on, as text, by a model that is slower than the group allows.
#![expect(clippy::unwrap_used, reason = "helpers of tests may panic")]

use serde_json::Value;
use tidemill_connectors::kafka::tools::Record;
use tidemill_tests::Pipeline;
use tidemill_tests::kafka::Broker;

fn pipeline(name: &str, source: &str, prompt: &str, sink: &str) -> Pipeline {
    let broker = Broker::shared();
    for suffix in ["out", "errors"] {
        broker.create_topic(&format!("{name}-{suffix}"), 1);
    }
    let mut pipeline = Pipeline::new(&format!(
        "name: {name}\nmodel: {{ name: fake }}\nsource: {{ kafka: {{ brokers: '${{BROKERS}}', {source} }} }}\n\
         steps:\n  - generate: {{ name: answer, prompt: '{prompt}', max_tokens: 4 }}\n\
         sink: {{ kafka: {{ topic: {name}-out{sink} }} }}\n\
         errors: {{ kafka: {{ topic: {name}-errors }}, budget: 100% }}\n"
    ));
    pipeline.env.push(("BROKERS", broker.address().to_owned()));
    pipeline
}

fn results(name: &str) -> Vec<Value> {
    let records = Broker::shared().read(&format!("{name}-out"));
    records.iter().map(|record| serde_json::from_slice(record.value.as_ref().unwrap()).unwrap()).collect()
}

#[test]
fn topics_by_pattern_and_text_as_it_is() {
    let broker = Broker::shared();
    for topic in ["feed-a", "feed-b", "other-c"] {
        broker.create_topic(topic, 2);
        broker.produce(topic, (0..20).map(|id| Record::new(&id.to_string(), format!("{topic} says {id}"))));
    }
    let source = "pattern: ^feed-, format: text";
    let prompt = "{{ kafka.topic }} {{ kafka.key }}: {{ value }}";
    let pipeline = pipeline("pattern", source, prompt, ", delivery: at_least_once, value: '{{ value }}!'");
    pipeline.run(&["run", "--quiet", "--until-end"]).expect_code(0);
    let mut values: Vec<String> = broker
        .read("pattern-out")
        .into_iter()
        .map(|record| String::from_utf8(record.value.unwrap()).unwrap())
        .collect();
    values.sort();
    let mut expected: Vec<String> = ["feed-a", "feed-b"]
        .iter()
        .flat_map(|topic| (0..20).map(move |id| format!("{topic} says {id}!")))
        .collect();
    expected.sort();
    assert_eq!(values, expected);
    assert_eq!(broker.committed("pattern", "feed-b"), broker.ends("feed-b"), "at least once commits too");
}

#[test]
fn a_new_group_begins_where_it_is_told() {
    let broker = Broker::shared();
    broker.create_topic("times-in", 1);
    let old = |id: u64| Record {
        timestamp: Some(1_700_000_000_000 + id as i64 * 1000),
        ..Record::new("k", format!("{{\"id\": {id}, \"text\": \"t\"}}"))
    };
    broker.produce("times-in", (0..10).map(old));
    let ids = |name: &str| results(name).iter().map(|row| row["id"].as_u64().unwrap()).collect::<Vec<_>>();
    let source = "topics: [times-in], start: { timestamp: 2023-11-14T22:13:26Z }";
    pipeline("since", source, "{{ text }}", "").run(&["run", "--quiet", "--until-end"]).expect_code(0);
    assert_eq!(ids("since"), [6, 7, 8, 9]);
    let late = pipeline("late", "topics: [times-in], start: latest", "{{ text }}", "");
    late.run(&["run", "--quiet", "--until-end"]).expect_code(0);
    assert_eq!(ids("late"), [0_u64; 0]);
    let committed = pipeline("none", "topics: [times-in], start: committed", "{{ text }}", "");
    committed.run(&["run", "--quiet", "--until-end"]).expect_code(1);
}

/// The group throws out who does not poll for three seconds; a step takes longer.
#[test]
fn a_slow_model_does_not_lose_its_partitions() {
    let broker = Broker::shared();
    broker.create_topic("slow-in", 2);
    broker.produce(
        "slow-in",
        (0..60)
            .map(|id| Record::new(&id.to_string(), format!("{{\"id\": {id}, \"text\": \"number {id}\"}}"))),
    );
    let options = "max.poll.interval.ms: 3000, session.timeout.ms: 3000, heartbeat.interval.ms: 500";
    let source = format!("topics: [slow-in], options: {{ {options} }}");
    let mut pipeline = pipeline("slow", &source, "Summarize this as well as you can: {{ text }}", "");
    let definition =
        std::fs::read_to_string(pipeline.path("pipeline.yaml")).unwrap() + "credit: { documents: 8 }\n";
    std::fs::write(pipeline.path("pipeline.yaml"), definition).unwrap();
    pipeline.env.push(("TIDEMILL_FAKE_DELAY_US", "12000".to_owned()));
    pipeline.env.push(("TIDEMILL_LOG", "tidemill::ledger=debug,info".to_owned()));
    let mut child = pipeline.start(&["run", "--quiet", "--until-end"], "slow.log");
    assert!(child.wait().unwrap().success());
    let log = std::fs::read_to_string(pipeline.path("slow.log")).unwrap();
    assert_eq!(log.matches(" assigned partitions").count(), 1, "{log}");
    assert_eq!(results("slow").len(), 60);
    assert_eq!(pipeline.computed("slow.log").len(), 60, "{log}");
}
