//! A checked definition: everything that can be known before a model is loaded is known to be right.
//!
//! [`check`] opens the source to learn its schema, compiles the templates and resolves the names. Every error
//! stands at the value at fault. Whether the model's file and the output can be used is found out by
//! [`run`](crate::run), since checking must not fetch or write anything.

pub mod device;
pub mod engine;
pub mod kafka;
pub mod steps;
mod tenants;
mod traces;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use arrow::datatypes::{Field, Schema, SchemaRef};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tidemill_connectors::jsonl::JsonlSource;
use tidemill_connectors::kafka::source::KafkaSource;
use tidemill_connectors::output::SinkSpec as SinkTarget;
use tidemill_connectors::parquet::ParquetSource;
use tidemill_connectors::source::{BatchLimits, InputFile, Source, SourceError};
use tidemill_kernels::step::SamplingParams;
use tidemill_operators::infer::sequence::Priority;
use tidemill_operators::template::Template;
use tidemill_operators::tenants::TenantPolicy;
use tidemill_operators::tokenize::{InputNameFn, PromptBuilder, TextModel};

use self::device::Devices;
use self::engine::EnginePlan;
use self::kafka::TopicPlan;
use self::steps::{sampling_changes, step_fields, steps};
use crate::models::catalogue::{ModelRef, OTHER_NAMES, resolve};
use crate::spec::{
    Budget, Definition, FilesSpec, PathSpec, SinkSpec, SourceSpec, Spanned, SpecError, TargetSpec,
};

const DEFAULT_COMMIT_ROWS: u64 = 100_000;
const DEFAULT_COMMIT_SECONDS: u64 = 10;
const DEFAULT_CREDIT_DOCUMENTS: u64 = 4096;
const DEFAULT_CREDIT_BYTES: u64 = 256 << 20;
/// A source batch is at most this many rows and at most a quarter of the credit.
///
/// An epoch is written when all its documents are done, so large batches make results come late.
const MAX_BATCH_ROWS: u64 = 64;
/// Of a topic, where a batch is also no more than what is written in a moment.
const MAX_TOPIC_ROWS: u64 = 1024;
pub const STDIO: &str = "-";

type Result<T> = std::result::Result<T, Box<SpecError>>;

/// What will run.
#[derive(Debug)]
pub struct Plan {
    pub name: String,
    pub model: ModelRef,
    pub model_name: String,
    pub devices: Devices,
    pub input_schema: SchemaRef,
    /// What is read, for people.
    pub source_name: String,
    pub reads_stdin: bool,
    /// Where a pipeline on topics keeps its journal.
    pub state_folder: PathBuf,
    pub steps: Vec<GeneratePlan>,
    pub sink: SinkPlan,
    pub engine: EnginePlan,
    pub credit: CreditPlan,
    /// Before which other pipelines its prompts go, where they share engines.
    pub priority: Priority,
    /// URL of an OpenTelemetry collector.
    pub traces: Option<String>,
    /// `None` if the definition has no tenants; the template that names them is with each step.
    pub tenants: Option<TenantPolicy>,
    /// What decides the output: two definitions with equal values may continue each other's work.
    pub fingerprint: Value,
}

/// One `generate` step.
#[derive(Clone, Debug)]
pub struct GeneratePlan {
    pub name: Arc<str>,
    pub system: Option<String>,
    pub prompt: String,
    pub max_tokens: u32,
    pub sampling: SamplingParams,
    /// Names the tenant; the same in all steps.
    pub tenant: Option<String>,
    /// Names of earlier steps that the templates use.
    pub uses: Vec<String>,
}

#[derive(Debug)]
pub struct SinkPlan {
    pub target: Target,
    pub budget: Option<Budget>,
    pub commit_rows: u64,
    pub commit_interval: Duration,
}

/// Where results and errors go, committed together.
#[derive(Clone, Debug)]
pub enum Target {
    Files { sink: SinkTarget, errors: SinkTarget },
    Topics(Box<TopicPlan>),
}

impl Target {
    /// Of results and of errors.
    pub fn names(&self) -> [String; 2] {
        match self {
            Self::Files { sink, errors } => [sink.to_string(), errors.to_string()],
            Self::Topics(topics) => {
                let name = |topic: &str| format!("topic {topic} at {}", topics.producer.cluster.brokers);
                [name(&topics.producer.topic), name(&topics.producer.errors_topic)]
            }
        }
    }
}

