//! Holds both numeric paths to the golden logits and tokens of Hugging Face transformers, on the real Gemma 3 270M.
//!
//! The golden file is written by `tests/reference/make_golden.py`; its last prompt is longer than the window.

use std::sync::Arc;

use tidemill_kernels::models::{Checkpoint, ModelWeights, NumericPath};
use tidemill_tests::golden::{FAST_TOLERANCE, Golden, OTHER_SCHEDULES, REFERENCE_TOLERANCE};
use tidemill_tests::model;

fn golden() -> Golden {
    Golden::read("gemma-3-270m.json")
}

fn load(path: NumericPath) -> Arc<ModelWeights> {
    let checkpoint = Checkpoint::open(&model("gemma-3-270m")).expect("a whole GGUF file");
    ModelWeights::load(&checkpoint, path).expect("a Gemma model")
}

#[test]
fn reference_path_equals_transformers() {
    golden().check(&load(NumericPath::Reference), REFERENCE_TOLERANCE, "Gemma 3");
}

#[test]
fn fast_path_equals_transformers() {
    golden().check(&load(NumericPath::Fast), FAST_TOLERANCE, "Gemma 3");
}

#[test]
fn fast_path_gives_the_same_bits_for_every_schedule() {
    // Single tokens take long with the last prompt; the tiny models are cut so.
    let golden = golden().shortened(15..20, 8);
    golden.check_schedules(&load(NumericPath::Fast), &OTHER_SCHEDULES[1..], "Gemma 3");
}
