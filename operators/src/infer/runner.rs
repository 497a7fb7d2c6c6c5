//! Runs an engine on a thread of its own, and journals on another, for one pipeline or several at once.
//!
//! What belongs to the engine is the [`Runner`]'s; what belongs to a pipeline comes with its work, as a [`WorkContext`].
//! A pipeline that ends or fails takes its own works out of the engine and no others; a failure of the engine is one of
//! all that use it, by [`Failure::caused_by`].
//!
//! The way of an answer: engine → journal (durable) → mailbox → operator. While the journal writes, the
//! engine goes on; all answers that finished meanwhile share the journal's next transaction. Between two steps, works
//! whose lease is revoked leave the engine without an answer. Queues are bounded by what `group` hands out, so sending
//! never blocks.

use std::collections::BTreeMap;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use tidemill_kernels::step::{SamplingParams, StepError};
use timely::scheduling::SyncActivator;

use super::engine::{Engine, EngineStats};
use super::figures::{ElapsedFn, EngineFigures, Tracing, Watcher};
use super::load::EngineLoad;
use super::scheduler;
use super::sequence::{Finished, OwnerId, Priority, SequenceId, SequenceRequest, SharedPrefix};
use super::{Failure, Stop};
use crate::counters::Counters;
use crate::document::{Generated, Lease};
use crate::group::Demand;
use crate::in_flight::TokensInFlight;
use crate::journal::{Journal, JournalKey};
use crate::tenants::Tenants;
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
    /// W3C `traceparent` of the document; only traces look at it.
    pub trace_parent: Option<Arc<str>>,
    pub context: Arc<WorkContext>,
    pub reply: Arc<Mailbox>,
    /// Has counted the work for this engine, and is told when the engine is done with it.
    pub demand: Arc<Demand>,
    pub engine: u32,
}

impl Work {
    /// Of prompt and answer, in tokens.
    fn max_len(&self) -> u64 {
        self.token_ids.len() as u64 + u64::from(self.max_tokens)
    }
}

/// What an operator is told of its work.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reply {
    Answer(Generated),
    /// The lease was revoked.
    Canceled,
}

/// Replies waiting for an operator, which is woken for them. Each work is replied to once, or never if its pipeline is
/// over.
pub struct Mailbox {
    replies: Mutex<Vec<(u64, Reply)>>,
    operator: SyncActivator,
}

impl Mailbox {
    pub fn new(operator: SyncActivator) -> Self {
        Self { replies: Mutex::new(Vec::new()), operator }
    }

    fn put(&self, replies: impl IntoIterator<Item = (u64, Reply)>) {
        self.replies.lock().unwrap_or_else(PoisonError::into_inner).extend(replies);
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
    /// Together what is there together: a message of its own for each work would wake the engine for each.
    work: Sender<Vec<Work>>,
    failure: Failure,
    load: Arc<EngineLoad>,
    figures: Arc<EngineFigures>,
}

impl EngineHandle {
    /// Queues prompts. After a failure or a stop they are dropped: nobody waits for the answers then.
    pub fn submit(&self, works: Vec<Work>) {
        let _ = self.work.send(works);
    }

    /// What breaks the engine, and so all that use it.
    pub fn failure(&self) -> &Failure {
        &self.failure
    }

    /// How busy the engine is.
    pub fn load(&self) -> &Arc<EngineLoad> {
        &self.load
    }

