//! A checked definition: everything that can be known before a model is loaded is known to be right.
//!
//! [`check`] opens the source to learn its schema, compiles the templates and resolves the names. Every error
//! stands at the value at fault. Whether the model's file and the output can be used is found out by
//! [`run`](crate::run), since checking must not fetch or write anything.

pub mod device;
mod tenants;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use arrow::datatypes::{DataType, Field, Schema, SchemaRef};
use serde_json::{Value, json};
use tidemill_connectors::jsonl::JsonlSource;
use tidemill_connectors::output::SinkSpec as SinkTarget;
use tidemill_connectors::parquet::ParquetSource;
use tidemill_connectors::source::{BatchLimits, Source, SourceError};
use tidemill_kernels::step::SamplingParams;
use tidemill_operators::infer::sequence::Priority;
use tidemill_operators::template::Template;
use tidemill_operators::tenants::TenantPolicy;
use tidemill_operators::tokenize::{PromptBuilder, TextModel};

use self::device::Devices;
use crate::models::catalogue::{ModelRef, OTHER_NAMES, resolve};
use crate::spec::{
    Budget, Definition, FilesSpec, GenerateSpec, PathSpec, SinkSpec, SourceSpec, Spanned, SpecError,
    StepSpec, TargetSpec,
};

const DEFAULT_MAX_TOKENS: u32 = 256;
const DEFAULT_COMMIT_ROWS: u64 = 100_000;
const DEFAULT_COMMIT_SECONDS: u64 = 10;
const DEFAULT_CREDIT_DOCUMENTS: u64 = 4096;
const DEFAULT_CREDIT_BYTES: u64 = 256 << 20;
/// A source batch is at most this many rows and at most a quarter of the credit.
///
/// An epoch is written when all its documents are done, so large batches make results come late.
const MAX_BATCH_ROWS: u64 = 64;
const DEFAULT_KV_CACHE_MEMORY: u64 = 192 << 20;
const DEFAULT_PAGE_SIZE: u32 = 64;
const DEFAULT_MAX_NUM_SEQS: u32 = 32;
const DEFAULT_MAX_NUM_BATCHED_TOKENS: u32 = 512;
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
    pub source_path: PathBuf,
    pub steps: Vec<GeneratePlan>,
    pub sink: SinkPlan,
    pub engine: EnginePlan,
    pub credit: CreditPlan,
    /// Before which other pipelines its prompts go, where they share engines.
    pub priority: Priority,
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
    pub target: SinkTarget,
    pub errors: SinkTarget,
    pub budget: Option<Budget>,
    pub commit_rows: u64,
    pub commit_seconds: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EnginePlan {
    pub max_num_seqs: u32,
    pub max_num_batched_tokens: u32,
    pub page_size: u32,
    pub kv_cache_bytes: u64,
}

