//! A burst that arrives much faster than the model answers: memory stays where it was, the source keeps its place in the
//! group, the lag only falls, nothing is lost, and who goes first by priority or has turns of its own does not wait for
//! it. `make burst` shows a larger one as a plot.
#![expect(clippy::unwrap_used, reason = "helpers of tests may panic")]

use std::collections::BTreeSet;
use std::fs;
use std::net::TcpListener;
use std::ops::Range;
use std::process::{Child, Command};
use std::time::Duration;

use serde_json::Value;
use tidemill_connectors::kafka::tools::Record;
use tidemill_tests::kafka::Broker;
use tidemill_tests::{Pipeline, http_get};

const CALM: u64 = 500;
const BURST: u64 = 12_000;
const CREDIT: u64 = 512;
const URGENT: u64 = 60;
const MAX_GROWTH_KIB: u64 = 64 << 10;

/// A pipeline from topic `NAME-in` to `NAME-out`, with the topics it needs.
fn definition(name: &str, more: &str) -> String {
    let broker = Broker::shared();
    for suffix in ["in", "out", "errors"] {
        broker.create_topic(&format!("{name}-{suffix}"), 4);
    }
    format!(
        "name: {name}\nmodel: {{ name: fake }}\n\
         source: {{ kafka: {{ brokers: '{}', topics: [{name}-in], options: {{ session.timeout.ms: 6000, heartbeat.interval.ms: 500, max.poll.interval.ms: 6000 }} }} }}\n\
         steps:\n  - generate: {{ name: answer, prompt: 'Summarize {{{{ text }}}}', max_tokens: 8 }}\n\
         sink: {{ kafka: {{ topic: {name}-out }} }}\nerrors: {{ kafka: {{ topic: {name}-errors }} }}\n{more}",
        broker.address()
    )
}

/// A running process that is looked at, as `tidemill top` does.
struct Run {
    child: Child,
    port: u16,
}

impl Run {
    /// Starts all definitions of the folder that are named, and `pipeline.yaml`.
    fn start(pipeline: &Pipeline, others: &[&str]) -> Self {
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let listen = format!("127.0.0.1:{port}");
        let paths: Vec<String> =
            others.iter().map(|name| pipeline.path(name).to_str().unwrap().to_owned()).collect();
        let mut args = vec!["run", "--quiet", "--listen", &listen];
        args.extend(paths.iter().map(String::as_str));
        Self { child: pipeline.start(&args, "run.log"), port }
    }

