//! A Hugging Face folder with a model that is small, whole and random: what it answers is no matter, only that it does.

use std::fs;
use std::path::Path;

use half::f16;
use serde_json::{Value, json};

use crate::workspace;

const VOCAB_SIZE: usize = 703;
const HIDDEN_SIZE: usize = 64;
const INTERMEDIATE_SIZE: usize = 96;

/// A small Llama with the tokenizer of the reference files.
pub fn write_model(folder: &Path) {
    fs::create_dir_all(folder).expect("a writable folder");
    let config = json!({
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": VOCAB_SIZE,
        "hidden_size": HIDDEN_SIZE, "intermediate_size": INTERMEDIATE_SIZE, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "max_position_embeddings": 1024,
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

/// Of the same size but for the vocabulary.
pub fn write_weights(folder: &Path, vocab_size: usize) {
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
    write_safetensors(folder, header, &data);
}

/// Rounds the weights of such a model to f16.
pub fn store_as_f16(folder: &Path) {
    let bytes = fs::read(folder.join("model.safetensors")).expect("a model was written");
    let (len, rest) = bytes.split_first_chunk().expect("a length");
    let (header, data) = rest.split_at(u64::from_le_bytes(*len) as usize);
    let mut header: serde_json::Map<String, Value> = serde_json::from_slice(header).expect("a header");
    for entry in header.values_mut() {
        entry["dtype"] = json!("F16");
        for offset in entry["data_offsets"].as_array_mut().expect("offsets") {
            *offset = json!(offset.as_u64().expect("a number of bytes") / 2);
        }
    }
    let half = |bytes: &[u8; 4]| f16::from_f32(f32::from_le_bytes(*bytes)).to_le_bytes();
    let data: Vec<u8> = data.as_chunks().0.iter().flat_map(half).collect();
    write_safetensors(folder, header, &data);
}

fn write_safetensors(folder: &Path, header: serde_json::Map<String, Value>, data: &[u8]) {
    let header = Value::Object(header).to_string();
    let bytes = [&(header.len() as u64).to_le_bytes(), header.as_bytes(), data].concat();
    fs::write(folder.join("model.safetensors"), bytes).expect("a writable folder");
}
