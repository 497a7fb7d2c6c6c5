//! Holds both numeric paths to the golden logits and tokens of Hugging Face transformers, on the real SmolLM2.
//!
//! The golden file is written by `tests/reference/make_golden.py`. Beyond it, the fast path must give the same bits
//! for every chunk size, page size, batch and number of threads.

use std::sync::Arc;

use tidemill_kernels::models::{Checkpoint, ModelWeights, NumericPath};
use tidemill_tests::default_model;
use tidemill_tests::golden::{FAST_TOLERANCE, Golden, OTHER_SCHEDULES, REFERENCE_TOLERANCE};

fn golden() -> Golden {
    Golden::read("smollm2-135m.json")
}

fn load(path: NumericPath) -> Arc<ModelWeights> {
    let checkpoint = Checkpoint::open(&default_model()).expect("a whole GGUF file");
    ModelWeights::load(&checkpoint, path).expect("a Llama model")
}

#[test]
fn reference_path_equals_transformers() {
    golden().check(&load(NumericPath::Reference), REFERENCE_TOLERANCE, "SmolLM2");
}

#[test]
fn fast_path_equals_transformers() {
    golden().check(&load(NumericPath::Fast), FAST_TOLERANCE, "SmolLM2");
}

#[test]
fn fast_path_gives_the_same_bits_for_every_schedule() {
    let golden = golden().shortened(0..10, 16);
    golden.check_schedules(&load(NumericPath::Fast), &OTHER_SCHEDULES, "SmolLM2");
}
