//! A Hugging Face folder answers like any model, by its path and as a model of the hub that is in the cache.
//!
//! The weights are random; what they answer is no matter here, only that it is the same. Their golden tests are elsewhere.

use std::fs;
use std::path::Path;

use serde_json::{Value, json};
use tidemill_tests::{Pipeline, workspace};

const VOCAB_SIZE: usize = 703;
const HIDDEN_SIZE: usize = 64;
const INTERMEDIATE_SIZE: usize = 96;
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

/// A small Llama with the tokenizer of the reference files.
fn write_model(folder: &Path) {
    fs::create_dir_all(folder).expect("a writable folder");
    let config = json!({
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": VOCAB_SIZE,
        "hidden_size": HIDDEN_SIZE, "intermediate_size": INTERMEDIATE_SIZE, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu", "tie_word_embeddings": true,
        "bos_token_id": 700, "eos_token_id": 701,
    });
    fs::write(folder.join("config.json"), config.to_string()).expect("a writable folder");
    let tokenizer = workspace().join("tests/reference/tokenizers/llama-bpe");
    for name in ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"] {
        fs::copy(tokenizer.join(name), folder.join(name)).expect("the reference file is committed");
    }
    write_weights(folder, VOCAB_SIZE);
}

fn write_weights(folder: &Path, vocab_size: usize) {
    let (h, i) = (HIDDEN_SIZE, INTERMEDIATE_SIZE);
    let layer = "model.layers.0";
    let tensors = [
        ("model.embed_tokens.weight".to_owned(), vec![vocab_size, h]),
        ("model.norm.weight".to_owned(), vec![h]),
        (format!("{layer}.input_layernorm.weight"), vec![h]),
        (format!("{layer}.post_attention_layernorm.weight"), vec![h]),
        (format!("{layer}.self_attn.q_proj.weight"), vec![64, h]),
        (format!("{layer}.self_attn.k_proj.weight"), vec![32, h]),
        (format!("{layer}.self_attn.v_proj.weight"), vec![32, h]),
        (format!("{layer}.self_attn.o_proj.weight"), vec![h, 64]),
        (format!("{layer}.mlp.gate_proj.weight"), vec![i, h]),
        (format!("{layer}.mlp.up_proj.weight"), vec![i, h]),
        (format!("{layer}.mlp.down_proj.weight"), vec![h, i]),
    ];
    let (mut header, mut data) = (serde_json::Map::new(), Vec::<u8>::new());
    let mut random = 1u64;
    for (name, shape) in tensors {
        let start = data.len();
        for _ in 0..shape.iter().product() {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let value = ((random >> 40) as f32 / (1 << 24) as f32 - 0.5) * 0.3;
            data.extend(value.to_le_bytes());
        }
        let entry = json!({ "dtype": "F32", "shape": shape, "data_offsets": [start, data.len()] });
        header.insert(name, entry);
    }
    let header = Value::Object(header).to_string();
    let bytes = [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &data].concat();
    fs::write(folder.join("model.safetensors"), bytes).expect("a writable folder");
}
