use std::sync::Arc;

use expect_test::{Expect, expect};

use super::*;
use crate::gguf::build::Builder;
use crate::sample::{penalize, sample};
use crate::step::{Model, PageId, SamplingParams, StepBatch, TokenUse};

const HIDDEN: usize = 32;
const INTERMEDIATE: usize = 48;
const VOCAB: usize = 50;
const KV_LEN: usize = 16;
const NUM_LAYERS: u32 = 2;

/// Metadata of a model with two heads of 16 that share keys and values.
fn metadata() -> Builder {
    Builder::new()
        .str("general.architecture", "llama")
        .u32("llama.vocab_size", VOCAB as u32)
        .u32("llama.block_count", NUM_LAYERS)
        .u32("llama.context_length", 128)
        .u32("llama.embedding_length", HIDDEN as u32)
        .u32("llama.feed_forward_length", INTERMEDIATE as u32)
        .u32("llama.attention.head_count", 2)
        .u32("llama.attention.head_count_kv", 1)
        .f32("llama.attention.layer_norm_rms_epsilon", 1e-5)
        .u32("tokenizer.ggml.eos_token_id", 2)
}

fn tensor(builder: Builder, name: &str, shape: &[usize]) -> Builder {
    let mut state = name.bytes().fold(7u64, |seed, byte| seed.wrapping_mul(31).wrapping_add(byte.into())) | 1;
    let mut value = |_| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1u64 << 24) as f32 - 0.5
    };
    let values: Vec<f32> = (0..shape.iter().product()).map(&mut value).collect();
    builder.tensor(name, shape, &values)
}

fn with_tensors(mut builder: Builder) -> Builder {
    builder = tensor(builder, "token_embd.weight", &[VOCAB, HIDDEN]);
    builder = tensor(builder, "output_norm.weight", &[HIDDEN]);
    for layer in 0..NUM_LAYERS {
        for (part, shape) in [
            ("attn_norm", &[HIDDEN][..]),
            ("attn_q", &[HIDDEN, HIDDEN]),
            ("attn_k", &[KV_LEN, HIDDEN]),
            ("attn_v", &[KV_LEN, HIDDEN]),
            ("attn_output", &[HIDDEN, HIDDEN]),
            ("ffn_norm", &[HIDDEN]),
            ("ffn_gate", &[INTERMEDIATE, HIDDEN]),
            ("ffn_up", &[INTERMEDIATE, HIDDEN]),
            ("ffn_down", &[HIDDEN, INTERMEDIATE]),
        ] {
            builder = tensor(builder, &format!("blk.{layer}.{part}.weight"), shape);
        }
    }
    builder
}

#[track_caller]
fn check(builder: Builder, expected: Expect) {
    let gguf = builder.open().unwrap();
    expected.assert_eq(
        &ModelWeights::load(&Checkpoint::Gguf(gguf), NumericPath::Fast)
            .expect_err("the model is wrong")
            .to_string(),
    );
}

fn weights(path: NumericPath) -> Arc<ModelWeights> {
    ModelWeights::load(&Checkpoint::Gguf(with_tensors(metadata()).open().unwrap()), path).unwrap()
}

fn transformer(path: NumericPath) -> Transformer {
    Transformer::new(weights(path), KvConfig { page_size: 16, num_pages: 8 }, 2, "tiny", "abc").unwrap()
}

fn batch(token_ids: &[u32]) -> StepBatch {
    let mut batch = StepBatch::default();
    batch.push(token_ids, 0, &[PageId(3), PageId(1)], Some(SamplingParams::GREEDY));
    batch
}

const TOKENS: [u32; 20] = [1, 5, 9, 13, 17, 21, 25, 29, 33, 37, 41, 45, 49, 3, 7, 11, 15, 19, 23, 27];

#[test]
fn paths_agree_and_say_who_they_are() {
    let (mut reference, mut fast) = (transformer(NumericPath::Reference), transformer(NumericPath::Fast));
    assert_eq!(reference.info().digest, format!("abc-reference-f32-v{ENGINE_VERSION}"));
    assert_eq!(fast.info().digest, format!("abc-cpu-int8-v{ENGINE_VERSION}"));
    assert_eq!(fast.info().eos_token_ids, [2]);
    let (expected, actual) = (reference.logits(&batch(&TOKENS)), fast.logits(&batch(&TOKENS)));
    let scale = expected.iter().fold(0.0f32, |max, logit| max.max(logit.abs()));
    for (expected, actual) in expected.iter().zip(&actual) {
        assert!((expected - actual).abs() < 5e-2 * scale, "{expected} and {actual}");
    }
}

