//! Configurations of folders, right and wrong ones; the keys of GGUF files are tested with the models.

use std::path::Path;

use expect_test::{Expect, expect};
use serde_json::{Value as Json, json};

use super::*;
use crate::models::RopeScaling;

fn read(config: &Json) -> Result<ModelConfig, ModelError> {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
    HuggingFaceConfig::open(folder.path())?.model_config()
}

/// A config with some fields set.
fn with(model_type: &str, fields: Json) -> Json {
    let mut config = json!({
        "model_type": model_type, "vocab_size": 100, "hidden_size": 64, "intermediate_size": 96,
        "num_hidden_layers": 7, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 4096, "rms_norm_eps": 1e-6, "eos_token_id": 2,
    });
    for (key, value) in fields.as_object().unwrap() {
        config[key] = value.clone();
    }
    config
}

fn config(model_type: &str, fields: Json) -> ModelConfig {
    read(&with(model_type, fields)).unwrap()
}

#[track_caller]
fn check_error(model_type: &str, fields: Json, expected: Expect) {
    let error = read(&with(model_type, fields)).expect_err("the config is wrong").to_string();
    // The folder has another name in every run.
    let (_, text) = error.split_once("config.json\" ").unwrap();
    expected.assert_eq(text);
}

const LLAMA3: RopeScaling = RopeScaling::Llama3 {
    factor: 8.0,
    low_freq_factor: 1.0,
    high_freq_factor: 4.0,
    original_max_position: 1024,
};

#[test]
fn both_spellings_of_positions_are_one() {
    let scaling = json!({
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 1024,
    });
    let mut newer = scaling.clone();
    newer["rope_theta"] = json!(5e5);
    let older = config("llama", json!({ "rope_theta": 5e5, "rope_scaling": scaling }));
    assert_eq!(older, config("llama", json!({ "rope_parameters": newer })));
    assert_eq!(older.rope, RopeConfig { theta: 5e5, scaling: LLAMA3 });
    let linear = config("llama", json!({ "rope_scaling": { "type": "linear", "factor": 2 } }));
    assert_eq!(linear.rope, RopeConfig { theta: 1e4, scaling: RopeScaling::Linear { factor: 2.0 } });

    let older = json!({
        "rope_theta": 1e6, "rope_local_base_freq": 5e3, "sliding_window": 8, "sliding_window_pattern": 3,
        "rope_scaling": null,
    });
    let newer = json!({
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention",
            "sliding_attention", "full_attention", "sliding_attention"],
        "rope_parameters": {
            "full_attention": { "rope_type": "default", "rope_theta": 1e6 },
            "sliding_attention": { "rope_type": "default", "rope_theta": 5e3 },
        },
    });
    let older = config("gemma3_text", older);
    assert_eq!(older, config("gemma3_text", newer));
    assert_eq!(older.window_rope, Some(RopeConfig::unscaled(5e3)));
    assert_eq!(older.attention_scale, 1.0 / 16.0);
}

#[test]
fn windows_follow_the_family() {
    let windows = |model_type: &str, fields| config(model_type, fields).windows;
    assert_eq!(windows("mistral", json!({ "sliding_window": 9 })), [Some(9); 7]);
    assert_eq!(windows("mistral", json!({ "sliding_window": null })), [None; 7]);
    assert_eq!(windows("qwen2", json!({ "sliding_window": 9, "use_sliding_window": false })), [None; 7]);
    let last_two = json!({ "sliding_window": 9, "use_sliding_window": true, "max_window_layers": 5 });
    assert_eq!(windows("qwen3", last_two)[4..], [None, Some(9), Some(9)]);
    let gemma = windows("gemma3_text", json!({ "sliding_window": 9 }));
    assert_eq!(gemma[4..], [Some(9), None, Some(9)]);
}

#[test]
fn end_tokens_come_from_both_files() {
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, json: Json| std::fs::write(folder.path().join(name), json.to_string()).unwrap();
    write("config.json", with("llama", json!({})));
    write("generation_config.json", json!({ "eos_token_id": [2, 7] }));
    let config = HuggingFaceConfig::open(folder.path()).unwrap().model_config().unwrap();
    assert_eq!(config.eos_token_ids, [2, 7]);
    write("generation_config.json", json!({ "eos_token_id": [100] }));
    assert!(HuggingFaceConfig::open(folder.path()).unwrap().model_config().is_err());
}