impl std::fmt::Display for Target {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Files { sink, .. } => write!(f, "{sink}"),
            Self::Topics(topics) => write!(f, "topic {}", topics.producer.topic),
        }
    }
}

/// An opened source.
pub enum Input {
    Files(Box<dyn Source>),
    Topics(Box<KafkaSource>),
}

impl Input {
    pub fn source(&self) -> &dyn Source {
        match self {
            Self::Files(source) => source.as_ref(),
            Self::Topics(source) => source.as_ref(),
        }
    }

    pub fn into_source(self) -> Box<dyn Source> {
        match self {
            Self::Files(source) => source,
            Self::Topics(source) => source,
        }
    }
}

/// The most that is read and not yet written.
#[derive(Clone, Copy, Debug)]
pub struct CreditPlan {
    pub documents: u64,
    pub bytes: u64,
    /// Of prompts and answers; by default the KV cache decides.
    pub tokens: Option<u64>,
}

/// A plan and the source it was checked against, at its first row.
pub struct Checked {
    pub plan: Plan,
    pub source: Input,
}

impl std::fmt::Debug for Checked {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Checked").field("plan", &self.plan).finish_non_exhaustive()
    }
}

/// Checks a definition.
pub fn check(definition: &Definition) -> Result<Checked> {
    let spec = &definition.spec;
    if spec.name.value.trim().is_empty() {
        return Err(definition.error(&spec.name, "name", "the name is empty", None));
    }
    let model = model(definition)?;
    let devices = device::devices(definition)?;
    let credit = credit(definition)?;
    let engine = engine::engine(definition, &devices)?;
    let (source, source_path) = source(definition, &credit)?;
    let source_name = match (&source_path, &spec.source) {
        (None, SourceSpec::Kafka(topics)) => kafka::name(topics),
        (path, _) => path.as_deref().unwrap_or(Path::new("")).display().to_string(),
    };
    let input_schema = source.source().schema();
    let steps = steps(definition, &input_schema)?;
    let tenants = tenants::tenants(definition, &input_schema)?;
    let sink = sink(definition, &input_schema, &steps)?;
    if let Some(path) = &source_path {
        refuse_output_in_input(definition, path, &sink)?;
    }
    let fingerprint = fingerprint(definition, &devices, &engine, &steps);
    let plan = Plan {
        name: spec.name.value.clone(),
        model,
        model_name: spec.model.name.value.clone(),
        devices,
        input_schema,
        source_name,
        reads_stdin: source_path.is_some_and(|path| path.as_os_str() == STDIO),
        state_folder: state_folder(definition),
        steps,
        sink,
        engine,
        credit,
        priority: spec.priority,
        traces: traces::traces(definition)?,
        tenants,
        fingerprint,
    };
    Ok(Checked { plan, source })
}

impl Plan {
    /// The input's columns and four for every step.
    pub fn output_schema(&self) -> SchemaRef {
        let mut fields: Vec<Arc<Field>> = self.input_schema.fields().iter().cloned().collect();
        for step in &self.steps {
            fields.extend(step_fields(&step.name).map(Arc::new));
        }
        Arc::new(Schema::new_with_metadata(fields, self.input_schema.metadata().clone()))
    }
}

impl GeneratePlan {
    /// Compiles the templates; every worker has its own.
    pub fn builder(&self, model: &Arc<TextModel>, input_names: Option<InputNameFn>) -> PromptBuilder {
        let compile = |source: &str| Template::new(source).expect("compiled once when the plan was checked");
        PromptBuilder {
            step: Arc::clone(&self.name),
            model: Arc::clone(model),
            system: self.system.as_deref().map(compile),
            prompt: compile(&self.prompt),
            max_tokens: self.max_tokens,
            sampling: self.sampling,
            input_names,
            tenant: self.tenant.as_deref().map(compile),
        }
    }
}

