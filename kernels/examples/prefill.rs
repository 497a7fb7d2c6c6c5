//! Measures the fast path: prefill and decode speed, load time, memory.
//!
//!     cargo run --release -p tidemill-kernels --example prefill -- MODEL.gguf [NUM_THREADS]
//!
//! Token ids are arbitrary: the time does not depend on them.

#![expect(clippy::disallowed_methods, reason = "a measurement reads the clock")]

use std::path::PathBuf;
use std::time::Instant;

use anyhow::Context;
use tidemill_kernels::models::{Checkpoint, KvConfig, ModelWeights, NumericPath, Transformer};
use tidemill_kernels::step::{Model, PageId, SamplingParams, StepBatch};

const PAGE_SIZE: u32 = 16;
const NUM_PAGES: u32 = 1024;

fn main() -> anyhow::Result<()> {
    let mut args = std::env::args_os().skip(1);
    let path = PathBuf::from(args.next().context("usage: prefill MODEL.gguf [NUM_THREADS]")?);
    let num_threads = match args.next() {
        Some(text) => text.to_str().and_then(|text| text.parse().ok()).context("not a number of threads")?,
        None => std::thread::available_parallelism()?.get(),
    };
    let start = Instant::now();
    let weights = ModelWeights::load(&Checkpoint::open(&path)?, NumericPath::Fast)?;
    println!(
        "loaded in {:.2} s, {} KV bytes a token",
        start.elapsed().as_secs_f64(),
        weights.kv_bytes_per_token()
    );
    let kv = KvConfig { page_size: PAGE_SIZE, num_pages: NUM_PAGES };
    let mut model = Transformer::new(weights, kv, num_threads, "prefill", "")?;
    for num_tokens in [64, 512, 512, 2048] {
        let seconds = prefill(&mut model, 1, num_tokens)?;
        println!("prefill of {num_tokens}: {:.0} tokens/s", f64::from(num_tokens) / seconds);
    }
    for num_seqs in [1, 4, 16] {
        prefill(&mut model, num_seqs, 256)?;
        let num_steps = 32;
        let start = Instant::now();
        for step in 0..num_steps {
            model.step(&batch(num_seqs, 256 + step, 1))?;
        }
        let speed = f64::from(num_steps * num_seqs) / start.elapsed().as_secs_f64();
        println!("decode of {num_seqs} sequences after 256 tokens: {speed:.0} tokens/s");
    }
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    for line in status.lines().filter(|line| line.starts_with("VmHWM") || line.starts_with("RssAnon")) {
        println!("{line}");
    }
    Ok(())
}

/// Seconds of one step of `num_tokens` for each of some sequences.
fn prefill(model: &mut Transformer, num_seqs: u32, num_tokens: u32) -> anyhow::Result<f64> {
    let start = Instant::now();
    model.step(&batch(num_seqs, 0, num_tokens))?;
    Ok(start.elapsed().as_secs_f64())
}

fn batch(num_seqs: u32, first_position: u32, num_tokens: u32) -> StepBatch {
    let pages_each = NUM_PAGES / 16;
    let mut batch = StepBatch::default();
    for seq in 0..num_seqs {
        let token_ids: Vec<u32> =
            (0..num_tokens).map(|i| 1000 + (first_position + i + seq) * 37 % 20_000).collect();
        let first_page = seq * pages_each;
        let last_page = if num_seqs == 1 { NUM_PAGES } else { first_page + pages_each };
        let pages: Vec<PageId> = (first_page..last_page).map(PageId).collect();
        batch.push(&token_ids, first_position, &pages, Some(SamplingParams::GREEDY));
    }
    batch
}
