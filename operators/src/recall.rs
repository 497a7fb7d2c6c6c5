//! `recall`: prompts whose answers the journal already holds are answered from it.
//!
//! It stands before `group`, so that a replayed document takes no place in the window and no KV page.

use std::sync::Arc;

use timely::container::CapacityContainerBuilder;
use timely::dataflow::StreamVec;
use timely::dataflow::channels::pact::Pipeline;
use timely::dataflow::operators::generic::OutputBuilder;
use timely::dataflow::operators::generic::builder_rc::OperatorBuilder;

use crate::Epoch;
use crate::counters::Counters;
use crate::document::Document;
use crate::infer::Failure;
use crate::journal::Journal;
use crate::tokenize::Prompt;

/// Extension trait of prompt streams.
pub trait Recall<'scope> {
    /// Splits off the documents that are answered already; they leave by the second stream.
    fn recall(
        self,
        step: Arc<str>,
        journal: Option<Journal>,
        counters: Arc<Counters>,
        failure: Failure,
    ) -> (StreamVec<'scope, Epoch, Prompt>, StreamVec<'scope, Epoch, Document>);
}

impl<'scope> Recall<'scope> for StreamVec<'scope, Epoch, Prompt> {
    fn recall(
        self,
        step: Arc<str>,
        journal: Option<Journal>,
        counters: Arc<Counters>,
        failure: Failure,
    ) -> (StreamVec<'scope, Epoch, Prompt>, StreamVec<'scope, Epoch, Document>) {
        let mut operator = OperatorBuilder::new("Recall".to_owned(), self.scope());
        let mut input = operator.new_input(self, Pipeline);
        let (unknown, unknown_stream) = operator.new_output();
        let (answered, answered_stream) = operator.new_output();
        let mut unknown = OutputBuilder::<Epoch, CapacityContainerBuilder<Vec<Prompt>>>::from(unknown);
        let mut answered = OutputBuilder::<Epoch, CapacityContainerBuilder<Vec<Document>>>::from(answered);
        operator.build(move |_| {
            move |_| {
                let (mut unknown, mut answered) = (unknown.activate(), answered.activate());
                input.for_each(|capability, prompts| {
                    let (Some(of_unknown), Some(of_answered)) =
                        (capability.retain_least(0), capability.retain_least(1))
                    else {
                        return;
                    };
                    let found = match &journal {
                        Some(journal) => journal.get_all(prompts.iter().map(|prompt| &prompt.key)),
                        None => Ok(Vec::new()),
                    };
                    let mut found = found
                        .unwrap_or_else(|error| {
                            failure.fail(&error);
                            Vec::new()
                        })
                        .into_iter();
                    let mut unknown = unknown.session(&of_unknown);
                    let mut answered = answered.session(&of_answered);
                    for prompt in prompts.drain(..) {
                        let Some(generated) = found.next().flatten() else {
                            unknown.give(prompt);
                            continue;
                        };
                        Counters::add(&counters.recalled, 1);
                        let mut document = prompt.document;
                        document.results.insert(Arc::clone(&step), generated);
                        answered.give(document);
                    }
                });
            }
        });
        (unknown_stream, answered_stream)
    }
}
