//! From a model's name to engines that are ready to run.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tidemill_kernels::gguf::GgufError;
use tidemill_kernels::models::ModelError;
use tidemill_kernels::models::checkpoint::Checkpoint;
use tidemill_kernels::models::fake::{FakeConfig, FakeModel};
use tidemill_kernels::models::transformer::{KvConfig, Transformer};
use tidemill_kernels::models::weights::{ModelWeights, NumericPath, PackedFile};
use tidemill_kernels::safetensors::SafetensorsError;
use tidemill_kernels::step::Model;
use tidemill_operators::chat::ChatTemplate;
use tidemill_operators::infer::engine::{Engine, EngineConfig};
use tidemill_operators::tokenize::TextModel;
use tidemill_operators::tokenizer::gguf::text_of;
use tidemill_operators::tokenizer::hugging_face::text_of_folder;
use tidemill_operators::tokenizer::{TextModelError, Tokenizer};

use super::catalogue::{FAKE, ModelRef};
use super::digest::file_digest;
use super::folder;
use super::hub::{Hub, HubError};
use super::pull::{PullError, packed_path, pull, verified};
use crate::cores::Cores;
use crate::plan::EnginePlan;
use crate::plan::device::Devices;

const FAKE_CONTROL_TOKENS: [&str; 2] = ["<|im_start|>", "<|im_end|>"];
const FAKE_CHAT_TEMPLATE: &str = "{% for message in messages %}<|im_start|>{{ message.role }}\n\
    {{ message.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n";
/// Microseconds the fake model takes for a token, so that a test can interrupt it.
const FAKE_DELAY: &str = "TIDEMILL_FAKE_DELAY_US";
/// A sequence of the fake model, in tokens.
const FAKE_MAX_POSITION: u32 = 8192;
const FAKE_KV_BYTES_PER_TOKEN: u64 = 16;