impl Default for EnginePlan {
    fn default() -> Self {
        Self {
            max_num_seqs: DEFAULT_MAX_NUM_SEQS,
            max_num_batched_tokens: DEFAULT_MAX_NUM_BATCHED_TOKENS,
            page_size: DEFAULT_PAGE_SIZE,
            kv_cache_bytes: DEFAULT_KV_CACHE_MEMORY,
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
    pub source: Box<dyn Source>,
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
    let engine = engine(definition)?;
    let (source, source_path) = source(definition, &credit)?;
    let input_schema = source.schema();
    let steps = steps(definition, &input_schema)?;
    let tenants = tenants::tenants(definition, &input_schema)?;
    let sink = sink(definition)?;
    refuse_output_in_input(definition, &source_path, &sink)?;
    let fingerprint = fingerprint(definition, devices, &steps);
    let plan = Plan {
        name: spec.name.value.clone(),
        model,
        model_name: spec.model.name.value.clone(),
        devices,
        input_schema,
        source_path,
        steps,
        sink,
        engine,
        credit,
        priority: spec.priority,
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
    pub fn builder(&self, model: &Arc<TextModel>) -> PromptBuilder {
        let compile = |source: &str| Template::new(source).expect("compiled once when the plan was checked");
        PromptBuilder {
            step: Arc::clone(&self.name),
            model: Arc::clone(model),
            system: self.system.as_deref().map(compile),
            prompt: compile(&self.prompt),
            max_tokens: self.max_tokens,
            sampling: self.sampling,
            tenant: self.tenant.as_deref().map(compile),
        }
    }
}

/// The columns a step adds.
pub fn step_fields(name: &str) -> [Field; 4] {
    [
        Field::new(name, DataType::Utf8, false),
        Field::new(format!("{name}_finish_reason"), DataType::Utf8, false),
        Field::new(format!("{name}_prompt_tokens"), DataType::UInt32, false),
        Field::new(format!("{name}_output_tokens"), DataType::UInt32, false),
    ]
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

fn engine(definition: &Definition) -> Result<EnginePlan> {
    let spec = &definition.spec.engine;
    let number = |value: Option<&Spanned<u32>>, key, default: u32| -> Result<u32> {
        let number = at_least(definition, value, 1, key, |number| u64::from(*number))?;
        Ok(number.map_or(default, |number| number as u32))
    };
    let page_size = number(spec.page_size.as_ref(), "engine.page_size", DEFAULT_PAGE_SIZE)?;
    if let Some(value) = &spec.page_size
        && !page_size.is_power_of_two()
    {
        let help = Some("16 is a good size".to_owned());
        return Err(definition.error(value, "engine.page_size", "the page size is no power of two", help));
    }
    let kv_cache_bytes =
        at_least(definition, spec.kv_cache_memory.as_ref(), 1, "engine.kv_cache_memory", |bytes| bytes.0)?;
    Ok(EnginePlan {
        max_num_seqs: number(spec.max_num_seqs.as_ref(), "engine.max_num_seqs", DEFAULT_MAX_NUM_SEQS)?,
        max_num_batched_tokens: number(
            spec.max_num_batched_tokens.as_ref(),
            "engine.max_num_batched_tokens",
            DEFAULT_MAX_NUM_BATCHED_TOKENS,
        )?,
        page_size,
        kv_cache_bytes: kv_cache_bytes.unwrap_or(DEFAULT_KV_CACHE_MEMORY),
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

fn source(definition: &Definition, credit: &CreditPlan) -> Result<(Box<dyn Source>, PathBuf)> {
    let (kind, files) = match &definition.spec.source {
        SourceSpec::Parquet(files) => ("parquet", files),
        SourceSpec::Jsonl(files) => ("jsonl", files),
    };
    let key = format!("source.{kind}");
    let columns: Option<Vec<String>> =
        files.columns.as_ref().map(|columns| columns.iter().map(|column| column.value.clone()).collect());
    if files.columns.as_ref().is_some_and(Vec::is_empty) {
        let help = Some("name at least one column, or leave the key out to read all".to_owned());
        return Err(definition.error(&files.path, &format!("{key}.columns"), "no columns are named", help));
    }
    let limits = BatchLimits {
        max_rows: MAX_BATCH_ROWS.min(credit.documents.div_ceil(4)) as usize,
        max_bytes: (credit.bytes / 4).max(1) as usize,
    };
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
        SourceSpec::Jsonl(_) => {
            JsonlSource::open(&path, columns.as_deref(), limits).map(|source| Box::new(source) as _)
        }
    };
    opened.map(|source| (source, path)).map_err(|error| source_error(definition, files, &key, &error))
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

fn steps(definition: &Definition, schema: &Schema) -> Result<Vec<GeneratePlan>> {
    let specs = &definition.spec.steps;
    if specs.value.is_empty() {
        let help = Some("add a step, such as `- generate: { name: summary, prompt: … }`".to_owned());
        return Err(definition.error(specs, "steps", "there are no steps", help));
    }
    let mut taken: Vec<String> = schema.fields().iter().map(|field| field.name().clone()).collect();
    let mut plans: Vec<GeneratePlan> = Vec::new();
    for (index, StepSpec::Generate(spec)) in specs.value.iter().enumerate() {
        let key = format!("steps[{index}].generate");
        let plan = generate(definition, spec, &key, schema, &plans)?;
        for field in step_fields(&plan.name) {
            if taken.contains(field.name()) {
                let message = format!("the step would add a column {:?} that is there already", field.name());
                let help = Some("give the step another name".to_owned());
                return Err(definition.error(&spec.name, &format!("{key}.name"), message, help));
            }
            taken.push(field.name().clone());
        }
        plans.push(plan);
    }
    Ok(plans)
}

fn generate(
    definition: &Definition,
    spec: &GenerateSpec,
    key: &str,
    schema: &Schema,
    earlier: &[GeneratePlan],
) -> Result<GeneratePlan> {
    let is_name = |name: &str| {
        name.starts_with(|c: char| c.is_alphabetic() || c == '_')
            && name.chars().all(|c| c.is_alphanumeric() || c == '_')
    };
    if !is_name(&spec.name.value) {
        let message = format!("{:?} cannot name a column for templates", spec.name.value);
        let help = Some("use letters, digits and _, not beginning with a digit".to_owned());
        return Err(definition.error(&spec.name, &format!("{key}.name"), message, help));
    }
    let mut uses = Vec::new();
    for (part, source) in [("system", spec.system.as_ref()), ("prompt", Some(&spec.prompt))] {
        if let Some(source) = source {
            uses.extend(template(definition, source, &format!("{key}.{part}"), schema, earlier)?);
        }
    }
    uses.dedup();
    Ok(GeneratePlan {
        name: spec.name.value.as_str().into(),
        system: spec.system.as_ref().map(|system| system.value.clone()),
        prompt: spec.prompt.value.clone(),
        max_tokens: at_least(definition, spec.max_tokens.as_ref(), 1, &format!("{key}.max_tokens"), |n| {
            u64::from(*n)
        })?
        .map_or(DEFAULT_MAX_TOKENS, |max_tokens| max_tokens as u32),
        sampling: sampling(definition, spec, key)?,
        tenant: definition.spec.tenants.as_ref().map(|tenants| tenants.by.value.clone()),
        uses,
    })
}

fn sampling(definition: &Definition, spec: &GenerateSpec, key: &str) -> Result<SamplingParams> {
    let in_range = |value: &Option<Spanned<f32>>, part: &str, default: f32, most: f32| -> Result<f32> {
        let Some(value) = value else { return Ok(default) };
        if !(0.0..=most).contains(&value.value) {
            let message = format!("{part} is {}, it must be between 0 and {most}", value.value);
            return Err(definition.error(value, &format!("{key}.{part}"), message, None));
        }
        Ok(value.value)
    };
    Ok(SamplingParams {
        temperature: in_range(&spec.temperature, "temperature", 0.0, 10.0)?,
        top_p: in_range(&spec.top_p, "top_p", 1.0, 1.0)?,
        top_k: spec.top_k.unwrap_or(0),
        seed: spec.seed.unwrap_or(0),
        ignore_eos: spec.ignore_eos,
    })
}

/// Compiles a template and returns the earlier steps it uses.
fn template(
    definition: &Definition,
    source: &Spanned<String>,
    key: &str,
    schema: &Schema,
    earlier: &[GeneratePlan],
) -> Result<Vec<String>> {
    let template = Template::new(&source.value).map_err(|error| {
        let detail = error.detail().map_or_else(|| error.kind().to_string(), str::to_owned);
        let message = format!("the template is not valid Jinja: {detail}");
        definition.error(source, key, message, None).on_line(error.line().unwrap_or(0))
    })?;
    let mut uses = Vec::new();
    for name in template.variables() {
        if earlier.iter().any(|step| *step.name == **name) {
            uses.push(name.clone());
        } else if schema.column_with_name(name).is_none() {
            let known: Vec<&str> = schema
                .fields()
                .iter()
                .map(|field| field.name().as_str())
                .chain(earlier.iter().map(|step| &*step.name))
                .collect();
            let message = format!("the template uses an unknown column {name:?}");
            let line = source.value.lines().position(|line| line.contains(name.as_str()));
            let help = Some(hint(name, &known));
            return Err(definition
                .error(source, key, message, help)
                .on_line(line.map_or(0, |line| line + 1)));
        }
    }
    Ok(uses)
}

fn hint(name: &str, known: &[&str]) -> String {
    let best =
        known.iter().max_by(|a, b| strsim::jaro_winkler(a, name).total_cmp(&strsim::jaro_winkler(b, name)));
    match best {
        Some(best) if strsim::jaro_winkler(best, name) > 0.8 => {
            format!("did you mean {best:?}? There are: {}", known.join(", "))
        }
        _ => format!("there are: {}", known.join(", ")),
    }
}

fn sink(definition: &Definition) -> Result<SinkPlan> {
    let (key, target) = match &definition.spec.sink {
        SinkSpec::Parquet(target) => ("sink.parquet", target),
        SinkSpec::Jsonl(target) => ("sink.jsonl", target),
    };
    let is_jsonl = matches!(definition.spec.sink, SinkSpec::Jsonl(_));
    let place = sink_target(definition, &target.path, is_jsonl, key)?;
    let errors = errors(definition, target)?;
    let commit_rows =
        at_least(definition, target.commit_rows.as_ref(), 1, &format!("{key}.commit_rows"), |rows| *rows)?;
    let commit_seconds =
        at_least(definition, target.commit_seconds.as_ref(), 1, &format!("{key}.commit_seconds"), |s| *s)?;
    Ok(SinkPlan {
        target: place,
        errors,
        budget: definition.spec.errors.as_ref().and_then(|errors| errors.budget),
        commit_rows: commit_rows.unwrap_or(DEFAULT_COMMIT_ROWS),
        commit_seconds: commit_seconds.unwrap_or(DEFAULT_COMMIT_SECONDS),
    })
}

/// Output in a folder that is read would be input of the next run.
fn refuse_output_in_input(definition: &Definition, source: &Path, sink: &SinkPlan) -> Result<()> {
    let target = match &definition.spec.sink {
        SinkSpec::Parquet(target) | SinkSpec::Jsonl(target) => target,
    };
    for output in [&sink.target, &sink.errors] {
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

/// Everything that decides the output, and nothing that only decides how fast it comes.
fn fingerprint(definition: &Definition, devices: Devices, steps: &[GeneratePlan]) -> Value {
    let spec = &definition.spec;
    // The number of engines decides nothing.
    let path = if devices == Devices::Reference { "reference" } else { "auto" };
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
            json!({ "generate": {
                "name": &*step.name, "system": step.system, "prompt": step.prompt, "max_tokens": step.max_tokens,
                "temperature": step.sampling.temperature, "top_p": step.sampling.top_p,
                "top_k": step.sampling.top_k, "seed": step.sampling.seed,
                "ignore_eos": step.sampling.ignore_eos,
            }})
        })
        .collect();
    json!({
        "name": spec.name.value,
        "model": { "name": spec.model.name.value, "device": path },
        "source": match &spec.source {
            SourceSpec::Parquet(parquet) => files("parquet", parquet),
            SourceSpec::Jsonl(jsonl) => files("jsonl", jsonl),
        },
        "steps": steps,
        "sink": match &spec.sink {
            SinkSpec::Parquet(target) => json!({ "parquet": target.path.value }),
            SinkSpec::Jsonl(target) => json!({ "jsonl": target.path.value }),
        },
    })
}
