//! A definition as the user wrote it: the YAML's shape and the place of every value, nothing checked.
//!
//! Unknown keys and wrong types are refused here; whether a value makes sense is decided in
//! [`plan`](crate::plan). Values that can be wrong later keep their place ([`Spanned`]).

mod environment;
pub mod kafka;

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};

use serde::de::{self, Deserializer, Visitor};
use serde::{Deserialize, Serialize};
pub use serde_saphyr::{Location, Spanned};
use tidemill_operators::infer::sequence::Priority;

use self::kafka::{KafkaSourceSpec, KafkaTargetSpec, KafkaTopicSpec};

/// A whole definition file.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Spec {
    pub name: Spanned<String>,
    pub model: ModelSpec,
    pub source: SourceSpec,
    pub steps: Spanned<Vec<StepSpec>>,
    pub sink: SinkSpec,
    pub errors: Option<ErrorsSpec>,
    #[serde(default)]
    pub engine: EngineSpec,
    #[serde(default)]
    pub credit: CreditSpec,
    /// A folder for what a pipeline on topics keeps on disk; relative to the definition.
    pub state: Option<Spanned<String>>,
    #[serde(default)]
    pub priority: Priority,
    pub tenants: Option<TenantsSpec>,
    /// Where spans of answers go; nowhere if left out.
    pub traces: Option<TracesSpec>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelSpec {
    /// A name from `tidemill models list`, or the path of a GGUF file.
    pub name: Spanned<String>,
    /// The same as `device` of the engine.
    pub device: Option<Spanned<DeviceSpec>>,
    /// The same as `quantization` of the engine.
    pub quantization: Option<Spanned<Quantization>>,
}

/// The names of one or more devices; each has an engine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceSpec(pub Vec<String>);

#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SourceSpec {
    Parquet(FilesSpec),
    Jsonl(FilesSpec),
    Kafka(Box<KafkaSourceSpec>),
}

/// Input files.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FilesSpec {
    /// A file, a folder or a glob; relative to the definition. `-` is standard input (JSONL only).
    pub path: Spanned<String>,
    pub columns: Option<Vec<Spanned<String>>>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StepSpec {
    Generate(GenerateSpec),
}

/// One question asked of every document.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GenerateSpec {
    /// Names the output column.
    pub name: Spanned<String>,
    pub system: Option<Spanned<String>>,
    pub prompt: Spanned<String>,
    pub max_tokens: Option<Spanned<u32>>,
    pub temperature: Option<Spanned<f32>>,
    pub top_p: Option<Spanned<f32>>,
    pub top_k: Option<u32>,
    pub min_p: Option<Spanned<f32>>,
    pub repetition_penalty: Option<Spanned<f32>>,
    pub presence_penalty: Option<Spanned<f32>>,
    pub frequency_penalty: Option<Spanned<f32>>,
    pub seed: Option<u64>,
    /// Answers have `max_tokens` tokens, whatever the model says; for measuring.
    #[serde(default)]
    pub ignore_eos: bool,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SinkSpec {
    Parquet(TargetSpec),
    Jsonl(TargetSpec),
    Kafka(Box<KafkaTargetSpec>),
}

/// Where rows are written.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TargetSpec {
    /// A folder for Parquet, a file for JSONL; relative to the definition. `-` is standard output (JSONL).
    pub path: Spanned<String>,
    /// Rows are committed at the latest when this many wait.
    pub commit_rows: Option<Spanned<u64>>,
    /// Rows are committed at the latest after this many seconds.
    pub commit_seconds: Option<Spanned<u64>>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ErrorsSpec {
    pub parquet: Option<PathSpec>,
    pub jsonl: Option<PathSpec>,
    pub kafka: Option<KafkaTopicSpec>,
    /// The run stops when more documents than this fail.
    pub budget: Option<Budget>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PathSpec {
    pub path: Spanned<String>,
}

/// `5%` of the documents, or a number of them.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Budget {
    Percent(f64),
    Documents(u64),
}

/// The inference engines and their bounds.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EngineSpec {
    pub device: Option<Spanned<DeviceSpec>>,
    pub max_num_seqs: Option<Spanned<u32>>,
    pub max_num_batched_tokens: Option<Spanned<u32>>,
    pub page_size: Option<Spanned<u32>>,
    pub kv_cache_memory: Option<Spanned<Bytes>>,
    /// The share of a GPU's memory that an engine may fill.
    pub gpu_memory_utilization: Option<Spanned<f64>>,
    /// Answers do not depend on what else is in the batch; on a CPU they never do.
    pub deterministic: Option<bool>,
    pub dtype: Option<Spanned<Dtype>>,
    pub quantization: Option<Spanned<Quantization>>,
    pub kv_cache_dtype: Option<Spanned<KvCacheDtype>>,
}

/// Numbers that a model computes in on a GPU.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Dtype {
    /// float16 where the weights are stored so, else bfloat16.
    #[default]
    Auto,
    Bfloat16,
    Float16,
}

