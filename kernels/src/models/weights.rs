//! Loads the weights of a model by name, in the form its numeric path wants.
//!
//! Invariant: every tensor of the checkpoint was used, with the shape the config says, and every number is finite: a
//! tensor that the family does not know would otherwise be ignored and the answers be wrong without a sign.
//! Weights are immutable and shared: any number of models may hold one `Arc`.

mod loader;
mod source;

use std::fmt;
use std::path::Path;
use std::sync::Arc;

use self::loader::Loader;
pub(crate) use self::source::{MatrixRole, MatrixSource};
use crate::backend::{Backend, RopeTable};
use crate::cpu::packed::Packing;
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

/// How a path keeps its matrices.
pub(crate) trait Matrices {
    type Matrix: Send + Sync;

    fn make(&self, source: &MatrixSource<'_>) -> Result<Self::Matrix, ModelError>;
    /// The last matrix was made.
    fn finish(&self) -> Result<(), ModelError>;
}

impl<B: Backend> Matrices for B {
    type Matrix = <B as Backend>::Matrix;

    fn make(&self, source: &MatrixSource<'_>) -> Result<Self::Matrix, ModelError> {
        let fill_row = &mut |row, out: &mut [f32]| source.fill(row, out);
        Ok(self.matrix(source.num_outputs(), source.num_inputs, fill_row))
    }

    fn finish(&self) -> Result<(), ModelError> {
        self.finish_loading();
        Ok(())
    }
}

/// All weights, the matrices as one path keeps them.
pub(crate) struct Layers<M: Matrices> {
    pub(crate) config: ModelConfig,
    pub(crate) architecture: &'static Architecture,
    pub(crate) backend: M,
    pub(crate) embedding: M::Matrix,
    pub(crate) layers: Vec<Layer<M>>,
    pub(crate) output_norm: Vec<f32>,
    /// None where the embedding is the output head too.
    output: Option<M::Matrix>,
    rope: RopeTable,
    /// For layers with a window, where it is another.
    window_rope: Option<RopeTable>,
}

pub(crate) struct Layer<M: Matrices> {
    pub(crate) attention_norm: Vec<f32>,
    /// Queries, keys and values of all heads in one matrix.
    pub(crate) qkv: M::Matrix,
    pub(crate) qkv_bias: Option<Vec<f32>>,
    /// Of each head of the queries, and of the keys.
    pub(crate) head_norms: Option<[Vec<f32>; 2]>,
    pub(crate) attention_output: M::Matrix,
    pub(crate) post_attention_norm: Option<Vec<f32>>,
    pub(crate) feed_forward_norm: Vec<f32>,
    pub(crate) feed_forward: FeedForward<M>,
    pub(crate) post_feed_forward_norm: Option<Vec<f32>>,
}

pub(crate) enum FeedForward<M: Matrices> {
    Dense(Dense<M>),
    Experts(Experts<M>),
}

pub(crate) struct Dense<M: Matrices> {
    /// Gates, then ups.
    pub(crate) gate_up: M::Matrix,
    pub(crate) down: M::Matrix,
}

pub(crate) struct Experts<M: Matrices> {
    pub(crate) config: ExpertsConfig,
    /// A score for each expert.
    pub(crate) router: M::Matrix,
    /// `[num_experts]`
    pub(crate) experts: Vec<Dense<M>>,
}

/// Where the fast path keeps packed weights, so that the next start maps them.
#[derive(Clone, Copy, Debug)]
pub struct PackedFile<'a> {
    pub path: &'a Path,
    /// Names the weights, as their digest does: a file of other ones is replaced.
    pub identity: &'a str,
}

impl ModelWeights {
    pub fn load(checkpoint: &Checkpoint, path: NumericPath) -> Result<Arc<Self>, ModelError> {
        Self::load_packed(checkpoint, path, None)
    }

    /// Loads weights, packed ones from the file if they are there.
    pub fn load_packed(
        checkpoint: &Checkpoint,
        path: NumericPath,
        packed: Option<PackedFile<'_>>,
    ) -> Result<Arc<Self>, ModelError> {
        let config = checkpoint.config()?;
        let layers = match path {
            NumericPath::Reference => {
                AnyLayers::Reference(Arc::new(Layers::load(checkpoint, &config, Reference)?))
            }
            NumericPath::Fast => {
                if !config.head_dim.is_multiple_of(LANES as u32) {
                    return Err(ModelError::HeadDim { head_dim: config.head_dim, multiple: LANES as u32 });
                }
                let packing = match packed {
                    Some(file) => Packing::cached(file.path, file.identity),
                    None => Packing::in_memory(),
                };
                let backend = Cpu { isa: Isa::detect(), packing };
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

/// What [`Layers`] holds but what it was made with, for a path that keeps it in another form.
pub(crate) struct Parts<M: Matrices> {
    pub(crate) embedding: M::Matrix,
    pub(crate) layers: Vec<Layer<M>>,
    pub(crate) output_norm: Vec<f32>,
    pub(crate) output: Option<M::Matrix>,
    pub(crate) rope: RopeTable,
    pub(crate) window_rope: Option<RopeTable>,
}

impl<M: Matrices> Layers<M> {
    pub(crate) fn into_parts(self) -> Parts<M> {
        let Self { embedding, layers, output_norm, output, rope, window_rope, .. } = self;
        Parts { embedding, layers, output_norm, output, rope, window_rope }
    }

    pub(crate) fn output(&self) -> &M::Matrix {
        self.output.as_ref().unwrap_or(&self.embedding)
    }

    /// The angles of a layer.
    pub(crate) fn rope(&self, window: Option<u32>) -> &RopeTable {
        self.window_rope.as_ref().filter(|_| window.is_some()).unwrap_or(&self.rope)
    }

    pub(crate) fn load(
        checkpoint: &Checkpoint,
        config: &ModelConfig,
        backend: M,
    ) -> Result<Self, ModelError> {
        let mut loader = Loader::new(checkpoint, config, &backend);
        let (hidden, vocab) = (config.hidden_size as usize, config.vocab_size as usize);
        let name = |part| TensorName { layer: None, part, expert: None };
        let embedding =
            loader.matrix(MatrixRole::Embedding, hidden, &[(name("token_embd.weight"), vocab)])?;
        let output = match config.tied_output {
            true => None,
            false => Some(loader.matrix(MatrixRole::Output, hidden, &[(name("output.weight"), vocab)])?),
        };
        let output_norm = loader.norm(name("output_norm.weight"), hidden)?;
        let layers = (0..config.num_layers).map(|index| loader.layer(index)).collect::<Result<_, _>>()?;
        let frequencies = loader.frequencies()?;
        loader.check_all_used()?;
        backend.finish()?;
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
