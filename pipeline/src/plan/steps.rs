//! The checked form of the steps: names, templates against the columns there are, sampling parameters.

use arrow::datatypes::{DataType, Field, Schema};
use tidemill_kernels::step::SamplingParams;
use tidemill_operators::template::{Template, is_json};

use super::{GeneratePlan, Result, at_least};
use crate::spec::{Definition, GenerateSpec, Spanned, StepSpec};

const DEFAULT_MAX_TOKENS: u32 = 256;

/// The columns a step adds.
pub fn step_fields(name: &str) -> [Field; 4] {
    [
        Field::new(name, DataType::Utf8, false),
        Field::new(format!("{name}_finish_reason"), DataType::Utf8, false),
        Field::new(format!("{name}_prompt_tokens"), DataType::UInt32, false),
        Field::new(format!("{name}_output_tokens"), DataType::UInt32, false),
    ]
}

pub(super) fn steps(definition: &Definition, schema: &Schema) -> Result<Vec<GeneratePlan>> {
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
    let number = |value: &Option<Spanned<f32>>, limits: &Limits| limits.check(definition, value, key);
    Ok(SamplingParams {
        temperature: number(&spec.temperature, &TEMPERATURE)?,
        top_p: number(&spec.top_p, &TOP_P)?,
        top_k: spec.top_k.unwrap_or(0),
        seed: spec.seed.unwrap_or(0),
        ignore_eos: spec.ignore_eos,
        min_p: number(&spec.min_p, &MIN_P)?,
        repetition_penalty: number(&spec.repetition_penalty, &REPETITION_PENALTY)?,
        presence_penalty: number(&spec.presence_penalty, &PRESENCE_PENALTY)?,
        frequency_penalty: number(&spec.frequency_penalty, &FREQUENCY_PENALTY)?,
    })
}

/// The numbers of a step that change how tokens are chosen, under their keys.
pub fn sampling_changes(params: &SamplingParams) -> Vec<(&'static str, f32)> {
    let values = [
        (&TEMPERATURE, params.temperature),
        (&TOP_P, params.top_p),
        (&MIN_P, params.min_p),
        (&REPETITION_PENALTY, params.repetition_penalty),
        (&PRESENCE_PENALTY, params.presence_penalty),
        (&FREQUENCY_PENALTY, params.frequency_penalty),
    ];
    let changes = values.into_iter().filter(|(limits, value)| *value != limits.neutral);
    changes.map(|(limits, value)| (limits.part, value)).collect()
}

/// What a number of a step may be.
struct Limits {
    part: &'static str,
    /// Where it is left out.
    neutral: f32,
    is_legal: fn(f32) -> bool,
    range: &'static str,
    help: Option<&'static str>,
}

const TEMPERATURE: Limits = Limits {
    part: "temperature",
    neutral: 0.0,
    is_legal: |value| (0.0..=10.0).contains(&value),
    range: "between 0 and 10",
    help: None,
};
const TOP_P: Limits = Limits {
    part: "top_p",
    neutral: 1.0,
    is_legal: |value| (0.0..=1.0).contains(&value),
    range: "between 0 and 1",
    help: None,
};
const MIN_P: Limits = Limits {
    part: "min_p",
    neutral: 0.0,
    is_legal: |value| (0.0..1.0).contains(&value),
    range: "at least 0 and below 1",
    help: Some("it is a share of the probability of the most likely token, such as 0.05; 0 keeps all tokens"),
};
const REPETITION_PENALTY: Limits = Limits {
    part: "repetition_penalty",
    neutral: 1.0,
    is_legal: |value| value > 0.0 && value.is_finite(),
    range: "finite and above 0",
    help: Some("1 changes nothing; above it, tokens of the prompt and the answer become less likely"),
};
const PRESENCE_PENALTY: Limits = Limits {
    part: "presence_penalty",
    neutral: 0.0,
    is_legal: |value| (-2.0..=2.0).contains(&value),
    range: "between -2 and 2",
    help: Some("0 changes nothing; above it, tokens of the answer become less likely"),
};
const FREQUENCY_PENALTY: Limits = Limits { part: "frequency_penalty", ..PRESENCE_PENALTY };

impl Limits {
    fn check(&self, definition: &Definition, value: &Option<Spanned<f32>>, key: &str) -> Result<f32> {
        let Some(value) = value else { return Ok(self.neutral) };
        if !(self.is_legal)(value.value) {
            let message = format!("{} is {}, it must be {}", self.part, value.value, self.range);
            let help = self.help.map(str::to_owned);
            return Err(definition.error(value, &format!("{key}.{}", self.part), message, help));
        }
        Ok(value.value)
    }
}

/// Compiles a template and returns the earlier steps it uses.
pub(super) fn template(
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
        } else if schema.column_with_name(name).is_none()
            && !schema.fields().iter().any(|field| is_json(field))
        {
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
