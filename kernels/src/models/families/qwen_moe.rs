//! Qwen3-MoE: Qwen3 whose feed-forward part is a choice of experts by a router, in every layer.

use super::qwen::QWEN3;
use super::{ATTENTION, Architecture, FEED_FORWARD_NORM, HEAD_NORMS};

const EXPERTS: &[(&str, &str)] = &[
    ("ffn_gate_inp.weight", "mlp.gate.weight"),
    ("ffn_gate_exps.weight", "mlp.experts.{}.gate_proj.weight"),
    ("ffn_up_exps.weight", "mlp.experts.{}.up_proj.weight"),
    ("ffn_down_exps.weight", "mlp.experts.{}.down_proj.weight"),
];

pub(super) const QWEN3_MOE: Architecture = Architecture {
    gguf_name: "qwen3moe",
    model_types: &["qwen3_moe"],
    layer_tensors: &[ATTENTION, HEAD_NORMS, FEED_FORWARD_NORM, EXPERTS],
    ..QWEN3
};
