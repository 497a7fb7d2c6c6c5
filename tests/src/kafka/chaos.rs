//! Histories of failures against a real broker, and the checker that reads what came of them.
//!
//! Records have an id, in order within a partition; answers go to the partition that they came from. The checker reads
//! committed records only, as a user would.

use std::collections::BTreeMap;
use std::fs;
use std::process::Child;
use std::time::{Duration, Instant};

use serde_json::Value;
use tidemill_connectors::kafka::record::header;
use tidemill_connectors::kafka::tools::Record;

use super::Broker;
use crate::Pipeline;

const DELAY: &str = "TIDEMILL_FAKE_DELAY_US";
/// A step of the fake model takes this long while things go wrong.
const SLOW_US: &str = "300";

const MAX_NUM_SEQS: usize = 8;
/// Prompts that are begun and not in the journal: those that an engine is handed ahead of time, which are twice those that
/// it runs, and the answers of a step on their way to the disk. Who has the same journal begins no others again.
pub const IN_ENGINE: usize = 3 * MAX_NUM_SEQS;
const CREDIT: usize = 64;
const COMMIT_ROWS: usize = 32;
/// Documents that are read and not committed: the credit, and what waits for the next transaction with its last batch.
/// Who has another journal begins all of them again.
pub const UNCOMMITTED: usize = CREDIT + COMMIT_ROWS + CREDIT / 4;

/// One pipeline between two topics, its processes, and what has happened to them.
pub struct History {
    pub name: String,
    pub pipeline: Pipeline,
    pub num_partitions: i32,
    num_records: usize,
    num_processes: usize,
    begun: Instant,
    lines: Vec<String>,
}

impl History {
    /// Makes the topics. `options` are the consumer's, `sink` more keys of the sink. The variable `STATE` gives a
    /// process another folder, so another journal.
    #[expect(clippy::disallowed_methods, reason = "times are printed and decide nothing")]
    pub fn new(broker: &Broker, address: &str, name: &str, options: &str, sink: &str) -> Self {
        let num_partitions = 4;
        for suffix in ["in", "out", "errors"] {
            broker.create_topic(&format!("{name}-{suffix}"), num_partitions);
        }
        let definition = format!(
            "name: {name}\nmodel: {{ name: fake }}\n\
             source: {{ kafka: {{ brokers: '{address}', topics: [{name}-in], options: {{ {options} }} }} }}\n\
             steps:\n  - generate: {{ name: answer, prompt: 'Summarize {{{{ text }}}}', max_tokens: 8 }}\n\
             sink: {{ kafka: {{ topic: {name}-out, partition: input, commit_rows: {COMMIT_ROWS}{sink} }} }}\n\
             errors: {{ kafka: {{ topic: {name}-errors }}, budget: 100% }}\ncredit: {{ documents: {CREDIT} }}\n\
             engine: {{ max_num_seqs: {MAX_NUM_SEQS} }}\nstate: ${{STATE:state}}\n"
        );
        let mut pipeline = Pipeline::new(&definition);
        pipeline
            .env
            .push(("TIDEMILL_LOG", "tidemill::ledger=debug,tidemill_connectors=debug,info".to_owned()));
        pipeline.env.push((DELAY, SLOW_US.to_owned()));
        let (begun, lines) = (Instant::now(), Vec::new());
        let mut history = Self {
            name: name.to_owned(),
            pipeline,
            num_partitions,
            num_records: 0,
            num_processes: 0,
            begun,
            lines,
        };
        history.note("begins");
        history
    }

    /// Adds a line to what is printed.
    pub fn note(&mut self, what: &str) {
        let line = format!("{:>7.2} s  {}  {what}", self.begun.elapsed().as_secs_f64(), self.name);
        println!("{line}");
        self.lines.push(line);
    }

    /// Writes so many more records, one in fifty of them broken.
    pub fn feed(&mut self, broker: &Broker, num_records: usize) {
        let first = self.num_records;
        let record = |id: usize| Record {
            partition: Some(id as i32 % self.num_partitions),
            ..Record::new(
                &format!("key-{id}"),
                match id % 50 {
                    17 => format!("{{\"id\": {id}, \"text\": null}}"),
                    33 => format!("{{\"id\": {id}, broken"),
                    _ => format!("{{\"id\": {id}, \"text\": \"record number {id} of {}\"}}", id % 7),
                },
            )
        };
        broker.produce(&format!("{}-in", self.name), (first..first + num_records).map(record));
        self.num_records += num_records;
        self.note(&format!("{num_records} records written"));
    }

    /// Starts a process; its log has this name.
    pub fn start(&mut self) -> (Child, String) {
        let log = format!("process-{}.log", self.num_processes);
        self.num_processes += 1;
        let child = self.pipeline.start(&["run", "--quiet"], &log);
        (child, log)
    }