impl Dtype {
    pub fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Bfloat16 => "bfloat16",
            Self::Float16 => "float16",
        }
    }
}

/// What weights are rounded to when they are loaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Quantization {
    /// e4m3, with a scale for each output.
    Fp8,
}

/// Numbers of keys and values.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum KvCacheDtype {
    /// The device's own: on a GPU, those that the model computes in.
    #[default]
    Auto,
    /// e4m3.
    Fp8,
}

/// Bounds of what is read and not yet written.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CreditSpec {
    pub documents: Option<Spanned<u64>>,
    pub bytes: Option<Spanned<Bytes>>,
    pub tokens: Option<Spanned<u64>>,
}

/// On whose behalf documents are processed.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TenantsSpec {
    /// A template that names the tenant of a document.
    pub by: Spanned<String>,
    #[serde(default)]
    pub weights: BTreeMap<String, Spanned<u32>>,
    pub default_weight: Option<Spanned<u32>>,
    pub max_tokens_in_flight: Option<Spanned<u64>>,
    /// The same of tenants by name.
    #[serde(default)]
    pub limits: BTreeMap<String, Spanned<u64>>,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TracesSpec {
    /// URL of an OpenTelemetry collector, which takes OTLP over HTTP.
    pub endpoint: Spanned<String>,
}

/// A size in bytes, written as `512MiB` or a plain number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bytes(pub u64);

/// What is wrong with a definition, and where.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{path}:{line}:{column}: {message}")]
pub struct SpecError {
    /// The file, as the user named it.
    pub path: String,
    /// The file's text, for the snippet.
    pub text: String,
    /// 1-based; 0 if the place is unknown.
    pub line: usize,
    /// 1-based.
    pub column: usize,
    /// Bytes of `text` to mark.
    pub span: std::ops::Range<usize>,
    /// The key at fault, such as `steps[0].generate.prompt`; empty if the YAML itself is at fault.
    pub key: String,
    pub message: String,
    pub help: Option<String>,
}

/// A definition file with its parsed content.
#[derive(Clone, Debug)]
pub struct Definition {
    pub path: PathBuf,
    pub text: String,
    pub spec: Spec,
}

impl Definition {
    /// Reads and parses a definition.
    pub fn load(path: &Path) -> Result<Self, Box<SpecError>> {
        let text = std::fs::read_to_string(path).map_err(|error| {
            let help = match error.kind() {
                std::io::ErrorKind::NotFound => {
                    "give the path of a pipeline definition, such as pipeline.yaml"
                }
                std::io::ErrorKind::InvalidData => "a definition is UTF-8 text",
                _ => "check the file's permissions",
            };
            SpecError::without_place(path, format!("cannot read the definition: {error}"), Some(help))
        })?;
        Self::parse(path, text)
    }

    /// Parses a definition that was read from `path`, with `${NAME}` and `${NAME:default}` filled in.
    pub fn parse(path: &Path, text: String) -> Result<Self, Box<SpecError>> {
        let text = environment::expand(&text, |name| std::env::var(name).ok())
            .map_err(|(line, message)| SpecError::on_text_line(path, &text, line, message))?;
        match serde_saphyr::from_str(&text) {
            Ok(spec) => Ok(Self { path: path.to_owned(), text, spec }),
            Err(error) => {
                let location = error.location().unwrap_or(Location::UNKNOWN);
                let message =
                    error.without_snippet().render_with_formatter(&serde_saphyr::UserMessageFormatter);
                Err(SpecError::at(path, &text, location, "", message, None))
            }
        }
    }

    /// The folder that relative paths start from.
    pub fn folder(&self) -> &Path {
        self.path.parent().unwrap_or(Path::new(""))
    }

    /// An error at a value of this definition.
    pub fn error<T>(
        &self,
        value: &Spanned<T>,
        key: &str,
        message: impl Into<String>,
        help: Option<String>,
    ) -> Box<SpecError> {
        SpecError::at(&self.path, &self.text, value.referenced, key, message.into(), help)
    }
}

impl SpecError {
    fn without_place(path: &Path, message: String, help: Option<&str>) -> Box<Self> {
        Self::at(path, "", Location::UNKNOWN, "", message, help.map(str::to_owned))
    }

    /// An error of the text itself; `line` is 1-based.
    fn on_text_line(path: &Path, text: &str, line: usize, message: String) -> Box<Self> {
        let start: usize = text.split_inclusive('\n').take(line - 1).map(str::len).sum();
        let len = text[start..].lines().next().map_or(0, str::len);
        Box::new(Self {
            path: path.display().to_string(),
            text: text.to_owned(),
            line,
            column: 1,
            span: start..start + len,
            key: String::new(),
            message,
            help: Some("set it, or write ${NAME:default}; $${ stands for ${ itself".to_owned()),
        })
    }

