//! [`ModelConfig`] from the metadata of a GGUF file.

use super::values::{Value, Values};
use super::{
    ExpertsConfig, MAX_EXPERTS, MAX_FACTOR, MAX_HEAD_DIM, MAX_HIDDEN_SIZE, MAX_POSITIONS, MAX_THETA,
    MAX_VOCAB_SIZE, ModelConfig, SizeKeys,
};
use crate::gguf::{Gguf, MetadataValue};
use crate::models::rope::{RopeConfig, RopeScaling};
use crate::models::{Family, ModelError};

/// Every how many layers a Gemma 3 sees all positions; files do not say.
const GEMMA3_PATTERN: usize = 6;
/// Base of the angles in layers with a window of Gemma 3; most files do not say.
const GEMMA3_WINDOW_THETA: f32 = 10_000.0;
/// Gemma 3 27B, which alone scales its scores by the share of a head in the hidden size.
const GEMMA3_27B_LAYERS: u32 = 62;

impl ModelConfig {
    pub fn from_gguf(gguf: &Gguf) -> Result<Self, ModelError> {
        let find = |key: &str| gguf.metadata.get(key).map(value_of);
        let values = Values { path: gguf.path(), find: &find };
        let name = values.text("general.architecture")?;
        let family = Family::ALL.into_iter().find(|family| family.architecture().gguf_name == name);
        let Some(family) = family else {
            return Err(ModelError::UnknownFamily {
                path: gguf.path().to_owned(),
                family: name,
                known: Family::ALL.map(|family| family.architecture().gguf_name).join(", "),
            });
        };
        let reader = Reader { values: &values, name: &name };
        let mut config =
            Self::from_sizes(&values, &reader.size_keys(family), family, reader.vocab_size(gguf)?)?;
        for part in ["rope.dimension_count", "attention.value_length"] {
            let key = reader.key(part);
            if values.size_or(&key, MAX_HEAD_DIM, config.head_dim)? != config.head_dim {
                let expected = format!("{}, the dimension of a head", config.head_dim);
                return Err(values.invalid(&key, expected));
            }
        }
        config.rope = reader.rope()?;
        config.experts = reader.experts(family)?;
        config.tied_output = gguf.tensor("output.weight").is_err();
        reader.windows(&mut config)?;
        reader.attention_scale(&mut config)?;
        for key in
            ["tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id"]
        {
            if values.has(key) {
                config.add_eos_token_id(&values, key, u64::from(gguf.u32(key)?))?;
            }
        }
        Ok(config)
    }
}

struct Reader<'a> {
    values: &'a Values<'a>,
    /// Prefix of the keys.
    name: &'a str,
}

