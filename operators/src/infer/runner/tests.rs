use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use tidemill_kernels::models::{FakeConfig, FakeModel};
use tidemill_kernels::step::{Model, ModelInfo, StepBatch, StepOutput};

use super::super::engine::EngineConfig;
use super::super::sequence::FinishReason;
use super::*;
use crate::chat::ChatTemplate;
use crate::tenants::TenantPolicy;
use crate::tokenizer::Tokenizer;

const MAX_TOKENS: u32 = 40;

/// Fails where a prompt begins with token 0.
struct FragileModel(FakeModel);

impl Model for FragileModel {
    fn info(&self) -> &ModelInfo {
        self.0.info()
    }

    fn start(&mut self, batch: &StepBatch) -> Result<(), StepError> {
        if batch.token_ids.iter().zip(&batch.positions).any(|place| place == (&0, &0)) {
            return Err(StepError { message: "planned".to_owned() });
        }
        self.0.start(batch)
    }

    fn finish(&mut self) -> Result<StepOutput, StepError> {
        self.0.finish()
    }
}

fn start() -> (Runner, EngineHandle) {
    let text = TextModel {
        tokenizer: Tokenizer::bytes(&["<end>"]),
        chat: ChatTemplate::new(String::new(), String::new(), String::new()).unwrap(),
        digest: "fake".to_owned(),
        max_seq_len: 64,
    };
    let vocab_size = text.tokenizer.vocab_size() as u32;
    let model = FakeModel::new(FakeConfig {
        vocab_size,
        eos_token_id: vocab_size - 1,
        eos_probability: 0.0,
        page_size: 4,
        num_pages: 64,
        ..FakeConfig::default()
    });
    let config = EngineConfig { max_num_seqs: 4, max_num_batched_tokens: 32, enable_prefix_cache: true };
    let engine = Engine::new(Box::new(FragileModel(model)), config);
    Runner::start(engine, Arc::new(text), Arc::new(|| Duration::ZERO)).unwrap()
}

fn context(handle: &EngineHandle, everyone: &Arc<AtomicBool>, journal: Option<Journal>) -> Arc<WorkContext> {
    Arc::new(WorkContext {
        priority: Priority::default(),
        journal,
        counters: Arc::default(),
        tokens: Arc::default(),
        tenants: Arc::new(Tenants::new(TenantPolicy::default(), || Duration::ZERO)),
        failure: Failure::caused_by([handle.failure().clone()]),
        stop: Stop::new(Arc::clone(everyone)),
        tracing: None,
    })
}

fn key(tag: u64) -> JournalKey {
    JournalKey::new("fake", &[tag as u32], MAX_TOKENS, &SamplingParams::GREEDY)
}

fn work(tag: u64, context: &Arc<WorkContext>, reply: &Arc<Mailbox>) -> Work {
    let demand = Arc::new(Demand::new(1, 1, 0));
    assert!(demand.take(0));
    Work {
        tag,
        key: key(tag),
        token_ids: [tag as u32 + 1, 2, 3].into(),
        max_tokens: MAX_TOKENS,
        sampling: SamplingParams::GREEDY,
        step: "answer".into(),
        shared: Arc::default(),
        lease: Lease::default(),
        trace_parent: None,
        context: Arc::clone(context),
        reply: Arc::clone(reply),
        demand,
        engine: 0,
    }
}

/// Runs with a mailbox that wakes a worker of timely; hands over the replies when all threads have ended.
fn with_mailbox(test: impl Fn(&Arc<Mailbox>) + Send + Sync + 'static) -> Vec<(u64, Reply)> {
    timely::execute_directly(move |worker| {
        let mailbox = Arc::new(Mailbox::new(worker.sync_activator_for(Vec::new())));
        test(&mailbox);
        let mut replies = mailbox.take();
        replies.sort_by_key(|(tag, _)| *tag);
        replies
    })
}