    /// Waits until a process has begun so many prompts; it must not end before.
    pub fn await_computed(&self, child: &mut Child, log: &str, count: usize) {
        while self.pipeline.computed(log).len() < count {
            assert!(child.try_wait().expect("a child").is_none(), "{}", self.log(log));
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    pub fn log(&self, log: &str) -> String {
        let text = fs::read_to_string(self.pipeline.path(log)).unwrap_or_default();
        text.lines().filter(|line| !line.contains("ledger")).collect::<Vec<_>>().join("\n")
    }

    /// Lets a last process, at full speed, do what is left.
    pub fn finish(&mut self) {
        self.pipeline.env.retain(|(key, _)| *key != DELAY);
        let log = format!("process-{}.log", self.num_processes);
        self.num_processes += 1;
        let status = self.pipeline.start(&["run", "--quiet", "--until-end"], &log).wait().expect("a child");
        assert!(status.success(), "{}", self.log(&log));
        self.note("read to the end");
    }

    /// Every record once, as a result or as an error, in order, and no more tokens begun than one pass and what was in
    /// flight when a process or its lease ended: at most `in_flight` prompts each time.
    pub fn check(&mut self, broker: &Broker, in_flight: usize) {
        self.check_output(broker);
        self.check_ledger(in_flight);
    }

    /// Every record once, as a result or as an error, in order.
    pub fn check_output(&mut self, broker: &Broker) {
        for suffix in ["out", "errors"] {
            broker.await_transactions(&format!("{}-{suffix}", self.name));
        }
        let results = broker.read(&format!("{}-out", self.name));
        let errors = broker.read(&format!("{}-errors", self.name));
        let mut found: BTreeMap<u64, usize> = BTreeMap::new();
        let mut last: BTreeMap<i32, u64> = BTreeMap::new();
        for record in &results {
            let value: Value =
                serde_json::from_slice(record.value.as_deref().unwrap_or_default()).expect("JSON");
            let id = value["id"].as_u64().expect("results keep their fields");
            *found.entry(id).or_default() += 1;
            let partition = record.partition.expect("read from one");
            assert_eq!(id % self.num_partitions as u64, partition as u64, "answers stay in their partition");
            let before = last.insert(partition, id);
            assert!(
                before.is_none_or(|before| before < id),
                "{id} comes after {before:?} in partition {partition}"
            );
        }
        for record in &errors {
            *found.entry(origin(record, self.num_partitions)).or_default() += 1;
        }
        let lost: Vec<usize> =
            (0..self.num_records).filter(|&id| !found.contains_key(&(id as u64))).collect();
        let double: Vec<u64> = found.iter().filter(|(_, count)| **count > 1).map(|(id, _)| *id).collect();
        assert!(lost.is_empty(), "{}: lost {lost:?}", self.name);
        assert!(double.is_empty(), "{}: twice {double:?}", self.name);
        let committed = broker.committed(&self.name, &format!("{}-in", self.name));
        assert_eq!(committed, broker.ends(&format!("{}-in", self.name)), "{}: offsets", self.name);
        self.note(&format!(
            "checked: {} records once and in order, {} as errors",
            self.num_records,
            errors.len()
        ));
    }

    fn check_ledger(&mut self, in_flight: usize) {
        let (mut distinct, mut total, mut longest, mut most) = (BTreeMap::new(), 0, 0, 0);
        for number in 0..self.num_processes {
            let log = format!("process-{number}.log");
            let begun = self.pipeline.ledger(&log);
            let text = fs::read_to_string(self.pipeline.path(&log)).expect("a process has a log");
            // The last process ends when all is done.
            let num_ends = text.matches(" revoked partitions=[\"").count()
                + usize::from(number + 1 < self.num_processes);
            most += begun.len().min(num_ends * in_flight);
            for (key, tokens) in begun {
                distinct.insert(key, tokens);
                total += tokens;
                longest = longest.max(tokens);
            }
        }
        let one_pass: usize = distinct.values().sum();
        let beyond = total - one_pass;
        let most = most * longest;
        self.note(&format!(
            "checked: {one_pass} tokens of one pass and {beyond} beyond it; at most {most} were in flight when something broke"
        ));
        let num_good = (0..self.num_records).filter(|id| id % 50 != 17 && id % 50 != 33).count();
        assert_eq!(distinct.len(), num_good, "{}: each prompt was begun", self.name);
        assert!(beyond <= most, "{}: {beyond} tokens beyond one pass, {most} in flight", self.name);
    }
}

/// The id of the record that an error tells of.
fn origin(record: &Record, num_partitions: i32) -> u64 {
    let number = |name: &str| -> u64 {
        let value =
            record.headers.iter().find(|(found, _)| found == name).and_then(|(_, value)| value.clone());
        String::from_utf8(value.expect("errors tell their origin")).expect("text").parse().expect("a number")
    };
    number(header::ORIGIN_OFFSET) * num_partitions as u64 + number(header::ORIGIN_PARTITION)
}
