//! Kills real runs at random moments and checks what the next one makes of it.
//!
//! After each kill: nothing that the journal holds is computed again. At the end: exactly one row for each
//! input row, in the input's order, and the same answers as a run that was never killed.
#![expect(clippy::unwrap_used, reason = "helpers of tests may panic")]

use std::collections::BTreeSet;
use std::fs;
use std::process::Child;
use std::time::Duration;

use serde_json::Value;
use tidemill_operators::journal::Journal;
use tidemill_tests::Pipeline;

const DOCUMENTS: usize = 1500;
const KILLS: u64 = 24;
const DELAY: &str = "TIDEMILL_FAKE_DELAY_US";

fn definition(sink: &str) -> String {
    format!(
        "name: crash\nmodel: {{ name: fake }}\nsource: {{ jsonl: {{ path: input.jsonl }} }}\n\
         steps:\n  - generate: {{ name: answer, prompt: 'Summarize {{{{ text }}}}', max_tokens: 8 }}\n\
         sink: {{ {sink} }}\nerrors: {{ jsonl: {{ path: out/errors.jsonl }}, budget: 100% }}\n\
         credit: {{ documents: 200 }}\n"
    )
}

fn pipeline(sink: &str) -> Pipeline {
    let mut pipeline = Pipeline::new(&definition(sink));
    pipeline.env.push(("TIDEMILL_LOG", "tidemill::ledger=debug".to_owned()));
    let lines = (0..DOCUMENTS).map(|id| match id % 50 {
        17 => format!("{{\"id\": {id}, \"text\": null}}\n"),
        33 => format!("{{\"id\": {id}, broken\n"),
        _ => format!("{{\"id\": {id}, \"text\": \"document number {id} of {}\"}}\n", id % 7),
    });
    fs::write(pipeline.path("input.jsonl"), lines.collect::<String>()).unwrap();
    pipeline
}

