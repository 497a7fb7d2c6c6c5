//! The source is the gate: what is read and not yet written never exceeds the credit, however long the input.
#![expect(clippy::unwrap_used, reason = "helpers of tests may panic")]

use std::fs;

use serde_json::Value;
use tidemill_tests::Pipeline;

const CREDIT: usize = 40;

fn run(workers: &str, documents: usize, credit: &str) -> Value {
    let mut pipeline = Pipeline::new(&format!(
        "name: burst\nmodel: {{ name: fake }}\nsource: {{ jsonl: {{ path: input.jsonl }} }}\n\
         steps:\n  - generate: {{ name: a, prompt: '{{{{ text }}}}', max_tokens: 4 }}\n\
         \x20 - generate: {{ name: b, prompt: 'Again: {{{{ a }}}} {{{{ text }}}}', max_tokens: 4 }}\n\
         sink: {{ jsonl: {{ path: out/results.jsonl }} }}\ncredit: {{ {credit} }}\n"
    ));
    // Answers take longer than reading.
    pipeline.env.push(("TIDEMILL_FAKE_DELAY_US", "5".to_owned()));
    let lines = (0..documents).map(|id| format!("{{\"id\": {id}, \"text\": \"{id} {}\"}}\n", id % 9));
    fs::write(pipeline.path("input.jsonl"), lines.collect::<String>()).unwrap();
    let summary = pipeline.path("summary.json");
    pipeline.run(&["run", "--workers", workers, "--summary", summary.to_str().unwrap()]).expect_code(0);
    assert_eq!(pipeline.jsonl("out/results.jsonl").len(), documents);
    serde_json::from_str(&fs::read_to_string(summary).unwrap()).unwrap()
}

#[test]
fn rows_in_flight_never_exceed_the_credit() {
    for workers in ["1", "3"] {
        let summary = run(workers, 100 * CREDIT, &format!("documents: {CREDIT}"));
        let peak = summary["peak_documents_in_flight"].as_u64().unwrap() as usize;
        assert!(peak <= CREDIT, "{peak} documents in flight with a credit of {CREDIT}");
        assert!(peak > CREDIT / 2, "the credit is not used: at most {peak} in flight");
    }
}

/// Batches of 64 documents are let in while there is credit, two before their tokens are known.
#[test]
fn tokens_in_flight_stay_near_the_credit() {
    let most_of_a_batch = 64 * 2 * 60;
    let [one, some] = ["tokens: 1", "tokens: 20000"]
        .map(|credit| run("1", 3000, credit)["peak_tokens_in_flight"].as_u64().unwrap());
    assert!(0 < one && one <= 3 * most_of_a_batch, "{one}");
    assert!(one < some && some <= 20_000 + 3 * most_of_a_batch, "{some}");
}
