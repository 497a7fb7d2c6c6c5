//! What records may be encoded as, against a real broker and a real schema registry.
#![expect(clippy::unwrap_used, reason = "helpers of tests may panic")]

use std::collections::BTreeMap;
use std::time::Duration;

use serde_json::{Value, json};
use tidemill_connectors::kafka::config::Cluster;
use tidemill_connectors::kafka::record::header;
use tidemill_connectors::kafka::tools::{self, Record};
use tidemill_tests::Pipeline;
use tidemill_tests::kafka::Broker;
use tidemill_tests::kafka::proxy::Proxy;
use tidemill_tests::kafka::registry::Registry;

/// A pipeline from topic `NAME-in` to `NAME-out`.
fn topics(name: &str, format: &str, prompt: &str) -> Pipeline {
    let broker = Broker::shared();
    for suffix in ["in", "out", "errors"] {
        broker.create_topic(&format!("{name}-{suffix}"), 1);
    }
    let brokers = broker.address();
    Pipeline::new(&format!(
        "name: {name}\nmodel: {{ name: fake }}\n\
         source: {{ kafka: {{ brokers: '{brokers}', topics: [{name}-in], {format} }} }}\n\
         steps:\n  - generate: {{ name: answer, prompt: '{prompt}', max_tokens: 8 }}\n\
         sink: {{ kafka: {{ topic: {name}-out }} }}\nerrors: {{ kafka: {{ topic: {name}-errors }}, budget: 100% }}\n"
    ))
}

fn framed(id: u32, value: &[u8]) -> Record {
    let value = [&[0], &id.to_be_bytes()[..], value].concat();
    Record { value: Some(value), ..Record::new("key", String::new()) }
}

fn values(topic: &str) -> Vec<Value> {
    let records = Broker::shared().read(topic);
    records.iter().map(|record| serde_json::from_slice(record.value.as_ref().unwrap()).unwrap()).collect()
}

/// By offset, what the errors topic says of records; the bytes must be those that were read.
fn errors(topic: &str, input: &[Record]) -> BTreeMap<usize, String> {
    let text = |record: &Record, name: &str| {
        let found = record.headers.iter().find(|(found, _)| found == name).unwrap();
        String::from_utf8(found.1.clone().unwrap()).unwrap()
    };
    let told = |record: &Record| {
        let offset: usize = text(record, header::ORIGIN_OFFSET).parse().unwrap();
        assert_eq!(record.value.clone().unwrap_or_default(), input[offset].value.clone().unwrap_or_default());
        assert_eq!(text(record, header::KIND), "malformed");
        (offset, text(record, header::MESSAGE))
    };
    Broker::shared().read(topic).iter().map(told).collect()
}

#[test]
fn avro_is_decoded_by_the_schema_that_a_record_names() {
    let registry = Registry::shared();
    let author =
        r#"{"type":"record","name":"Author","namespace":"news","fields":[{"name":"name","type":"string"}]}"#;
    let article = |more: &str| {
        format!(
            r#"{{"type":"record","name":"Article","namespace":"news","fields":[{{"name":"id","type":"long"}},
            {{"name":"text","type":"string"}},{{"name":"author","type":["null","news.Author"]}}{more}]}}"#
        )
    };
    registry.register("author", "AVRO", author, &[]);
    let references = [("news.Author", "author")];
    let old = registry.register("avro-in-value", "AVRO", &article(""), &references);
    let more = r#",{"name":"score","type":"double","default":0}"#;
    let new = registry.register("avro-in-value", "AVRO", &article(more), &references);
    let other =
        registry.register("other", "PROTOBUF", "syntax = \"proto3\"; message M { int32 id = 1; }", &[]);

    let pipeline = topics(
        "avro",
        &format!("format: avro, registry: {{ url: '{}' }}", registry.url()),
        "{{ text }}{% if author %} by {{ author.name }}{% endif %}",
    );
    let score = 0.5_f64.to_le_bytes();
    let input = [
        framed(old, b"\x0e\x08news\x02\x06Ada"),
        framed(new, &[b"\x10\x08more\x00", &score[..]].concat()),
        framed(4_000_000, b"\x0e\x08news\x00"),
        framed(old, b"\x0e\x08ne"),
        Record::new("key", "{\"id\": 1}".to_owned()),
        framed(other, b"\x00\x08\x01"),
        Record { value: None, ..Record::new("key", String::new()) },
        framed(old, b"\x12\x08last\x00"),
    ];
    Broker::shared().produce("avro-in", input.clone());
    pipeline.run(&["run", "--quiet", "--until-end"]).expect_code(0);
    let mut results = values("avro-out");
    for result in &mut results {
        assert!(result["answer"].is_string());
        result.as_object_mut().unwrap().retain(|name, _| !name.starts_with("answer"));
    }
    let expected = [
        json!({"id": 7, "text": "news", "author": {"name": "Ada"}}),
        json!({"id": 8, "text": "more", "author": null, "score": 0.5}),
        json!({"id": 9, "text": "last", "author": null}),
    ];
    assert_eq!(results, expected);
    let errors = errors("avro-errors", &input);
    assert_eq!(errors.keys().copied().collect::<Vec<_>>(), [2, 3, 4, 5, 6]);
    for (offset, reason) in [
        (2, "knows no schemas/ids/4000000"),
        (3, "not a value of schema"),
        (4, "begins with byte 0x7b"),
        (5, "is of type PROTOBUF, the topic's format is AVRO"),
        (6, "tombstone"),
    ] {
        assert!(errors[&offset].contains(reason), "{}", errors[&offset]);
    }
}

