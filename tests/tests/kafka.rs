//! Topic to topic against the real broker: what a record becomes, where refused ones go, and that nothing is done twice.
#![expect(clippy::unwrap_used, reason = "helpers of tests may panic")]

use std::collections::BTreeMap;

use serde_json::{Value, json};
use tidemill_connectors::kafka::record::header;
use tidemill_connectors::kafka::tools::Record;
use tidemill_tests::Pipeline;
use tidemill_tests::kafka::Broker;

fn definition(name: &str, source: &str, sink: &str, errors: &str) -> String {
    format!(
        "name: {name}\nmodel: {{ name: fake }}\nsource: {{ {source} }}\nsteps:\n  - generate: {{ name: answer, \
         prompt: 'Summarize {{{{ text }}}}', max_tokens: 8 }}\nsink: {{ {sink} }}\nerrors: {{ {errors} }}\n"
    )
}

/// A pipeline from topic `NAME-in` to `NAME-out`, with the topics it needs.
fn topics(name: &str, num_partitions: i32, more: &str) -> Pipeline {
    let broker = Broker::shared();
    for suffix in ["in", "out", "errors"] {
        broker.create_topic(&format!("{name}-{suffix}"), num_partitions);
    }
    let mut pipeline = Pipeline::new(&definition(
        name,
        &format!("kafka: {{ brokers: '${{BROKERS}}', topics: [{name}-in] }}"),
        &format!("kafka: {{ topic: {name}-out{more} }}"),
        &format!("kafka: {{ topic: {name}-errors }}, budget: 100%"),
    ));
    pipeline.env.push(("BROKERS", broker.address().to_owned()));
    pipeline
}

fn value(record: &Record) -> Value {
    serde_json::from_slice(record.value.as_ref().unwrap()).unwrap()
}

fn headers(record: &Record) -> BTreeMap<&str, String> {
    let text = |value: &Option<Vec<u8>>| String::from_utf8(value.clone().unwrap_or_default()).unwrap();
    record.headers.iter().map(|(name, value)| (name.as_str(), text(value))).collect()
}

#[test]
fn a_record_keeps_what_it_had_and_nothing_is_done_twice() {
    let broker = Broker::shared();
    let pipeline = topics("whole", 3, "");
    let input = |id: usize| Record {
        timestamp: Some(1_700_000_000_000 + id as i64),
        headers: vec![("traceparent".to_owned(), Some(format!("00-{id:032x}-01").into_bytes()))],
        ..Record::new(
            &format!("key-{}", id % 10),
            format!("{{\"id\": {id}, \"text\": \"news {id}\", \"more\": [1.50]}}"),
        )
    };
    broker.produce("whole-in", (0..200).map(input));
    pipeline.run(&["run", "--quiet", "--until-end"]).expect_code(0);
    let results = broker.read("whole-out");
    assert_eq!(results.len(), 200);
    let mut last: BTreeMap<Vec<u8>, u64> = BTreeMap::new();
    for record in &results {
        let found = value(record);
        let id = found["id"].as_u64().unwrap();
        let expected = input(id as usize);
        assert_eq!((&record.key, record.timestamp), (&expected.key, expected.timestamp));
        assert_eq!(record.headers, expected.headers);
        assert_eq!(found["more"], json!([1.50]));
        assert!(found["answer"].is_string());
        let before = last.insert(record.key.clone().unwrap(), id);
        assert!(before.is_none_or(|before| before < id), "records of a key stay in order");
    }
    assert!(broker.read("whole-errors").is_empty());
    assert_eq!(broker.committed("whole", "whole-in"), broker.ends("whole-in"));
    // Nothing is left to do; then only what is new is done.
    pipeline.run(&["run", "--quiet", "--until-end"]).expect_code(0);
    assert_eq!(broker.read("whole-out").len(), 200);
    broker.produce("whole-in", (200..230).map(input));
    pipeline.run(&["run", "--quiet", "--until-end"]).expect_code(0);
    assert_eq!(broker.read("whole-out").len(), 230);
}

