//! The real model in the real engine: greedy answers are byte for byte the same however the work is cut.
#![expect(clippy::unwrap_used, reason = "helpers of tests may panic")]

use std::sync::Arc;

use tidemill_kernels::gguf::Gguf;
use tidemill_kernels::models::checkpoint::Checkpoint;
use tidemill_kernels::models::transformer::{KvConfig, Transformer};
use tidemill_kernels::models::weights::{ModelWeights, NumericPath};
use tidemill_kernels::step::SamplingParams;
use tidemill_operators::infer::engine::{Engine, EngineConfig, EngineStats};
use tidemill_operators::infer::sequence::{SequenceId, SequenceRequest};
use tidemill_operators::tokenizer::gguf::text_of;
use tidemill_tests::default_model;

const SYSTEM: &str =
    "You are a careful news editor. You answer in one plain sentence and never invent facts.";
const DOCUMENTS: [&str; 6] = [
    "The river rose by two meters overnight and closed the old bridge.",
    "The river rose by two meters overnight and the school stayed shut.",
    "A small bakery won the prize for the best rye bread in the county.",
    "Scientists counted 412 seals on the sandbank, the most in twenty years.",
    "The match ended in a draw after a goal in the last minute.",
    "The library will open on Sundays from March, the council said.",
];
const MAX_TOKENS: u32 = 36;

struct Setting {
    name: &'static str,
    max_num_seqs: usize,
    max_num_batched_tokens: usize,
    enable_prefix_cache: bool,
    page_size: u32,
    num_pages: u32,
    num_threads: usize,
    reverse: bool,
}

const BASE: Setting = Setting {
    name: "base",
    max_num_seqs: 8,
    max_num_batched_tokens: 512,
    enable_prefix_cache: true,
    page_size: 16,
    num_pages: 256,
    num_threads: 2,
    reverse: false,
};

fn answers(
    weights: &Arc<ModelWeights>,
    prompts: &[Arc<[u32]>],
    setting: &Setting,
) -> (Vec<Vec<u32>>, EngineStats) {
    let kv = KvConfig { page_size: setting.page_size, num_pages: setting.num_pages };
    let model = Transformer::new(Arc::clone(weights), kv, setting.num_threads, "smollm2", "test").unwrap();
    let config = EngineConfig {
        max_num_seqs: setting.max_num_seqs,
        max_num_batched_tokens: setting.max_num_batched_tokens,
        enable_prefix_cache: setting.enable_prefix_cache,
    };
    let mut engine = Engine::new(Box::new(model), config);
    let mut order: Vec<usize> = (0..prompts.len()).collect();
    if setting.reverse {
        order.reverse();
    }
    let mut answers = vec![Vec::new(); prompts.len()];
    // Twice: the second time the prefix cache is warm.
    for _ in 0..2 {
        for &index in &order {
            let request = SequenceRequest {
                id: SequenceId(index as u64),
                token_ids: Arc::clone(&prompts[index]),
                max_tokens: MAX_TOKENS,
                sampling: SamplingParams::GREEDY,
            };
            engine.submit(request).unwrap();
        }
        while engine.has_work() {
            for finished in engine.step().unwrap() {
                let answer = &mut answers[finished.id.0 as usize];
                assert!(
                    answer.is_empty() || *answer == finished.token_ids,
                    "{}: warm and cold differ",
                    setting.name
                );
                *answer = finished.token_ids;
            }
        }
    }
    (answers, engine.stats())
}

#[test]
fn greedy_answers_do_not_depend_on_how_the_work_is_cut() {
    let gguf = Gguf::open(&default_model()).unwrap();
    let (tokenizer, chat) = text_of(&gguf).unwrap();
    let weights = ModelWeights::load(&Checkpoint::Gguf(gguf), NumericPath::Fast).unwrap();
    let prompts: Vec<Arc<[u32]>> = DOCUMENTS
        .iter()
        .map(|document| tokenizer.encode(&chat.render(Some(SYSTEM), document).unwrap()).unwrap().into())
        .collect();
    let (base, stats) = answers(&weights, &prompts, &BASE);
    assert!(base.iter().all(|answer| answer.len() > 3));
    assert!(stats.reused_tokens > 0, "the system prompt is shared");
    let settings = [
        Setting { name: "one sequence at a time", max_num_seqs: 1, ..BASE },
        Setting { name: "chunks of 7 tokens", max_num_batched_tokens: 7, ..BASE },
        Setting {
            name: "chunks of 33 tokens, no cache",
            max_num_batched_tokens: 33,
            enable_prefix_cache: false,
            ..BASE
        },
        Setting { name: "large pages", page_size: 64, num_pages: 64, ..BASE },
        Setting { name: "few pages: eviction and preemption", num_pages: 10, ..BASE },
        Setting { name: "reverse order, one thread", num_threads: 1, reverse: true, ..BASE },
        Setting { name: "after a restart", ..BASE },
    ];
    for setting in &settings {
        let (answers, stats) = answers(&weights, &prompts, setting);
        assert_eq!(answers, base, "{}", setting.name);
        if setting.num_pages == 10 {
            assert!(stats.preemptions > 0, "{}: nothing was preempted: {stats:?}", setting.name);
        }
    }
}