    /// The pipeline of this name, once it has partitions.
    fn look(&mut self, name: &str) -> Value {
        loop {
            assert!(self.child.try_wait().unwrap().is_none(), "the run has ended");
            let answer = http_get(self.port, "/snapshot");
            if let Some(body) = answer.as_deref().and_then(|text| text.split("\r\n\r\n").nth(1)) {
                let snapshot = serde_json::from_str::<Value>(body).unwrap();
                let mut pipelines = snapshot["pipelines"].as_array().unwrap().iter();
                let has_partitions = |one: &Value| !one["kafka"]["partitions"].as_array().unwrap().is_empty();
                if let Some(found) = pipelines.find(|one| one["name"] == name && has_partitions(one)) {
                    return found.clone();
                }
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn resident_kib(&self) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
        line.split_whitespace().next().unwrap().parse().unwrap()
    }

    fn stop(mut self) {
        assert!(
            Command::new("kill").args(["-INT", &self.child.id().to_string()]).status().unwrap().success()
        );
        assert_eq!(self.child.wait().unwrap().code(), Some(130));
    }
}

fn number(seen: &Value, key: &str) -> u64 {
    seen[key].as_u64().unwrap()
}

fn record(id: u64) -> Record {
    let text = "some words about the news of the day ".repeat(5);
    Record::new(&id.to_string(), format!("{{\"id\": {id}, \"text\": \"record {id} {text}\"}}"))
}

/// What was seen while a burst waits.
#[derive(Default)]
struct Seen {
    peak_kib: u64,
    rebalances: BTreeSet<u64>,
    lag: Option<u64>,
    was_paused: bool,
}

impl Seen {
    /// Looks at the burst and checks what must hold at any time; returns what is done of it.
    fn add(&mut self, run: &mut Run) -> u64 {
        let seen = run.look("burst");
        self.peak_kib = self.peak_kib.max(run.resident_kib());
        self.rebalances.insert(number(&seen["kafka"], "rebalances"));
        self.was_paused |= seen["kafka"]["is_paused"] == true;
        assert!(number(&seen, "documents_in_flight") <= CREDIT);
        let partitions = seen["kafka"]["partitions"].as_array().unwrap();
        let total = |key: &str| -> u64 { partitions.iter().filter_map(|one| one[key].as_u64()).sum() };
        // Where a partition ends is learned with what is fetched from it, so not of all at the same time.
        if total("end") == CALM + BURST {
            let now = total("lag");
            assert!(self.lag.is_none_or(|before| now <= before), "the lag rose: {:?}, {now}", self.lag);
            self.lag = Some(now);
        }
        number(&seen, "documents_done")
    }
}

#[test]
fn a_burst_waits_outside() {
    let broker = Broker::shared();
    let mut pipeline = Pipeline::new(&definition("burst", &format!("credit: {{ documents: {CREDIT} }}\n")));
    fs::write(pipeline.path("urgent.yaml"), definition("urgent", "priority: high\n")).unwrap();
    pipeline.env.push(("TIDEMILL_FAKE_DELAY_US", "6".to_owned()));
    let mut run = Run::start(&pipeline, &["urgent.yaml"]);
    run.look("urgent");
    broker.produce("burst-in", (0..CALM).map(record));
    while number(&run.look("burst"), "documents_done") != CALM {
        std::thread::sleep(Duration::from_millis(50));
    }
    let calm = run.resident_kib();
    broker.produce("burst-in", (CALM..CALM + BURST).map(record));
    let mut seen = Seen::default();
    while number(&run.look("burst"), "documents_read") < CALM + CREDIT {
        seen.add(&mut run);
    }
    // Long prompts of high priority take the whole engine for a while.
    let before = number(&run.look("burst"), "documents_done");
    let long = |id| Record::new("k", format!("{{\"text\": \"{id} {}\"}}", "is urgent ".repeat(600)));
    broker.produce("urgent-in", (0..URGENT).map(long));
    while number(&run.look("urgent"), "documents_done") < URGENT {
        seen.add(&mut run);
    }
    let after = seen.add(&mut run);
    assert!(seen.was_paused, "a second without progress pauses the partitions");
    assert!(after < before + BURST / 2, "the burst waits for who is urgent: {before}, then {after}");
    while seen.add(&mut run) < CALM + BURST {
        std::thread::sleep(Duration::from_millis(100));
    }
    assert!(seen.lag.is_some(), "the ends were known long before they were reached");
    assert_eq!(seen.rebalances.len(), 1, "a member that is held back stays in the group");
    assert!(seen.peak_kib <= calm + MAX_GROWTH_KIB, "memory grew from {calm} to {} KiB", seen.peak_kib);
    run.stop();
    let records = broker.read("burst-out");
    let id = |record: &Record| -> u64 {
        serde_json::from_slice::<Value>(record.value.as_ref().unwrap()).unwrap()["id"].as_u64().unwrap()
    };
    let ids: BTreeSet<u64> = records.iter().map(id).collect();
    assert_eq!((records.len() as u64, ids.len() as u64), (CALM + BURST, CALM + BURST), "each once");
}

/// Steps that the engine has made between a record's writing and its answer, for each record of the small tenant, one
/// after the other.
fn waits_of_small(run: &mut Run, ids: Range<u64>) -> Vec<u64> {
    let steps = |seen: &Value| number(&seen["engines"][0], "steps");
    let mut waits = Vec::new();
    for id in ids {
        let before = run.look("turns");
        let text = format!("{{\"who\": \"small\", \"text\": \"question number {id}\"}}");
        Broker::shared().produce("turns-in", [Record::new("small", text)]);
        // An idle engine makes no step before the record is there; a busy one makes some while it is written.
        let is_idle = before["tenants"]["large"].is_null();
        let begun = steps(&if is_idle { before } else { run.look("turns") });
        waits.push(loop {
            let seen = run.look("turns");
            if seen["tenants"]["small"]["documents"].as_u64().is_some_and(|done| done > id) {
                break steps(&seen) - begun;
            }
        });
    }
    waits.sort_unstable();
    waits
}

/// One tenant has sent a hundred times what the other sends, and all of it waits when the other comes. Time is counted in
/// steps of the engine, which take long beside the way of a record.
#[test]
fn a_tenant_does_not_wait_for_the_burst_of_another() {
    const SMALL: u64 = 10;
    let broker = Broker::shared();
    let more = "tenants: { by: '{{ who }}' }\nengine: { max_num_seqs: 8 }\n";
    let mut pipeline = Pipeline::new(&definition("turns", more).replace("max_tokens: 8", "max_tokens: 16"));
    pipeline.env.push(("TIDEMILL_FAKE_DELAY_US", "2500".to_owned()));
    let mut run = Run::start(&pipeline, &[]);
    let alone = waits_of_small(&mut run, 0..SMALL);
    let large =
        |id| Record::new("large", format!("{{\"who\": \"large\", \"text\": \"remark number {id}\"}}"));
    broker.produce("turns-in", (0..100 * SMALL).map(large));
    while run.look("turns")["tenants"]["large"]["waiting"].as_u64().is_none_or(|waiting| waiting < 90 * SMALL)
    {
        std::thread::sleep(Duration::from_millis(20));
    }
    let beside = waits_of_small(&mut run, SMALL..2 * SMALL);
    let waiting = number(&run.look("turns")["tenants"]["large"], "waiting");
    println!("steps alone: {alone:?}, beside {waiting} others: {beside:?}");
    assert!(waiting > 50 * SMALL, "{waiting} wait at the end");
    let p95 = |waits: &[u64]| waits[waits.len() * 95 / 100];
    assert!(p95(&beside) < 2 * p95(&alone), "{beside:?} steps beside a burst, {alone:?} alone");
    run.stop();
}

/// Texts by how long the model's answer to them is: the one with the longest, and some with short ones.
fn slow_and_quick(step: &str) -> (u64, Vec<u64>) {
    let pipeline = Pipeline::new(&format!(
        "name: lengths\nmodel: {{ name: fake }}\nsource: {{ jsonl: {{ path: in.jsonl }} }}\n\
         {step}sink: {{ jsonl: {{ path: out.jsonl }} }}\n"
    ));
    let line = |id| format!("{{\"id\": {id}, \"text\": \"candidate {id}\"}}\n");
    fs::write(pipeline.path("in.jsonl"), (0..400).map(line).collect::<String>()).unwrap();
    pipeline.run(&["run", "--quiet"]).expect_code(0);
    let rows = pipeline.jsonl("out.jsonl");
    let answer_len = |row: &Value| number(row, "answer_output_tokens");
    let slow = rows.iter().max_by_key(|row| answer_len(row)).unwrap();
    assert!(answer_len(slow) > 80, "{slow}");
    let quick = rows.iter().filter(|row| answer_len(row) <= 8).map(|row| number(row, "id"));
    (number(slow, "id"), quick.collect())
}

/// What follows it is answered meanwhile, and another partition is committed; its own is not, and keeps its order.
#[test]
fn a_slow_document_delays_the_commit_of_its_partition_and_no_work() {
    const QUICK: usize = 16;
    let broker = Broker::shared();
    let step = "steps:\n  - generate: { name: answer, prompt: 'Summarize {{ text }}', max_tokens: 400 }\n";
    let (slow, quick) = slow_and_quick(step);
    let ids = [[&[slow], &quick[..QUICK]].concat(), quick[QUICK..2 * QUICK].to_vec()];
    let text = definition("slow", "engine: { max_num_seqs: 8 }\ncredit: { documents: 64 }\n")
        .replace("max_tokens: 8", "max_tokens: 400")
        .replace("topic: slow-out", "topic: slow-out, partition: input, commit_ms: 10");
    let mut pipeline = Pipeline::new(&text);
    pipeline.env.push(("TIDEMILL_FAKE_DELAY_US", "5000".to_owned()));
    let mut run = Run::start(&pipeline, &[]);
    run.look("slow");
    let record = |partition: usize, id: &u64| Record {
        partition: Some(partition as i32),
        ..Record::new("k", format!("{{\"id\": {id}, \"text\": \"candidate {id}\"}}"))
    };
    let records =
        ids.iter().enumerate().flat_map(|(number, ids)| ids.iter().map(move |id| record(number, id)));
    broker.produce("slow-in", records);
    loop {
        let seen = run.look("slow");
        let arrived = number(&seen, "documents_arrived") as usize;
        assert!(arrived <= 2 * QUICK, "all others were answered and committed before it: {seen}");
        let partitions = seen["kafka"]["partitions"].as_array().unwrap();
        let committed = |number: usize| partitions[number]["committed"].as_u64().unwrap_or(0) as usize;
        assert_eq!(committed(0), 0, "{seen}");
        if arrived == 2 * QUICK && committed(1) == QUICK {
            assert_eq!(number(&seen, "documents_done") as usize, QUICK);
            break;
        }
    }
    while number(&run.look("slow"), "documents_done") as usize <= 2 * QUICK {
        std::thread::sleep(Duration::from_millis(20));
    }
    run.stop();
    let mut found = [Vec::new(), Vec::new()];
    for record in broker.read("slow-out") {
        let value: Value = serde_json::from_slice(record.value.as_ref().unwrap()).unwrap();
        found[record.partition.unwrap() as usize].push(number(&value, "id"));
    }
    assert_eq!(found, ids, "in the order of the input");
}