#[test]
fn refused_records_go_to_the_errors_topic_as_they_were() {
    let broker = Broker::shared();
    let pipeline = topics("poison", 1, "");
    let long = format!("{{\"text\": \"{}\"}}", "long ".repeat(20_000));
    let values: [Option<&[u8]>; 7] = [
        Some(b"{\"text\": \"fine\"}"),
        Some(b"{\"text\": "),
        Some(b"\xff\xfe"),
        None,
        Some(b"{\"other\": 1}"),
        Some(long.as_bytes()),
        Some(b"{\"text\": \"fine too\"}"),
    ];
    broker.produce(
        "poison-in",
        values.iter().map(|value| Record {
            key: Some(b"k".to_vec()),
            value: value.map(<[u8]>::to_vec),
            headers: vec![("mine".to_owned(), Some(b"kept".to_vec()))],
            ..Record::default()
        }),
    );
    pipeline.run(&["run", "--quiet", "--until-end"]).expect_code(0);
    assert_eq!(broker.read("poison-out").len(), 2);
    let errors = broker.read("poison-errors");
    let kinds = ["malformed", "malformed", "malformed", "null", "too_long"];
    assert_eq!(errors.len(), kinds.len());
    for ((error, kind), offset) in errors.iter().zip(kinds).zip(1..) {
        let headers = headers(error);
        assert_eq!(headers[header::KIND], kind, "{headers:?}");
        assert_eq!(headers[header::ORIGIN], "poison-in");
        assert_eq!(headers[header::ORIGIN_PARTITION], "0");
        assert_eq!(headers[header::ORIGIN_OFFSET], offset.to_string());
        assert_eq!(headers["mine"], "kept");
        assert!(!headers[header::MESSAGE].is_empty());
        assert_eq!(error.key.as_deref(), Some(&b"k"[..]));
        assert_eq!(error.value.as_deref().unwrap_or_default(), values[offset].unwrap_or_default());
    }
}

#[test]
fn a_result_beyond_the_topics_limit_is_an_error_and_the_rest_goes_on() {
    let broker = Broker::shared();
    broker.create_topic("large-in", 1);
    broker.create_topic_with("large-out", 1, &[("max.message.bytes", "2000")]);
    broker.create_topic("large-errors", 1);
    let mut pipeline = Pipeline::new(&definition(
        "large",
        "kafka: { brokers: '${BROKERS}', topics: [large-in] }",
        "kafka: { topic: large-out }",
        "kafka: { topic: large-errors }, budget: 100%",
    ));
    pipeline.env.push(("BROKERS", broker.address().to_owned()));
    let long = format!("{{\"id\": 7, \"text\": \"{}\"}}", "x".repeat(3000));
    let value = |id: usize| if id == 7 { long.clone() } else { format!("{{\"id\": {id}, \"text\": \"t\"}}") };
    broker.produce("large-in", (0..20).map(|id| Record::new("k", value(id))));
    pipeline.run(&["run", "--quiet", "--until-end"]).expect_code(0);
    assert_eq!(broker.read("large-out").len(), 19);
    let errors = broker.read("large-errors");
    assert_eq!(errors.len(), 1);
    assert_eq!(headers(&errors[0])[header::KIND], "too_large");
    assert!(headers(&errors[0])[header::MESSAGE].contains("limit is 2000"));
    assert_eq!(errors[0].value.as_deref(), Some(long.as_bytes()));
}

/// A compacted topic takes no record without a key, and an errors topic may take less than what was refused.
#[test]
fn what_a_topic_refuses_for_itself_is_an_error_and_the_rest_goes_on() {
    let broker = Broker::shared();
    let pipeline = topics("picky", 1, "");
    broker.create_topic_with("picky-compact", 1, &[("cleanup.policy", "compact")]);
    broker.create_topic_with("picky-small", 1, &[("max.message.bytes", "2048")]);
    let text = std::fs::read_to_string(pipeline.path("pipeline.yaml")).unwrap();
    let text = text.replace("picky-out", "picky-compact").replace("picky-errors", "picky-small");
    std::fs::write(pipeline.path("pipeline.yaml"), text).unwrap();
    let record = |key: Option<&str>, id: usize, more: usize| Record {
        key: key.map(|key| key.as_bytes().to_vec()),
        value: Some(
            format!("{{\"id\": {id}, \"text\": \"t\", \"more\": \"{}\"}}", "x".repeat(more)).into_bytes(),
        ),
        headers: vec![(header::TRUNCATED.to_owned(), Some(b"of another errors topic".to_vec()))],
        ..Record::default()
    };
    broker.produce(
        "picky-in",
        [record(Some("a"), 0, 10), record(None, 1, 10), record(None, 2, 9000), record(Some("b"), 3, 10)],
    );
    pipeline.run(&["run", "--quiet", "--until-end"]).expect_code(0);
    let ids: Vec<Value> =
        broker.read("picky-compact").iter().map(|record| value(record)["id"].clone()).collect();
    assert_eq!(ids, [json!(0), json!(3)]);
    let errors = broker.read("picky-small");
    assert_eq!(errors.len(), 2);
    for (error, offset) in errors.iter().zip([1, 2]) {
        let found = headers(error);
        assert_eq!(
            (found[header::ORIGIN].as_str(), found[header::ORIGIN_PARTITION].as_str()),
            ("picky-in", "0")
        );
        assert_eq!(found[header::ORIGIN_OFFSET], offset.to_string());
        assert_eq!(found[header::KIND], "refused");
    }
    assert!(!headers(&errors[0]).contains_key(header::TRUNCATED));
    assert_eq!(headers(&errors[1])[header::TRUNCATED], "true");
}