#[test]
fn models_share_weights_but_not_caches() {
    let weights = weights(NumericPath::Fast);
    // Keys and values of two layers: a byte a number, and a scale for the one head.
    assert_eq!(weights.kv_bytes_per_token(), 2 * 2 * (KV_LEN + 4) as u64);
    let kv = KvConfig { page_size: 16, num_pages: 8 };
    let mut models: Vec<Transformer> =
        (0..2).map(|i| Transformer::new(Arc::clone(&weights), kv, 1 + i, "tiny", "abc").unwrap()).collect();
    let expected = models[0].step(&batch(&TOKENS)).unwrap();
    models[1].step(&batch(&TOKENS[3..])).unwrap();
    assert_eq!(models[1].step(&batch(&TOKENS)).unwrap(), expected);
}

#[test]
fn only_asked_rows_are_sampled() {
    let mut model = transformer(NumericPath::Fast);
    let mut batch = batch(&TOKENS);
    batch.push(&TOKENS[5..], 0, &[PageId(0)], None);
    batch.push(&TOKENS, 0, &[PageId(5), PageId(6)], Some(SamplingParams::GREEDY));
    let output = model.step(&batch).unwrap();
    assert_eq!(output.token_ids[1], None);
    assert!(output.token_ids[0].is_some());
    assert_eq!(output.token_ids[0], output.token_ids[2]);
}

#[test]
fn penalties_are_for_their_own_sequence() {
    let mut model = transformer(NumericPath::Fast);
    let mut batch = batch(&TOKENS);
    let plain = model.step(&batch).unwrap().token_ids[0].unwrap();
    let penalties = SamplingParams {
        repetition_penalty: 1.5,
        frequency_penalty: 2.0,
        presence_penalty: 2.0,
        ..SamplingParams::GREEDY
    };
    let uses = [TokenUse { token_id: plain, num_in_answer: 3 }];
    for (seq, sampling) in
        [penalties, SamplingParams { temperature: 2.0, min_p: 0.5, ..penalties }].into_iter().enumerate()
    {
        batch.push(&TOKENS, 0, &[0, 2].map(|page| PageId(page + seq as u32 * 4)), Some(sampling));
        batch.push_uses(&uses);
    }
    let output = model.step(&batch).unwrap();
    assert_eq!(output.token_ids[0], Some(plain));
    assert_ne!(output.token_ids[1], Some(plain));
    let mut logits = model.logits(&batch);
    let vocab_size = model.info().vocab_size as usize;
    for (seq, row) in logits.chunks_exact_mut(vocab_size).enumerate() {
        let params = batch.sampling[seq].unwrap();
        penalize(row, &params, batch.uses(seq));
        assert_eq!(output.token_ids[seq], Some(sample(row, &params, TOKENS.len() as u32).unwrap()));
    }
}

#[test]
fn a_sampling_error_fails_the_step() {
    let mut batch = batch(&TOKENS);
    batch.sampling[0] = Some(SamplingParams { temperature: f32::NAN, ..SamplingParams::GREEDY });
    let error = transformer(NumericPath::Fast).step(&batch).unwrap_err();
    expect!["model step failed: sequence 0 of the batch: the temperature is not a number of at least zero"]
        .assert_eq(&error.to_string());
}

#[test]
fn caches_that_cannot_be_are_errors() {
    let weights = weights(NumericPath::Fast);
    for (page_size, num_pages) in [(8, 4), (24, 4), (1 << 20, 4), (16, 0)] {
        let kv = KvConfig { page_size, num_pages };
        assert!(Transformer::new(Arc::clone(&weights), kv, 1, "tiny", "").is_err(), "{kv:?}");
    }
}