    fn at(
        path: &Path,
        text: &str,
        location: Location,
        key: &str,
        message: String,
        help: Option<String>,
    ) -> Box<Self> {
        let start = location.span().byte_offset().map_or(0, |offset| offset as usize);
        let start = text.floor_char_boundary(start);
        let len = location.span().byte_len().unwrap_or(0) as usize;
        // A block scalar's span reaches to its end: mark its first line only.
        let rest = &text[start..];
        let line_len = rest.find('\n').unwrap_or(rest.len());
        let len = if len == 0 { line_len } else { len.min(line_len) };
        Box::new(Self {
            path: path.display().to_string(),
            text: text.to_owned(),
            line: location.line() as usize,
            column: location.column() as usize,
            span: start..text.floor_char_boundary(start + len),
            key: key.to_owned(),
            message,
            help,
        })
    }

    /// Moves the place to line `line` (1-based) of the value the error stands at, if that is a block of text.
    pub fn on_line(mut self: Box<Self>, line: usize) -> Box<Self> {
        // The place of a block is its first line of text; the mark stands before it.
        let before = self.text[..self.span.start].split_whitespace().next_back().unwrap_or("");
        if !before.starts_with('|') || line == 0 {
            return self;
        }
        let target = self.line + line - 1;
        let start: usize = self.text.split_inclusive('\n').take(target - 1).map(str::len).sum();
        let Some(text) = self.text[start..].lines().next() else { return self };
        let indent = text.len() - text.trim_start().len();
        self.line = target;
        self.column = indent + 1;
        self.span = start + indent..start + text.len();
        self
    }
}

impl<'de> Deserialize<'de> for DeviceSpec {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct DeviceVisitor;
        impl<'de> Visitor<'de> for DeviceVisitor {
            type Value = DeviceSpec;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a device such as `cuda` or `cpu`, or a list such as `[cuda:0, cuda:1]`")
            }

            fn visit_str<E: de::Error>(self, value: &str) -> Result<DeviceSpec, E> {
                Ok(DeviceSpec(vec![value.to_owned()]))
            }

            fn visit_seq<A: de::SeqAccess<'de>>(self, mut list: A) -> Result<DeviceSpec, A::Error> {
                let mut names = Vec::new();
                while let Some(name) = list.next_element()? {
                    names.push(name);
                }
                Ok(DeviceSpec(names))
            }
        }
        deserializer.deserialize_any(DeviceVisitor)
    }
}

impl<'de> Deserialize<'de> for Budget {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct BudgetVisitor;
        impl Visitor<'_> for BudgetVisitor {
            type Value = Budget;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a share such as `5%` or a number of documents")
            }

            fn visit_u64<E: de::Error>(self, value: u64) -> Result<Budget, E> {
                Ok(Budget::Documents(value))
            }

            fn visit_i64<E: de::Error>(self, value: i64) -> Result<Budget, E> {
                u64::try_from(value)
                    .map(Budget::Documents)
                    .map_err(|_| E::invalid_value(de::Unexpected::Signed(value), &self))
            }

            fn visit_str<E: de::Error>(self, value: &str) -> Result<Budget, E> {
                if let Ok(documents) = value.trim().parse() {
                    return Ok(Budget::Documents(documents));
                }
                let percent = value.trim().strip_suffix('%').and_then(|number| number.trim().parse().ok());
                match percent {
                    Some(percent) if (0.0..=100.0).contains(&percent) => Ok(Budget::Percent(percent)),
                    _ => Err(E::invalid_value(de::Unexpected::Str(value), &self)),
                }
            }
        }
        deserializer.deserialize_any(BudgetVisitor)
    }
}

impl<'de> Deserialize<'de> for Bytes {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct BytesVisitor;
        impl Visitor<'_> for BytesVisitor {
            type Value = Bytes;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a size such as `512MiB` or a number of bytes")
            }

            fn visit_u64<E: de::Error>(self, value: u64) -> Result<Bytes, E> {
                Ok(Bytes(value))
            }

            fn visit_i64<E: de::Error>(self, value: i64) -> Result<Bytes, E> {
                u64::try_from(value)
                    .map(Bytes)
                    .map_err(|_| E::invalid_value(de::Unexpected::Signed(value), &self))
            }

            fn visit_str<E: de::Error>(self, value: &str) -> Result<Bytes, E> {
                let digits = value.trim_end_matches(|c: char| c.is_ascii_alphabetic() || c == ' ');
                let unit: u64 = match value[digits.len()..].trim() {
                    "" | "B" => 1,
                    "KiB" => 1 << 10,
                    "MiB" => 1 << 20,
                    "GiB" => 1 << 30,
                    _ => return Err(E::invalid_value(de::Unexpected::Str(value), &self)),
                };
                let number = digits.trim().parse::<u64>().ok().and_then(|number| number.checked_mul(unit));
                number.map(Bytes).ok_or_else(|| E::invalid_value(de::Unexpected::Str(value), &self))
            }
        }
        deserializer.deserialize_any(BytesVisitor)
    }
}