#[test]
fn a_partition_that_is_not_there_ends_the_run_with_the_reason() {
    let broker = Broker::shared();
    let pipeline = topics("narrow", 1, ", partition: input");
    broker.create_topic("narrow-wide", 3);
    let text = std::fs::read_to_string(pipeline.path("pipeline.yaml")).unwrap();
    std::fs::write(pipeline.path("pipeline.yaml"), text.replace("narrow-in", "narrow-wide")).unwrap();
    broker.produce(
        "narrow-wide",
        (0..3)
            .map(|partition| Record { partition: Some(partition), ..Record::new("k", "{\"text\": \"t\"}") }),
    );
    let run = pipeline.run(&["run", "--quiet", "--until-end"]).expect_code(1);
    let shown = run.stderr();
    assert!(shown.contains("has 1 partitions") && shown.contains("`partition: input`"), "{shown}");
}

#[test]
fn files_to_a_topic_and_a_topic_to_files() {
    let broker = Broker::shared();
    broker.create_topic("files-out", 2);
    broker.create_topic("files-out-errors", 1);
    let mut pipeline = Pipeline::new(&definition(
        "files",
        "jsonl: { path: input.jsonl }",
        "kafka: { brokers: '${BROKERS}', topic: files-out, key: '{{ id }}' }",
        "budget: 100%",
    ));
    pipeline.env.push(("BROKERS", broker.address().to_owned()));
    let lines = (0..100).map(|id| match id {
        50 => "{ broken\n".to_owned(),
        _ => format!("{{\"id\": {id}, \"text\": \"row {id}\"}}\n"),
    });
    std::fs::write(pipeline.path("input.jsonl"), lines.collect::<String>()).unwrap();
    pipeline.run(&["run", "--quiet"]).expect_code(0);
    let again = pipeline.run(&["run"]).expect_code(0);
    assert!(again.stderr().contains("nothing to do"), "{}", again.stderr());
    let results = broker.read("files-out");
    assert_eq!(results.len(), 99);
    for record in &results {
        let id = value(record)["id"].to_string();
        assert_eq!(record.key.as_deref(), Some(id.as_bytes()));
    }
    assert_eq!(headers(&broker.read("files-out-errors")[0])[header::ORIGIN_OFFSET], "50");

    let mut back = Pipeline::new(&definition(
        "back",
        "kafka: { brokers: '${BROKERS}', topics: [files-out] }",
        "jsonl: { path: out.jsonl }",
        "budget: 100%",
    ));
    back.env.push(("BROKERS", broker.address().to_owned()));
    let changed =
        std::fs::read_to_string(back.path("pipeline.yaml")).unwrap().replace("name: answer", "name: second");
    std::fs::write(back.path("pipeline.yaml"), changed).unwrap();
    back.run(&["run", "--quiet", "--until-end"]).expect_code(0);
    let rows = back.jsonl("out.jsonl");
    assert_eq!(rows.len(), 99);
    let row = &rows[0];
    assert_eq!(row["kafka"]["topic"], "files-out");
    assert!(row["value"].as_str().unwrap().contains("\"answer\""));
    broker.produce("files-out", [Record::new("new", "{\"text\": \"new\"}")]);
    back.run(&["run", "--quiet", "--until-end"]).expect_code(0);
    assert_eq!(back.jsonl("out.jsonl").len(), 100, "the offsets are in the manifest");
}

#[test]
fn a_world_that_is_not_there_is_a_clear_error() {
    let broker = Broker::shared();
    let pipeline = |brokers: &str, more: &str| {
        let mut pipeline = Pipeline::new(&definition(
            "absent",
            &format!("kafka: {{ brokers: '${{BROKERS}}', topics: [absent-in]{more} }}"),
            "kafka: { topic: absent-out }",
            "budget: 5%",
        ));
        pipeline.env.push(("BROKERS", brokers.to_owned()));
        pipeline
    };
    let missing = pipeline(broker.address(), "").run(&["run", "--quiet"]).expect_code(1);
    missing.expect_words(&["no topic \"absent-out\"", "--create --topic absent-out"]);
    let reserved = pipeline("x:1", ", options: { enable.auto.commit: true }").run(&["check"]).expect_code(2);
    reserved.expect_words(&["enable.auto.commit", "offsets are committed with the results"]);
    let unknown = pipeline("x:1", ", options: { sasl.mechanisme: PLAIN }").run(&["check"]).expect_code(2);
    unknown.expect_words(&["sasl.mechanisme", "CONFIGURATION.md"]);
    pipeline("x:1", "").run(&["check"]).expect_code(0);
}
