//! Loads the weights of a model by name, in the form its numeric path wants.
//!
//! Invariant: every tensor of the checkpoint was used, with the shape the config says, and every number is finite: a
//! tensor that the family does not know would otherwise be ignored and the answers be wrong without a sign.
//! Weights are immutable and shared: any number of models may hold one `Arc`.

mod loader;

use std::fmt;
use std::sync::Arc;

use self::loader::Loader;
use crate::backend::{Backend, RopeTable};
use crate::cpu::{Cpu, Isa, LANES};
use crate::models::checkpoint::{Checkpoint, TensorName};
use crate::models::config::ExpertsConfig;
use crate::models::families::Architecture;
use crate::models::{ModelConfig, ModelError};
use crate::reference::Reference;

/// Which implementation of the ops computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NumericPath {
    /// Plain f32 loops; slow, to compare with.
    Reference,
    /// SIMD on f16 weights.
    Fast,
}

/// The weights of one model in memory.
pub struct ModelWeights {
    pub config: ModelConfig,
    pub path: NumericPath,
    pub(crate) layers: AnyLayers,
}

pub(crate) enum AnyLayers {
    Reference(Arc<Layers<Reference>>),
    Fast(Arc<Layers<Cpu>>),
}

/// All matrices, for one backend.
pub(crate) struct Layers<B: Backend> {
    pub(crate) config: ModelConfig,
    pub(crate) architecture: &'static Architecture,
    pub(crate) backend: B,
    pub(crate) embedding: B::Matrix,
    pub(crate) layers: Vec<Layer<B>>,
    pub(crate) output_norm: Vec<f32>,
    /// None where the embedding is the output head too.
    output: Option<B::Matrix>,
    rope: RopeTable,
    /// For layers with a window, where it is another.
    window_rope: Option<RopeTable>,
}

pub(crate) struct Layer<B: Backend> {
    pub(crate) attention_norm: Vec<f32>,
    /// Queries, keys and values of all heads in one matrix.
    pub(crate) qkv: B::Matrix,
    pub(crate) qkv_bias: Option<Vec<f32>>,
    /// Of each head of the queries, and of the keys.
    pub(crate) head_norms: Option<[Vec<f32>; 2]>,
    pub(crate) attention_output: B::Matrix,
    pub(crate) post_attention_norm: Option<Vec<f32>>,
    pub(crate) feed_forward_norm: Vec<f32>,
    pub(crate) feed_forward: FeedForward<B>,
    pub(crate) post_feed_forward_norm: Option<Vec<f32>>,
}

pub(crate) enum FeedForward<B: Backend> {
    Dense(Dense<B>),
    Experts(Experts<B>),
}

pub(crate) struct Dense<B: Backend> {
    /// Gates, then ups.
    pub(crate) gate_up: B::Matrix,
    pub(crate) down: B::Matrix,
}

pub(crate) struct Experts<B: Backend> {
    pub(crate) config: ExpertsConfig,
    /// A score for each expert.
    pub(crate) router: B::Matrix,
    /// `[num_experts]`
    pub(crate) experts: Vec<Dense<B>>,
}

impl ModelWeights {
    pub fn load(checkpoint: &Checkpoint, path: NumericPath) -> Result<Arc<Self>, ModelError> {
        let config = checkpoint.config()?;
        let layers = match path {
            NumericPath::Reference => {
                AnyLayers::Reference(Arc::new(Layers::load(checkpoint, &config, Reference)?))
            }
            NumericPath::Fast => {
                if !config.head_dim.is_multiple_of(LANES as u32) {
                    return Err(ModelError::HeadDim { head_dim: config.head_dim, multiple: LANES as u32 });
                }
                let backend = Cpu { isa: Isa::detect() };
                tracing::debug!(isa = ?backend.isa, "loading weights for the fast path");
                AnyLayers::Fast(Arc::new(Layers::load(checkpoint, &config, backend)?))
            }
        };
        Ok(Arc::new(Self { config, path, layers }))
    }
}

impl fmt::Debug for ModelWeights {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ModelWeights")
            .field("config", &self.config)
            .field("path", &self.path)
            .finish_non_exhaustive()
    }
}

impl<B: Backend> Layers<B> {
    pub(crate) fn output(&self) -> &B::Matrix {
        self.output.as_ref().unwrap_or(&self.embedding)
    }

    /// The angles of a layer.
    pub(crate) fn rope(&self, window: Option<u32>) -> &RopeTable {
        self.window_rope.as_ref().filter(|_| window.is_some()).unwrap_or(&self.rope)
    }

    fn load(checkpoint: &Checkpoint, config: &ModelConfig, backend: B) -> Result<Self, ModelError> {
        let mut loader = Loader::new(checkpoint, config, &backend);
        let (hidden, vocab) = (config.hidden_size as usize, config.vocab_size as usize);
        let name = |part| TensorName { layer: None, part, expert: None };
        let embedding = loader.matrix(hidden, &[(name("token_embd.weight"), vocab)])?;
        let output = match config.tied_output {
            true => None,
            false => Some(loader.matrix(hidden, &[(name("output.weight"), vocab)])?),
        };
        let output_norm = loader.norm(name("output_norm.weight"), hidden)?;
        let layers = (0..config.num_layers).map(|index| loader.layer(index)).collect::<Result<_, _>>()?;
        let frequencies = loader.frequencies()?;
        loader.check_all_used()?;
        let max_position = config.max_position as usize;
        let window_frequencies = config.window_rope.map(|rope| rope.frequencies(config.head_dim as usize));
        Ok(Self {
            config: config.clone(),
            architecture: config.family.architecture(),
            backend,
            embedding,
            layers,
            output_norm,
            output,
            rope: RopeTable::new(frequencies, max_position),
            window_rope: window_frequencies.map(|frequencies| RopeTable::new(frequencies, max_position)),
        })
    }
}
