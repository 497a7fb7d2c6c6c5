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
    let committed = pipeline("none", "topics: [times-in], start: committed", "{{ text }}", "");
    committed.run(&["run", "--quiet", "--until-end"]).expect_code(1);
}

const UNTIL_END: [&str; 3] = ["run", "--quiet", "--until-end"];

fn numbered(ids: std::ops::Range<u64>) -> impl Iterator<Item = Record> {
    ids.map(|id| Record {
        timestamp: Some(1_700_000_000_000 + id as i64 * 1000),
        ..Record::new("k", format!("{{\"id\": {id}, \"text\": \"t\"}}"))
    })
}

fn ids(name: &str) -> Vec<u64> {
    results(name).iter().map(|row| row["id"].as_u64().unwrap()).collect()
}

/// What comes while nobody runs is read by the next run, also where the first one had nothing to commit.
#[test]
fn a_start_is_kept_for_the_next_run() {
    let broker = Broker::shared();
    broker.create_topic("kept-in", 1);
    broker.produce("kept-in", numbered(0..10));
    let late = pipeline("late", "topics: [kept-in], start: latest", "{{ text }}", "");
    late.run(&UNTIL_END).expect_code(0);
    assert_eq!(ids("late"), [0_u64; 0]);
    broker.produce("kept-in", numbered(10..13));
    late.run(&UNTIL_END).expect_code(0);
    assert_eq!(ids("late"), [10, 11, 12]);
}

#[test]
fn a_group_that_began_at_a_time_goes_on_where_it_was() {
    let broker = Broker::shared();
    broker.create_topic("again-in", 1);
    broker.produce("again-in", numbered(0..10));
    let source = "topics: [again-in], start: { timestamp: 2023-11-14T22:13:26Z }";
    let again = pipeline("again", source, "{{ text }}", "");
    again.run(&UNTIL_END).expect_code(0);
    broker.produce("again-in", numbered(10..13));
    again.run(&UNTIL_END).expect_code(0);
    assert_eq!(ids("again"), [6, 7, 8, 9, 10, 11, 12]);
}

#[test]
fn a_group_with_offsets_goes_on_from_them() {
    let broker = Broker::shared();
    broker.create_topic("goes-in", 1);
    broker.produce("goes-in", numbered(0..5));
    let goes = pipeline("goes", "topics: [goes-in]", "{{ text }}", "");
    goes.run(&UNTIL_END).expect_code(0);
    broker.produce("goes-in", numbered(5..8));
    let definition = std::fs::read_to_string(goes.path("pipeline.yaml")).unwrap();
    let definition = definition.replace("[goes-in]", "[goes-in], start: committed");
    std::fs::write(goes.path("pipeline.yaml"), definition).unwrap();
    goes.run(&UNTIL_END).expect_code(0);
    assert_eq!(ids("goes"), [0, 1, 2, 3, 4, 5, 6, 7]);
}

#[test]
fn templates_see_where_a_record_comes_from_and_write_headers() {
    let broker = Broker::shared();
    broker.create_topic("origin-in", 2);
    let record = |partition| Record {
        partition: Some(partition),
        timestamp: Some(1_700_000_000_000),
        headers: vec![("lang".to_owned(), Some(format!("l{partition}").into_bytes()))],
        ..Record::new("k", "{\"text\": \"t\"}")
    };
    broker.produce("origin-in", [record(1), record(1), record(0)]);
    let of = "{{ kafka.headers.lang }} {{ kafka.timestamp }} {{ kafka.partition }} {{ kafka.offset }}";
    let sink =
        format!(", value: '{of}', headers: {{ from: '{{{{ kafka.topic }}}}/{{{{ kafka.partition }}}}' }}");
    let origin = pipeline("origin", "topics: [origin-in]", of, &sink);
    origin.run(&UNTIL_END).expect_code(0);
    let text = |bytes: &Option<Vec<u8>>| String::from_utf8(bytes.clone().unwrap()).unwrap();
    let mut found: Vec<(String, String)> = broker
        .read("origin-out")
        .iter()
        .map(|record| {
            let from = record.headers.iter().find(|(name, _)| name == "from").unwrap();
            (text(&record.value), text(&from.1))
        })
        .collect();
    found.sort();
    let expected = [(0, 0), (1, 0), (1, 1)].map(|(partition, offset)| {
        let value = format!("l{partition} 2023-11-14T22:13:20Z {partition} {offset}");
        (value, format!("origin-in/{partition}"))
    });
    assert_eq!(found, expected);
}

/// As Java's client does it.
fn murmur2(bytes: &[u8]) -> i32 {
    const M: u32 = 0x5bd1_e995;
    let mut hash = 0x9747_b28c ^ bytes.len() as u32;
    let (words, rest) = bytes.as_chunks::<4>();
    for word in words {
        let mut word = u32::from_le_bytes(*word).wrapping_mul(M);
        word ^= word >> 24;
        hash = hash.wrapping_mul(M) ^ word.wrapping_mul(M);
    }
    if !rest.is_empty() {
        for (index, byte) in rest.iter().enumerate() {
            hash ^= u32::from(*byte) << (8 * index);
        }
        hash = hash.wrapping_mul(M);
    }
    hash = (hash ^ (hash >> 13)).wrapping_mul(M);
    (hash ^ (hash >> 15)) as i32
}

#[test]
fn keys_lie_where_javas_partitioner_puts_them() {
    let vectors = [
        ("21", -973_932_308),
        ("foobar", -790_332_482),
        ("a-little-bit-long-string", -985_981_536),
        ("a-little-bit-longer-string", -1_486_304_829),
        ("lkjh234lh9fiuh90y23oiuhsafujhadof229phr9h19h89h8", -58_897_971),
        ("abc", 479_470_107),
    ];
    let broker = Broker::shared();
    broker.create_topic("java-in", 1);
    broker.create_topic("java-wide", 7);
    broker.produce("java-in", vectors.map(|(key, _)| Record::new(key, "{\"text\": \"t\"}")));
    let java = pipeline("java", "topics: [java-in]", "{{ text }}", "");
    let definition = std::fs::read_to_string(java.path("pipeline.yaml")).unwrap();
    std::fs::write(java.path("pipeline.yaml"), definition.replace("java-out", "java-wide")).unwrap();
    java.run(&UNTIL_END).expect_code(0);
    let records = broker.read("java-wide");
    assert_eq!(records.len(), vectors.len());
    for (key, hash) in vectors {
        assert_eq!(murmur2(key.as_bytes()), hash, "{key}");
        let record = records.iter().find(|record| record.key.as_deref() == Some(key.as_bytes())).unwrap();
        assert_eq!(record.partition, Some((hash & 0x7fff_ffff) % 7), "{key}");
    }
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
