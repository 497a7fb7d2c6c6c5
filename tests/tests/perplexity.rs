//! The fast path rounds to bytes, and that must cost next to nothing: its perplexity on a text stays within one
//! percent of f32. README.md gives the figures for the whole text.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail by panicking")]

use std::sync::Arc;

use tidemill_kernels::models::{Checkpoint, KvConfig, ModelWeights, NumericPath, Transformer};
use tidemill_kernels::step::{PageId, StepBatch};
use tidemill_operators::tokenizer::Tokenizer;
use tidemill_operators::tokenizer::gguf::text_of;
use tidemill_tests::{default_model, model, workspace};

const MAX_EXCESS: f64 = 0.01;
const WINDOW: usize = 512;
const NUM_WINDOWS: usize = 4;

/// Articles of the example, titles and bodies.
fn text() -> String {
    let lines = std::fs::read_to_string(workspace().join("examples/news-summaries/articles.jsonl")).unwrap();
    let article = |line: &str| {
        let article: serde_json::Value = serde_json::from_str(line).unwrap();
        format!("{}\n{}\n\n", article["title"].as_str().unwrap(), article["body"].as_str().unwrap())
    };
    lines.lines().map(article).collect()
}

fn perplexity(checkpoint: &Checkpoint, tokenizer: &Tokenizer, path: NumericPath) -> f64 {
    let weights: Arc<ModelWeights> = ModelWeights::load(checkpoint, path).unwrap();
    let kv = KvConfig { page_size: 64, num_pages: (WINDOW / 64) as u32 };
    let pages: Vec<PageId> = (0..kv.num_pages).map(PageId).collect();
    let mut model = Transformer::new(weights, kv, 2, "model", "test").unwrap();
    let token_ids = tokenizer.encode(&text()).unwrap();
    let bos = tokenizer.bos();
    let token_ids = token_ids.strip_prefix(bos.as_slice()).unwrap_or(&token_ids);
    let (mut total, mut count) = (0.0, 0);
    for tokens in token_ids.chunks(WINDOW - bos.iter().len()).take(NUM_WINDOWS) {
        let mut batch = StepBatch::default();
        batch.push(&[bos.as_slice(), tokens].concat(), 0, &pages, None);
        let scores = model.log_probabilities(&batch);
        total += scores.iter().sum::<f64>();
        count += scores.len();
    }
    (-total / count as f64).exp()
}

#[track_caller]
fn check(name: &str, path: &std::path::Path) {
    let checkpoint = Checkpoint::open(path).unwrap();
    let Checkpoint::Gguf(gguf) = &checkpoint else { panic!("{name} is a GGUF file") };
    let (tokenizer, _) = text_of(gguf).unwrap();
    let reference = perplexity(&checkpoint, &tokenizer, NumericPath::Reference);
    let fast = perplexity(&checkpoint, &tokenizer, NumericPath::Fast);
    println!("{name}: perplexity {reference:.3} in f32, {fast:.3} on the fast path");
    // A model that knows nothing has that of a guess, and would hide what rounding costs.
    assert!(reference < 200.0, "{name}: {reference}");
    assert!(fast < reference * (1.0 + MAX_EXCESS), "{name}: {fast} is too far from {reference}");
}

#[test]
fn smollm2_loses_less_than_a_percent() {
    check("SmolLM2", &default_model());
}

#[test]
fn gemma_loses_less_than_a_percent() {
    check("Gemma 3", &model("gemma-3-270m"));
}