#[test]
fn protobuf_is_decoded_by_the_message_that_a_record_names() {
    let registry = Registry::shared();
    let author = "syntax = \"proto3\"; package news; message Author { string name = 1; }";
    let article = "syntax = \"proto3\"; package news; import \"author.proto\";\
        message Other { int32 x = 1; } message Article { int64 id = 1; string text = 2; Author author = 3; }";
    registry.register("proto-author", "PROTOBUF", author, &[]);
    let id = registry.register("proto-in-value", "PROTOBUF", article, &[("author.proto", "proto-author")]);
    let pipeline = topics(
        "proto",
        &format!("format: protobuf, registry: {{ url: '{}' }}", registry.url()),
        "{{ text }} by {{ author.name }}",
    );
    // The second message of the file: a path of one step, to index 1, in zigzag.
    let input = [
        framed(id, b"\x02\x02\x08\x07\x12\x04news\x1a\x05\x0a\x03Ada"),
        framed(id, b"\x02\x08\x08\x07"),
        framed(id, b"\x02\x02\x12\x7fcut"),
    ];
    Broker::shared().produce("proto-in", input.clone());
    pipeline.run(&["run", "--quiet", "--until-end"]).expect_code(0);
    let results = values("proto-out");
    assert_eq!(results.len(), 1);
    assert_eq!((&results[0]["id"], &results[0]["author"]), (&json!(7), &json!({"name": "Ada"})));
    let errors = errors("proto-errors", &input);
    assert!(errors[&1].contains("no message [4]") && errors.contains_key(&2), "{errors:?}");
}

#[test]
fn a_registry_that_is_away_is_waited_for() {
    let registry = Registry::shared();
    let schema = r#"{"type":"record","name":"A","fields":[{"name":"text","type":"string"}]}"#;
    let id = registry.register("away-in-value", "AVRO", schema, &[]);
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let proxy = Proxy::start((port, registry.port()));
    let url = registry.url().replace(&registry.port().to_string(), &port.to_string());
    // Below the pause, the group would throw out who does not poll.
    let options =
        "options: { session.timeout.ms: 1500, heartbeat.interval.ms: 300, max.poll.interval.ms: 2000 }";
    let pipeline =
        topics("away", &format!("format: avro, registry: {{ url: '{url}' }}, {options}"), "{{ text }}");
    proxy.cut();
    Broker::shared().produce("away-in", (0..100).map(|_| framed(id, b"\x08news")));
    let mut child = pipeline.start(&["run", "--quiet", "--until-end"], "away.log");
    std::thread::sleep(Duration::from_secs(4));
    assert!(child.try_wait().unwrap().is_none(), "it waits");
    assert!(values("away-out").is_empty());
    proxy.heal();
    assert!(child.wait().unwrap().success());
    assert_eq!(values("away-out").len(), 100);
    assert!(Broker::shared().read("away-errors").is_empty());
    let log = std::fs::read_to_string(pipeline.path("away.log")).unwrap();
    assert!(log.contains("waiting for the schema registry"), "{log}");
}

#[test]
fn all_codecs_are_read_and_written() {
    for codec in ["none", "gzip", "snappy", "lz4", "zstd"] {
        let broker = Broker::shared();
        let name = format!("codec-{codec}");
        let mut pipeline = topics(&name, "format: json", "{{ text }}");
        let definition = std::fs::read_to_string(pipeline.path("pipeline.yaml")).unwrap();
        let sink = format!("topic: {name}-out }}");
        let options = format!("topic: {name}-out, options: {{ compression.type: {codec} }} }}");
        pipeline = Pipeline::new(&definition.replace(&sink, &options));
        let options = BTreeMap::from([("compression.type".to_owned(), codec.to_owned())]);
        let cluster = Cluster { options, ..broker.cluster() };
        let input = (0..50)
            .map(|id| Record::new("key", format!("{{\"id\": {id}, \"text\": \"{}\"}}", "news ".repeat(100))));
        tools::produce(&cluster, &format!("{name}-in"), input).unwrap();
        pipeline.run(&["run", "--quiet", "--until-end"]).expect_code(0);
        let ids: Vec<Value> =
            values(&format!("{name}-out")).iter().map(|value| value["id"].clone()).collect();
        assert_eq!(ids, (0..50).map(Value::from).collect::<Vec<_>>(), "{codec}");
    }
}
