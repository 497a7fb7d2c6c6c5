//! From a model's name to engines that are ready to run.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tidemill_kernels::gguf::GgufError;
use tidemill_kernels::gpu::{DeviceError, GpuError, GpuWeights};
use tidemill_kernels::models::checkpoint::Checkpoint;
use tidemill_kernels::models::fake::{FakeConfig, FakeModel};
use tidemill_kernels::models::transformer::{KvConfig, Transformer};
use tidemill_kernels::models::weights::{ModelWeights, NumericPath, PackedFile};
use tidemill_kernels::models::{ModelConfig, ModelError};
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
use super::gpu::{self, Gpus};
use super::hub::{Hub, HubError};
use super::pull::{PullError, packed_path, pull, verified};
use crate::cores::Cores;
use crate::plan::chain;
use crate::plan::device::Devices;
use crate::plan::engine::{Bounds, DeviceKind, EnginePlan};
use crate::spec::{Dtype, KvCacheDtype, Quantization};

const FAKE_CONTROL_TOKENS: [&str; 2] = ["<|im_start|>", "<|im_end|>"];
const FAKE_CHAT_TEMPLATE: &str = "{% for message in messages %}<|im_start|>{{ message.role }}\n\
    {{ message.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n";
/// Microseconds the fake model takes for a token, so that a test can interrupt it.
const FAKE_DELAY: &str = "TIDEMILL_FAKE_DELAY_US";
/// A sequence of the fake model, in tokens.
const FAKE_MAX_POSITION: u32 = 8192;
const FAKE_KV_BYTES_PER_TOKEN: u64 = 16;

const INSPECT: &str = "look at it with: tidemill models inspect NAME, or the path of a file or folder";

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
    #[error("cannot use GPU {name}")]
    Gpu {
        name: String,
        #[source]
        source: Box<GpuError>,
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
            Self::Gpu { source, .. } => Some(gpu_help(source)),
            Self::Model { source, .. } => Some(match &**source {
                ModelError::Gpu(error) => gpu_help(error),
                _ => INSPECT.to_owned(),
            }),
            Self::Text { .. } => Some(INSPECT.to_owned()),
            Self::KvCache { .. } => Some("raise engine.kv_cache_memory".to_owned()),
        }
    }

    /// The reason, if only a GPU is at fault, so that a CPU may do the work; else the error itself.
    fn why_no_gpu(self) -> Result<String, Self> {
        match self {
            Self::Gpu { source, .. } => Ok(chain(&*source)),
            Self::Model { name, source } => match *source {
                ModelError::Gpu(error) => Ok(chain(&error)),
                source => Err(Self::Model { name, source: Box::new(source) }),
            },
            error => Err(error),
        }
    }
}

fn gpu_help(error: &GpuError) -> String {
    match error {
        GpuError::Cuda(error) => format!("{}; without a GPU, let the device be auto or cpu", error.help()),
        GpuError::Device(DeviceError::OutOfMemory { .. }) | GpuError::KvCache { .. } => {
            "lower engine.max_num_batched_tokens, raise engine.gpu_memory_utilization, set engine.quantization to \
             fp8, or take a smaller model"
                .to_owned()
        }
        GpuError::Device(_) => "see whether nvidia-smi works, or let the device be auto or cpu".to_owned(),
        _ => "let the device be auto or cpu, or take another model".to_owned(),
    }
}

enum Weights {
    Fake,
    Cpu {
        weights: Arc<ModelWeights>,
        digest: String,
    },
    /// On each GPU.
    Gpus {
        weights: Vec<Arc<GpuWeights>>,
        digest: String,
    },
}

/// What computes a model.
#[derive(Clone, Copy, Debug)]
pub enum Compute<'a> {
    Cpu(NumericPath),
    Gpus(&'a Gpus),
}

/// A model's weights and text side, in memory.
pub struct LoadedModel {
    name: String,
    weights: Weights,
    text: (Tokenizer, ChatTemplate),
}

/// Where engines were made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Placement {
    /// Such as `cpu` or `cuda:0 (NVIDIA H200)`.
    pub device: String,
    /// The reason, where a GPU was looked for in vain.
    pub why_no_gpu: Option<String>,
    /// Settings of the definition that have no effect there.
    pub notes: Vec<String>,
}

