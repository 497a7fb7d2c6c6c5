//! The shape of a model, from the metadata of its checkpoint; the only place that knows the keys.
//!
//! Invariant: a [`ModelConfig`] is checked. Sizes are positive, bounded and divide each other as the layers need, so
//! that products of them neither overflow nor allocate absurd amounts. What is known to change the answers and is not
//! computed here is refused by its key.

mod gguf;
mod hugging_face;
#[cfg(test)]
mod tests;
mod values;

use self::values::Values;
use crate::models::{Family, ModelError, RopeConfig};

pub(super) use self::hugging_face::HuggingFaceConfig;

const MAX_VOCAB_SIZE: u32 = 1 << 20;
const MAX_HIDDEN_SIZE: u32 = 1 << 16;
const MAX_LAYERS: u32 = 1 << 10;
const MAX_HEADS: u32 = 1 << 10;
const MAX_HEAD_DIM: u32 = 1 << 10;
const MAX_POSITIONS: u32 = 1 << 20;
const MAX_EXPERTS: u32 = 1 << 10;
const MAX_THETA: f32 = 1e12;
/// Of frequencies and scores.
const MAX_FACTOR: f32 = 1e6;

/// What the layers of a model must know.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    pub family: Family,
    pub vocab_size: u32,
    pub hidden_size: u32,
    /// Of the feed-forward part, or of each expert.
    pub intermediate_size: u32,
    pub num_layers: u32,
    pub num_heads: u32,
    pub num_kv_heads: u32,
    pub head_dim: u32,
    pub max_position: u32,
    pub rms_norm_epsilon: f32,
    /// Scores are multiplied by this.
    pub attention_scale: f32,
    pub rope: RopeConfig,
    /// For layers with a window, where these differ.
    pub window_rope: Option<RopeConfig>,
    /// `[num_layers]`: the positions that a layer sees, if not all.
    pub windows: Vec<Option<u32>>,
    pub experts: Option<ExpertsConfig>,
    /// The embedding is the output head too.
    pub tied_output: bool,
    /// Tokens that end an answer.
    pub eos_token_ids: Vec<u32>,
}

/// A feed-forward part made of experts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExpertsConfig {
    pub num_experts: u32,
    pub num_experts_per_token: u32,
    /// The weights of the chosen experts are scaled to a sum of one.
    pub renormalize: bool,
}

/// Under which keys the sizes are found.
struct SizeKeys {
    hidden_size: String,
    intermediate_size: String,
    num_layers: String,
    num_heads: String,
    num_kv_heads: String,
    head_dim: String,
    max_position: String,
    rms_norm_epsilon: String,
}

impl ModelConfig {
    /// Sizes alone, checked; the rest as in a Llama.
    fn from_sizes(
        values: &Values<'_>,
        keys: &SizeKeys,
        family: Family,
        vocab_size: u32,
    ) -> Result<Self, ModelError> {
        let hidden_size = values.size(&keys.hidden_size, MAX_HIDDEN_SIZE)?;
        let num_layers = values.size(&keys.num_layers, MAX_LAYERS)?;
        let num_heads = values.size(&keys.num_heads, MAX_HEADS)?;
        let num_kv_heads = values.size_or(&keys.num_kv_heads, num_heads, num_heads)?;
        if !num_heads.is_multiple_of(num_kv_heads) {
            let expected = format!("a divisor of {num_heads}, the number of heads");
            return Err(values.invalid(&keys.num_kv_heads, expected));
        }
        let head_dim = values.size_or(&keys.head_dim, MAX_HEAD_DIM, hidden_size / num_heads)?;
        if head_dim == 0 || !head_dim.is_multiple_of(2) || head_dim > MAX_HEAD_DIM {
            let key = if values.has(&keys.head_dim) { &keys.head_dim } else { &keys.num_heads };
            return Err(values.invalid(key, format!("heads of an even dimension up to {MAX_HEAD_DIM}")));
        }
        Ok(Self {
            family,
            vocab_size,
            hidden_size,
            intermediate_size: values.size(&keys.intermediate_size, MAX_HIDDEN_SIZE * 4)?,
            num_layers,
            num_heads,
            num_kv_heads,
            head_dim,
            max_position: values.size(&keys.max_position, MAX_POSITIONS)?,
            rms_norm_epsilon: values.float(&keys.rms_norm_epsilon, 0.0, 1.0)?,
            attention_scale: 1.0 / (head_dim as f32).sqrt(),
            rope: RopeConfig::unscaled(10_000.0),
            window_rope: None,
            windows: vec![None; num_layers as usize],
            experts: None,
            tied_output: false,
            eos_token_ids: Vec::new(),
        })
    }

    fn add_eos_token_id(&mut self, values: &Values<'_>, key: &str, id: u64) -> Result<(), ModelError> {
        match u32::try_from(id) {
            Ok(id) if id < self.vocab_size => {
                if !self.eos_token_ids.contains(&id) {
                    self.eos_token_ids.push(id);
                }
                Ok(())
            }
            _ => Err(values.invalid(key, format!("a token id below {}", self.vocab_size))),
        }
    }
}
