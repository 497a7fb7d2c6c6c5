//! [`ModelConfig`] from the `config.json` of a Hugging Face folder.
//!
//! Both spellings of positions are read: `rope_theta` and `rope_scaling`, and the newer `rope_parameters`. Defaults
//! are those of the transformers classes, where published folders rely on them.

use std::fs::File;
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};

use serde_json::Value as Json;

use super::values::{Value, Values};
use super::{
    ExpertsConfig, MAX_EXPERTS, MAX_FACTOR, MAX_POSITIONS, MAX_THETA, MAX_VOCAB_SIZE, ModelConfig, SizeKeys,
};
use crate::models::rope::{RopeConfig, RopeScaling};
use crate::models::{Family, ModelError};

const MAX_FILE_BYTES: u64 = 1 << 20;

/// The configuration files of a folder.
#[derive(Debug)]
pub(crate) struct HuggingFaceConfig {
    /// Of `config.json`.
    path: PathBuf,
    config: Json,
    /// `generation_config.json`, if there is one: chat models often name their end tokens there alone.
    generation: Json,
}

impl HuggingFaceConfig {
    pub(crate) fn open(folder: &Path) -> Result<Self, ModelError> {
        let path = folder.join("config.json");
        let config = read_json(&path)?;
        let generation_path = folder.join("generation_config.json");
        let generation = match generation_path.try_exists() {
            Ok(false) => Json::Null,
            _ => read_json(&generation_path)?,
        };
        Ok(Self { path, config, generation })
    }

    pub(crate) fn model_config(&self) -> Result<ModelConfig, ModelError> {
        let find = |key: &str| value_at(&self.config, key);
        let values = Values { path: &self.path, find: &find };
        let model_type = values.text("model_type")?;
        let known = |family: &Family| family.architecture().model_types.contains(&model_type.as_str());
        let Some(family) = Family::ALL.into_iter().find(known) else {
            let known = Family::ALL.iter().flat_map(|family| family.architecture().model_types);
            return Err(ModelError::UnknownFamily {
                path: self.path.clone(),
                family: model_type,
                known: known.copied().collect::<Vec<_>>().join(", "),
            });
        };
        let reader = Reader { values: &values, family };
        reader.refuse_variants()?;
        let vocab_size = values.size("vocab_size", MAX_VOCAB_SIZE)?;
        let mut config = ModelConfig::from_sizes(&values, &reader.size_keys(), family, vocab_size)?;
        reader.positions(&mut config)?;
        config.windows = reader.windows(&model_type, config.num_layers as usize)?;
        config.experts = reader.experts()?;
        config.tied_output = values.flag_or("tie_word_embeddings", family == Family::Gemma3)?;
        if family == Family::Gemma3 {
            let scalar = values.float_or("query_pre_attn_scalar", 1.0, MAX_FACTOR, 256.0)?;
            config.attention_scale = 1.0 / scalar.sqrt();
        }
        self.add_eos_token_ids(&mut config)?;
        Ok(config)
    }

    fn add_eos_token_ids(&self, config: &mut ModelConfig) -> Result<(), ModelError> {
        const KEY: &str = "eos_token_id";
        for json in [&self.config, &self.generation] {
            let find = |key: &str| value_at(json, key);
            let values = Values { path: &self.path, find: &find };
            let ids = match values.get(KEY) {
                None => continue,
                Some(Value::List(ids)) => ids,
                Some(id) => vec![id],
            };
            for id in ids {
                let Value::Integer(id) = id else {
                    return Err(values.invalid(KEY, "a token id or a list of them".to_owned()));
                };
                config.add_eos_token_id(&values, KEY, id)?;
            }
        }
        Ok(())
    }
}

struct Reader<'a> {
    values: &'a Values<'a>,
    family: Family,
}

