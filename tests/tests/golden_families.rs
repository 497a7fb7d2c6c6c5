//! Holds every family to the golden logits and tokens of Hugging Face transformers, on tiny random models that
//! `tests/reference/make_golden_families.py` writes as folders and as GGUF files.

use std::path::PathBuf;
use std::sync::Arc;

use tidemill_kernels::models::{Checkpoint, Family, ModelWeights, NumericPath};
use tidemill_tests::golden::{FAST_TOLERANCE, Golden, OTHER_SCHEDULES, REFERENCE_TOLERANCE};
use tidemill_tests::workspace;

/// Folder, family, and whether there is a GGUF file with the same weights.
const MODELS: [(&str, Family, bool); 6] = [
    ("llama3", Family::Llama, true),
    ("mistral", Family::Llama, false),
    ("qwen2", Family::Qwen2, true),
    ("qwen3", Family::Qwen3, true),
    ("qwen3_moe", Family::Qwen3Moe, true),
    ("gemma3", Family::Gemma3, true),
];

fn folder(name: &str) -> PathBuf {
    workspace().join("tests/reference/tiny").join(name)
}

fn load(path: PathBuf, numeric_path: NumericPath) -> Arc<ModelWeights> {
    let checkpoint = Checkpoint::open(&path).expect("a whole checkpoint");
    ModelWeights::load(&checkpoint, numeric_path).expect("a known family")
}

fn check_all(numeric_path: NumericPath, tolerance: f64) {
    for (name, family, has_gguf) in MODELS {
        let golden = Golden::read(&format!("tiny/{name}/golden.json"));
        let weights = load(folder(name), numeric_path);
        assert_eq!(weights.config.family, family);
        golden.check(&weights, tolerance, name);
        if has_gguf {
            let weights = load(folder(name).join("model.gguf"), numeric_path);
            golden.check(&weights, tolerance, &format!("{name}, GGUF"));
        }
    }
}

#[test]
fn reference_path_equals_transformers() {
    check_all(NumericPath::Reference, REFERENCE_TOLERANCE);
}

#[test]
fn fast_path_equals_transformers() {
    check_all(NumericPath::Fast, FAST_TOLERANCE);
}

#[test]
fn fast_path_gives_the_same_bits_for_every_schedule() {
    for (name, ..) in MODELS {
        let golden = Golden::read(&format!("tiny/{name}/golden.json"));
        golden.check_schedules(&load(folder(name), NumericPath::Fast), &OTHER_SCHEDULES, name);
    }
}
