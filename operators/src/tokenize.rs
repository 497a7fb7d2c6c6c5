//! `tokenize`: a document becomes a prompt, or leaves on the errors stream.
//!
//! Templates are rendered and encoded here, on the timely workers, so the engine's thread never waits for
//! text. What cannot fit the model is refused before it is encoded: no token stands for more bytes than the
//! longest one, so the bytes alone bound the tokens from below.

use std::fmt;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use tidemill_kernels::step::SamplingParams;
use timely::container::CapacityContainerBuilder;
use timely::dataflow::StreamVec;
use timely::dataflow::channels::pact::Pipeline;
use timely::dataflow::operators::generic::OutputBuilder;
use timely::dataflow::operators::generic::builder_rc::OperatorBuilder;

use crate::Epoch;
use crate::chat::ChatTemplate;
use crate::document::{Document, ErrorKind, Payload, RecordError};
use crate::in_flight::TokensInFlight;
use crate::infer::sequence::SharedPrefix;
use crate::journal::JournalKey;
use crate::template::Template;
use crate::tenants;
use crate::tokenizer::Tokenizer;

/// A document, rendered and encoded for one step.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Prompt {
    pub document: Document,
    pub token_ids: Arc<[u32]>,
    pub max_tokens: u32,
    pub sampling: SamplingParams,
    pub key: JournalKey,
    /// On whose behalf; empty if nobody is named.
    pub tenant: Arc<str>,
    /// The engine that answers it, and its place among all that were handed out; set by `group`.
    pub engine: u32,
    pub place: u64,
    /// What prompts that come later for the same engine share with it; set by `group`.
    pub shared: Arc<[SharedPrefix]>,
}

impl Prompt {
    /// The tokens that prompt and answer may take.
    pub fn cost(&self) -> u64 {
        self.token_ids.len() as u64 + u64::from(self.max_tokens)
    }
}

/// What a model brings to the text side; shared by all steps.
#[derive(Debug)]
pub struct TextModel {
    pub tokenizer: Tokenizer,
    pub chat: ChatTemplate,
    /// Distinguishes models in the journal.
    pub digest: String,
    /// Longest prompt and answer together, in tokens.
    pub max_seq_len: u32,
}

/// The name of an input by its number.
#[derive(Clone)]
pub struct InputNameFn(pub Arc<dyn Fn(u32) -> Arc<str> + Send + Sync>);

impl fmt::Debug for InputNameFn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("InputNameFn")
    }
}

/// One `generate` step, ready to render documents.
#[derive(Debug)]
pub struct PromptBuilder {
    pub step: Arc<str>,
    pub model: Arc<TextModel>,
    pub system: Option<Template>,
    pub prompt: Template,
    pub max_tokens: u32,
    /// Its seed is mixed with the document's id unless the step is greedy.
    pub sampling: SamplingParams,
    /// Where the numbers of inputs are not the same in every run, their names stand for them in the seed.
    pub input_names: Option<InputNameFn>,
    /// Names the tenant; without it there is one.
    pub tenant: Option<Template>,
}

impl PromptBuilder {
    /// Renders and encodes one document.
    pub fn build(&self, document: Document) -> Result<Prompt, RecordError> {
        match self.token_ids(&document) {
            Ok(token_ids) => {
                let sampling = self.sampling_of(&document);
                let key = JournalKey::new(&self.model.digest, &token_ids, self.max_tokens, &sampling);
                let token_ids = token_ids.into();
                let shared = Arc::default();
                let tenant = self.tenant_of(&document);
                Ok(Prompt {
                    document,
                    token_ids,
                    max_tokens: self.max_tokens,
                    sampling,
                    key,
                    tenant,
                    engine: 0,
                    place: 0,
                    shared,
                })
            }
            Err((kind, message)) => Err(RecordError {
                id: document.id,
                step: Some(self.step.to_string()),
                kind,
                message,
                payload: Payload::Row(Box::new(document)),
            }),
        }
    }

    fn token_ids(&self, document: &Document) -> Result<Vec<u32>, (ErrorKind, String)> {
        let render = |template: &Template| {
            let text = template.render(document).map_err(|error| (error.kind, error.message))?;
            Ok(self.model.tokenizer.shield(&text).into_owned())
        };
        let system = self.system.as_ref().map(render).transpose()?;
        let user = render(&self.prompt)?;
        let limit = self.model.max_seq_len.saturating_sub(self.max_tokens) as usize;
        let least = user.len() / self.model.tokenizer.max_token_bytes();
        if least > limit {
            return Err(self.too_long(&format!("at least {least}"), limit));
        }
        let template_failed = |error: &dyn std::fmt::Display| (ErrorKind::Template, error.to_string());
        let text = self
            .model
            .chat
            .render(system.as_deref(), &user)
            .map_err(|error| template_failed(&format!("the chat template failed: {error}")))?;
        let token_ids = self.model.tokenizer.encode(&text).map_err(|error| template_failed(&error))?;
        if token_ids.len() > limit {
            return Err(self.too_long(&token_ids.len().to_string(), limit));
        }
        if token_ids.is_empty() {
            return Err((ErrorKind::Empty, "the prompt has no tokens".to_owned()));
        }
        Ok(token_ids)
    }