impl Placement {
    /// For the user.
    pub fn lines(&self) -> Vec<String> {
        let mut lines = vec![match &self.why_no_gpu {
            Some(why) => format!("device: {}; no GPU is used, {why}", self.device),
            None => format!("device: {}", self.device),
        }];
        lines.extend(self.notes.iter().map(|note| format!("note: {note}")));
        lines
    }
}

/// The engines of a run and what they share.
pub struct Engines {
    /// Each with the cores that its threads stay on, `None` for all.
    pub engines: Vec<(Engine, Option<Cores>)>,
    pub text: Arc<TextModel>,
    /// Tokens that the KV cache of one engine holds.
    pub kv_tokens: u64,
    pub max_num_seqs: u32,
    pub placement: Placement,
}

/// Loads the plan's model and makes its engines where the plan wants them, or on the CPU if it leaves that open and no
/// GPU can be used. The model is fetched first if need be; `say` is told what takes time.
pub fn load_engines(
    model: &ModelRef,
    name: &str,
    devices: &Devices,
    plan: &EnginePlan,
    say: &dyn Fn(&str),
) -> Result<Engines, LoadError> {
    let on_cpu = |path| load(model, name, Compute::Cpu(path), say)?.engines(plan, devices);
    let on_gpus = |ordinals: &[usize]| {
        let gpus = Gpus::open(ordinals, plan)?;
        let loaded = load(model, name, Compute::Gpus(&gpus), say)?;
        let numbers = loaded.gpu_numbers();
        let mut engines = loaded.engines(plan, devices)?;
        engines.placement.device =
            format!("{gpus}{}", numbers.map(|name| format!(" in {name}")).unwrap_or_default());
        Ok(engines)
    };
    match devices {
        Devices::Reference => on_cpu(NumericPath::Reference),
        Devices::Cpu | Devices::CpuShares(_) => on_cpu(NumericPath::Fast),
        Devices::Cuda(ordinals) => on_gpus(ordinals),
        Devices::Auto if *model == ModelRef::Fake => on_cpu(NumericPath::Fast),
        Devices::Auto => on_gpus(&[0]).or_else(|error: LoadError| {
            let why = error.why_no_gpu()?;
            let mut engines = on_cpu(NumericPath::Fast)?;
            engines.placement.why_no_gpu = Some(why);
            Ok(engines)
        }),
    }
}