/// Waits until a run has begun so many prompts.
fn await_computed(pipeline: &Pipeline, log: &str, count: usize, child: &mut Child) {
    while pipeline.computed(log).len() < count && child.try_wait().unwrap().is_none() {
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Keys that the journal holds.
fn journaled(pipeline: &Pipeline, state: &str) -> BTreeSet<String> {
    let path = pipeline.path(state).join("journal.redb");
    if !path.exists() {
        return BTreeSet::new();
    }
    // A copy, since opening repairs what the kill left and the next run shall do that itself.
    let copy = pipeline.path("journal-copy.redb");
    fs::copy(&path, &copy).unwrap();
    let Ok(journal) = Journal::open(&copy) else { return BTreeSet::new() };
    journal.keys().iter().map(ToString::to_string).collect()
}

struct Rows {
    results: Vec<(i64, String)>,
    errors: Vec<u64>,
}

fn rows(pipeline: &Pipeline, is_parquet: bool) -> Rows {
    let results: Vec<Value> = if is_parquet {
        let mut bytes = Vec::new();
        for batch in tidemill_tests::read_parts(&pipeline.path("out/results")).unwrap() {
            let mut writer = arrow::json::LineDelimitedWriter::new(&mut bytes);
            writer.write(&batch).unwrap();
            writer.finish().unwrap();
        }
        String::from_utf8(bytes).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    } else {
        pipeline.jsonl("out/results.jsonl")
    };
    let results = results
        .into_iter()
        .map(|row| (row["id"].as_i64().unwrap(), row["answer"].as_str().unwrap().to_owned()))
        .collect();
    let errors = pipeline.jsonl("out/errors.jsonl").iter().map(|row| row["row"].as_u64().unwrap()).collect();
    Rows { results, errors }
}

fn kill_until_done(sink: &str, state: &str, is_parquet: bool, seed: u64) {
    let calm = pipeline(sink);
    calm.run(&["run", "--quiet"]).expect_code(0);
    let expected = rows(&calm, is_parquet);
    assert_eq!(expected.results.len() + expected.errors.len(), DOCUMENTS);

    let mut pipeline = pipeline(sink);
    // So slow that all the time between the kills is too short for the whole input.
    pipeline.env.push((DELAY, "200".to_owned()));
    let mut state_of_random = seed;
    let mut before = BTreeSet::new();
    let mut total = BTreeSet::new();
    let mut kills_with_progress = 0;
    for kill in 0..KILLS {
        state_of_random = state_of_random.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        let log = format!("run-{kill}.log");
        let mut child = pipeline.start(&["run", "--quiet"], &log);
        let random = state_of_random >> 33;
        if kill % 2 == 0 {
            std::thread::sleep(Duration::from_millis(random % 300));
        } else {
            // Engines are handed 64 prompts at a time: beyond that, some are answered.
            await_computed(&pipeline, &log, 64 + random as usize % 60, &mut child);
        }
        assert!(child.try_wait().unwrap().is_none(), "seed {seed}: the run was over at kill {kill}");
        child.kill().unwrap();
        child.wait().unwrap();
        let keys = pipeline.computed(&log);
        let again: Vec<&String> = keys.iter().filter(|key| before.contains(*key)).collect();
        assert!(again.is_empty(), "seed {seed}, kill {kill}: computed again although journaled: {again:?}");
        let now = journaled(&pipeline, state);
        assert!(before.is_subset(&now), "seed {seed}, kill {kill}: the journal lost answers");
        kills_with_progress += usize::from(now.len() > before.len());
        before = now;
        total.extend(keys);
    }
    assert!(kills_with_progress > 3, "seed {seed}: the kills came before any work was done");
    pipeline.env.retain(|(key, _)| *key != DELAY);
    let log = "last.log";
    assert!(
        pipeline.start(&["run", "--quiet"], log).wait().unwrap().success(),
        "{}",
        fs::read_to_string(pipeline.path(log)).unwrap()
    );
    assert!(pipeline.computed(log).iter().all(|key| !before.contains(key)));
    let got = rows(&pipeline, is_parquet);
    assert_eq!(got.results, expected.results, "seed {seed}");
    assert_eq!(got.errors, expected.errors, "seed {seed}");
    let again = pipeline.run(&["run"]).expect_code(0);
    assert!(again.stderr().contains("nothing to do"), "{}", again.stderr());
}

#[test]
fn killed_runs_lose_nothing_and_compute_nothing_twice_in_parquet() {
    kill_until_done("parquet: { path: out/results, commit_rows: 100 }", "out/results/_tidemill", true, 11);
}

#[test]
fn killed_runs_lose_nothing_and_compute_nothing_twice_in_jsonl() {
    kill_until_done(
        "jsonl: { path: out/results.jsonl, commit_rows: 100 }",
        "out/results.jsonl.tidemill",
        false,
        12,
    );
}

#[test]
fn an_interrupted_run_keeps_what_is_finished() {
    let mut pipeline = pipeline("jsonl: { path: out/results.jsonl }");
    pipeline.env.push((DELAY, "200".to_owned()));
    let mut child = pipeline.start(&["run"], "first.log");
    await_computed(&pipeline, "first.log", 100, &mut child);
    let status = std::process::Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
    assert!(status.success());
    assert_eq!(child.wait().unwrap().code(), Some(130));
    let kept = pipeline.jsonl("out/results.jsonl").len();
    let known = journaled(&pipeline, "out/results.jsonl.tidemill");
    assert!(!known.is_empty() && known.len() < DOCUMENTS, "{} answers", known.len());
    pipeline.env.retain(|(key, _)| *key != DELAY);
    assert!(pipeline.start(&["run", "--quiet"], "second.log").wait().unwrap().success());
    assert!(pipeline.computed("second.log").iter().all(|key| !known.contains(key)));
    let rows = pipeline.jsonl("out/results.jsonl");
    assert!(rows.len() > kept);
    let ids: Vec<i64> = rows.iter().map(|row| row["id"].as_i64().unwrap()).collect();
    assert!(ids.is_sorted() && ids.windows(2).all(|pair| pair[0] != pair[1]), "one row a document, in order");
}
