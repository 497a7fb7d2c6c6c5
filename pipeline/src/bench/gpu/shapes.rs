//! Models whose speed is measured with random weights: their shapes, so that nothing is fetched.
//!
//! The numbers are those of the models' own configurations; answers are noise, but cost what real ones do.

use clap::ValueEnum;
use tidemill_kernels::models::{Family, ModelConfig, RopeConfig, RopeScaling};

/// A model by its shape.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(in crate::bench) enum Shape {
    #[value(name = "qwen3-8b")]
    Qwen3_8b,
    #[value(name = "llama-3.1-8b")]
    Llama31_8b,
    #[value(name = "smollm2-135m")]
    SmolLm2_135m,
}

impl Shape {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Qwen3_8b => "qwen3-8b",
            Self::Llama31_8b => "llama-3.1-8b",
            Self::SmolLm2_135m => "smollm2-135m",
        }
    }

    pub(super) fn config(self) -> ModelConfig {
        let unscaled = |theta| RopeConfig { theta, scaling: RopeScaling::None };
        match self {
            Self::Qwen3_8b => ModelConfig {
                family: Family::Qwen3,
                vocab_size: 151_936,
                intermediate_size: 12_288,
                num_layers: 36,
                max_position: 40_960,
                rms_norm_epsilon: 1e-6,
                rope: unscaled(1e6),
                windows: vec![None; 36],
                eos_token_ids: vec![151_645],
                ..large()
            },
            Self::Llama31_8b => ModelConfig {
                family: Family::Llama,
                vocab_size: 128_256,
                intermediate_size: 14_336,
                num_layers: 32,
                max_position: 131_072,
                rms_norm_epsilon: 1e-5,
                rope: RopeConfig {
                    theta: 5e5,
                    scaling: RopeScaling::Llama3 {
                        factor: 8.0,
                        low_freq_factor: 1.0,
                        high_freq_factor: 4.0,
                        original_max_position: 8192,
                    },
                },
                windows: vec![None; 32],
                eos_token_ids: vec![128_001],
                ..large()
            },
            Self::SmolLm2_135m => ModelConfig {
                family: Family::Llama,
                vocab_size: 49_152,
                hidden_size: 576,
                intermediate_size: 1536,
                num_layers: 30,
                num_heads: 9,
                num_kv_heads: 3,
                head_dim: 64,
                max_position: 8192,
                rms_norm_epsilon: 1e-5,
                attention_scale: 0.125,
                rope: unscaled(1e5),
                windows: vec![None; 30],
                tied_output: true,
                eos_token_ids: vec![2],
                ..large()
            },
        }
    }
}

/// What models of eight billion weights have in common.
fn large() -> ModelConfig {
    ModelConfig {
        family: Family::Llama,
        vocab_size: 0,
        hidden_size: 4096,
        intermediate_size: 0,
        num_layers: 0,
        num_heads: 32,
        num_kv_heads: 8,
        head_dim: 128,
        max_position: 0,
        rms_norm_epsilon: 0.0,
        attention_scale: 128f32.powf(-0.5),
        rope: RopeConfig { theta: 1e4, scaling: RopeScaling::None },
        window_rope: None,
        windows: Vec::new(),
        experts: None,
        tied_output: false,
        eos_token_ids: Vec::new(),
    }
}