impl Reader<'_> {
    fn size_keys(&self) -> SizeKeys {
        let intermediate_size = match self.family {
            Family::Qwen3Moe => "moe_intermediate_size",
            _ => "intermediate_size",
        };
        SizeKeys {
            hidden_size: "hidden_size".to_owned(),
            intermediate_size: intermediate_size.to_owned(),
            num_layers: "num_hidden_layers".to_owned(),
            num_heads: "num_attention_heads".to_owned(),
            num_kv_heads: "num_key_value_heads".to_owned(),
            head_dim: "head_dim".to_owned(),
            max_position: "max_position_embeddings".to_owned(),
            rms_norm_epsilon: "rms_norm_eps".to_owned(),
        }
    }

    /// Known fields which would silently give wrong answers.
    fn refuse_variants(&self) -> Result<(), ModelError> {
        let values = self.values;
        for key in ["attention_bias", "mlp_bias", "use_bidirectional_attention"] {
            if values.flag_or(key, false)? {
                return Err(values.invalid(key, "false".to_owned()));
            }
        }
        for key in ["attn_logit_softcapping", "final_logit_softcapping", "quantization_config"] {
            if values.has(key) {
                return Err(values.invalid(key, "nothing, this is not supported".to_owned()));
            }
        }
        if values.float_or("partial_rotary_factor", 0.0, 1.0, 1.0)? != 1.0 {
            return Err(values.invalid("partial_rotary_factor", "1".to_owned()));
        }
        let (key, expected) = match self.family {
            Family::Gemma3 => ("hidden_activation", "gelu_pytorch_tanh"),
            _ => ("hidden_act", "silu"),
        };
        if values.text_or(key, expected)? != expected {
            return Err(values.invalid(key, format!("{expected:?}")));
        }
        Ok(())
    }

    fn positions(&self, config: &mut ModelConfig) -> Result<(), ModelError> {
        let values = self.values;
        let theta = if self.family == Family::Gemma3 { 1e6 } else { 10_000.0 };
        if self.family == Family::Gemma3 {
            config.window_rope = Some(if values.has("rope_parameters/sliding_attention") {
                self.rope(
                    "rope_parameters/sliding_attention/rope_theta",
                    "rope_parameters/sliding_attention",
                    1e4,
                )?
            } else {
                RopeConfig::unscaled(values.float_or("rope_local_base_freq", 1.0, MAX_THETA, 1e4)?)
            });
        }
        config.rope = if values.has("rope_parameters/full_attention") {
            self.rope("rope_parameters/full_attention/rope_theta", "rope_parameters/full_attention", theta)?
        } else if values.has("rope_parameters") {
            self.rope("rope_parameters/rope_theta", "rope_parameters", theta)?
        } else {
            self.rope("rope_theta", "rope_scaling", theta)?
        };
        Ok(())
    }

    /// `scaling` is the object that says how positions are stretched.
    fn rope(&self, theta_key: &str, scaling: &str, default_theta: f32) -> Result<RopeConfig, ModelError> {
        let values = self.values;
        let theta = values.float_or(theta_key, 1.0, MAX_THETA, default_theta)?;
        let key = |name: &str| format!("{scaling}/{name}");
        let positive = |name: &str| values.float(&key(name), 1.0 / MAX_FACTOR, MAX_FACTOR);
        let kind_key = if values.has(&key("rope_type")) { key("rope_type") } else { key("type") };
        let scaling = match values.text_or(&kind_key, "default")?.as_str() {
            "default" => RopeScaling::None,
            "linear" => RopeScaling::Linear { factor: positive("factor")? },
            "llama3" => {
                let low_freq_factor = positive("low_freq_factor")?;
                let high_freq_factor = positive("high_freq_factor")?;
                if high_freq_factor <= low_freq_factor {
                    let expected = format!("a number above {low_freq_factor}, the low one");
                    return Err(values.invalid(&key("high_freq_factor"), expected));
                }
                let original_max_position =
                    values.size(&key("original_max_position_embeddings"), MAX_POSITIONS)?;
                let factor = positive("factor")?;
                RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position }
            }
            _ => {
                return Err(values.invalid(&kind_key, "\"default\", \"linear\" or \"llama3\"".to_owned()));
            }
        };
        let partial = key("partial_rotary_factor");
        if values.float_or(&partial, 0.0, 1.0, 1.0)? != 1.0 {
            return Err(values.invalid(&partial, "1".to_owned()));
        }
        Ok(RopeConfig { theta, scaling })
    }

    /// `[num_layers]`
    fn windows(&self, model_type: &str, num_layers: usize) -> Result<Vec<Option<u32>>, ModelError> {
        let values = self.values;
        let is_used = match self.family {
            Family::Llama => model_type == "mistral" && values.has("sliding_window"),
            Family::Gemma3 => true,
            _ => values.flag_or("use_sliding_window", false)? && values.has("sliding_window"),
        };
        if !is_used {
            return Ok(vec![None; num_layers]);
        }
        let window = values.size("sliding_window", MAX_POSITIONS)?;
        if values.has("layer_types") {
            return self.listed_windows(window, num_layers);
        }
        let has_window: Box<dyn Fn(usize) -> bool> = match self.family {
            Family::Gemma3 => {
                let keys = ["sliding_window_pattern", "_sliding_window_pattern"];
                let key = keys.into_iter().find(|key| values.has(key)).unwrap_or(keys[0]);
                let pattern = values.size_or(key, u32::MAX, 6)? as usize;
                Box::new(move |layer| !(layer + 1).is_multiple_of(pattern))
            }
            Family::Llama => Box::new(|_| true),
            _ => {
                let first = match values.get("max_window_layers") {
                    Some(Value::Integer(first)) => first,
                    _ => return Err(values.invalid("max_window_layers", "a number of layers".to_owned())),
                };
                Box::new(move |layer| layer as u64 >= first)
            }
        };
        Ok((0..num_layers).map(|layer| has_window(layer).then_some(window)).collect())
    }

    fn listed_windows(&self, window: u32, num_layers: usize) -> Result<Vec<Option<u32>>, ModelError> {
        let invalid = || {
            let expected = format!("{num_layers} times \"full_attention\" or \"sliding_attention\"");
            self.values.invalid("layer_types", expected)
        };
        let Some(Value::List(kinds)) = self.values.get("layer_types") else { return Err(invalid()) };
        if kinds.len() != num_layers {
            return Err(invalid());
        }
        let window_of = |kind: &Value| match kind {
            Value::Text(kind) if kind == "full_attention" => Ok(None),
            Value::Text(kind) if kind == "sliding_attention" => Ok(Some(window)),
            _ => Err(invalid()),
        };
        kinds.iter().map(window_of).collect()
    }

    fn experts(&self) -> Result<Option<ExpertsConfig>, ModelError> {
        if self.family != Family::Qwen3Moe {
            return Ok(None);
        }
        let values = self.values;
        if values.size_or("decoder_sparse_step", u32::MAX, 1)? != 1 {
            return Err(values.invalid("decoder_sparse_step", "1, experts in every layer".to_owned()));
        }
        if !matches!(values.get("mlp_only_layers"), None | Some(Value::List(_)))
            || matches!(values.get("mlp_only_layers"), Some(Value::List(layers)) if !layers.is_empty())
        {
            return Err(values.invalid("mlp_only_layers", "an empty list, experts in every layer".to_owned()));
        }
        let key = if values.has("num_experts") { "num_experts" } else { "num_local_experts" };
        let num_experts = values.size(key, MAX_EXPERTS)?;
        Ok(Some(ExpertsConfig {
            num_experts,
            num_experts_per_token: values.size("num_experts_per_tok", num_experts)?,
            renormalize: values.flag_or("norm_topk_prob", false)?,
        }))
    }
}