#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    #[error(transparent)]
    Pull(#[from] PullError),
    #[error(transparent)]
    Hub(#[from] HubError),
    #[error(transparent)]
    Gguf(#[from] GgufError),
    #[error(transparent)]
    Safetensors(#[from] SafetensorsError),
    #[error("cannot load model {name:?}")]
    Model {
        name: String,
        #[source]
        source: Box<ModelError>,
    },
    #[error("cannot load the text side of model {name:?}")]
    Text {
        name: String,
        #[source]
        source: Box<TextModelError>,
    },
    #[error("a KV cache of {bytes} bytes holds no page of {page_bytes} bytes for each of {engines} engines")]
    KvCache { bytes: u64, page_bytes: u64, engines: usize },
}

impl LoadError {
    /// What the user can do.
    pub fn help(&self) -> Option<String> {
        match self {
            Self::Pull(error) => Some(error.help()),
            Self::Hub(error) => Some(error.help()),
            Self::Gguf(_) | Self::Safetensors(_) => None,
            Self::Model { .. } | Self::Text { .. } => Some(
                "look at it with: tidemill models inspect NAME, or the path of a file or folder".to_owned(),
            ),
            Self::KvCache { .. } => Some("raise engine.kv_cache_memory".to_owned()),
        }
    }
}

enum Weights {
    Fake,
    Real { weights: Arc<ModelWeights>, digest: String },
}

/// A model's weights and text side, in memory.
pub struct LoadedModel {
    name: String,
    weights: Weights,
    text: (Tokenizer, ChatTemplate),
}

/// The engines of a run and what they share.
pub struct Engines {
    /// Each with the cores that its threads stay on, `None` for all.
    pub engines: Vec<(Engine, Option<Cores>)>,
    pub text: Arc<TextModel>,
    /// Tokens that the KV cache of one engine holds.
    pub kv_tokens: u64,
}

/// Loads the plan's model, fetching it first if need be; `say` is told what takes time.
pub fn load(
    model: &ModelRef,
    name: &str,
    devices: Devices,
    say: &dyn Fn(&str),
) -> Result<LoadedModel, LoadError> {
    let name = name.to_owned();
    let Some(path) = fetched(model, false, say)? else {
        let chat = ChatTemplate::new(FAKE_CHAT_TEMPLATE.to_owned(), String::new(), String::new());
        let text = (Tokenizer::bytes(&FAKE_CONTROL_TOKENS), chat.expect("a template of our own"));
        return Ok(LoadedModel { name, weights: Weights::Fake, text });
    };
    let digest = digest(model, &path, say)?;
    let model_error = |source| LoadError::Model { name: name.clone(), source: Box::new(source) };
    let text_error = |source| LoadError::Text { name: name.clone(), source: Box::new(source) };
    let checkpoint = Checkpoint::open(&path).map_err(model_error)?;
    let (tokenizer, chat) = match &checkpoint {
        Checkpoint::Gguf(gguf) => text_of(gguf),
        Checkpoint::Folder(_) => text_of_folder(&path),
    }
    .map_err(text_error)?;
    let numeric_path = match devices {
        Devices::Cpu | Devices::CpuShares(_) => NumericPath::Fast,
        Devices::Reference => NumericPath::Reference,
    };
    let packed = packed_path(&digest)?;
    let packed = PackedFile { path: &packed, identity: &digest };
    let weights = ModelWeights::load_packed(&checkpoint, numeric_path, Some(packed)).map_err(model_error)?;
    let tokenizer = tokenizer.fit(weights.config.vocab_size).map_err(|error| text_error(error.into()))?;
    Ok(LoadedModel { name, weights: Weights::Real { weights, digest }, text: (tokenizer, chat) })
}

/// Where a model's file or folder is, fetched if need be; none for the one that is built in.
pub fn fetched(model: &ModelRef, force: bool, say: &dyn Fn(&str)) -> Result<Option<PathBuf>, LoadError> {
    Ok(match model {
        ModelRef::Fake => None,
        ModelRef::Catalogued(entry) => Some(match verified(entry) {
            Err(PullError::Missing { .. }) => pull(entry, false, say)?,
            _ if force => pull(entry, true, say)?,
            found => found?,
        }),
        ModelRef::File(path) | ModelRef::Folder(path) => Some(path.clone()),
        ModelRef::Hub(name) => Some(Hub::from_env()?.pull(name, force, say)?.folder),
    })
}

/// What stands for the model's answers in the journal.
fn digest(model: &ModelRef, path: &Path, say: &dyn Fn(&str)) -> Result<String, LoadError> {
    Ok(match model {
        ModelRef::Fake => FAKE.to_owned(),
        ModelRef::Catalogued(entry) => entry.sha256.to_owned(),
        ModelRef::File(_) => file_digest(path, say)?,
        // A commit of the hub names its files' contents, but who wrote them into the cache is not known.
        ModelRef::Folder(_) | ModelRef::Hub(_) => folder::digest(path, say)?,
    })
}

impl LoadedModel {
    /// Makes the engines; they share the weights, and split the KV memory and the cores.
    pub fn engines(self, plan: &EnginePlan, devices: Devices) -> Result<Engines, LoadError> {
        let num_engines = devices.num_engines();
        let cores = Cores::available();
        let engines = match devices {
            Devices::Cpu | Devices::Reference => vec![(self.engine(plan, cores.num_cores(), 1)?, None)],
            Devices::CpuShares(_) => cores
                .shares(num_engines)
                .into_iter()
                .map(|share| {
                    let make = || self.engine(plan, share.num_cores(), num_engines);
                    Ok((share.pinned(make)?, Some(share)))
                })
                .collect::<Result<_, LoadError>>()?,
        };
        let first = &engines[0].0;
        let (tokenizer, chat) = self.text;
        let text = TextModel {
            tokenizer,
            chat,
            digest: first.model_info().digest.clone(),
            max_seq_len: first.max_seq_len(),
        };
        let kv_tokens = u64::from(first.model_info().num_pages) * u64::from(plan.page_size);
        tracing::info!(model = self.name, num_engines, kv_tokens, "engines are ready");
        Ok(Engines { engines, text: Arc::new(text), kv_tokens })
    }

    /// Makes one of `num_engines` engines that split the plan's KV memory.
    pub fn engine(
        &self,
        plan: &EnginePlan,
        num_threads: usize,
        num_engines: usize,
    ) -> Result<Engine, LoadError> {
        let page_bytes = self.kv_bytes_per_token() * u64::from(plan.page_size);
        let num_pages = plan.kv_cache_bytes / num_engines as u64 / page_bytes;
        // More pages than all sequences at full length can use would never be touched.
        let max_position = match &self.weights {
            Weights::Fake => FAKE_MAX_POSITION,
            Weights::Real { weights, .. } => weights.config.max_position,
        };
        let useful = u64::from(plan.max_num_seqs + 1) * u64::from(max_position.div_ceil(plan.page_size));
        let num_pages = num_pages.min(useful).min(u64::from(u32::MAX)) as u32;
        if num_pages == 0 {
            let bytes = plan.kv_cache_bytes;
            return Err(LoadError::KvCache { bytes, page_bytes, engines: num_engines });
        }
        let config = EngineConfig {
            max_num_seqs: plan.max_num_seqs as usize,
            max_num_batched_tokens: plan.max_num_batched_tokens as usize,
            enable_prefix_cache: true,
        };
        Ok(Engine::new(self.model(plan.page_size, num_pages, num_threads)?, config))
    }

    /// Products a token takes in the layers, and in the output head where its next token is wanted; 0 without weights.
    pub fn num_products(&self) -> (u64, u64) {
        let Weights::Real { weights, .. } = &self.weights else { return (0, 0) };
        let config = &weights.config;
        let (hidden, intermediate) = (u64::from(config.hidden_size), u64::from(config.intermediate_size));
        let head_dim = u64::from(config.head_dim);
        let (q_len, kv_len) =
            (u64::from(config.num_heads) * head_dim, u64::from(config.num_kv_heads) * head_dim);
        let layer = hidden * (2 * q_len + 2 * kv_len + 3 * intermediate);
        (layer * u64::from(config.num_layers), hidden * u64::from(config.vocab_size))
    }

    /// The matrices of a dense model: name, inputs, outputs; none without weights.
    pub fn matrix_shapes(&self) -> Vec<(&'static str, usize, usize)> {
        let Weights::Real { weights, .. } = &self.weights else { return Vec::new() };
        let config = &weights.config;
        let (hidden, intermediate) = (config.hidden_size as usize, config.intermediate_size as usize);
        let q_len = (config.num_heads * config.head_dim) as usize;
        let kv_len = (config.num_kv_heads * config.head_dim) as usize;
        vec![
            ("qkv", hidden, q_len + 2 * kv_len),
            ("attention output", q_len, hidden),
            ("gate and up", hidden, 2 * intermediate),
            ("down", intermediate, hidden),
            ("head", hidden, config.vocab_size as usize),
        ]
    }

    /// Keys and values of one token in all layers.
    pub fn kv_bytes_per_token(&self) -> u64 {
        match &self.weights {
            Weights::Fake => FAKE_KV_BYTES_PER_TOKEN,
            Weights::Real { weights, .. } => weights.kv_bytes_per_token(),
        }
    }

    fn model(&self, page_size: u32, num_pages: u32, num_threads: usize) -> Result<Box<dyn Model>, LoadError> {
        match &self.weights {
            Weights::Fake => {
                let delay = std::env::var(FAKE_DELAY).ok().and_then(|value| value.parse().ok()).unwrap_or(0);
                let vocab_size = self.text.0.vocab_size() as u32;
                Ok(Box::new(FakeModel::new(FakeConfig {
                    name: FAKE.to_owned(),
                    vocab_size,
                    eos_token_id: vocab_size - 1,
                    eos_probability: 0.05,
                    page_size,
                    num_pages,
                    num_host_pages: 0,
                    max_position: FAKE_MAX_POSITION,
                    delay_per_token: Duration::from_micros(delay),
                    runs_ahead: false,
                })))
            }
            Weights::Real { weights, digest } => {
                let kv = KvConfig { page_size, num_pages };
                Ok(Box::new(self.transformer(weights, digest, kv, num_threads)?))
            }
        }
    }

    /// The tokenizer, and the model on all cores with a cache of `num_pages`; none for a model without weights.
    pub fn scorer(
        &self,
        page_size: u32,
        num_pages: u32,
    ) -> Result<Option<(&Tokenizer, Transformer)>, LoadError> {
        let Weights::Real { weights, digest } = &self.weights else { return Ok(None) };
        let kv = KvConfig { page_size, num_pages };
        let num_threads = Cores::available().num_cores();
        Ok(Some((&self.text.0, self.transformer(weights, digest, kv, num_threads)?)))
    }

    fn transformer(
        &self,
        weights: &Arc<ModelWeights>,
        digest: &str,
        kv: KvConfig,
        num_threads: usize,
    ) -> Result<Transformer, LoadError> {
        Transformer::new(Arc::clone(weights), kv, num_threads, &self.name, digest)
            .map_err(|source| LoadError::Model { name: self.name.clone(), source: Box::new(source) })
    }
}