/// Loads a model, fetching it first if need be; `say` is told what takes time.
pub fn load(
    model: &ModelRef,
    name: &str,
    compute: Compute<'_>,
    say: &dyn Fn(&str),
) -> Result<LoadedModel, LoadError> {
    let name = name.to_owned();
    let Some(path) = fetched(model, false, say)? else {
        return Ok(LoadedModel { name, weights: Weights::Fake, text: fake_text() });
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
    let weights = match compute {
        Compute::Cpu(numeric_path) => {
            let packed = packed_path(&digest)?;
            let packed = PackedFile { path: &packed, identity: &digest };
            let weights = ModelWeights::load_packed(&checkpoint, numeric_path, Some(packed));
            Weights::Cpu { weights: weights.map_err(model_error)?, digest }
        }
        Compute::Gpus(gpus) => {
            Weights::Gpus { weights: gpus.load(&checkpoint, say).map_err(model_error)?, digest }
        }
    };
    let vocab_size = weights.config().map_or(0, |config| config.vocab_size);
    let tokenizer = tokenizer.fit(vocab_size).map_err(|error| text_error(error.into()))?;
    Ok(LoadedModel { name, weights, text: (tokenizer, chat) })
}

fn fake_text() -> (Tokenizer, ChatTemplate) {
    let chat = ChatTemplate::new(FAKE_CHAT_TEMPLATE.to_owned(), String::new(), String::new());
    (Tokenizer::bytes(&FAKE_CONTROL_TOKENS), chat.expect("a template of our own"))
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

impl Weights {
    /// None without weights.
    fn config(&self) -> Option<&ModelConfig> {
        match self {
            Self::Fake => None,
            Self::Cpu { weights, .. } => Some(&weights.config),
            Self::Gpus { weights, .. } => weights.first().map(|weights| &weights.config),
        }
    }
}

impl LoadedModel {
    /// A model of random weights, whose text is that of the fake one.
    pub fn random(gpus: &Gpus, name: &str, config: ModelConfig) -> Result<Self, LoadError> {
        let name = name.to_owned();
        let model_error = |source| LoadError::Model { name: name.clone(), source: Box::new(source) };
        let weights = vec![gpus.random(config).map_err(model_error)?];
        let weights = Weights::Gpus { weights, digest: "random".to_owned() };
        Ok(Self { name, weights, text: fake_text() })
    }

    /// The numbers of the weights on GPUs.
    pub fn gpu_numbers(&self) -> Option<&'static str> {
        match &self.weights {
            Weights::Gpus { weights, .. } => weights.first().map(|weights| weights.number_name()),
            Weights::Fake | Weights::Cpu { .. } => None,
        }
    }

    /// Makes the engines. On a CPU they share the weights, and split the KV memory and the cores; each GPU has one.
    pub fn engines(self, plan: &EnginePlan, devices: &Devices) -> Result<Engines, LoadError> {
        let num_engines = devices.num_engines();
        let cores = Cores::available();
        let on_all_cores = |index| Ok((self.engine(plan, index, cores.num_cores(), num_engines)?, None));
        let engines: Vec<(Engine, Option<Cores>)> = match devices {
            Devices::CpuShares(_) => cores
                .shares(num_engines)
                .into_iter()
                .map(|share| {
                    let make = || self.engine(plan, 0, share.num_cores(), num_engines);
                    Ok((share.pinned(make)?, Some(share)))
                })
                .collect::<Result<_, LoadError>>()?,
            _ => (0..num_engines).map(on_all_cores).collect::<Result<_, LoadError>>()?,
        };
        let max_num_seqs = self.bounds(plan).max_num_seqs;
        let placement = self.placement(plan, devices);
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
        Ok(Engines { engines, text: Arc::new(text), kv_tokens, max_num_seqs, placement })
    }

    fn bounds(&self, plan: &EnginePlan) -> Bounds {
        plan.bounds(match self.weights {
            Weights::Gpus { .. } => DeviceKind::Gpu,
            Weights::Fake | Weights::Cpu { .. } => DeviceKind::Cpu,
        })
    }

    /// On a CPU; who has opened GPUs names them.
    fn placement(&self, plan: &EnginePlan, devices: &Devices) -> Placement {
        let mut notes = Vec::new();
        if let Weights::Cpu { .. } = self.weights {
            if plan.dtype != Dtype::Auto {
                notes.push("dtype has no effect: a CPU computes with int8".to_owned());
            }
            if plan.quantization == Some(Quantization::Fp8) {
                notes.push("quantization has no effect: a CPU computes with int8".to_owned());
            }
            if plan.kv_cache_dtype == KvCacheDtype::Fp8 {
                notes.push("kv_cache_dtype has no effect: a CPU keeps int8".to_owned());
            }
            if plan.gpu_memory_utilization.is_some() && *devices != Devices::Auto {
                notes.push("gpu_memory_utilization has no effect on a CPU".to_owned());
            }
        }
        let device = if *devices == Devices::Reference { "reference" } else { "cpu" };
        Placement { device: device.to_owned(), why_no_gpu: None, notes }
    }

    /// Makes engine `index` of `num_engines` that split the plan's KV memory.
    pub fn engine(
        &self,
        plan: &EnginePlan,
        index: usize,
        num_threads: usize,
        num_engines: usize,
    ) -> Result<Engine, LoadError> {
        Ok(Engine::new(self.model(plan, index, num_threads, num_engines)?, self.engine_config(plan)))
    }

    pub fn engine_config(&self, plan: &EnginePlan) -> EngineConfig {
        let bounds = self.bounds(plan);
        EngineConfig {
            max_num_seqs: bounds.max_num_seqs as usize,
            max_num_batched_tokens: bounds.max_num_batched_tokens as usize,
            enable_prefix_cache: true,
        }
    }

    /// The model of engine `index`.
    pub fn model(
        &self,
        plan: &EnginePlan,
        index: usize,
        num_threads: usize,
        num_engines: usize,
    ) -> Result<Box<dyn Model>, LoadError> {
        Ok(match &self.weights {
            Weights::Fake => Box::new(self.fake(plan.page_size, self.num_pages(plan, num_engines)?)),
            Weights::Cpu { weights, digest } => {
                let num_pages = self.num_pages(plan, num_engines)?;
                let kv = KvConfig { page_size: plan.page_size, num_pages };
                Box::new(self.transformer(weights, digest, kv, num_threads)?)
            }
            Weights::Gpus { weights, digest } => {
                Box::new(gpu::model(&weights[index], plan, &self.name, digest, num_engines)?)
            }
        })
    }

    /// None without weights.
    pub fn config(&self) -> Option<&ModelConfig> {
        self.weights.config()
    }

    /// Of an engine on a CPU.
    fn num_pages(&self, plan: &EnginePlan, num_engines: usize) -> Result<u32, LoadError> {
        let max_position = self.weights.config().map_or(FAKE_MAX_POSITION, |config| config.max_position);
        let useful = useful_pages(plan.page_size, self.bounds(plan).max_num_seqs, max_position);
        pages_in(plan.cpu_kv_cache_bytes(), self.kv_bytes_per_token(), plan.page_size, num_engines)
            .map(|num_pages| num_pages.min(useful))
    }

    /// Products a token takes in the layers, and in the output head where its next token is wanted; 0 without weights.
    pub fn num_products(&self) -> (u64, u64) {
        let Some(config) = self.weights.config() else { return (0, 0) };
        let (hidden, intermediate) = (u64::from(config.hidden_size), u64::from(config.intermediate_size));
        let head_dim = u64::from(config.head_dim);
        let (q_len, kv_len) =
            (u64::from(config.num_heads) * head_dim, u64::from(config.num_kv_heads) * head_dim);
        let layer = hidden * (2 * q_len + 2 * kv_len + 3 * intermediate);
        (layer * u64::from(config.num_layers), hidden * u64::from(config.vocab_size))
    }

    /// The matrices of a dense model: name, inputs, outputs; none without weights.
    pub fn matrix_shapes(&self) -> Vec<(&'static str, usize, usize)> {
        let Some(config) = self.weights.config() else { return Vec::new() };
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
            Weights::Cpu { weights, .. } => weights.kv_bytes_per_token(),
            Weights::Gpus { weights, .. } => weights[0].kv_bytes_per_token(),
        }
    }

    fn fake(&self, page_size: u32, num_pages: u32) -> FakeModel {
        let delay = std::env::var(FAKE_DELAY).ok().and_then(|value| value.parse().ok()).unwrap_or(0);
        let vocab_size = self.text.0.vocab_size() as u32;
        FakeModel::new(FakeConfig {
            name: FAKE.to_owned(),
            vocab_size,
            eos_token_id: vocab_size - 1,
            eos_probability: 0.05,
            page_size,
            num_pages,
            max_position: FAKE_MAX_POSITION,
            delay_per_token: Duration::from_micros(delay),
            runs_ahead: false,
            num_host_pages: 0,
        })
    }

    /// The tokenizer, and the model on all cores with a cache of `num_pages`; none for a model without weights.
    pub fn scorer(
        &self,
        page_size: u32,
        num_pages: u32,
    ) -> Result<Option<(&Tokenizer, Transformer)>, LoadError> {
        let Weights::Cpu { weights, digest } = &self.weights else { return Ok(None) };
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

/// Pages that all sequences at full length can use; more would never be touched.
pub(super) fn useful_pages(page_size: u32, max_num_seqs: u32, max_position: u32) -> u32 {
    let pages = (u64::from(max_num_seqs) + 1) * u64::from(max_position.div_ceil(page_size));
    u32::try_from(pages).unwrap_or(u32::MAX)
}

/// Pages of each of `num_engines` engines that split some memory.
pub(super) fn pages_in(
    bytes: u64,
    bytes_per_token: u64,
    page_size: u32,
    num_engines: usize,
) -> Result<u32, LoadError> {
    let page_bytes = bytes_per_token * u64::from(page_size);
    match bytes / num_engines as u64 / page_bytes {
        0 => Err(LoadError::KvCache { bytes, page_bytes, engines: num_engines }),
        num_pages => Ok(u32::try_from(num_pages).unwrap_or(u32::MAX)),
    }
}
