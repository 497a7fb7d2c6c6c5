//! `infer`: prompts in, answered documents out, with each engine on a thread of its own.
//!
//! The operator never blocks and never computes: it hands prompts to a [`runner`] and is woken when answers
//! are in its mailbox. It keeps one capability an open epoch and drops it with the epoch's last answer, so
//! the frontier passes an epoch exactly when all its documents are done. A document whose lease is revoked is done
//! without an answer: it leaves nothing but its place.

pub mod engine;
pub mod figures;
pub mod forecast;
pub mod load;
pub mod page_pool;
pub mod prefix_cache;
pub mod runner;
pub mod scheduler;
pub mod sequence;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use timely::container::CapacityContainerBuilder;
use timely::dataflow::StreamVec;
use timely::dataflow::channels::pact::Exchange;
use timely::dataflow::operators::{Capability, Operator};

use crate::Epoch;
use crate::document::Document;
use crate::group::Demand;
use crate::tokenize::Prompt;
use runner::{EngineHandle, Mailbox, Reply, Work, WorkContext};

/// Where operators and their threads report that the world is broken; the first report stands.
#[derive(Clone, Debug, Default)]
pub struct Failure {
    message: Arc<Mutex<Option<String>>>,
    /// Set after the message, so that asking whether there is one costs no lock.
    is_reported: Arc<AtomicBool>,
    /// What fails, this fails with.
    causes: Arc<[Failure]>,
}

impl Failure {
    /// A failure of its own that includes those of others: of the engines that a pipeline shares, for one.
    pub fn caused_by(causes: impl IntoIterator<Item = Self>) -> Self {
        Self { causes: causes.into_iter().collect(), ..Self::default() }
    }

    /// Reports an error with its causes.
    pub fn fail(&self, error: &dyn std::error::Error) {
        let mut message = error.to_string();
        let mut cause = error.source();
        while let Some(error) = cause {
            message.push_str(": ");
            message.push_str(&error.to_string());
            cause = error.source();
        }
        self.message.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(message);
        self.is_reported.store(true, Ordering::Release);
    }

    /// Reports a panic of the thread that drops it, so that nobody waits for that thread.
    pub fn watch(&self, thread: &'static str) -> Watch {
        Watch { failure: self.clone(), thread }
    }

    pub fn is_reported(&self) -> bool {
        self.is_reported.load(Ordering::Acquire) || self.causes.iter().any(Self::is_reported)
    }

    pub fn get(&self) -> Option<String> {
        let own = self.message.lock().unwrap_or_else(PoisonError::into_inner).clone();
        own.or_else(|| self.causes.iter().find_map(Self::get))
    }
}

/// Asks one pipeline to end without finishing what is open, or all pipelines that share `everyone`.
#[derive(Clone, Debug, Default)]
pub struct Stop {
    own: Arc<AtomicBool>,
    everyone: Arc<AtomicBool>,
}

impl Stop {
    pub fn new(everyone: Arc<AtomicBool>) -> Self {
        Self { own: Arc::default(), everyone }
    }

    /// Ends this pipeline and no other.
    pub fn set(&self) {
        self.own.store(true, Ordering::Release);
    }

    pub fn is_set(&self) -> bool {
        self.own.load(Ordering::Acquire) || self.everyone.load(Ordering::Acquire)
    }
}

/// See [`Failure::watch`].
#[derive(Debug)]
pub struct Watch {
    failure: Failure,
    thread: &'static str,
}

#[derive(Debug, thiserror::Error)]
#[error("the {0} thread panicked, which is a bug: please report it with the message above")]
struct Panicked(&'static str);

impl Drop for Watch {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.failure.fail(&Panicked(self.thread));
        }
    }
}

/// A document whose answer is being made.
struct OpenDocument {
    epoch: Epoch,
    tenant: Arc<str>,
    /// Counted as in flight for the tenant.
    tokens: u64,
    document: Document,
}

/// Documents whose answers are being made.
#[derive(Default)]
struct Open {
    /// By tag.
    documents: BTreeMap<u64, OpenDocument>,
    /// The capability of each epoch and how many of its documents are open.
    epochs: BTreeMap<Epoch, (Capability<Epoch>, usize)>,
    next_tag: u64,
}

impl Open {
    fn insert(&mut self, document: OpenDocument) -> u64 {
        let tag = self.next_tag;
        self.next_tag += 1;
        self.documents.insert(tag, document);
        tag
    }

    fn remove(&mut self, tag: u64) -> OpenDocument {
        self.documents.remove(&tag).expect("a tag is answered once")
    }
}

