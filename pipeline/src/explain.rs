//! What a run would do, before it is done: the graph, and what the input costs in tokens.
//!
//! Reads the whole input with the real tokenizer, but runs no model. Steps that use the answer of an earlier
//! step cannot be counted beforehand and say so.

use std::fmt::Write;
use std::sync::Arc;

use serde::Serialize;
use tidemill_connectors::source::{Source, SourceError};
use tidemill_operators::batch::Batch;
use tidemill_operators::document::{Document, DocumentId, Lease};
use tidemill_operators::group::distinct::distinct_tokens;
use tidemill_operators::tokenize::PromptBuilder;

use crate::models::load::{LoadError, load_engines};
use crate::plan::steps::sampling_changes;
use crate::plan::{Checked, GeneratePlan, Input, Plan, Target};
use crate::summary::{share, thousands};

/// What one step would compute.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct StepCost {
    pub name: String,
    pub documents: u64,
    pub errors: u64,
    pub prompt_tokens: u64,
    /// Tokens in the radix tree of all prompts.
    pub distinct_tokens: u64,
    pub longest_prompt: u64,
    pub most_output_tokens: u64,
}

/// What a run would do.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Explanation {
    pub name: String,
    pub model: String,
    /// Where the model would run, such as `cpu` or `cuda:0 (NVIDIA H200) in bf16`.
    pub device: String,
    /// The reason, where a GPU was looked for in vain.
    pub why_no_gpu: Option<String>,
    /// Settings that have no effect there.
    pub notes: Vec<String>,
    pub input: String,
    pub files: usize,
    pub documents: u64,
    pub malformed: u64,
    /// Tokens that the KV cache of one engine holds.
    pub kv_tokens: u64,
    pub max_seq_len: u32,
    /// `None` for a step that cannot be counted beforehand.
    pub steps: Vec<(String, Option<StepCost>)>,
}

