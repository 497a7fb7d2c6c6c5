//! `--until-end` ends when everything up to the end is written, and not before, nor never.

use std::collections::BTreeSet;
use std::net::TcpListener;
use std::process::{Child, Command};
use std::time::Duration;

use serde_json::Value;
use tidemill_connectors::kafka::tools::Record;
use tidemill_tests::kafka::Broker;
use tidemill_tests::{Pipeline, http_get};

fn record(id: u64) -> Record {
    Record::new(&id.to_string(), format!("{{\"id\": {id}, \"text\": \"number {id}\"}}"))
}

/// The group throws out who does not poll for three seconds, and all is read in the first moment.
#[test]
fn what_is_read_long_before_it_is_answered_is_written() {
    let broker = Broker::shared();
    for topic in ["tail-in", "tail-out", "tail-errors"] {
        broker.create_topic(topic, 2);
    }
    broker.produce("tail-in", (0..24).map(record));
    let options = "max.poll.interval.ms: 3000, session.timeout.ms: 3000, heartbeat.interval.ms: 500";
    let mut pipeline = Pipeline::new(&format!(
        "name: tail\nmodel: {{ name: fake }}\n\
         source: {{ kafka: {{ brokers: '{}', topics: [tail-in], options: {{ {options} }} }} }}\n\
         steps:\n  - generate: {{ name: answer, prompt: 'Summarize this as well as you can: {{{{ text }}}}', max_tokens: 4 }}\n\
         sink: {{ kafka: {{ topic: tail-out }} }}\nerrors: {{ kafka: {{ topic: tail-errors }} }}\n",
        broker.address()
    ));
    pipeline.env.push(("TIDEMILL_FAKE_DELAY_US", "12000".to_owned()));
    pipeline.env.push(("TIDEMILL_LOG", "tidemill::ledger=debug,info".to_owned()));
    let mut child = pipeline.start(&["run", "--quiet", "--until-end"], "tail.log");
    assert!(child.wait().unwrap().success());
    let log = std::fs::read_to_string(pipeline.path("tail.log")).unwrap();
    assert_eq!(log.matches(" assigned partitions").count(), 1, "{log}");
    assert_eq!(pipeline.computed("tail.log").len(), 24, "{log}");
    let id = |record: &Record| -> u64 {
        serde_json::from_slice::<Value>(record.value.as_ref().unwrap()).unwrap()["id"].as_u64().unwrap()
    };
    let results = broker.read("tail-out");
    let ids: BTreeSet<u64> = results.iter().map(id).collect();
    assert_eq!((results.len(), ids.len()), (24, 24), "{log}");
    assert_eq!(broker.committed("tail", "tail-in"), broker.ends("tail-in"), "{log}");
}

/// The client tells that a partition has ended without saying of which topic, and of partitions that are taken without
/// a group nobody tells before there are records.
#[test]
fn topics_without_anything_new_end_too_and_are_ready() {
    let broker = Broker::shared();
    for topic in ["one", "two", "empty"] {
        broker.create_topic(topic, 1);
    }
    broker.produce("one", (0..10).map(record));
    broker.produce("two", (10..20).map(record));
    let pipeline = Pipeline::new(&format!(
        "name: files\nmodel: {{ name: fake }}\n\
         source: {{ kafka: {{ brokers: '{}', topics: [one, two, empty] }} }}\n\
         steps:\n  - generate: {{ name: answer, prompt: '{{{{ text }}}}', max_tokens: 4 }}\n\
         sink: {{ jsonl: {{ path: out.jsonl }} }}\nerrors: {{ jsonl: {{ path: errors.jsonl }} }}\n",
        broker.address()
    ));
    for _ in 0..2 {
        pipeline.run(&["run", "--quiet", "--until-end"]).expect_code(0);
        assert_eq!(pipeline.jsonl("out.jsonl").len(), 20);
    }
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let mut child =
        pipeline.start(&["run", "--quiet", "--listen", &format!("127.0.0.1:{port}")], "ready.log");
    while !http_get(port, "/readyz").is_some_and(|answer| answer.starts_with("HTTP/1.1 200")) {
        assert!(child.try_wait().unwrap().is_none(), "the run has ended");
        std::thread::sleep(Duration::from_millis(50));
    }
    assert!(Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap().success());
    assert_eq!(child.wait().unwrap().code(), Some(130));
    assert_eq!(pipeline.jsonl("out.jsonl").len(), 20);
}

/// What a member was thrown out with is done when whoever took it over has committed it.
#[test]
fn work_that_was_taken_away_is_awaited() {
    let broker = Broker::shared();
    for topic in ["taken-in", "taken-out", "taken-errors"] {
        broker.create_topic(topic, 2);
    }
    broker.produce("taken-in", (0..120).map(record));
    let options = "session.timeout.ms: 1500, heartbeat.interval.ms: 300";
    let mut pipeline = Pipeline::new(&format!(
        "name: taken\nmodel: {{ name: fake }}\n\
         source: {{ kafka: {{ brokers: '{}', topics: [taken-in], options: {{ {options} }} }} }}\n\
         steps:\n  - generate: {{ name: answer, prompt: 'Summarize {{{{ text }}}}', max_tokens: 4 }}\n\
         sink: {{ kafka: {{ topic: taken-out, commit_ms: 10, transaction_timeout_ms: 1000 }} }}\nerrors: {{ kafka: {{ topic: taken-errors }} }}\n",
        broker.address()
    ));
    pipeline.env.push(("TIDEMILL_FAKE_DELAY_US", "1000".to_owned()));
    pipeline.env.push(("TIDEMILL_LOG", "tidemill::ledger=debug,info".to_owned()));
    let signal = |child: &Child, name: &str| {
        assert!(Command::new("kill").args([name, &child.id().to_string()]).status().unwrap().success());
    };
    let await_computed = |child: &mut Child, log: &str| {
        while pipeline.computed(log).len() < 20 {
            assert!(child.try_wait().unwrap().is_none(), "the run has ended");
            std::thread::sleep(Duration::from_millis(10));
        }
    };
    let mut child = pipeline.start(&["run", "--quiet", "--until-end"], "first.log");
    await_computed(&mut child, "first.log");
    signal(&child, "-STOP");
    let mut heir = pipeline.start(&["run", "--quiet"], "heir.log");
    await_computed(&mut heir, "heir.log");
    signal(&child, "-CONT");
    assert!(child.wait().unwrap().success());
    assert_eq!(broker.committed("taken", "taken-in"), broker.ends("taken-in"));
    assert_eq!(broker.read("taken-out").len(), 120);
    signal(&heir, "-INT");
    assert_eq!(heir.wait().unwrap().code(), Some(130));
}
