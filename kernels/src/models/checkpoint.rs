//! Weights on disk behind one naming: a GGUF file, or a Hugging Face folder.
//!
//! Tensors go by their GGUF names. Invariant: a [`TensorView`] is the tensor as it is stored; how the two kinds store
//! queries, keys and norms differently is answered here and undone by `weights`. Tokenizers and templates, which both
//! kinds carry too, are read elsewhere.

use std::fmt;
use std::path::Path;

use crate::gguf::{Gguf, TensorView};
use crate::models::config::HuggingFaceConfig;
use crate::models::families::Architecture;
use crate::models::{ModelConfig, ModelError};
use crate::safetensors::Safetensors;

/// An open model.
#[derive(Debug)]
pub enum Checkpoint {
    Gguf(Gguf),
    Folder(Box<Folder>),
}

/// A Hugging Face folder: `config.json` and safetensors.
#[derive(Debug)]
pub struct Folder {
    config: HuggingFaceConfig,
    tensors: Safetensors,
}

/// A tensor by its GGUF name.
#[derive(Clone, Copy, Debug)]
pub(crate) struct TensorName {
    pub(crate) layer: Option<u32>,
    /// With its ending: `attn_q.weight`.
    pub(crate) part: &'static str,
    /// One matrix of a tensor that holds those of all experts.
    pub(crate) expert: Option<u32>,
}

impl Checkpoint {
    /// Opens a GGUF file, or a folder.
    pub fn open(path: &Path) -> Result<Self, ModelError> {
        if !path.is_dir() {
            return Ok(Self::Gguf(Gguf::open(path)?));
        }
        let config = HuggingFaceConfig::open(path)?;
        Ok(Self::Folder(Box::new(Folder { config, tensors: Safetensors::open(path)? })))
    }

    pub fn path(&self) -> &Path {
        match self {
            Self::Gguf(gguf) => gguf.path(),
            Self::Folder(folder) => folder.tensors.path(),
        }
    }

    pub fn config(&self) -> Result<ModelConfig, ModelError> {
        match self {
            Self::Gguf(gguf) => ModelConfig::from_gguf(gguf),
            Self::Folder(folder) => folder.config.model_config(),
        }
    }

    /// Whether the rows of queries and keys interleave the two halves of each head.
    pub(crate) fn interleaves_halves(&self, architecture: &Architecture) -> bool {
        matches!(self, Self::Gguf(_)) && architecture.interleaved_in_gguf
    }

    /// Whether one is to be added to the weights of norms.
    pub(crate) fn lacks_one(&self, architecture: &Architecture) -> bool {
        matches!(self, Self::Folder(_)) && architecture.norms_lack_one
    }

    pub(crate) fn tensor(
        &self,
        architecture: &Architecture,
        name: TensorName,
    ) -> Result<TensorView<'_>, ModelError> {
        let stored_name = self.stored_name(architecture, name);
        match self {
            Self::Gguf(gguf) => {
                let tensor = gguf.tensor(&stored_name)?;
                Ok(name.expert.map_or(tensor, |expert| part_of(tensor, expert as usize)))
            }
            Self::Folder(folder) => Ok(folder.tensors.tensor(&stored_name)?),
        }
    }

    /// Number of experts that a tensor holds together, if it is stored so.
    pub(crate) fn num_stored_together(
        &self,
        architecture: &Architecture,
        name: TensorName,
    ) -> Result<Option<usize>, ModelError> {
        match self {
            Self::Gguf(gguf) => Ok(Some(gguf.tensor(&self.stored_name(architecture, name))?.shape[0])),
            Self::Folder(_) => Ok(None),
        }
    }

    pub(crate) fn stored_names(&self) -> Box<dyn Iterator<Item = &str> + '_> {
        match self {
            Self::Gguf(gguf) => Box::new(gguf.tensor_names()),
            Self::Folder(folder) => Box::new(folder.tensors.tensor_names()),
        }
    }

    /// What the checkpoint calls a tensor.
    pub(crate) fn stored_name(&self, architecture: &Architecture, name: TensorName) -> String {
        let TensorName { layer, part, expert } = name;
        match (self, layer) {
            (Self::Gguf(_), _) => name.to_string(),
            (Self::Folder(_), None) => match part {
                "token_embd.weight" => "model.embed_tokens.weight".to_owned(),
                "output_norm.weight" => "model.norm.weight".to_owned(),
                _ => "lm_head.weight".to_owned(),
            },
            (Self::Folder(_), Some(layer)) => {
                let name = architecture.hugging_face_name(part).expect("asked for only where it is listed");
                let name = expert.map_or(name.to_owned(), |expert| name.replace("{}", &expert.to_string()));
                format!("model.layers.{layer}.{name}")
            }
        }
    }
}

impl fmt::Display for TensorName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.layer {
            Some(layer) => write!(f, "blk.{layer}.{}", self.part),
            None => f.write_str(self.part),
        }
    }
}

/// One of the parts that the outermost dimension counts; the caller checked that it is there.
fn part_of(tensor: TensorView<'_>, index: usize) -> TensorView<'_> {
    let part_bytes = tensor.data.len() / tensor.shape[0];
    let data = &tensor.data[index * part_bytes..(index + 1) * part_bytes];
    TensorView { shape: &tensor.shape[1..], data, ..tensor }
}