fn read_json(path: &Path) -> Result<Json, ModelError> {
    let io_error = |source| ModelError::Config { path: path.to_owned(), source };
    let file = File::open(path).map_err(io_error)?;
    let mut bytes = Vec::new();
    file.take(MAX_FILE_BYTES + 1).read_to_end(&mut bytes).map_err(io_error)?;
    if bytes.len() as u64 > MAX_FILE_BYTES {
        let what = format!("more than {MAX_FILE_BYTES} bytes");
        return Err(io_error(io::Error::new(io::ErrorKind::InvalidData, what)));
    }
    serde_json::from_slice(&bytes).map_err(|error| io_error(error.into()))
}

/// The value at a path of keys with `/` between them.
fn value_at(json: &Json, key: &str) -> Option<Value> {
    json.pointer(&format!("/{key}")).and_then(value_of)
}

fn value_of(json: &Json) -> Option<Value> {
    Some(match json {
        Json::Null => return None,
        Json::Bool(value) => Value::Bool(*value),
        Json::Number(number) => match (number.as_u64(), number.as_f64()) {
            (Some(value), _) => Value::Integer(value),
            (None, Some(value)) => Value::Float(value),
            (None, None) => Value::Other(number.to_string()),
        },
        Json::String(text) => Value::Text(text.clone()),
        Json::Array(values) => {
            let describe = |value| value_of(value).unwrap_or_else(|| Value::Other("null".to_owned()));
            Value::List(values.iter().map(describe).collect())
        }
        Json::Object(_) => Value::Other("an object".to_owned()),
    })
}