fn model(definition: &Definition) -> Result<ModelRef> {
    let name = &definition.spec.model.name;
    let fail = |message: String, help: String| definition.error(name, "model.name", message, Some(help));
    match resolve(&name.value, definition.folder()) {
        Ok(ModelRef::File(path)) if !path.is_file() => Err(fail(
            format!("no model file {}", path.display()),
            "paths are relative to the definition".to_owned(),
        )),
        Ok(model) => Ok(model),
        Err(nearest) => Err(fail(
            format!("no model {:?}", name.value),
            format!("known are: {}; or {OTHER_NAMES}", nearest.join(", ")),
        )),
    }
}

fn credit(definition: &Definition) -> Result<CreditPlan> {
    let spec = &definition.spec.credit;
    let documents =
        at_least(definition, spec.documents.as_ref(), 1, "credit.documents", |documents| *documents)?;
    let bytes = at_least(definition, spec.bytes.as_ref(), 1, "credit.bytes", |bytes| bytes.0)?;
    Ok(CreditPlan {
        documents: documents.unwrap_or(DEFAULT_CREDIT_DOCUMENTS),
        bytes: bytes.unwrap_or(DEFAULT_CREDIT_BYTES),
        tokens: at_least(definition, spec.tokens.as_ref(), 1, "credit.tokens", |tokens| *tokens)?,
    })
}

fn at_least<T>(
    definition: &Definition,
    value: Option<&Spanned<T>>,
    least: u64,
    key: &str,
    number: impl Fn(&T) -> u64,
) -> Result<Option<u64>> {
    let Some(value) = value else { return Ok(None) };
    let number = number(&value.value);
    if number < least {
        let message = format!("{key} is {number}, it must be at least {least}");
        return Err(definition.error(value, key, message, None));
    }
    Ok(Some(number))
}

/// The folder for what is kept on disk beside topics.
fn state_folder(definition: &Definition) -> PathBuf {
    match &definition.spec.state {
        Some(path) => resolve_path(definition, &path.value),
        None => definition.folder().join(".tidemill").join(definition.spec.name.value.replace('/', "_")),
    }
}

fn source(definition: &Definition, credit: &CreditPlan) -> Result<(Input, Option<PathBuf>)> {
    let limits = BatchLimits {
        max_rows: MAX_BATCH_ROWS.min(credit.documents.div_ceil(4)) as usize,
        max_bytes: (credit.bytes / 4).max(1) as usize,
    };
    let topic_rows = MAX_TOPIC_ROWS.min(credit.documents / 8) as usize;
    let of_topics = BatchLimits { max_rows: topic_rows.max(limits.max_rows), ..limits };
    let (kind, files) = match &definition.spec.source {
        SourceSpec::Parquet(files) => ("parquet", files),
        SourceSpec::Jsonl(files) => ("jsonl", files),
        SourceSpec::Kafka(topics) => {
            let source = kafka::source(definition, topics, of_topics)?;
            return Ok((Input::Topics(Box::new(source)), None));
        }
    };
    let key = format!("source.{kind}");
    let columns: Option<Vec<String>> =
        files.columns.as_ref().map(|columns| columns.iter().map(|column| column.value.clone()).collect());
    if files.columns.as_ref().is_some_and(Vec::is_empty) {
        let help = Some("name at least one column, or leave the key out to read all".to_owned());
        return Err(definition.error(&files.path, &format!("{key}.columns"), "no columns are named", help));
    }
    let path = resolve_path(definition, &files.path.value);
    let opened: std::result::Result<Box<dyn Source>, SourceError> = match &definition.spec.source {
        SourceSpec::Parquet(_) if files.path.value == STDIO => {
            let help = Some("Parquet needs a file; JSONL can be read from standard input".to_owned());
            let message = "Parquet cannot be read from standard input";
            return Err(definition.error(&files.path, &format!("{key}.path"), message, help));
        }
        SourceSpec::Parquet(_) => {
            ParquetSource::open(&path, columns.as_deref(), limits).map(|source| Box::new(source) as _)
        }
        SourceSpec::Jsonl(_) | SourceSpec::Kafka(_) => {
            JsonlSource::open(&path, columns.as_deref(), limits).map(|source| Box::new(source) as _)
        }
    };
    opened
        .map(|source| (Input::Files(source), Some(path)))
        .map_err(|error| source_error(definition, files, &key, &error))
}

