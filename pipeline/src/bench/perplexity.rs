//! What the fast path costs in quality: its perplexity on a text, beside that of f32 on the same tokens.
//!
//! The text is cut into windows that are scored apart, each token by those before it in its window; where the model
//! wants a token of its own at the start of a text, each window gets it. The absolute
//! figure depends on text, tokenizer and window; the ratio of the two paths is what is wanted.

use serde::Serialize;
use tidemill_kernels::models::NumericPath;
use tidemill_kernels::step::{PageId, StepBatch};

use super::{BenchError, PerplexityArgs, io_error, model, table};
use crate::models::load::{Compute, load};

const PAGE_SIZE: u32 = 64;

#[derive(Debug, Serialize)]
pub(super) struct PerplexityReport {
    model: String,
    num_tokens: usize,
    window: u32,
    reference: f64,
    fast: f64,
    /// Of the fast path, above the reference.
    excess_percent: f64,
}

pub(super) fn measure(args: &PerplexityArgs) -> Result<PerplexityReport, BenchError> {
    let text = std::fs::read_to_string(&args.text).map_err(io_error("read", &args.text))?;
    let (reference, num_tokens) = perplexity(args, NumericPath::Reference, &text)?;
    let (fast, _) = perplexity(args, NumericPath::Fast, &text)?;
    Ok(PerplexityReport {
        model: args.model.clone(),
        num_tokens,
        window: args.window.into(),
        reference,
        fast,
        excess_percent: 100.0 * (fast / reference - 1.0),
    })
}

/// The perplexity of a text, and of how many tokens.
fn perplexity(args: &PerplexityArgs, path: NumericPath, text: &str) -> Result<(f64, usize), BenchError> {
    let loaded = load(&model(&args.model)?, &args.model, Compute::Cpu(path), &|_| ())?;
    let window = u32::from(args.window);
    let scorer = loaded.scorer(PAGE_SIZE, window.div_ceil(PAGE_SIZE))?;
    let (tokenizer, mut model) = scorer.ok_or_else(|| BenchError::NoWeights { name: args.model.clone() })?;
    let token_ids = tokenizer.encode(text)?;
    let pages: Vec<PageId> = (0..window.div_ceil(PAGE_SIZE)).map(PageId).collect();
    let (mut total, mut count) = (0.0, 0);
    let bos = tokenizer.bos();
    let text_ids = token_ids.strip_prefix(bos.as_slice()).unwrap_or(&token_ids);
    for tokens in text_ids.chunks(usize::from(args.window) - bos.iter().len()) {
        let tokens = [bos.as_slice(), tokens].concat();
        if tokens.len() < 2 {
            continue;
        }
        let mut batch = StepBatch::default();
        batch.push(&tokens, 0, &pages, None);
        let scores = model.log_probabilities(&batch);
        total += scores.iter().sum::<f64>();
        count += scores.len();
    }
    match count {
        0 => Err(BenchError::NoText { path: args.text.clone() }),
        _ => Ok(((-total / count as f64).exp(), count)),
    }
}

impl PerplexityReport {
    pub(super) fn render(&self) -> String {
        let row =
            |name: &str, value: f64, excess: String| vec![name.to_owned(), format!("{value:.4}"), excess];
        let rows = [
            row("f32 (reference)", self.reference, String::new()),
            row("int8 (cpu)", self.fast, format!("{:+.2} %", self.excess_percent)),
        ];
        let title = format!("{}, {} tokens in windows of {}", self.model, self.num_tokens, self.window);
        table(&[&title, "perplexity", "above f32"], rows)
    }
}
