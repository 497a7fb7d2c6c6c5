//! A whole run on a GPU: the program picks it by itself, and its answers are those of the reference. Without a GPU the
//! driver is one that runs the kernels on the CPU, and all the rest is what it is on a GPU.
#![expect(clippy::unwrap_used, reason = "helpers of tests may panic")]

use std::fs;

use anyhow::Result;
use serde_json::Value;
use tidemill_tests::gpu::FakeDriver;
use tidemill_tests::{Pipeline, Ran, default_model};

const DOCUMENTS: [&str; 3] = ["France", "Italy", "Japan"];

fn pipeline(engine: &str) -> Pipeline {
    default_model();
    let pipeline = Pipeline::new(&format!(
        "name: capitals\nmodel: {{ name: smollm2-135m-instruct }}\nengine: {{ {engine} }}\n\
         source: {{ jsonl: {{ path: input.jsonl }} }}\nsteps:\n  - generate:\n      name: answer\n\
         \x20     prompt: 'The capital of {{{{ text }}}} is'\n      max_tokens: 4\n\
         sink: {{ jsonl: {{ path: out/results.jsonl }} }}\n"
    ));
    let rows: Vec<String> = DOCUMENTS.iter().map(|text| format!("{{\"text\": \"{text}\"}}\n")).collect();
    fs::write(pipeline.path("input.jsonl"), rows.concat()).unwrap();
    pipeline
}

fn answers(pipeline: &Pipeline) -> Vec<Value> {
    pipeline.jsonl("out/results.jsonl").into_iter().map(|row| row["answer"].clone()).collect()
}

#[test]
fn a_run_takes_the_gpu_and_answers_as_the_reference() -> Result<()> {
    let driver = FakeDriver::new()?;
    let on_gpu = |pipeline: &Pipeline, args: &[&str]| {
        let mut command = pipeline.command(args);
        if !cfg!(feature = "cuda-tests") {
            driver.serve(&mut command);
        }
        Ran(command.output().unwrap())
    };
    let by_reference = pipeline("device: reference");
    by_reference.run(&["run"]).expect_code(0);
    let expected = answers(&by_reference);
    assert_eq!(expected.len(), DOCUMENTS.len());

    // Nothing is said of a device.
    let pipeline = pipeline("max_num_seqs: 4, max_num_batched_tokens: 256, kv_cache_memory: 64MiB");
    on_gpu(&pipeline, &["run"]).expect_code(0).expect_words(&["device: cuda:0"]);
    assert_eq!(answers(&pipeline), expected);
    Ok(())
}
