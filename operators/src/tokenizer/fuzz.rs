//! Damaged `tokenizer.json` files: never a panic, and what opens encodes, decodes and shields.

use std::path::Path;

use serde_json::{Value, json};

use super::hugging_face::parse;

const NUM_FILES: u64 = 8000;

#[test]
fn broken_files_never_panic() {
    let valid = [byte_level().to_string(), sentence_piece().to_string()];
    let mut num_open = 0;
    for seed in 0..NUM_FILES {
        let mut random = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        let text = damage(valid[seed as usize % 2].as_bytes().to_vec(), &mut random);
        let checked = std::panic::catch_unwind(|| use_all(&text));
        num_open += u64::from(checked.unwrap_or_else(|_| panic!("seed {seed} panics: {text}")));
    }
    // Both outcomes are exercised.
    assert!(num_open > NUM_FILES / 50, "only {num_open} files open");
    assert!(num_open < NUM_FILES, "all files open");
}

/// Whether the file opens; then it must be of use.
fn use_all(text: &str) -> bool {
    let Ok(tokenizer) = parse(Path::new("tokenizer.json"), text, "<s>", None) else { return false };
    for prompt in ["", "a ab\n\n", "<s>héé <e> 12 b", "\u{F0000}\u{F0001}"] {
        let shielded = tokenizer.shield(prompt);
        // What the tables lack may be dropped or refused; that is a matter of the document.
        if let Ok(ids) = tokenizer.encode(&shielded) {
            let _ = tokenizer.decode(&ids);
        }
    }
    let _ = tokenizer.decode(&[0, 1, 5, u32::MAX]);
    true
}

fn file(vocab: Value, merges: Value, byte_fallback: bool, pre_tokenizer: Value, decoder: Value) -> Value {
    json!({
        "version": "1.0",
        "added_tokens": [
            { "id": 9, "content": "<s>", "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true },
            { "id": 10, "content": "\n\n", "special": false },
        ],
        "normalizer": { "type": "Replace", "pattern": { "String": " " }, "content": "▁" },
        "pre_tokenizer": pre_tokenizer,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{ "SpecialToken": { "id": "<s>", "type_id": 0 } }, { "Sequence": { "id": "A", "type_id": 0 } }],
            "pair": [{ "Sequence": { "id": "A", "type_id": 0 } }, { "Sequence": { "id": "B", "type_id": 1 } }],
            "special_tokens": { "<s>": { "id": "<s>", "ids": [9], "tokens": ["<s>"] } },
        },
        "decoder": decoder,
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": "", "end_of_word_suffix": null,
            "fuse_unk": false, "byte_fallback": byte_fallback, "ignore_merges": true, "vocab": vocab, "merges": merges,
        },
    })
}

fn byte_level() -> Value {
    let split = json!({ "type": "Split", "pattern": { "Regex": "\\p{N}{1,3}|\\s+(?!\\S)|\\s+|\\w+" }, "behavior": "Isolated", "invert": false });
    let bytes =
        json!({ "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false });
    let vocab = json!({ "a": 0, "b": 1, "ab": 2, "Ġ": 3, "Ġab": 4, "Ã": 5, "©": 6, "h": 7, "1": 8 });
    let pre_tokenizer = json!({ "type": "Sequence", "pretokenizers": [split, bytes.clone()] });
    file(vocab, json!([["a", "b"], ["Ġ", "ab"]]), false, pre_tokenizer, bytes)
}

fn sentence_piece() -> Value {
    let decoder = json!({ "type": "Sequence", "decoders": [
        { "type": "Replace", "pattern": { "String": "▁" }, "content": " " }, { "type": "ByteFallback" }, { "type": "Fuse" },
        { "type": "Strip", "content": " ", "start": 1, "stop": 0 },
    ] });
    let vocab =
        json!({ "a": 0, "b": 1, "ab": 2, "▁": 3, "▁ab": 4, "<0xC3>": 5, "<0xA9>": 6, "h": 7, "1": 8 });
    file(vocab, json!(["a b", "▁ ab"]), true, Value::Null, decoder)
}

fn damage(mut bytes: Vec<u8>, random: &mut u64) -> String {
    for _ in 0..=next(random) % 3 {
        let at = next(random) as usize % bytes.len();
        match next(random) % 5 {
            0 => bytes[at] ^= 1 << (next(random) % 8),
            1 => bytes[at] = next(random) as u8,
            2 => bytes.truncate(at.max(1)),
            // A digit or a letter for another keeps the JSON valid, so that the tables are tested.
            3 => {
                if let Some(digit) = bytes[at..].iter_mut().find(|byte| byte.is_ascii_digit()) {
                    *digit = b'0' + (next(random) % 10) as u8;
                }
            }
            _ => {
                if let Some(letter) = bytes[at..].iter_mut().find(|byte| byte.is_ascii_alphabetic()) {
                    *letter = b"abstr"[next(random) as usize % 5];
                }
            }
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// Xorshift.
fn next(random: &mut u64) -> u64 {
    *random ^= *random << 13;
    *random ^= *random >> 7;
    *random ^= *random << 17;
    *random
}
