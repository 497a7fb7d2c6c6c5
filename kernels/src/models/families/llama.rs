//! Llama 2 and 3, SmolLM2, and Mistral, which is a Llama with a window in some versions.
//!
//! Biases, which the configuration of a Llama may ask for, are refused: no published model has them.

use super::{ATTENTION, Activation, Architecture, FEED_FORWARD, FEED_FORWARD_NORM};

pub(super) const LLAMA: Architecture = Architecture {
    gguf_name: "llama",
    model_types: &["llama", "mistral"],
    layer_tensors: &[ATTENTION, FEED_FORWARD_NORM, FEED_FORWARD],
    interleaved_in_gguf: true,
    norms_lack_one: false,
    activation: Activation::Silu,
    scaled_embedding: false,
};