fn source_error(
    definition: &Definition,
    files: &FilesSpec,
    key: &str,
    error: &SourceError,
) -> Box<SpecError> {
    let message = chain(error);
    if let SourceError::UnknownColumn { name, .. } = error
        && let Some(columns) = &files.columns
        && let Some((index, column)) = columns.iter().enumerate().find(|(_, column)| column.value == *name)
    {
        return definition.error(column, &format!("{key}.columns[{index}]"), message, error.help());
    }
    definition.error(&files.path, &format!("{key}.path"), message, error.help())
}

/// An error with its causes, on one line.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let more = error.to_string();
        if !text.ends_with(&more) {
            text = format!("{text}: {more}");
        }
        cause = error.source();
    }
    text
}

fn sink(definition: &Definition, schema: &Schema, steps: &[GeneratePlan]) -> Result<SinkPlan> {
    let budget = definition.spec.errors.as_ref().and_then(|errors| errors.budget);
    let (key, target) = match &definition.spec.sink {
        SinkSpec::Parquet(target) => ("sink.parquet", target),
        SinkSpec::Jsonl(target) => ("sink.jsonl", target),
        SinkSpec::Kafka(target) => {
            let topics = kafka::target(definition, target, schema, steps)?;
            return Ok(SinkPlan {
                budget,
                commit_rows: topics.commit_rows,
                commit_interval: Duration::from_millis(topics.commit_ms),
                target: Target::Topics(Box::new(topics)),
            });
        }
    };
    if let Some(errors) = definition.spec.errors.as_ref().and_then(|errors| errors.kafka.as_ref()) {
        let help =
            Some("write `errors: { jsonl: { path: … } }`: errors are committed with the results".to_owned());
        let message = "results go to a file and errors to a topic";
        return Err(definition.error(&errors.topic, "errors.kafka", message, help));
    }
    let is_jsonl = matches!(definition.spec.sink, SinkSpec::Jsonl(_));
    let place = sink_target(definition, &target.path, is_jsonl, key)?;
    let errors = errors(definition, target)?;
    let commit_rows =
        at_least(definition, target.commit_rows.as_ref(), 1, &format!("{key}.commit_rows"), |rows| *rows)?;
    let commit_seconds =
        at_least(definition, target.commit_seconds.as_ref(), 1, &format!("{key}.commit_seconds"), |s| *s)?;
    Ok(SinkPlan {
        target: Target::Files { sink: place, errors },
        budget,
        commit_rows: commit_rows.unwrap_or(DEFAULT_COMMIT_ROWS),
        commit_interval: Duration::from_secs(commit_seconds.unwrap_or(DEFAULT_COMMIT_SECONDS)),
    })
}

/// Output in a folder that is read would be input of the next run.
fn refuse_output_in_input(definition: &Definition, source: &Path, sink: &SinkPlan) -> Result<()> {
    let (SinkSpec::Parquet(target) | SinkSpec::Jsonl(target), Target::Files { sink, errors }) =
        (&definition.spec.sink, &sink.target)
    else {
        return Ok(());
    };
    for output in [sink, errors] {
        if let SinkTarget::Parquet { path } | SinkTarget::Jsonl { path } = output
            && (path.starts_with(source) && source.is_dir() || path == source)
            && path.as_os_str() != STDIO
        {
            let message = format!("output {} lies in the input {}", path.display(), source.display());
            let help = Some("give the output a folder of its own".to_owned());
            return Err(definition.error(&target.path, "sink", message, help));
        }
    }
    Ok(())
}

