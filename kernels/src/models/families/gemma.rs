//! Gemma 3, text only: norms before and after both parts of a layer, most layers see a window only.

use super::{ATTENTION, Activation, Architecture, FEED_FORWARD, HEAD_NORMS};

const SANDWICH_NORMS: &[(&str, &str)] = &[
    ("post_attention_norm.weight", "post_attention_layernorm.weight"),
    ("ffn_norm.weight", "pre_feedforward_layernorm.weight"),
    ("post_ffw_norm.weight", "post_feedforward_layernorm.weight"),
];

pub(super) const GEMMA3: Architecture = Architecture {
    gguf_name: "gemma3",
    model_types: &["gemma3_text"],
    layer_tensors: &[ATTENTION, HEAD_NORMS, SANDWICH_NORMS, FEED_FORWARD],
    interleaved_in_gguf: false,
    norms_lack_one: true,
    activation: Activation::Gelu,
    scaled_embedding: true,
};
