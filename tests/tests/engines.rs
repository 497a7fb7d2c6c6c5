//! Several engines behind one operator: the answers do not depend on their number, nor on that of the workers.
#![expect(clippy::unwrap_used, reason = "helpers of tests may panic")]

use std::fs;

use serde_json::Value;
use tidemill_tests::{Pipeline, default_model};

const SETTINGS: [(&str, &str); 4] =
    [("cpu", "1"), ("[cpu:0, cpu:1]", "1"), ("[cpu:0, cpu:1]", "3"), ("[cpu:0, cpu:1, cpu:2]", "2")];

fn run(model: &str, documents: usize, max_tokens: u32, device: &str, workers: &str) -> (String, Value) {
    let pipeline = Pipeline::new(&format!(
        "name: engines\nmodel: {{ name: {model} }}\nengine: {{ device: {device}, kv_cache_memory: 64MiB }}\n\
         source: {{ jsonl: {{ path: input.jsonl }} }}\nsteps:\n  - generate:\n      name: answer\n\
         \x20     prompt: 'What does this mean? {{{{ text }}}}'\n      max_tokens: {max_tokens}\n\
         \x20     ignore_eos: true\nsink: {{ jsonl: {{ path: out/results.jsonl }} }}\n"
    ));
    let lines = (0..documents)
        .map(|id| format!("{{\"id\": {id}, \"text\": \"Notice {} of the harbor, part {id}.\"}}\n", id % 4));
    fs::write(pipeline.path("input.jsonl"), lines.collect::<String>()).unwrap();
    let summary = pipeline.path("summary.json");
    let args = ["run", "--workers", workers, "--summary", summary.to_str().unwrap()];
    pipeline.run(&args).expect_code(0);
    let rows = fs::read_to_string(pipeline.path("out/results.jsonl")).unwrap();
    (rows, serde_json::from_str(&fs::read_to_string(summary).unwrap()).unwrap())
}

fn check(model: &str, documents: usize, max_tokens: u32) {
    let (one, _) = run(model, documents, max_tokens, SETTINGS[0].0, SETTINGS[0].1);
    assert_eq!(one.lines().count(), documents);
    for (device, workers) in &SETTINGS[1..] {
        let (several, summary) = run(model, documents, max_tokens, device, workers);
        assert_eq!(several, one, "{model} on {device} with {workers} workers");
        let output_tokens = documents as u64 * u64::from(max_tokens);
        assert_eq!(summary["output_tokens"], output_tokens, "the end of a sequence is ignored");
    }
}

#[test]
fn the_fake_model_answers_alike_on_any_number_of_engines() {
    check("fake", 200, 12);
}

#[test]
fn the_real_model_answers_alike_on_any_number_of_engines() {
    default_model();
    check("smollm2-135m-instruct", 10, 6);
}