/// Extension trait of grouped prompt streams.
pub trait Infer<'scope> {
    /// Answers each prompt on the engine it was assigned to; any worker may serve any engine.
    fn infer(
        self,
        step: Arc<str>,
        engines: Vec<EngineHandle>,
        demand: Arc<Demand>,
        context: Arc<WorkContext>,
    ) -> StreamVec<'scope, Epoch, Document>;
}

impl<'scope> Infer<'scope> for StreamVec<'scope, Epoch, Prompt> {
    fn infer(
        self,
        step: Arc<str>,
        engines: Vec<EngineHandle>,
        demand: Arc<Demand>,
        context: Arc<WorkContext>,
    ) -> StreamVec<'scope, Epoch, Document> {
        let worker = self.scope().worker();
        let assigned = Exchange::new(|prompt: &Prompt| u64::from(prompt.engine));
        self.unary::<CapacityContainerBuilder<Vec<Document>>, _, _, _>(assigned, "Infer", move |_, info| {
            let mailbox = Arc::new(Mailbox::new(worker.sync_activator_for(info.address.to_vec())));
            let mut open = Open::default();
            let mut arrived: Vec<(Epoch, Prompt)> = Vec::new();
            move |input, output| {
                input.for_each(|capability, prompts| {
                    let Some(capability) = capability.retain_least(0) else { return };
                    let epoch = *capability.time();
                    open.epochs.entry(epoch).or_insert((capability, 0)).1 += prompts.len();
                    arrived.extend(prompts.drain(..).map(|prompt| (epoch, prompt)));
                });
                arrived.sort_unstable_by_key(|(_, prompt)| prompt.place);
                let mut works: BTreeMap<u32, Vec<Work>> = BTreeMap::new();
                for (epoch, prompt) in arrived.drain(..) {
                    let lease = prompt.document.lease().clone();
                    let tracing = context.tracing.as_ref();
                    let trace_parent = tracing.and_then(|tracing| (tracing.trace_parent)(&prompt.document));
                    let (engine, tokens) = (prompt.engine, prompt.cost());
                    let (tenant, document) = (prompt.tenant, prompt.document);
                    let tag = open.insert(OpenDocument { epoch, tenant, tokens, document });
                    works.entry(engine).or_default().push(Work {
                        tag,
                        key: prompt.key,
                        token_ids: prompt.token_ids,
                        max_tokens: prompt.max_tokens,
                        sampling: prompt.sampling,
                        step: Arc::clone(&step),
                        shared: prompt.shared,
                        lease,
                        trace_parent,
                        context: Arc::clone(&context),
                        reply: Arc::clone(&mailbox),
                        demand: Arc::clone(&demand),
                        engine,
                    });
                }
                for (engine, works) in works {
                    engines[engine as usize].submit(works);
                }
                let replies = mailbox.take();
                if replies.is_empty() {
                    return;
                }
                let mut finished: BTreeMap<Epoch, u64> = BTreeMap::new();
                let mut leaving: BTreeMap<Epoch, Vec<Document>> = BTreeMap::new();
                for (tag, reply) in replies {
                    let OpenDocument { epoch, tenant, tokens, mut document } = open.remove(tag);
                    // An entry without documents is one whose answers are not wanted.
                    let leaving = leaving.entry(epoch).or_default();
                    // An answer that was finished before the lease was revoked is not wanted either.
                    let mut answer = None;
                    if let (Reply::Answer(generated), false) = (reply, document.lease().is_revoked()) {
                        answer = Some((generated.prompt_len, generated.output_len));
                        document.results.insert(Arc::clone(&step), generated);
                        leaving.push(document);
                    }
                    open.epochs.get_mut(&epoch).expect("open with its documents").1 -= 1;
                    *finished.entry(epoch).or_insert(0) += tokens;
                    context.tenants.finished(&tenant, tokens, answer);
                }
                for (epoch, mut documents) in leaving {
                    let (capability, count) = open.epochs.get(&epoch).expect("open with its documents");
                    if !documents.is_empty() {
                        output.session(capability).give_container(&mut documents);
                    }
                    if *count == 0 {
                        open.epochs.remove(&epoch);
                    }
                }
                context.tokens.finish(&finished);
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_is_a_failure_and_the_first_failure_stands() {
        let failure = Failure::default();
        let watched = failure.clone();
        let thread = std::thread::spawn(move || {
            let _watch = watched.watch("engine");
            panic!("a bug");
        });
        assert!(thread.join().is_err());
        failure.fail(&Panicked("later"));
        assert!(failure.get().is_some_and(|message| message.starts_with("the engine thread panicked")));
        let calm = Failure::default();
        drop(calm.watch("engine"));
        let of_both = Failure::caused_by([calm.clone(), failure.clone()]);
        assert_eq!((calm.get(), calm.is_reported()), (None, false));
        assert_eq!((of_both.get(), of_both.is_reported()), (failure.get(), true));
    }
}