    fn too_long(&self, len: &str, limit: usize) -> (ErrorKind, String) {
        let message = format!(
            "the prompt has {len} tokens; with max_tokens {} the model and its KV cache take {limit}",
            self.max_tokens
        );
        (ErrorKind::TooLong, message)
    }

    /// Who cannot be named is served with those that have no name: no document is refused for that.
    fn tenant_of(&self, document: &Document) -> Arc<str> {
        let rendered = self.tenant.as_ref().and_then(|template| template.render(document).ok());
        tenants::name(&rendered.unwrap_or_default())
    }

    /// Greedy steps share one seed, so equal prompts share one answer.
    fn sampling_of(&self, document: &Document) -> SamplingParams {
        if self.sampling.temperature == 0.0 {
            return SamplingParams { seed: 0, ..self.sampling };
        }
        let mut hasher = blake3::Hasher::new();
        hasher.update(&self.sampling.seed.to_le_bytes());
        match &self.input_names {
            Some(names) => hasher.update((names.0)(document.id.file).as_bytes()),
            None => hasher.update(&document.id.file.to_le_bytes()),
        };
        hasher.update(&document.id.row.to_le_bytes());
        let mut seed = [0; 8];
        hasher.finalize_xof().fill(&mut seed);
        SamplingParams { seed: u64::from_le_bytes(seed), ..self.sampling }
    }
}

/// Extension trait of document streams.
pub trait Tokenize<'scope> {
    /// Encodes each document as a prompt; those that cannot be go to the second stream, and those whose lease is revoked
    /// to none. What the prompts take is added to the tokens in flight.
    fn tokenize(
        self,
        builder: PromptBuilder,
        tokens: Arc<TokensInFlight>,
    ) -> (StreamVec<'scope, Epoch, Prompt>, StreamVec<'scope, Epoch, RecordError>);
}

impl<'scope> Tokenize<'scope> for StreamVec<'scope, Epoch, Document> {
    fn tokenize(
        self,
        builder: PromptBuilder,
        tokens: Arc<TokensInFlight>,
    ) -> (StreamVec<'scope, Epoch, Prompt>, StreamVec<'scope, Epoch, RecordError>) {
        let mut operator = OperatorBuilder::new("Tokenize".to_owned(), self.scope());
        let mut input = operator.new_input(self, Pipeline);
        let (prompts, prompt_stream) = operator.new_output();
        let (errors, error_stream) = operator.new_output();
        let mut prompts = OutputBuilder::<Epoch, CapacityContainerBuilder<Vec<Prompt>>>::from(prompts);
        let mut errors = OutputBuilder::<Epoch, CapacityContainerBuilder<Vec<RecordError>>>::from(errors);
        operator.build(move |_| {
            move |_| {
                let (mut prompts, mut errors) = (prompts.activate(), errors.activate());
                input.for_each(|capability, documents| {
                    // Errors leave by the second output, so both need the time.
                    let (Some(of_prompts), Some(of_errors)) =
                        (capability.retain_least(0), capability.retain_least(1))
                    else {
                        return;
                    };
                    let mut prompts = prompts.session(&of_prompts);
                    let mut errors = errors.session(&of_errors);
                    let mut num_tokens = 0;
                    for document in documents.drain(..).filter(|document| !document.lease().is_revoked()) {
                        match builder.build(document) {
                            Ok(prompt) => {
                                num_tokens += prompt.cost();
                                prompts.give(prompt);
                            }
                            Err(error) => errors.give(error),
                        }
                    }
                    tokens.add(*of_prompts.time(), num_tokens);
                });
            }
        });
        (prompt_stream, error_stream)
    }
}

#[cfg(test)]
mod tests {
    use arrow::array::StringArray;
    use arrow::record_batch::RecordBatch;

    use super::*;
    use crate::document::{DocumentId, Lease};

    /// Two runs that number the same partitions in another order.
    #[test]
    fn a_draw_follows_the_name_of_its_input() {
        let text = TextModel {
            tokenizer: Tokenizer::bytes(&[]),
            chat: ChatTemplate::plain(),
            digest: "fake".to_owned(),
            max_seq_len: 64,
        };
        let text = Arc::new(text);
        let seed = |names: Option<[&'static str; 2]>, file: u32| {
            let builder = PromptBuilder {
                step: "answer".into(),
                model: Arc::clone(&text),
                system: None,
                prompt: Template::new("{{ id }}").unwrap(),
                max_tokens: 1,
                sampling: SamplingParams { temperature: 1.0, ..SamplingParams::GREEDY },
                input_names: names
                    .map(|names| InputNameFn(Arc::new(move |number| names[number as usize].into()))),
                tenant: None,
            };
            let rows = RecordBatch::try_from_iter([("id", Arc::new(StringArray::from(vec!["7"])) as _)]);
            let id = DocumentId { file, row: 7 };
            let document = Document::new(id, Arc::new(rows.unwrap()), 0, Lease::default());
            builder.build(document).unwrap().sampling.seed
        };
        let (one, other) = (Some(["news-0", "news-1"]), Some(["news-1", "news-0"]));
        assert_eq!(seed(one, 0), seed(other, 1));
        assert_ne!(seed(one, 0), seed(one, 1));
        assert_ne!(seed(None, 0), seed(None, 1));
    }
}
