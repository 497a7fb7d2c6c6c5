//! A burst that arrives much faster than the model answers: memory stays where it was, the source keeps its
//! place in the group, the lag only falls, and nothing is lost. `make burst` shows a larger one as a plot.
#![expect(clippy::unwrap_used, reason = "helpers of tests may panic")]

use std::collections::BTreeSet;
use std::net::TcpListener;
use std::process::{Child, Command};
use std::time::Duration;

use serde_json::Value;
use tidemill_connectors::kafka::tools::Record;
use tidemill_tests::kafka::Broker;
use tidemill_tests::{Pipeline, http_get};

const CALM: u64 = 500;
const BURST: u64 = 12_000;
const MAX_GROWTH_KIB: u64 = 64 << 10;

/// What `tidemill top` sees.
fn look(port: u16, child: &mut Child) -> Value {
    loop {
        assert!(child.try_wait().unwrap().is_none(), "the run has ended");
        let answer = http_get(port, "/snapshot");
        if let Some(body) = answer.as_deref().and_then(|text| text.split("\r\n\r\n").nth(1)) {
            let pipeline = &serde_json::from_str::<Value>(body).unwrap()["pipelines"][0];
            if pipeline["kafka"]["partitions"].as_array().is_some_and(|partitions| !partitions.is_empty()) {
                return pipeline.clone();
            }
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

fn resident_kib(child: &Child) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", child.id())).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.split_whitespace().next().unwrap().parse().unwrap()
}

fn record(id: u64) -> Record {
    let text = "some words about the news of the day ".repeat(5);
    Record::new(&id.to_string(), format!("{{\"id\": {id}, \"text\": \"record {id} {text}\"}}"))
}

#[test]
fn a_burst_waits_outside() {
    let broker = Broker::shared();
    for topic in ["burst-in", "burst-out", "burst-errors"] {
        broker.create_topic(topic, 4);
    }
    let mut pipeline = Pipeline::new(&format!(
        "name: burst\nmodel: {{ name: fake }}\n\
         source: {{ kafka: {{ brokers: '{}', topics: [burst-in], options: {{ session.timeout.ms: 6000, heartbeat.interval.ms: 500, max.poll.interval.ms: 6000 }} }} }}\n\
         steps:\n  - generate: {{ name: answer, prompt: 'Summarize {{{{ text }}}}', max_tokens: 8 }}\n\
         sink: {{ kafka: {{ topic: burst-out }} }}\nerrors: {{ kafka: {{ topic: burst-errors }} }}\n\
         credit: {{ documents: 512 }}\n",
        broker.address()
    ));
    pipeline.env.push(("TIDEMILL_FAKE_DELAY_US", "4".to_owned()));
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let mut child =
        pipeline.start(&["run", "--quiet", "--listen", &format!("127.0.0.1:{port}")], "burst.log");
    broker.produce("burst-in", (0..CALM).map(record));
    while look(port, &mut child)["documents_done"] != CALM {
        std::thread::sleep(Duration::from_millis(50));
    }
    let calm = resident_kib(&child);
    broker.produce("burst-in", (CALM..CALM + BURST).map(record));
    let (mut peak, mut rebalances, mut lag) = (0, BTreeSet::new(), None);
    loop {
        let seen = look(port, &mut child);
        peak = peak.max(resident_kib(&child));
        rebalances.insert(seen["kafka"]["rebalances"].as_u64().unwrap());
        assert!(seen["documents_in_flight"].as_u64().unwrap() <= 512);
        let partitions = seen["kafka"]["partitions"].as_array().unwrap();
        let total = |key: &str| -> u64 { partitions.iter().filter_map(|one| one[key].as_u64()).sum() };
        // Where a partition ends is learned with what is fetched from it, so not of all at the same time.
        if total("end") == CALM + BURST {
            let now = total("lag");
            assert!(lag.is_none_or(|before| now <= before), "the lag rose: {lag:?}, {now}");
            lag = Some(now);
        }
        if seen["documents_done"] == CALM + BURST {
            break;
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    assert!(lag.is_some(), "the ends were known long before they were reached");
    assert_eq!(rebalances.len(), 1, "a member that is held back stays in the group");
    assert!(peak <= calm + MAX_GROWTH_KIB, "memory grew from {calm} to {peak} KiB");
    assert!(Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap().success());
    assert_eq!(child.wait().unwrap().code(), Some(130));
    let records = broker.read("burst-out");
    let id = |record: &Record| -> u64 {
        serde_json::from_slice::<Value>(record.value.as_ref().unwrap()).unwrap()["id"].as_u64().unwrap()
    };
    let ids: BTreeSet<u64> = records.iter().map(id).collect();
    assert_eq!((records.len() as u64, ids.len() as u64), (CALM + BURST, CALM + BURST), "each once");
}