#[test]
fn what_is_not_computed_is_refused() {
    check_error(
        "mamba",
        json!({}),
        expect![[
            r#"is of the family "mamba", known are llama, mistral, qwen2, qwen3, qwen3_moe, gemma3_text"#
        ]],
    );
    check_error(
        "llama",
        json!({ "rope_scaling": { "rope_type": "yarn", "factor": 4 } }),
        expect![[
            r#"has "yarn" under metadata key "rope_scaling/rope_type", expected "default", "linear" or "llama3""#
        ]],
    );
    check_error(
        "llama",
        json!({ "attention_bias": true }),
        expect![[r#"has true under metadata key "attention_bias", expected false"#]],
    );
    check_error(
        "llama",
        json!({ "hidden_act": "relu" }),
        expect![[r#"has "relu" under metadata key "hidden_act", expected "silu""#]],
    );
    check_error(
        "llama",
        json!({ "quantization_config": { "bits": 4 } }),
        expect![[
            r#"has an object under metadata key "quantization_config", expected nothing, this is not supported"#
        ]],
    );
    check_error(
        "llama",
        json!({ "num_attention_heads": 0 }),
        expect![[r#"has 0 under metadata key "num_attention_heads", expected a number from 1 to 1024"#]],
    );
    check_error(
        "llama",
        json!({ "num_key_value_heads": 3 }),
        expect![[
            r#"has 3 under metadata key "num_key_value_heads", expected a divisor of 4, the number of heads"#
        ]],
    );
    check_error("llama", json!({ "hidden_size": null }), expect![[r#"has no metadata key "hidden_size""#]]);
    check_error(
        "llama",
        json!({ "eos_token_id": "</s>" }),
        expect![[r#"has "</s>" under metadata key "eos_token_id", expected a token id or a list of them"#]],
    );
    check_error("gemma3_text", json!({}), expect![[r#"has no metadata key "sliding_window""#]]);
    check_error(
        "gemma3_text",
        json!({ "sliding_window": 8, "layer_types": ["full_attention"] }),
        expect![[
            r#"has a list of 1 values under metadata key "layer_types", expected 7 times "full_attention" or "sliding_attention""#
        ]],
    );
    let experts = json!({ "moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 5 });
    check_error(
        "qwen3_moe",
        experts,
        expect![[r#"has 5 under metadata key "num_experts_per_tok", expected a number from 1 to 4"#]],
    );
}

#[test]
fn missing_and_broken_files_are_errors() {
    let missing = HuggingFaceConfig::open(Path::new("/nowhere")).unwrap_err();
    expect![[r#"cannot read model configuration "/nowhere/config.json""#]].assert_eq(&missing.to_string());
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("config.json"), "{").unwrap();
    assert!(matches!(HuggingFaceConfig::open(folder.path()), Err(ModelError::Config { .. })));
}

/// Random values under random keys of a good config: an error or a config, never a panic.
#[test]
fn any_json_is_an_error_or_a_config() {
    const SEED: u64 = 0x5eed_c0de;
    println!("seed {SEED:#x}");
    let mut state = SEED;
    let mut next = |bound: usize| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 33) as usize % bound
    };
    let values = [
        json!(null),
        json!(0),
        json!(1),
        json!(-1),
        json!(3),
        json!(u64::MAX),
        json!(1e300),
        json!(0.5),
        json!("default"),
        json!("llama3"),
        json!(true),
        json!([]),
        json!(["full_attention"]),
        json!([null, 1]),
        json!({}),
        json!({ "rope_type": "linear", "factor": 0 }),
        json!({ "rope_type": "llama3", "factor": 1e-30 }),
    ];
    let good = json!({
        "sliding_window": 8, "use_sliding_window": true, "max_window_layers": 3, "head_dim": 16,
        "rope_theta": 1e4, "rope_scaling": null, "rope_parameters": null, "layer_types": null,
        "moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2, "mlp_only_layers": [],
        "decoder_sparse_step": 1, "sliding_window_pattern": 6, "query_pre_attn_scalar": 16,
    });
    for round in 0..4000 {
        let types = ["llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "gemma3_text"];
        let mut config = with(types[round % types.len()], good.clone());
        let keys: Vec<String> = config.as_object().unwrap().keys().cloned().collect();
        for _ in 0..=next(3) {
            config[&keys[next(keys.len())]] = values[next(values.len())].clone();
        }
        if let Ok(config) = read(&config) {
            assert_eq!(config.windows.len(), config.num_layers as usize, "{round}");
            assert_eq!(config.num_heads % config.num_kv_heads, 0, "{round}");
            let frequencies = config.rope.frequencies(config.head_dim as usize);
            assert!(frequencies.iter().all(|frequency| frequency.is_finite()), "{round}");
        }
    }
}
