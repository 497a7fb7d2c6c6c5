//! Runs an engine on a thread of its own, and the journal on another.
//!
//! The way of an answer: engine → journal (durable) → mailbox → operator. While the journal writes, the
//! engine goes on; all answers that finished meanwhile share the journal's next transaction. Between two steps, works
//! whose lease is revoked leave the engine without an answer. Queues are
//! bounded by what `group` hands out, so sending never blocks.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use tidemill_kernels::step::SamplingParams;
use timely::scheduling::SyncActivator;

use super::Failure;
use super::engine::{Engine, EngineStats};
use super::sequence::{Finished, SequenceId, SequenceRequest, SharedPrefix};
use crate::counters::Counters;
use crate::document::{Generated, Lease};
use crate::journal::{Journal, JournalKey};
use crate::tokenize::TextModel;

/// A prompt on its way to the engine, with where the answer goes.
pub struct Work {
    /// The operator's name for it.
    pub tag: u64,
    pub key: JournalKey,
    pub token_ids: Arc<[u32]>,
    pub max_tokens: u32,
    pub sampling: SamplingParams,
    pub step: Arc<str>,
    pub shared: Arc<[SharedPrefix]>,
    /// Revoked, the work is given up between two steps and replied to as canceled.
    pub lease: Lease,
    pub reply: Arc<Mailbox>,
}

/// What an operator is told of its work.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reply {
    Answer(Generated),
    /// The lease was revoked.
    Canceled,
}

/// Replies waiting for an operator, which is woken for them. Each work is replied to once.
pub struct Mailbox {
    replies: Mutex<Vec<(u64, Reply)>>,
    operator: SyncActivator,
}

impl Mailbox {
    pub fn new(operator: SyncActivator) -> Self {
        Self { replies: Mutex::new(Vec::new()), operator }
    }

    fn put(&self, tag: u64, reply: Reply) {
        self.replies.lock().unwrap_or_else(PoisonError::into_inner).push((tag, reply));
        // Fails only when the worker is gone, and then nobody needs waking.
        let _ = self.operator.activate();
    }

