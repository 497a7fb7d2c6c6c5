//! What tells the families apart, as data: their names, their tensors and the switches of the forward pass.
//!
//! A tensor of a layer is listed under GGUF's name, which the rest of the crate uses, and Hugging Face's. A part of a
//! layer is computed where its tensor is listed, so most switches are entries of the table. Sizes are not here: see
//! `config`.

mod gemma;
mod llama;
mod qwen;
mod qwen_moe;

/// A kind of model whose layers are known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// With SmolLM2 and Mistral.
    Llama,
    /// With Qwen2.5.
    Qwen2,
    Qwen3,
    Qwen3Moe,
    /// The text models.
    Gemma3,
}

/// What the layers of a family are made of.
pub(crate) struct Architecture {
    /// In metadata and as the prefix of its keys.
    pub(crate) gguf_name: &'static str,
    /// In `config.json`.
    pub(crate) model_types: &'static [&'static str],
    /// Tensors of each layer in groups: name in GGUF, name in Hugging Face folders with `{}` for the expert.
    pub(crate) layer_tensors: &'static [&'static [(&'static str, &'static str)]],
    /// GGUF files keep the two halves of each head of queries and keys interleaved.
    pub(crate) interleaved_in_gguf: bool,
    /// Hugging Face folders keep the weights of norms less one.
    pub(crate) norms_lack_one: bool,
    pub(crate) activation: Activation,
    /// The embedding is multiplied by the square root of the hidden size.
    pub(crate) scaled_embedding: bool,
}

/// What the gate of the feed-forward part goes through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Activation {
    Silu,
    Gelu,
}

impl Family {
    pub const ALL: [Self; 5] = [Self::Llama, Self::Qwen2, Self::Qwen3, Self::Qwen3Moe, Self::Gemma3];

    pub(crate) fn architecture(self) -> &'static Architecture {
        match self {
            Self::Llama => &llama::LLAMA,
            Self::Qwen2 => &qwen::QWEN2,
            Self::Qwen3 => &qwen::QWEN3,
            Self::Qwen3Moe => &qwen_moe::QWEN3_MOE,
            Self::Gemma3 => &gemma::GEMMA3,
        }
    }
}

impl Architecture {
    /// Hugging Face's name of a tensor, if layers have it.
    pub(crate) fn hugging_face_name(&self, part: &str) -> Option<&'static str> {
        self.layer_tensors.iter().copied().flatten().find(|(gguf, _)| *gguf == part).map(|(_, name)| *name)
    }

    pub(crate) fn has(&self, part: &str) -> bool {
        self.hugging_face_name(part).is_some()
    }
}

/// In every family.
const ATTENTION: &[(&str, &str)] = &[
    ("attn_norm.weight", "input_layernorm.weight"),
    ("attn_q.weight", "self_attn.q_proj.weight"),
    ("attn_k.weight", "self_attn.k_proj.weight"),
    ("attn_v.weight", "self_attn.v_proj.weight"),
    ("attn_output.weight", "self_attn.o_proj.weight"),
];

/// Norms of each head of queries and keys.
const HEAD_NORMS: &[(&str, &str)] =
    &[("attn_q_norm.weight", "self_attn.q_norm.weight"), ("attn_k_norm.weight", "self_attn.k_norm.weight")];

/// The norm before the feed-forward part, where there is none after the attention.
const FEED_FORWARD_NORM: &[(&str, &str)] = &[("ffn_norm.weight", "post_attention_layernorm.weight")];

const FEED_FORWARD: &[(&str, &str)] = &[
    ("ffn_gate.weight", "mlp.gate_proj.weight"),
    ("ffn_up.weight", "mlp.up_proj.weight"),
    ("ffn_down.weight", "mlp.down_proj.weight"),
];
