//! Holds the path of GPUs to the golden logits of Hugging Face transformers, for every family, and to itself under other
//! schedules. Without a GPU the kernels run on the CPU, on tiny models and short prompts.

use std::sync::Arc;

use anyhow::Result;
use tidemill_kernels::gpu::{Gpu, GpuOptions, GpuWeights, HalfDtype};
use tidemill_kernels::models::Checkpoint;
use tidemill_tests::golden::{BF16_TOLERANCE, F16_TOLERANCE, Golden, OTHER_SCHEDULES};
use tidemill_tests::gpu::on_gpu;
use tidemill_tests::workspace;

/// Folder, and whether there is a GGUF file with the same weights.
const MODELS: [(&str, bool); 6] = [
    ("llama3", true),
    ("mistral", false),
    ("qwen2", true),
    ("qwen3", true),
    ("qwen3_moe", true),
    ("gemma3", true),
];

const DETERMINISTIC: GpuOptions = GpuOptions {
    deterministic: true,
    dtype: Some(HalfDtype::Bf16),
    weight_dtype: tidemill_kernels::gpu::WeightDtype::Half,
    kv_dtype: tidemill_kernels::gpu::KvDtype::Half,
};

fn load(path: &std::path::Path, options: GpuOptions) -> Result<Arc<GpuWeights>> {
    Ok(GpuWeights::load(&Gpu::open(0)?, &Checkpoint::open(path)?, options)?)
}

/// All of it on a GPU, a part where one is emulated.
fn golden(name: &str) -> Golden {
    let golden = Golden::read(name);
    if cfg!(feature = "cuda-tests") { golden } else { golden.shortened(0..3, 6) }
}

#[test]
fn families_equal_transformers() -> Result<()> {
    on_gpu("families_equal_transformers", || {
        for (name, has_gguf) in MODELS {
            let folder = workspace().join("tests/reference/tiny").join(name);
            let golden = golden(&format!("tiny/{name}/golden.json"));
            golden.check(&load(&folder, GpuOptions::default())?, BF16_TOLERANCE, name);
            if name != "gemma3" {
                let options = GpuOptions { dtype: Some(HalfDtype::F16), ..GpuOptions::default() };
                golden.check(&load(&folder, options)?, F16_TOLERANCE, &format!("{name}, f16"));
            }
            if has_gguf {
                let weights = load(&folder.join("model.gguf"), DETERMINISTIC)?;
                golden.check(&weights, BF16_TOLERANCE, &format!("{name}, GGUF"));
            }
        }
        Ok(())
    })
}

#[test]
fn deterministic_answers_have_the_same_bits_for_every_schedule() -> Result<()> {
    on_gpu("deterministic_answers_have_the_same_bits_for_every_schedule", || {
        for (name, dtype) in [("qwen3", HalfDtype::F16), ("gemma3", HalfDtype::Bf16)] {
            let folder = workspace().join("tests/reference/tiny").join(name);
            let golden = golden(&format!("tiny/{name}/golden.json"));
            let options = GpuOptions { dtype: Some(dtype), ..DETERMINISTIC };
            golden.check_schedules(&load(&folder, options)?, &OTHER_SCHEDULES, name);
        }
        Ok(())
    })
}

/// The real model, where it takes seconds.
#[cfg(feature = "cuda-tests")]
#[test]
fn real_model_equals_transformers() -> Result<()> {
    use tidemill_tests::default_model;
    let weights = load(&default_model(), DETERMINISTIC)?;
    let golden = Golden::read("smollm2-135m.json");
    golden.check(&weights, BF16_TOLERANCE, "SmolLM2");
    golden.shortened(0..10, 16).check_schedules(&weights, &OTHER_SCHEDULES, "SmolLM2");
    Ok(())
}
