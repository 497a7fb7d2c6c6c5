//! Opens what a run reads and writes, in the order that its guarantees ask for.
//!
//! The output comes first: it knows where the last run has got to, and a topic's producer fences whoever has the same
//! name. Then the source is told where to go on.

use std::path::PathBuf;
use std::sync::Arc;

use tidemill_connectors::kafka::output::{KafkaOutput, KafkaOutputSpec};
use tidemill_connectors::kafka::record;
use tidemill_connectors::kafka::stats::KafkaStats;
use tidemill_connectors::output::{Output, OutputSpec, Resume, SinkSpec};
use tidemill_connectors::source::{Checkpoint, Source};

use super::{RunError, RunOptions};
use crate::plan::kafka::TopicPlan;
use crate::plan::{self, Input, Plan};
use crate::render::sink::Target;
use crate::render::sink::records::Records;
use crate::render::sink::rows::{Rows, errors_schema};
use crate::state::Slot;

const JOURNAL: &str = "journal.redb";

/// Both ends of a run.
pub(super) struct OpenEnds {
    pub(super) source: Box<dyn Source>,
    pub(super) target: Target,
    pub(super) resume: Resume,
    pub(super) journal_path: Option<PathBuf>,
    pub(super) kafka: Option<KafkaStats>,
    /// Kept as long as the run.
    pub(super) slot: Option<Slot>,
}

pub(super) fn open(plan: &Plan, input: Input, options: &RunOptions) -> Result<OpenEnds, RunError> {
    match &plan.sink.target {
        plan::Target::Files { sink, errors } => open_files(plan, input, options, sink, errors),
        plan::Target::Topics(topics) => open_topics(plan, input, options, topics),
    }
}

fn rows(plan: &Plan, source: &dyn Source) -> Rows {
    Rows::new(
        Arc::clone(&plan.input_schema),
        plan.output_schema(),
        plan.steps.iter().map(|step| Arc::clone(&step.name)).collect(),
        source.names(),
    )
}

fn open_files(
    plan: &Plan,
    mut input: Input,
    options: &RunOptions,
    sink: &SinkSpec,
    errors: &SinkSpec,
) -> Result<OpenEnds, RunError> {
    if let Input::Topics(topics) = &mut input
        && options.until_end
    {
        topics.set_until_end();
    }
    // A topic goes on after its end, so its run is never finished.
    let may_finish = matches!(input, Input::Files(_));
    let spec = OutputSpec {
        sink: sink.clone(),
        errors: errors.clone(),
        output_schema: plan.output_schema(),
        errors_schema: errors_schema(),
    };
    let (output, resume) = Output::open(spec, &plan.fingerprint, input.source().inputs(), options.force)?;
    let kafka = match &input {
        Input::Files(_) => None,
        Input::Topics(source) => Some(source.stats()),
    };
    let mut source = input.into_source();
    let mut checkpoint = Checkpoint::start(!may_finish);
    if let Resume::Continue { position, .. } = &resume {
        source.resume(position)?;
        checkpoint = position.clone();
    }
    let journal_path = output.state_dir().map(|folder| folder.join(JOURNAL));
    let (rows, names) = (rows(plan, source.as_ref()), source.names());
    let target = Target::Files { output: Box::new(output), rows, names, checkpoint, may_finish };
    Ok(OpenEnds { source, target, resume, journal_path, kafka, slot: None })
}

fn open_topics(
    plan: &Plan,
    mut input: Input,
    options: &RunOptions,
    topics: &TopicPlan,
) -> Result<OpenEnds, RunError> {
    let slot = Slot::take(&plan.state_folder)?;
    let mut producer = topics.producer.clone();
    let (group, stats) = match &mut input {
        Input::Topics(source) => {
            if options.until_end {
                source.set_until_end();
            }
            if producer.transactional_id.is_empty() {
                producer.transactional_id = format!("tidemill-{}-{}", plan.name, slot.id);
            }
            (Some(source.group()), source.stats())
        }
        // The position of files is kept by this name, so it must not depend on where the definition lies.
        Input::Files(_) => {
            if producer.transactional_id.is_empty() {
                producer.transactional_id = format!("tidemill-{}-{}", plan.name, producer.topic);
            }
            (None, KafkaStats::default())
        }
    };
    let names = input.source().names();
    let spec = KafkaOutputSpec {
        producer,
        definition: crate::plan::digest(&plan.fingerprint, input.source().inputs()),
        force: options.force,
    };
    let (mut output, resume) =
        KafkaOutput::open(spec, group, names.clone(), stats.clone(), Arc::clone(&options.stop))?;
    let mut source = input.into_source();
    if let Resume::Continue { position, .. } = &resume {
        source.resume(position)?;
    }
    let limit = output.limit(record::Target::Results);
    let records = Records::new(rows(plan, source.as_ref()), names, &plan.name, topics, limit);
    let journal_path = Some(slot.folder.join(JOURNAL));
    let target = Target::Topics { output: Box::new(output), records: Box::new(records) };
    Ok(OpenEnds { source, target, resume, journal_path, kafka: Some(stats), slot: Some(slot) })
}
