//! The shape of a model, from the metadata of its file; the only place that knows the keys.
//!
//! Invariant: a [`LlamaConfig`] is checked. Sizes are positive, bounded and divide each other as the layers need, so
//! that products of them neither overflow nor allocate absurd amounts.

use crate::gguf::{Gguf, MetadataValue};
use crate::models::ModelError;

const MAX_VOCAB_SIZE: u32 = 1 << 20;
const MAX_HIDDEN_SIZE: u32 = 1 << 16;
const MAX_LAYERS: u32 = 1 << 10;
const MAX_HEADS: u32 = 1 << 10;
const MAX_HEAD_DIM: u32 = 1 << 10;
/// The tables of angles are computed at load, for every position.
const MAX_POSITIONS: u32 = 1 << 20;

/// What the layers of a Llama model must know.
#[derive(Clone, Debug, PartialEq)]
pub struct LlamaConfig {
    pub vocab_size: u32,
    pub hidden_size: u32,
    pub intermediate_size: u32,
    pub num_layers: u32,
    pub num_heads: u32,
    pub num_kv_heads: u32,
    pub head_dim: u32,
    pub max_position: u32,
    pub rope_theta: f32,
    pub rms_norm_epsilon: f32,
    /// Tokens that end an answer.
    pub eos_token_ids: Vec<u32>,
}

impl LlamaConfig {
    pub fn from_gguf(gguf: &Gguf) -> Result<Self, ModelError> {
        let family = gguf.str("general.architecture")?;
        if family != "llama" {
            return Err(ModelError::UnknownFamily {
                path: gguf.path().to_owned(),
                family: family.to_owned(),
            });
        }
        refuse_variants(gguf)?;
        let num_heads = size(gguf, "llama.attention.head_count", MAX_HEADS)?;
        let hidden_size = size(gguf, "llama.embedding_length", MAX_HIDDEN_SIZE)?;
        let num_kv_heads = match gguf.has("llama.attention.head_count_kv") {
            true => size(gguf, "llama.attention.head_count_kv", num_heads)?,
            false => num_heads,
        };
        if !num_heads.is_multiple_of(num_kv_heads) {
            let expected = format!("a divisor of {num_heads}, the number of heads");
            return Err(invalid(gguf, "llama.attention.head_count_kv", expected));
        }
        let config = Self {
            vocab_size: vocab_size(gguf)?,
            hidden_size,
            intermediate_size: size(gguf, "llama.feed_forward_length", MAX_HIDDEN_SIZE * 4)?,
            num_layers: size(gguf, "llama.block_count", MAX_LAYERS)?,
            num_heads,
            num_kv_heads,
            head_dim: head_dim(gguf, hidden_size, num_heads)?,
            max_position: size(gguf, "llama.context_length", MAX_POSITIONS)?,
            rope_theta: match gguf.has("llama.rope.freq_base") {
                true => float(gguf, "llama.rope.freq_base", 1.0, 1e12)?,
                false => 10_000.0,
            },
            rms_norm_epsilon: float(gguf, "llama.attention.layer_norm_rms_epsilon", 0.0, 1.0)?,
            eos_token_ids: Vec::new(),
        };
        Ok(Self { eos_token_ids: eos_token_ids(gguf, config.vocab_size)?, ..config })
    }
}

/// Known extensions of the family which would silently give wrong answers.
fn refuse_variants(gguf: &Gguf) -> Result<(), ModelError> {
    const SCALING: &str = "llama.rope.scaling.type";
    if gguf.has(SCALING) && gguf.str(SCALING)? != "none" {
        return Err(invalid(gguf, SCALING, "\"none\", other positions are not supported".to_owned()));
    }
    const EXPERTS: &str = "llama.expert_count";
    if gguf.has(EXPERTS) && gguf.u32(EXPERTS)? != 0 {
        return Err(invalid(gguf, EXPERTS, "0, experts are not supported".to_owned()));
    }
    Ok(())
}

fn vocab_size(gguf: &Gguf) -> Result<u32, ModelError> {
    if gguf.has("llama.vocab_size") {
        return size(gguf, "llama.vocab_size", MAX_VOCAB_SIZE);
    }
    let len = gguf.str_array("tokenizer.ggml.tokens")?.len();
    match u32::try_from(len) {
        Ok(len) if (1..=MAX_VOCAB_SIZE).contains(&len) => Ok(len),
        _ => Err(invalid(gguf, "tokenizer.ggml.tokens", format!("1 to {MAX_VOCAB_SIZE} tokens"))),
    }
}

fn head_dim(gguf: &Gguf, hidden_size: u32, num_heads: u32) -> Result<u32, ModelError> {
    const KEY: &str = "llama.attention.key_length";
    let head_dim = match gguf.has(KEY) {
        true => size(gguf, KEY, MAX_HEAD_DIM)?,
        false => hidden_size / num_heads,
    };
    if head_dim == 0 || !head_dim.is_multiple_of(2) || head_dim > MAX_HEAD_DIM {
        let expected = format!("heads of an even dimension up to {MAX_HEAD_DIM}");
        return Err(invalid(gguf, "llama.attention.head_count", expected));
    }
    for key in ["llama.rope.dimension_count", "llama.attention.value_length"] {
        if gguf.has(key) && gguf.u32(key)? != head_dim {
            return Err(invalid(gguf, key, format!("{head_dim}, the dimension of a head")));
        }
    }
    Ok(head_dim)
}

fn eos_token_ids(gguf: &Gguf, vocab_size: u32) -> Result<Vec<u32>, ModelError> {
    let mut ids = Vec::new();
    for key in ["tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id"] {
        if !gguf.has(key) {
            continue;
        }
        let id = gguf.u32(key)?;
        if id >= vocab_size {
            return Err(invalid(gguf, key, format!("a token id below {vocab_size}")));
        }
        if !ids.contains(&id) {
            ids.push(id);
        }
    }
    Ok(ids)
}

fn size(gguf: &Gguf, key: &str, max: u32) -> Result<u32, ModelError> {
    let value = gguf.u32(key)?;
    if !(1..=max).contains(&value) {
        return Err(invalid(gguf, key, format!("a number from 1 to {max}")));
    }
    Ok(value)
}

fn float(gguf: &Gguf, key: &str, min: f32, max: f32) -> Result<f32, ModelError> {
    let value = gguf.f32(key)?;
    if !(min..=max).contains(&value) {
        return Err(invalid(gguf, key, format!("a number from {min} to {max}")));
    }
    Ok(value)
}

fn invalid(gguf: &Gguf, key: &str, expected: String) -> ModelError {
    let value = gguf.metadata.get(key).map_or_else(|| "nothing".to_owned(), MetadataValue::describe);
    ModelError::InvalidValue { path: gguf.path().to_owned(), key: key.to_owned(), value, expected }
}