    /// How long its steps and answers take.
    pub fn figures(&self) -> &Arc<EngineFigures> {
        &self.figures
    }
}

/// What belongs to a pipeline and goes with its work.
pub struct WorkContext {
    /// Of all its prompts, before those of other pipelines.
    pub priority: Priority,
    pub journal: Option<Journal>,
    pub counters: Arc<Counters>,
    pub tenants: Arc<Tenants>,
    pub tokens: Arc<TokensInFlight>,
    pub failure: Failure,
    pub stop: Stop,
    /// Who wants to know of each answer, if anybody does.
    pub tracing: Option<Tracing>,
}

impl WorkContext {
    /// Nobody waits for the pipeline's answers any more.
    pub fn is_over(&self) -> bool {
        self.stop.is_set() || self.failure.is_reported()
    }
}

/// The threads behind one engine; they end when every handle is dropped or the engine fails.
pub struct Runner {
    engine: JoinHandle<EngineStats>,
    journal: JoinHandle<()>,
}

impl Runner {
    /// Starts both threads; `elapsed` is the time since the run began.
    pub fn start(
        engine: Engine,
        text: Arc<TextModel>,
        elapsed: ElapsedFn,
    ) -> std::io::Result<(Self, EngineHandle)> {
        let failure = Failure::default();
        let load = Arc::new(EngineLoad::default());
        load.update(&engine, 0);
        let figures = Arc::new(EngineFigures::new(elapsed));
        let watcher = Watcher::new(Arc::clone(&figures));
        let (work, queue) = channel();
        let (done, answers) = channel();
        let watched = failure.clone();
        let journal = std::thread::Builder::new().name("journal".to_owned()).spawn(move || {
            let _watch = watched.watch("journal");
            write_journals(&answers);
        })?;
        let (watched, engine_load) = (failure.clone(), Arc::clone(&load));
        let engine = std::thread::Builder::new().name("engine".to_owned()).spawn(move || {
            let _watch = watched.watch("engine");
            let mut driver = Driver {
                engine,
                watcher,
                text,
                failure: watched.clone(),
                owners: Vec::new(),
                open: BTreeMap::new(),
                open_tokens: 0,
                load: engine_load,
                next_id: 0,
                done,
                freed: Vec::new(),
            };
            if let Err(error) = driver.run(&queue) {
                watched.fail(&error);
            }
            driver.engine.stats()
        })?;
        Ok((Self { engine, journal }, EngineHandle { work, failure, load, figures }))
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
    context: Arc<WorkContext>,
    reply: Arc<Mailbox>,
}

/// A pipeline that has given work, and what was counted for it.
struct Owner {
    context: Arc<WorkContext>,
    counted: scheduler::Counters,
}

struct Driver {
    engine: Engine,
    watcher: Watcher,
    text: Arc<TextModel>,
    failure: Failure,
    /// Indexed by owner; they stay as long as the engine, and there are as many as pipelines.
    owners: Vec<Owner>,
    open: BTreeMap<SequenceId, Work>,
    /// Of the open works.
    open_tokens: u64,
    load: Arc<EngineLoad>,
    next_id: u64,
    done: Sender<Vec<Answer>>,
    /// Demands that have room again and were not told yet.
    freed: Vec<Arc<Demand>>,
}

#[derive(Debug, thiserror::Error)]
enum WorkError {
    #[error("prompt was accepted by `tokenize` and refused by the engine")]
    Submit(#[from] super::engine::SubmitError),
    #[error("cannot decode an answer")]
    Decode(#[from] crate::tokenizer::TokenizerError),
}

impl Driver {
    fn run(&mut self, queue: &Receiver<Vec<Work>>) -> Result<(), StepError> {
        loop {
            if !self.engine.has_work() {
                match queue.recv() {
                    Ok(works) => works.into_iter().for_each(|work| self.submit(work)),
                    Err(_) => return Ok(()),
                }
            }
            while let Ok(works) = queue.try_recv() {
                works.into_iter().for_each(|work| self.submit(work));
            }
            if self.failure.is_reported() {
                return Ok(());
            }
            self.cancel();
            self.watcher.begins_step();
            let finished = self.engine.step()?;
            self.watcher.stepped(&self.engine, &finished);
            self.count();
            let answers: Vec<Answer> =
                finished.into_iter().filter_map(|finished| self.finish(finished)).collect();
            self.make_room();
            if !answers.is_empty() {
                // The journal's thread ends only after this one, or on a failure that is reported already.
                let _ = self.done.send(answers);
            }
            self.load.update(&self.engine, self.open_tokens);
        }
    }

    /// Takes out the works whose lease is revoked, and those of pipelines that are over.
    fn cancel(&mut self) {
        // Few pipelines are asked often: whether one is over is more than one flag.
        let over: Vec<_> = self.owners.iter().filter(|owner| owner.context.is_over()).collect();
        let is_over = |work: &Work| over.iter().any(|owner| Arc::ptr_eq(&owner.context, &work.context));
        let is_canceled = |work: &Work| work.lease.is_revoked() || is_over(work);
        if !self.open.values().any(is_canceled) {
            return;
        }
        for (id, work) in self.open.extract_if(.., |_, work| is_canceled(work)) {
            let is_known = self.engine.abort(id);
            assert!(is_known, "an open work is not in the engine");
            self.watcher.canceled(id);
            self.open_tokens -= work.max_len();
            if work.demand.finished(work.engine as usize) {
                self.freed.push(work.demand);
            }
            // Without a reply an epoch never closes: what a pipeline that is over leaves undone must not look done.
            if work.lease.is_revoked() {
                work.reply.put([(work.tag, Reply::Canceled)]);
            }
        }
    }

    /// Tells the demands that have room, each once.
    fn make_room(&mut self) {
        while let Some(demand) = self.freed.pop() {
            self.freed.retain(|other| !Arc::ptr_eq(other, &demand));
            demand.wake();
        }
    }

    /// Adds what the last step did to the totals of each pipeline, so that progress shows long prompts too.
    fn count(&mut self) {
        for (index, owner) in self.owners.iter_mut().enumerate() {
            let now = self.engine.counters_of(OwnerId(index as u32));
            let before = std::mem::replace(&mut owner.counted, now);
            let counters = &owner.context.counters;
            let prompt = |counted: &scheduler::Counters| {
                counted.computed_tokens + counted.reused_tokens - counted.recomputed_tokens
            };
            // Wraps both ways: a preemption may move tokens from one count to another.
            Counters::add(&counters.prompt_tokens, prompt(&now).wrapping_sub(prompt(&before)));
            Counters::add(&counters.computed_tokens, now.computed_tokens - before.computed_tokens);
            Counters::add(&counters.recomputed_tokens, now.recomputed_tokens - before.recomputed_tokens);
            Counters::add(&counters.reused_tokens, now.reused_tokens - before.reused_tokens);
            Counters::add(&counters.output_tokens, now.output_tokens - before.output_tokens);
            Counters::add(&counters.preemptions, now.preemptions - before.preemptions);
        }
    }

    /// The number of a pipeline, which is new or has given work before.
    fn owner(&mut self, context: &Arc<WorkContext>) -> OwnerId {
        let known = self.owners.iter().position(|owner| Arc::ptr_eq(&owner.context, context));
        let index = known.unwrap_or_else(|| {
            let counted = scheduler::Counters::default();
            self.owners.push(Owner { context: Arc::clone(context), counted });
            self.owners.len() - 1
        });
        OwnerId(index as u32)
    }

    /// A prompt that the engine refuses is a failure of its pipeline.
    fn submit(&mut self, work: Work) {
        let id = SequenceId(self.next_id);
        self.next_id += 1;
        tracing::debug!(target: "tidemill::ledger", key = %work.key, tokens = work.token_ids.len(), "compute");
        let owner = self.owner(&work.context);
        let submitted = self.engine.submit(SequenceRequest {
            id,
            token_ids: Arc::clone(&work.token_ids),
            max_tokens: work.max_tokens,
            sampling: work.sampling,
            owner,
            priority: work.context.priority,
            step: Arc::clone(&work.step),
            shared: Arc::clone(&work.shared),
        });
        match submitted {
            Ok(()) => {
                self.open_tokens += work.max_len();
                self.watcher.submitted(id);
                self.open.insert(id, work);
            }
            Err(error) => work.context.failure.fail(&WorkError::from(error)),
        }
    }

    /// The answer; `None` if it cannot be decoded, which is a failure of its pipeline.
    fn finish(&mut self, finished: Finished) -> Option<Answer> {
        let work = self.open.remove(&finished.id).expect("the engine answers what it was asked");
        self.watcher.finished(&finished, &work);
        self.open_tokens -= work.max_len();
        let text = match self.text.tokenizer.decode(&finished.token_ids) {
            Ok(text) => text,
            Err(error) => {
                work.context.failure.fail(&WorkError::from(error));
                return None;
            }
        };
        let generated = Generated {
            text,
            finish_reason: finished.reason,
            prompt_len: finished.prompt_len,
            output_len: finished.token_ids.len() as u32,
        };
        let Work { tag, key, context, reply, demand, engine, .. } = work;
        // The next prompt is asked for before this answer is durable: the engine does not wait for the journal.
        if demand.finished(engine as usize) {
            self.freed.push(demand);
        }
        Some(Answer { tag, key, generated, context, reply })
    }
}

/// Where answers come faster than this in the time of one write, each write waits so long for more of them.
const MANY_ANSWERS: usize = 32;
const GATHER: Duration = Duration::from_millis(2);

/// Writes answers as they come, each to the journal of its pipeline; those that came during one write share the next.
fn write_journals(answers: &Receiver<Vec<Answer>>) {
    let mut num_last = 0;
    while let Ok(first) = answers.recv() {
        if num_last >= MANY_ANSWERS {
            std::thread::sleep(GATHER);
        }
        let mut rest = first;
        rest.extend(answers.try_iter().flatten());
        num_last = rest.len();
        while let Some(context) = rest.first().map(|answer| Arc::clone(&answer.context)) {
            let mut batch: Vec<Answer> =
                rest.extract_if(.., |answer| Arc::ptr_eq(&answer.context, &context)).collect();
            let entries: Vec<_> = batch.iter().map(|answer| (answer.key, &answer.generated)).collect();
            if let Some(Err(error)) = context.journal.as_ref().map(|journal| journal.put(&entries)) {
                // Nothing goes on that is not durable, but other pipelines do.
                context.failure.fail(&error);
                continue;
            }
            // An operator is woken once.
            while let Some(mailbox) = batch.first().map(|answer| Arc::clone(&answer.reply)) {
                let own = batch.extract_if(.., |answer| Arc::ptr_eq(&answer.reply, &mailbox));
                mailbox.put(own.map(|answer| (answer.tag, Reply::Answer(answer.generated))));
            }
        }
    }
}

#[cfg(test)]
mod tests;