impl Reader<'_> {
    fn key(&self, part: &str) -> String {
        format!("{}.{part}", self.name)
    }

    fn size_keys(&self, family: Family) -> SizeKeys {
        let intermediate_size = match family {
            Family::Qwen3Moe => "expert_feed_forward_length",
            _ => "feed_forward_length",
        };
        SizeKeys {
            hidden_size: self.key("embedding_length"),
            intermediate_size: self.key(intermediate_size),
            num_layers: self.key("block_count"),
            num_heads: self.key("attention.head_count"),
            num_kv_heads: self.key("attention.head_count_kv"),
            head_dim: self.key("attention.key_length"),
            max_position: self.key("context_length"),
            rms_norm_epsilon: self.key("attention.layer_norm_rms_epsilon"),
        }
    }

    fn vocab_size(&self, gguf: &Gguf) -> Result<u32, ModelError> {
        const TOKENS: &str = "tokenizer.ggml.tokens";
        let key = self.key("vocab_size");
        if self.values.has(&key) {
            return self.values.size(&key, MAX_VOCAB_SIZE);
        }
        match u32::try_from(gguf.str_array(TOKENS)?.len()) {
            Ok(len) if (1..=MAX_VOCAB_SIZE).contains(&len) => Ok(len),
            _ => Err(self.values.invalid(TOKENS, format!("1 to {MAX_VOCAB_SIZE} tokens"))),
        }
    }

    /// The stretching of Llama 3 is not in the metadata: it is the tensor `rope_freqs.weight`.
    fn rope(&self) -> Result<RopeConfig, ModelError> {
        let theta = self.values.float_or(&self.key("rope.freq_base"), 1.0, MAX_THETA, 10_000.0)?;
        let key = self.key("rope.scaling.type");
        let scaling = match self.values.text_or(&key, "none")?.as_str() {
            "none" => RopeScaling::None,
            "linear" => RopeScaling::Linear {
                factor: self.values.float(&self.key("rope.scaling.factor"), 1.0 / MAX_FACTOR, MAX_FACTOR)?,
            },
            _ => return Err(self.values.invalid(&key, "\"none\" or \"linear\"".to_owned())),
        };
        Ok(RopeConfig { theta, scaling })
    }

    fn experts(&self, family: Family) -> Result<Option<ExpertsConfig>, ModelError> {
        let key = self.key("expert_count");
        if family != Family::Qwen3Moe {
            return match self.values.get(&key) {
                None | Some(Value::Integer(0)) => Ok(None),
                Some(_) => Err(self.values.invalid(&key, "0, this family has no experts".to_owned())),
            };
        }
        let num_experts = self.values.size(&key, MAX_EXPERTS)?;
        let num_experts_per_token = self.values.size(&self.key("expert_used_count"), num_experts)?;
        Ok(Some(ExpertsConfig { num_experts, num_experts_per_token, renormalize: true }))
    }

    fn windows(&self, config: &mut ModelConfig) -> Result<(), ModelError> {
        let key = self.key("attention.sliding_window");
        if matches!(self.values.get(&key), None | Some(Value::Integer(0))) {
            return Ok(());
        }
        let window = self.values.size(&key, MAX_POSITIONS)?;
        match config.family {
            Family::Llama => config.windows.fill(Some(window)),
            Family::Gemma3 => {
                let key = self.key("attention.sliding_window_pattern");
                let pattern = self.values.size_or(&key, u32::MAX, GEMMA3_PATTERN as u32)? as usize;
                for (layer, seen) in config.windows.iter_mut().enumerate() {
                    *seen = ((layer + 1) % pattern != 0).then_some(window);
                }
                let key = self.key("rope.freq_base_swa");
                let theta = self.values.float_or(&key, 1.0, MAX_THETA, GEMMA3_WINDOW_THETA)?;
                config.window_rope = Some(RopeConfig::unscaled(theta));
            }
            _ => return Err(self.values.invalid(&key, "no window in this family".to_owned())),
        }
        Ok(())
    }

    fn attention_scale(&self, config: &mut ModelConfig) -> Result<(), ModelError> {
        if config.family == Family::Gemma3 && config.num_layers == GEMMA3_27B_LAYERS {
            config.attention_scale = 1.0 / (config.hidden_size as f32 / config.num_heads as f32).sqrt();
        }
        let key = self.key("attention.scale");
        config.attention_scale =
            self.values.float_or(&key, 1.0 / MAX_HIDDEN_SIZE as f32, MAX_FACTOR, config.attention_scale)?;
        for part in ["attn_logit_softcapping", "final_logit_softcapping"] {
            let key = self.key(part);
            if self.values.has(&key) {
                return Err(self.values.invalid(&key, "nothing, capped logits are not supported".to_owned()));
            }
        }
        Ok(())
    }
}

fn value_of(value: &MetadataValue) -> Value {
    match value {
        MetadataValue::Str(text) => Value::Text(text.clone()),
        MetadataValue::F32(value) => Value::Float((*value).into()),
        MetadataValue::F64(value) => Value::Float(*value),
        MetadataValue::Bool(value) => Value::Bool(*value),
        other => other.as_u64().map_or_else(|| Value::Other(other.describe()), Value::Integer),
    }
}
