//! Qwen2 and Qwen2.5 (biases on queries, keys and values), and Qwen3 (norms of queries and keys instead).

use super::{ATTENTION, Activation, Architecture, FEED_FORWARD, FEED_FORWARD_NORM, HEAD_NORMS};

const BIASES: &[(&str, &str)] = &[
    ("attn_q.bias", "self_attn.q_proj.bias"),
    ("attn_k.bias", "self_attn.k_proj.bias"),
    ("attn_v.bias", "self_attn.v_proj.bias"),
];

pub(super) const QWEN2: Architecture = Architecture {
    gguf_name: "qwen2",
    model_types: &["qwen2"],
    layer_tensors: &[ATTENTION, BIASES, FEED_FORWARD_NORM, FEED_FORWARD],
    interleaved_in_gguf: false,
    norms_lack_one: false,
    activation: Activation::Silu,
    scaled_embedding: false,
};

pub(super) const QWEN3: Architecture = Architecture {
    gguf_name: "qwen3",
    model_types: &["qwen3"],
    layer_tensors: &[ATTENTION, HEAD_NORMS, FEED_FORWARD_NORM, FEED_FORWARD],
    ..QWEN2
};