#[test]
fn wrong_metadata_is_refused() {
    check(
        Builder::new().str("general.architecture", "gpt2"),
        expect![[
            r#"model file "test.gguf" is of the family "gpt2", known are llama, qwen2, qwen3, qwen3moe, gemma3"#
        ]],
    );
    check(
        Builder::new().str("general.architecture", "llama"),
        expect![[r#"model file "test.gguf" has no metadata key "tokenizer.ggml.tokens""#]],
    );
    check(
        with_tensors(metadata().str("llama.rope.scaling.type", "yarn")),
        expect![[
            r#"model file "test.gguf" has "yarn" under metadata key "llama.rope.scaling.type", expected "none" or "linear""#
        ]],
    );
    check(
        with_tensors(metadata().u32("llama.rope.dimension_count", 8)),
        expect![[
            r#"model file "test.gguf" has 8 under metadata key "llama.rope.dimension_count", expected 16, the dimension of a head"#
        ]],
    );
    check(
        with_tensors(metadata().u32("llama.attention.key_length", 6)),
        expect![[r#"head dimension 6 is not a multiple of 16, which the fast path needs"#]],
    );
    check(
        with_tensors(metadata().f32("llama.rope.freq_base", f32::NAN)),
        expect![[
            r#"model file "test.gguf" has NaN under metadata key "llama.rope.freq_base", expected a number from 1 to 1000000000000"#
        ]],
    );
    check(
        with_tensors(metadata().u32("tokenizer.ggml.eot_token_id", 50)),
        expect![[
            r#"model file "test.gguf" has 50 under metadata key "tokenizer.ggml.eot_token_id", expected a token id below 50"#
        ]],
    );
}

#[test]
fn experts_must_all_be_there() {
    let metadata = || {
        Builder::new()
            .str("general.architecture", "qwen3moe")
            .u32("qwen3moe.vocab_size", VOCAB as u32)
            .u32("qwen3moe.block_count", 1)
            .u32("qwen3moe.context_length", 128)
            .u32("qwen3moe.embedding_length", HIDDEN as u32)
            .u32("qwen3moe.expert_feed_forward_length", INTERMEDIATE as u32)
            .u32("qwen3moe.attention.head_count", 2)
            .f32("qwen3moe.attention.layer_norm_rms_epsilon", 1e-5)
            .u32("qwen3moe.expert_count", 4)
    };
    check(
        metadata().u32("qwen3moe.expert_used_count", 5),
        expect![[
            r#"model file "test.gguf" has 5 under metadata key "qwen3moe.expert_used_count", expected a number from 1 to 4"#
        ]],
    );
    let mut builder = metadata().u32("qwen3moe.expert_used_count", 2);
    for (name, shape) in [
        ("token_embd.weight", &[VOCAB, HIDDEN][..]),
        ("output_norm.weight", &[HIDDEN]),
        ("blk.0.attn_norm.weight", &[HIDDEN]),
        ("blk.0.attn_q_norm.weight", &[HIDDEN / 2]),
        ("blk.0.attn_k_norm.weight", &[HIDDEN / 2]),
        ("blk.0.attn_q.weight", &[HIDDEN, HIDDEN]),
        ("blk.0.attn_k.weight", &[HIDDEN, HIDDEN]),
        ("blk.0.attn_v.weight", &[HIDDEN, HIDDEN]),
        ("blk.0.attn_output.weight", &[HIDDEN, HIDDEN]),
        ("blk.0.ffn_norm.weight", &[HIDDEN]),
        ("blk.0.ffn_gate_exps.weight", &[3, INTERMEDIATE, HIDDEN]),
    ] {
        builder = tensor(builder, name, shape);
    }
    check(
        builder,
        expect![[
            r#"tensor "blk.0.ffn_gate_exps.weight" of model file "test.gguf" has the shape [3, 48, 32], expected [4, 48, 32]"#
        ]],
    );
}

#[test]
fn wrong_tensors_are_refused() {
    check(metadata(), expect![[r#"model file "test.gguf" has no tensor "token_embd.weight""#]]);
    check(
        tensor(metadata(), "token_embd.weight", &[VOCAB + 1, HIDDEN]),
        expect![[
            r#"tensor "token_embd.weight" of model file "test.gguf" has the shape [51, 32], expected [50, 32]"#
        ]],
    );
    check(
        metadata().tensor("token_embd.weight", &[VOCAB, HIDDEN], &[f32::NAN; VOCAB * HIDDEN]),
        expect![[
            r#"tensor "token_embd.weight" of model file "test.gguf" holds a number that is not finite"#
        ]],
    );
    check(
        tensor(with_tensors(metadata()), "blk.0.attn_q.bias", &[HIDDEN]),
        expect![[r#"tensor "blk.0.attn_q.bias" of model file "test.gguf" is not part of the llama family"#]],
    );
    check(
        with_tensors(metadata()).tensor("rope_freqs.weight", &[8], &[0.0; 8]),
        expect![[
            r#"tensor "rope_freqs.weight" of model file "test.gguf" holds a number that is not finite"#
        ]],
    );
}
