//! Several pipelines in one process: they share the engines, answer as they would alone, and fail alone.
#![expect(clippy::unwrap_used, reason = "helpers of tests may panic")]

use std::fs;

use serde_json::Value;
use tidemill_tests::{Pipeline, Ran};

const DOCUMENTS: usize = 120;

/// Adds a definition to the folder; `more` are further lines of it.
fn define(pipeline: &Pipeline, name: &str, question: &str, more: &str) {
    let definition = format!(
        "name: {name}\nmodel: {{ name: fake }}\nsource: {{ jsonl: {{ path: input.jsonl }} }}\n\
         steps:\n  - generate: {{ name: answer, prompt: '{question} {{{{ text }}}}', max_tokens: 8 }}\n\
         sink: {{ jsonl: {{ path: {name}.jsonl }} }}\n{more}"
    );
    fs::write(pipeline.path(&format!("{name}.yaml")), definition).unwrap();
}

fn folder() -> Pipeline {
    let pipeline = Pipeline::new("");
    let lines = (0..DOCUMENTS).map(|id| match id % 10 {
        7 => format!("{{\"id\": {id}, \"text\": null}}\n"),
        _ => format!("{{\"id\": {id}, \"text\": \"Notice {} of the harbor, part {id}.\"}}\n", id % 4),
    });
    fs::write(pipeline.path("input.jsonl"), lines.collect::<String>()).unwrap();
    pipeline
}

/// `tidemill run` of the named definitions.
fn run(pipeline: &Pipeline, args: &[&str], names: &[&str]) -> Ran {
    let mut command = std::process::Command::new(tidemill_tests::binary());
    command.arg("run").args(args).args(names.iter().map(|name| pipeline.path(&format!("{name}.yaml"))));
    Ran(command.output().unwrap())
}

#[test]
fn pipelines_answer_together_as_they_do_alone() {
    let pipeline = folder();
    for (name, question, more) in [
        ("first", "What?", "priority: low\n"),
        ("second", "Why?", "priority: high\n"),
        ("third", "What?", "engine: { max_num_seqs: 3, kv_cache_memory: 64KiB }\n"),
    ] {
        define(&pipeline, name, question, more);
    }
    let names = ["first", "second", "third"];
    let read = |name: &str| fs::read_to_string(pipeline.path(&format!("{name}.jsonl"))).unwrap();
    let mut alone = Vec::new();
    for name in names {
        run(&pipeline, &[], &[name]).expect_code(0);
        alone.push(read(name));
    }
    let summary = pipeline.path("summary.json");
    let args = ["--force", "--workers", "2", "--summary", summary.to_str().unwrap()];
    let ran = run(&pipeline, &args, &names).expect_code(0).expect_words(&names);
    assert!(ran.stderr().matches("peak memory").count() == 3, "{}", ran.stderr());
    assert_eq!(names.map(read), *alone);
    let summaries: Vec<Value> = serde_json::from_str(&fs::read_to_string(summary).unwrap()).unwrap();
    assert_eq!(summaries.iter().map(|one| &one["name"]).collect::<Vec<_>>(), names);
    for (one, rows) in summaries.iter().zip(&alone) {
        let sum = |key: &str| -> u64 {
            rows.lines().map(|row| serde_json::from_str::<Value>(row).unwrap()[key].as_u64().unwrap()).sum()
        };
        assert_eq!(one["output_tokens"], sum("answer_output_tokens"), "each has its own counts: {one}");
        assert_eq!(one["prompt_tokens"], sum("answer_prompt_tokens"), "each has its own counts: {one}");
    }
    run(&pipeline, &[], &names).expect_code(0).expect_words(&["nothing to do"]);
}

#[test]
fn a_pipeline_that_gives_up_harms_no_other() {
    let pipeline = folder();
    define(&pipeline, "going", "What?", "");
    define(&pipeline, "strict", "Why?", "errors: { budget: 0 }\n");
    run(&pipeline, &[], &["strict", "going"]).expect_code(3).expect_words(&["strict", "did not finish"]);
    assert_eq!(pipeline.jsonl("going.jsonl").len(), DOCUMENTS * 9 / 10);
}

#[test]
fn pipelines_do_not_write_to_the_same_place() {
    let pipeline = folder();
    define(&pipeline, "first", "What?", "");
    let text = fs::read_to_string(pipeline.path("first.yaml")).unwrap();
    fs::write(pipeline.path("second.yaml"), text.replace("name: first", "name: second")).unwrap();
    run(&pipeline, &[], &["first", "second"])
        .expect_code(2)
        .expect_words(&["pipelines \"first\" and \"second\" both use"]);
    assert!(!pipeline.path("first.jsonl").exists(), "nothing has started");
}
