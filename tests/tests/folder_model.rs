//! A Hugging Face folder answers like any model, by its path and as a model of the hub that is in the cache.
//!
//! The weights are random; what they answer is no matter here, only that it is the same. Their golden tests are elsewhere.

use std::fs;

use serde_json::{Value, json};
use tidemill_tests::Pipeline;
use tidemill_tests::tiny::{write_model, write_weights};

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

const DEFINITION: &str = "
name: folder
model: { name: MODEL }
source: { jsonl: { path: input.jsonl } }
steps:
  - generate: { name: answer, prompt: \"{{ text }}\", max_tokens: 8 }
sink: { jsonl: { path: out.jsonl } }
";

#[test]
fn a_folder_is_a_model_by_its_path_and_by_its_name() {
    let by_path = pipeline("models/tiny");
    write_model(&by_path.path("models/tiny"));
    by_path.run(&["run"]).expect_code(0);
    let answers = by_path.jsonl("out.jsonl");
    assert_eq!(answers.len(), 2);
    assert!(answers.iter().all(|row| row["answer"].as_str().is_some()), "{answers:?}");

    let mut by_name = pipeline("org/tiny");
    by_name.env.push(("HF_HOME", by_name.path("home").display().to_string()));
    by_name.env.push(("HF_HUB_OFFLINE", "1".to_owned()));
    by_name.run(&["run"]).expect_code(1).expect_words(&["model org/tiny is not here", "HF_HUB_OFFLINE"]);
    let repository = by_name.path("home/hub/models--org--tiny");
    write_model(&repository.join("snapshots").join(COMMIT));
    fs::create_dir_all(repository.join("refs")).unwrap();
    fs::write(repository.join("refs/main"), COMMIT).unwrap();
    by_name.run(&["run"]).expect_code(0);
    assert_eq!(by_name.jsonl("out.jsonl"), answers);
}

#[test]
fn a_token_that_the_model_lacks_is_named() {
    let pipeline = pipeline("tiny");
    write_model(&pipeline.path("tiny"));
    let config = pipeline.path("tiny/config.json");
    let mut values: Value = serde_json::from_str(&fs::read_to_string(&config).unwrap()).unwrap();
    for (key, value) in [("vocab_size", 600), ("bos_token_id", 1), ("eos_token_id", 2)] {
        values[key] = json!(value);
    }
    fs::write(config, values.to_string()).unwrap();
    write_weights(&pipeline.path("tiny"), 600);
    pipeline.run(&["run"]).expect_code(1).expect_words(&["700 token ids, but the model knows 600"]);
}

fn pipeline(model: &str) -> Pipeline {
    let pipeline = Pipeline::new(&DEFINITION.replace("MODEL", model));
    fs::write(pipeline.path("input.jsonl"), "{\"text\":\"Hello <|eot_id|>\"}\n{\"text\":\"größer\"}\n")
        .expect("a writable folder");
    pipeline
}