#[derive(Debug, thiserror::Error)]
pub enum ExplainError {
    #[error(transparent)]
    Load(#[from] LoadError),
    #[error(transparent)]
    Source(#[from] SourceError),
}

impl ExplainError {
    /// What the user can do.
    pub fn help(&self) -> Option<String> {
        match self {
            Self::Load(error) => error.help(),
            Self::Source(error) => error.help(),
        }
    }
}

/// Counts a plan's input.
pub fn explain(checked: Checked, say: &dyn Fn(&str)) -> Result<Explanation, ExplainError> {
    let Checked { plan, source } = checked;
    let mut source = match source {
        Input::Files(source) => source,
        Input::Topics(mut source) => {
            source.set_alone();
            source.set_until_end();
            source
        }
    };
    let engines = load_engines(&plan.model, &plan.model_name, &plan.devices, &plan.engine, say)?;
    let placement = &engines.placement;
    let mut explanation = Explanation {
        name: plan.name.clone(),
        model: plan.model_name.clone(),
        device: placement.device.clone(),
        why_no_gpu: placement.why_no_gpu.clone(),
        notes: placement.notes.clone(),
        input: plan.source_name.clone(),
        files: source.inputs().len(),
        documents: 0,
        malformed: 0,
        kv_tokens: engines.kv_tokens,
        max_seq_len: engines.text.max_seq_len,
        steps: Vec::new(),
    };
    let mut counts: Vec<Option<StepCount>> = plan
        .steps
        .iter()
        .map(|step| {
            step.uses.is_empty().then(|| StepCount {
                builder: step.builder(&engines.text, None),
                prompts: Vec::new(),
                errors: 0,
            })
        })
        .collect();
    read(source.as_mut(), &mut explanation, &mut counts)?;
    explanation.steps = plan
        .steps
        .iter()
        .zip(counts)
        .map(|(step, count)| (step.name.to_string(), count.map(|count| count.finish(step))))
        .collect();
    Ok(explanation)
}

fn read(
    source: &mut dyn Source,
    explanation: &mut Explanation,
    counts: &mut [Option<StepCount>],
) -> Result<(), SourceError> {
    while let Some(batch) = source.next_batch()? {
        explanation.malformed += batch.rejected.len() as u64;
        explanation.documents += (batch.rows.num_rows() + batch.rejected.len()) as u64;
        let ids = batch.row_numbers.iter().map(|&row| DocumentId { file: batch.file, row }).collect();
        for document in Batch::new(batch.rows, ids, Vec::new(), Lease::default()).drain().flatten() {
            for count in counts.iter_mut().flatten() {
                count.add(document.clone());
            }
        }
    }
    Ok(())
}

struct StepCount {
    builder: PromptBuilder,
    prompts: Vec<Arc<[u32]>>,
    errors: u64,
}

impl StepCount {
    fn add(&mut self, document: Document) {
        match self.builder.build(document) {
            Ok(prompt) => self.prompts.push(prompt.token_ids),
            Err(_) => self.errors += 1,
        }
    }

    fn finish(self, step: &GeneratePlan) -> StepCost {
        let lens = || self.prompts.iter().map(|prompt| prompt.len() as u64);
        StepCost {
            name: step.name.to_string(),
            documents: self.prompts.len() as u64,
            errors: self.errors,
            prompt_tokens: lens().sum(),
            distinct_tokens: distinct_tokens(&self.prompts),
            longest_prompt: lens().max().unwrap_or(0),
            most_output_tokens: self.prompts.len() as u64 * u64::from(step.max_tokens),
        }
    }
}

/// The dataflow as text.
pub fn graph(plan: &Plan) -> String {
    let mut text = format!("source {} ({} columns)\n", plan.source_name, plan.input_schema.fields().len());
    for step in &plan.steps {
        let _ =
            write!(text, "  └ tokenize → recall → group → infer   {} ({} tokens", step.name, step.max_tokens);
        for (part, value) in sampling_changes(&step.sampling) {
            let _ = write!(text, ", {part} {value}");
        }
        if step.sampling.top_k > 0 {
            let _ = write!(text, ", top_k {}", step.sampling.top_k);
        }
        text.push_str(")\n");
    }
    let (sink, errors) = match &plan.sink.target {
        Target::Files { sink, errors } => (target(sink), target(errors)),
        Target::Topics(topics) => {
            let topic = |name: &str| format!("{name} (kafka at {})", topics.producer.cluster.brokers);
            (topic(&topics.producer.topic), topic(&topics.producer.errors_topic))
        }
    };
    let _ = writeln!(text, "      └ sink {sink}");
    let _ = writeln!(text, "      └ errors {errors}");
    text
}

fn target(target: &tidemill_connectors::output::SinkSpec) -> String {
    use tidemill_connectors::output::SinkSpec;
    match target {
        SinkSpec::Parquet { path } => format!("{} (parquet)", path.display()),
        SinkSpec::Jsonl { path } if path.as_os_str() == crate::plan::STDIO => {
            "standard output (jsonl)".to_owned()
        }
        SinkSpec::Jsonl { path } => format!("{} (jsonl)", path.display()),
        SinkSpec::Stderr => "standard error (jsonl)".to_owned(),
    }
}

impl Explanation {
    /// As lines for a person.
    pub fn render(&self) -> String {
        let mut text = String::new();
        let mut line = |name: &str, value: String| {
            let _ = writeln!(text, "{name:<24}{value}");
        };
        line("documents", format!("{} in {} files", thousands(self.documents), self.files));
        if self.malformed > 0 {
            line("  malformed", thousands(self.malformed));
        }
        line("model", self.model.clone());
        line("  device", self.device.clone());
        if let Some(why) = &self.why_no_gpu {
            line("  no GPU is used", why.clone());
        }
        for note in &self.notes {
            line("  note", note.clone());
        }
        line("  longest sequence", format!("{} tokens", thousands(self.max_seq_len.into())));
        line("  KV cache", format!("{} tokens for each engine", thousands(self.kv_tokens)));
        for (name, cost) in &self.steps {
            line("step", name.clone());
            let Some(cost) = cost else {
                line("  prompt tokens", "depend on the answers of an earlier step".to_owned());
                continue;
            };
            let shared = cost.prompt_tokens - cost.distinct_tokens;
            let mean = cost.prompt_tokens / cost.documents.max(1);
            line("  prompts", format!("{} ({} errors)", thousands(cost.documents), thousands(cost.errors)));
            line(
                "  prompt tokens",
                format!("{}, {mean} each, longest {}", thousands(cost.prompt_tokens), cost.longest_prompt),
            );
            line(
                "  shared prefixes",
                format!("{} ({:.1} %)", thousands(shared), share(shared, cost.prompt_tokens)),
            );
            line("  to compute", thousands(cost.distinct_tokens));
            line("  output tokens", format!("at most {}", thousands(cost.most_output_tokens)));
            let together = self.kv_tokens / (mean + cost.most_output_tokens / cost.documents.max(1)).max(1);
            line("  fit the KV cache", format!("about {together} documents at a time"));
        }
        text
    }
}