#[test]
fn each_pipeline_has_its_own_counts_and_journal() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().to_owned();
    let replies = with_mailbox(move |mailbox| {
        let (runner, handle) = start();
        let everyone = Arc::default();
        let journal = |name: &str| Journal::open(&path.join(name)).unwrap();
        let journals = [journal("a.redb"), journal("b.redb")];
        let contexts = journals.clone().map(|journal| context(&handle, &everyone, Some(journal)));
        for tag in 0..20 {
            handle.submit(vec![work(tag, &contexts[usize::from(tag >= 5)], mailbox)]);
        }
        drop(handle);
        let stats = runner.join();
        assert_eq!(stats.finished, 20);
        for (context, journal, tags) in
            [(&contexts[0], &journals[0], 0..5), (&contexts[1], &journals[1], 5..20)]
        {
            let num = tags.end - tags.start;
            assert_eq!(Counters::get(&context.counters.prompt_tokens), 3 * num);
            assert_eq!(Counters::get(&context.counters.output_tokens), u64::from(MAX_TOKENS) * num);
            assert_eq!(journal.len() as u64, num);
            let found = journal.get_all(&tags.into_iter().map(key).collect::<Vec<_>>()).unwrap();
            assert!(found.iter().all(Option::is_some));
        }
    });
    assert_eq!(replies.len(), 20);
    assert!(replies.iter().all(|(_, reply)| matches!(
        reply,
        Reply::Answer(Generated { finish_reason: FinishReason::Length, output_len: MAX_TOKENS, .. })
    )));
}

#[test]
fn what_is_canceled_leaves_the_engine_and_the_rest_is_answered() {
    let replies = with_mailbox(|mailbox| {
        let (runner, handle) = start();
        let everyone = Arc::default();
        let (going, stopped) = (context(&handle, &everyone, None), context(&handle, &everyone, None));
        stopped.stop.set();
        let broken = context(&handle, &everyone, None);
        broken.failure.fail(&std::io::Error::other("planned"));
        let revoked = Lease::default();
        revoked.revoke();
        for tag in 0..24 {
            let context = [&going, &going, &stopped, &broken][tag as usize % 4];
            let lease = if tag % 4 == 1 { revoked.clone() } else { Lease::default() };
            handle.submit(vec![Work { lease, ..work(tag, context, mailbox) }]);
        }
        let load = Arc::clone(handle.load());
        drop(handle);
        let stats = runner.join();
        assert_eq!((stats.finished, stats.aborted, stats.kv_pages_in_use), (6, 18, 0));
        let get = |gauge: &AtomicU64| gauge.load(Ordering::Relaxed);
        let open = [&load.running, &load.waiting, &load.open_tokens, &load.kv_pages_in_use].map(get);
        assert_eq!((open, get(&load.steps), load.kv_tokens_free()), ([0; 4], stats.steps, 256));
        assert_eq!(going.failure.get(), None);
    });
    let (canceled, answered): (Vec<_>, Vec<_>) =
        replies.into_iter().partition(|(_, reply)| *reply == Reply::Canceled);
    assert_eq!(canceled.iter().map(|(tag, _)| *tag).collect::<Vec<_>>(), [1, 5, 9, 13, 17, 21]);
    assert_eq!(answered.iter().map(|(tag, _)| *tag).collect::<Vec<_>>(), [0, 4, 8, 12, 16, 20]);
}

#[test]
fn a_failure_of_the_engine_is_one_of_all_that_use_it_and_a_refused_prompt_is_not() {
    with_mailbox(|mailbox| {
        let (runner, handle) = start();
        let everyone = Arc::default();
        let contexts = [(); 3].map(|()| context(&handle, &everyone, None));
        handle.submit(vec![
            Work { max_tokens: 10_000, ..work(0, &contexts[0], mailbox) },
            work(1, &contexts[1], mailbox),
        ]);
        drop(handle.clone());
        let answered = |mailbox: &Mailbox| !mailbox.replies.lock().unwrap().is_empty();
        while !answered(mailbox) {
            std::thread::yield_now();
        }
        let message = contexts[0].failure.get().unwrap();
        assert!(message.starts_with("prompt was accepted by `tokenize`"), "{message}");
        assert_eq!((contexts[1].failure.get(), contexts[2].failure.get()), (None, None));
        handle.submit(vec![Work { token_ids: [0, 5].into(), ..work(2, &contexts[1], mailbox) }]);
        drop(handle);
        runner.join();
        let message = Some("model step failed: planned".to_owned());
        assert_eq!((contexts[1].failure.get(), contexts[2].failure.get()), (message.clone(), message));
    });
}
