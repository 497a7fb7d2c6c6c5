//! `recall`: prompts whose answers the journal already holds are answered from it.
//!
//! It stands before `group`, so that a replayed document takes no place in the window and no KV page.

use std::sync::Arc;

use timely::dataflow::StreamVec;
use timely::dataflow::operators::core::OkErr;

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
        self.ok_err(move |prompt: Prompt| {
            let known = journal.as_ref().map_or(Ok(None), |journal| journal.get(&prompt.key));
            match known {
                Ok(Some(generated)) => {
                    Counters::add(&counters.recalled, 1);
                    let mut document = prompt.document;
                    document.results.insert(Arc::clone(&step), generated);
                    Err(document)
                }
                Ok(None) => Ok(prompt),
                Err(error) => {
                    failure.fail(&error);
                    Ok(prompt)
                }
            }
        })
    }
}
