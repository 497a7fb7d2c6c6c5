//! Holds every weight type to the `gguf` package, block by block, and to transformers, as a whole model.
//!
//! The golden files in `tests/reference/quants` are written by `make_golden_quants.py`. Blocks are compared bit by bit;
//! logits come from another order of summation.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::Deserialize;
use tidemill_kernels::models::{Checkpoint, KvConfig, ModelWeights, NumericPath, Transformer};
use tidemill_kernels::quant::{Dtype, dequantize};
use tidemill_kernels::step::{PageId, StepBatch};

/// Relative to the largest logit.
const TOLERANCE: f32 = 1e-3;
const PAGE_SIZE: u32 = 16;

#[derive(Deserialize)]
struct Golden {
    #[serde(rename = "type")]
    dtype: String,
    token_ids: Vec<u32>,
    logits: Vec<f32>,
}

#[test]
fn blocks_of_every_type_equal_those_of_the_gguf_package() {
    for dtype in Dtype::ALL {
        let bytes = std::fs::read(file(&format!("{dtype}.bin"))).expect("the golden file is committed");
        let num_blocks = bytes.len() / (dtype.block_bytes() + dtype.block_len() * 4);
        let (blocks, expected) = bytes.split_at(num_blocks * dtype.block_bytes());
        let mut values = vec![f32::NAN; num_blocks * dtype.block_len()];
        dequantize(dtype, blocks, &mut values);
        let actual: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        assert!(num_blocks >= 4);
        assert_eq!(actual, expected, "{dtype}");
    }
}

#[test]
fn a_model_of_every_type_equals_transformers() {
    let golden = std::fs::read(file("logits.json")).expect("the golden file is committed");
    let golden: Vec<Golden> = serde_json::from_slice(&golden).expect("written by make_golden_quants.py");
    assert_eq!(golden.len(), Dtype::ALL.len());
    for Golden { dtype, token_ids, logits } in golden {
        let actual = last_logits(&file(&format!("{dtype}.gguf")), &token_ids);
        assert_eq!(actual.len(), logits.len());
        let largest = logits.iter().fold(0.0f32, |max, logit| max.max(logit.abs()));
        let error = actual.iter().zip(&logits).fold(0.0f32, |max, (a, b)| max.max((a - b).abs())) / largest;
        println!("{dtype}: largest relative error {error:.2e}");
        assert!(actual.iter().all(|logit| logit.is_finite()), "{dtype}");
        assert!(error < TOLERANCE, "the logits of {dtype} are off by {error}");
    }
}

/// Logits after the last token, on the f32 path.
fn last_logits(path: &Path, token_ids: &[u32]) -> Vec<f32> {
    let num_pages = (token_ids.len() as u32).div_ceil(PAGE_SIZE);
    let checkpoint = Checkpoint::open(path).expect("the golden file is committed");
    let weights = ModelWeights::load(&checkpoint, NumericPath::Reference).expect("a Llama model");
    let vocab_size = weights.config.vocab_size as usize;
    let kv = KvConfig { page_size: PAGE_SIZE, num_pages };
    let mut model = Transformer::new(Arc::clone(&weights), kv, 1, "golden", "golden").expect("a small cache");
    let pages: Vec<PageId> = (0..num_pages).map(PageId).collect();
    let mut batch = StepBatch::default();
    batch.push(token_ids, 0, &pages, None);
    let logits = model.logits(&batch);
    logits[logits.len() - vocab_size..].to_vec()
}

fn file(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("reference/quants").join(name)
}