/// The errors sink; without one in the definition it lies beside the sink.
fn errors(definition: &Definition, target: &TargetSpec) -> Result<SinkTarget> {
    let spec = definition.spec.errors.as_ref();
    let parquet = spec.and_then(|errors| errors.parquet.as_ref());
    let jsonl = spec.and_then(|errors| errors.jsonl.as_ref());
    let place = |spec: &PathSpec, is_jsonl: bool, key: &str| {
        if spec.path.value == target.path.value && spec.path.value != STDIO {
            let message = "errors and results have the same path";
            return Err(definition.error(&spec.path, &format!("{key}.path"), message, None));
        }
        sink_target(definition, &spec.path, is_jsonl, key)
    };
    match (parquet, jsonl) {
        (Some(_), Some(jsonl)) => {
            let help = Some("keep one of parquet and jsonl".to_owned());
            Err(definition.error(&jsonl.path, "errors", "there are two errors sinks", help))
        }
        (Some(parquet), None) => place(parquet, false, "errors.parquet"),
        (None, Some(jsonl)) => place(jsonl, true, "errors.jsonl"),
        (None, None) if target.path.value == STDIO => Ok(SinkTarget::Stderr),
        (None, None) => {
            let mut path = resolve_path(definition, target.path.value.trim_end_matches('/')).into_os_string();
            path.push(".errors.jsonl");
            Ok(SinkTarget::Jsonl { path: path.into() })
        }
    }
}

fn sink_target(
    definition: &Definition,
    path: &Spanned<String>,
    is_jsonl: bool,
    key: &str,
) -> Result<SinkTarget> {
    if path.value.is_empty() {
        return Err(definition.error(path, &format!("{key}.path"), "the path is empty", None));
    }
    match (is_jsonl, path.value == STDIO) {
        (false, true) => {
            let help = Some("JSONL can be written to standard output".to_owned());
            let message = "Parquet cannot be written to standard output";
            Err(definition.error(path, &format!("{key}.path"), message, help))
        }
        (true, _) => Ok(SinkTarget::Jsonl { path: resolve_path(definition, &path.value) }),
        (false, false) => Ok(SinkTarget::Parquet { path: resolve_path(definition, &path.value) }),
    }
}

fn resolve_path(definition: &Definition, path: &str) -> PathBuf {
    if path == STDIO { PathBuf::from(path) } else { definition.folder().join(Path::new(path)) }
}

/// A definition over its inputs, in short.
pub fn digest(fingerprint: &Value, inputs: &[InputFile]) -> String {
    let text = json!([fingerprint, inputs]).to_string();
    let hash = Sha256::digest(text.as_bytes());
    hash[..16].iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Everything that decides the output, and nothing that only decides how fast it comes.
fn fingerprint(
    definition: &Definition,
    devices: &Devices,
    engine: &EnginePlan,
    steps: &[GeneratePlan],
) -> Value {
    let spec = &definition.spec;
    let mut model = json!({ "name": spec.model.name.value, "device": devices.path() });
    engine.add_numbers(&mut model);
    let files = |kind: &str, files: &FilesSpec| {
        let columns: Option<Vec<&str>> = files
            .columns
            .as_ref()
            .map(|columns| columns.iter().map(|column| column.value.as_str()).collect());
        json!({ kind: { "path": files.path.value, "columns": columns } })
    };
    let steps: Vec<Value> = steps
        .iter()
        .map(|step| {
            let mut fields = json!({
                "name": &*step.name, "system": step.system, "prompt": step.prompt, "max_tokens": step.max_tokens,
                "temperature": step.sampling.temperature, "top_p": step.sampling.top_p,
                "top_k": step.sampling.top_k, "seed": step.sampling.seed,
                "ignore_eos": step.sampling.ignore_eos,
            });
            // Keys that came later change no fingerprint without them.
            for (part, value) in sampling_changes(&step.sampling) {
                fields[part] = json!(value);
            }
            json!({ "generate": fields })
        })
        .collect();
    json!({
        "name": spec.name.value,
        "model": model,
        "source": match &spec.source {
            SourceSpec::Parquet(parquet) => files("parquet", parquet),
            SourceSpec::Jsonl(jsonl) => files("jsonl", jsonl),
            SourceSpec::Kafka(topics) => json!({ "kafka": {
                "topics": topics.topics.as_ref().map(|topics| {
                    topics.value.iter().map(|topic| topic.value.as_str()).collect::<Vec<_>>()
                }),
                "pattern": topics.pattern.as_ref().map(|pattern| pattern.value.as_str()),
            }}),
        },
        "steps": steps,
        "sink": match &spec.sink {
            SinkSpec::Parquet(target) => json!({ "parquet": target.path.value }),
            SinkSpec::Jsonl(target) => json!({ "jsonl": target.path.value }),
            SinkSpec::Kafka(target) => json!({ "kafka": target.topic.value }),
        },
    })
}