    pub fn take(&self) -> Vec<(u64, Reply)> {
        std::mem::take(&mut *self.replies.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// The operators' end of a runner.
#[derive(Clone)]
pub struct EngineHandle {
    work: Sender<Work>,
}

impl EngineHandle {
    /// Queues a prompt. After a failure or a stop it is dropped: nobody waits for the answer then.
    pub fn submit(&self, work: Work) {
        let _ = self.work.send(work);
    }
}

/// What the threads of a runner share.
#[derive(Clone)]
pub struct RunnerContext {
    pub text: Arc<TextModel>,
    pub journal: Option<Journal>,
    pub counters: Arc<Counters>,
    pub failure: Failure,
    /// Set to end without finishing what is queued.
    pub cancel: Arc<AtomicBool>,
}

/// The threads behind one engine; they end when every handle is dropped or `cancel` is set.
pub struct Runner {
    engine: JoinHandle<EngineStats>,
    journal: JoinHandle<()>,
}

impl Runner {
    /// Starts both threads.
    pub fn start(engine: Engine, context: RunnerContext) -> std::io::Result<(Self, EngineHandle)> {
        let (work, queue) = channel();
        let (done, answers) = channel();
        let (journal_context, failure) = (context.clone(), context.failure.clone());
        let journal = std::thread::Builder::new().name("journal".to_owned()).spawn(move || {
            let _watch = journal_context.failure.watch("journal");
            write_journal(&answers, &journal_context);
        })?;
        let engine = std::thread::Builder::new().name("engine".to_owned()).spawn(move || {
            let _watch = failure.watch("engine");
            let mut driver = Driver {
                engine,
                context,
                open: BTreeMap::new(),
                next_id: 0,
                done,
                counted: EngineStats::default(),
            };
            if let Err(error) = driver.run(&queue) {
                failure.fail(&error);
            }
            driver.engine.stats()
        })?;
        Ok((Self { engine, journal }, EngineHandle { work }))
    }

    /// Waits for both threads; all handles must be dropped before.
    ///
    /// A panic in one of them was reported as a failure already.
    pub fn join(self) -> EngineStats {
        let stats = self.engine.join().unwrap_or_default();
        let _ = self.journal.join();
        stats
    }
}

/// An answer between the engine and the journal.
struct Answer {
    tag: u64,
    key: JournalKey,
    generated: Generated,
    reply: Arc<Mailbox>,
}

struct Driver {
    engine: Engine,
    context: RunnerContext,
    open: BTreeMap<SequenceId, Work>,
    next_id: u64,
    done: Sender<Answer>,
    /// What [`count`](Self::count) has seen of the engine's totals.
    counted: EngineStats,
}

#[derive(Debug, thiserror::Error)]
enum RunnerError {
    #[error(transparent)]
    Step(#[from] tidemill_kernels::step::StepError),
    #[error("prompt was accepted by `tokenize` and refused by the engine")]
    Submit(#[from] super::engine::SubmitError),
    #[error("cannot decode an answer")]
    Decode(#[from] crate::tokenizer::TokenizerError),
}

impl Driver {
    fn run(&mut self, queue: &Receiver<Work>) -> Result<(), RunnerError> {
        loop {
            if !self.engine.has_work() {
                match queue.recv() {
                    Ok(work) => self.submit(work)?,
                    Err(_) => return Ok(()),
                }
            }
            while let Ok(work) = queue.try_recv() {
                self.submit(work)?;
            }
            if self.context.cancel.load(Ordering::Acquire) || self.context.failure.get().is_some() {
                return Ok(());
            }
            self.cancel_revoked();
            let finished = self.engine.step()?;
            self.count();
            for finished in finished {
                self.finish(finished)?;
            }
        }
    }

    /// Gives up the works whose lease is revoked.
    fn cancel_revoked(&mut self) {
        for (id, work) in self.open.extract_if(.., |_, work| work.lease.is_revoked()) {
            let is_known = self.engine.abort(id);
            assert!(is_known, "an open work is not in the engine");
            work.reply.put(work.tag, Reply::Canceled);
        }
    }

    /// Adds what the last step did to the run's totals, so that progress shows long prompts too.
    fn count(&mut self) {
        let now = self.engine.stats();
        let before = std::mem::replace(&mut self.counted, now);
        let counters = &self.context.counters;
        let prompt =
            |stats: &EngineStats| stats.computed_tokens + stats.reused_tokens - stats.recomputed_tokens;
        // Wraps both ways: a preemption may move tokens from one count to another.
        Counters::add(&counters.prompt_tokens, prompt(&now).wrapping_sub(prompt(&before)));
        Counters::add(&counters.computed_tokens, now.computed_tokens - before.computed_tokens);
        Counters::add(&counters.recomputed_tokens, now.recomputed_tokens - before.recomputed_tokens);
        Counters::add(&counters.reused_tokens, now.reused_tokens - before.reused_tokens);
        Counters::add(&counters.output_tokens, now.output_tokens - before.output_tokens);
    }

    fn submit(&mut self, work: Work) -> Result<(), RunnerError> {
        let id = SequenceId(self.next_id);
        self.next_id += 1;
        tracing::debug!(target: "tidemill::ledger", key = %work.key, tokens = work.token_ids.len(), "compute");
        self.engine.submit(SequenceRequest {
            id,
            token_ids: Arc::clone(&work.token_ids),
            max_tokens: work.max_tokens,
            sampling: work.sampling,
            step: Arc::clone(&work.step),
            shared: Arc::clone(&work.shared),
        })?;
        self.open.insert(id, work);
        Ok(())
    }

    fn finish(&mut self, finished: Finished) -> Result<(), RunnerError> {
        let work = self.open.remove(&finished.id).expect("the engine answers what it was asked");
        let tokenizer = &self.context.text.tokenizer;
        let generated = Generated {
            text: tokenizer.decode(&finished.token_ids)?,
            finish_reason: finished.reason,
            prompt_len: finished.prompt_len,
            output_len: finished.token_ids.len() as u32,
        };
        let answer = Answer { tag: work.tag, key: work.key, generated, reply: work.reply };
        // The journal's thread ends only after this one, or on a failure that is reported already.
        let _ = self.done.send(answer);
        Ok(())
    }
}

/// Writes answers as they come; those that came during one write share the next.
fn write_journal(answers: &Receiver<Answer>, context: &RunnerContext) {
    while let Ok(first) = answers.recv() {
        let mut batch = vec![first];
        batch.extend(answers.try_iter());
        if let Some(journal) = &context.journal {
            let entries: Vec<_> = batch.iter().map(|answer| (answer.key, &answer.generated)).collect();
            if let Err(error) = journal.put(&entries) {
                context.failure.fail(&error);
                return;
            }
        }
        for answer in batch {
            answer.reply.put(answer.tag, Reply::Answer(answer.generated));
        }
    }
}
