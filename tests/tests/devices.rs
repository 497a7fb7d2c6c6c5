//! Which device a run takes and what it says of it, where there is no GPU and beside a driver that plays one.
#![expect(clippy::unwrap_used, reason = "helpers of tests may panic")]

use std::fs;

use serde_json::Value;
use tidemill_kernels::gpu::Gpu;
use tidemill_tests::gpu::FakeDriver;
use tidemill_tests::tiny::{store_as_f16, write_model};
use tidemill_tests::{Pipeline, Ran, default_model};

fn pipeline(model: &str, engine: &str) -> Pipeline {
    let pipeline = Pipeline::new(&format!(
        "name: devices\nmodel: {{ name: {model} }}\nengine: {{ {engine} }}\n\
         source: {{ jsonl: {{ path: input.jsonl }} }}\nsteps:\n  - generate:\n      name: answer\n\
         \x20     prompt: 'Say {{{{ text }}}}'\n      max_tokens: 2\n\
         \x20     ignore_eos: true\n\
         sink: {{ jsonl: {{ path: out/results.jsonl }} }}\n"
    ));
    fs::write(pipeline.path("input.jsonl"), "{\"text\": \"tide\"}\n").unwrap();
    pipeline
}

/// Why there is no GPU here; the tests below say nothing where there is one.
fn why_no_gpu() -> Option<String> {
    Gpu::open(0).err().map(|error| error.to_string())
}

#[test]
fn auto_takes_the_cpu_where_there_is_no_gpu_and_says_why_once() {
    let Some(why) = why_no_gpu() else { return };
    default_model();
    let pipeline = pipeline(
        "smollm2-135m-instruct",
        "device: auto, dtype: bfloat16, quantization: fp8, kv_cache_dtype: fp8",
    );
    let summary = pipeline.path("summary.json");
    let ran = pipeline.run(&["run", "--summary", summary.to_str().unwrap()]).expect_code(0);
    let ran = ran.expect_words(&["device: cpu; no GPU is used", &why, "quantization has no effect"]);
    let ran = ran.expect_words(&["note: dtype has no effect", "kv_cache_dtype has no effect"]);
    assert_eq!(ran.stderr().matches("no GPU is used").count(), 1, "{}", ran.stderr());
    let summary: Value = serde_json::from_str(&fs::read_to_string(summary).unwrap()).unwrap();
    assert_eq!(summary["device"], "cpu");
    let explained = pipeline.run(&["explain", "--json"]).expect_code(0);
    let explained: Value = serde_json::from_str(&explained.stdout()).unwrap();
    assert_eq!((&explained["device"], &explained["why_no_gpu"]), (&"cpu".into(), &why.into()));
}

#[test]
fn a_cpu_that_is_asked_for_needs_no_reason() {
    default_model();
    let pipeline = pipeline("smollm2-135m-instruct", "device: cpu, gpu_memory_utilization: 0.5");
    let ran = pipeline.run(&["run"]).expect_code(0);
    let ran = ran.expect_words(&["device: cpu", "gpu_memory_utilization has no effect on a CPU"]);
    assert!(!ran.stderr().contains("no GPU"), "{}", ran.stderr());
}

#[test]
fn a_gpu_that_is_demanded_and_missing_is_an_error() {
    let Some(why) = why_no_gpu() else { return };
    for model in ["fake", "smollm2-135m-instruct"] {
        for device in ["cuda", "cuda:0", "[cuda:0, cuda:1]"] {
            let pipeline = pipeline(model, &format!("device: {device}, quantization: fp8"));
            pipeline.run(&["check"]).expect_code(0);
            for command in ["run", "explain"] {
                let ran = pipeline.run(&[command]).expect_code(1);
                ran.expect_words(&["cannot use GPU cuda:0", &why, "let the device be auto or cpu"]);
            }
            assert!(pipeline.jsonl("out/results.jsonl").is_empty(), "nothing was answered");
        }
    }
}

#[test]
fn a_changed_number_is_another_definition() {
    let pipeline = pipeline("fake", "quantization: fp8");
    pipeline.run(&["run", "--quiet"]).expect_code(0);
    pipeline.run(&["run"]).expect_code(0).expect_words(&["nothing to do"]);
    let definition = fs::read_to_string(pipeline.path("pipeline.yaml")).unwrap();
    for other in ["dtype: float16", "kv_cache_dtype: fp8", "deterministic: true", "device: reference"] {
        let changed = definition.replace("quantization: fp8", other);
        fs::write(pipeline.path("pipeline.yaml"), changed).unwrap();
        pipeline.run(&["run"]).expect_code(1).expect_words(&["quantization", "--force"]);
    }
    let faster = definition.replace("quantization: fp8", "quantization: fp8, gpu_memory_utilization: 0.5");
    fs::write(pipeline.path("pipeline.yaml"), faster).unwrap();
    pipeline.run(&["run"]).expect_code(0).expect_words(&["nothing to do"]);
}

/// With a small model of its own and a driver that finds a GPU.
struct OnGpu {
    pipeline: Pipeline,
    driver: FakeDriver,
}

impl OnGpu {
    fn new(engine: &str) -> Self {
        let pipeline = pipeline("./tiny", engine);
        write_model(&pipeline.path("tiny"));
        Self { pipeline, driver: FakeDriver::new().unwrap() }
    }

    fn run(&self, args: &[&str]) -> Ran {
        let mut command = self.pipeline.command(args);
        self.driver.serve(&mut command);
        Ran(command.output().unwrap())
    }
}

#[test]
fn a_gpu_that_is_there_is_taken_and_named() {
    let settings = [
        ("device: auto", "in bf16"),
        ("device: cuda", "in bf16"),
        ("dtype: float16, deterministic: true", "in f16"),
        ("device: [cuda:0], deterministic: true, max_num_batched_tokens: 64, page_size: 16", "in bf16"),
        ("quantization: fp8, kv_cache_dtype: fp8, max_num_seqs: 4, kv_cache_memory: 4MiB", "in fp8"),
    ];
    for (engine, numbers) in settings {
        let gpu = OnGpu::new(engine);
        let device = format!("cuda:0 (fake H100) {numbers}");
        let ran = gpu.run(&["run"]).expect_code(0).expect_words(&[&format!("device: {device}")]);
        assert!(!ran.stderr().contains("no effect") && !ran.stderr().contains("no GPU"), "{}", ran.stderr());
        let rows = gpu.pipeline.jsonl("out/results.jsonl");
        assert_eq!((rows.len(), &rows[0]["answer_output_tokens"]), (1, &2.into()), "{engine}: {rows:?}");
        let explained = gpu.run(&["explain"]).expect_code(0);
        assert!(explained.stdout().contains(&device), "{}", explained.stdout());
    }
}

/// And a definition may ask for the other.
#[test]
fn a_model_stored_in_f16_is_computed_in_it() {
    for (engine, numbers) in [("device: cuda", "in f16"), ("dtype: bfloat16", "in bf16")] {
        let gpu = OnGpu::new(engine);
        store_as_f16(&gpu.pipeline.path("tiny"));
        gpu.run(&["run"]).expect_code(0).expect_words(&[numbers]);
        let rows = gpu.pipeline.jsonl("out/results.jsonl");
        assert_eq!((rows.len(), &rows[0]["answer_output_tokens"]), (1, &2.into()), "{engine}: {rows:?}");
    }
}

#[test]
fn a_gpu_without_room_is_left_or_refused_with_advice() {
    let engine = "gpu_memory_utilization: 0.0001, max_num_batched_tokens: 64, max_num_seqs: 4";
    let ran = OnGpu::new(engine).run(&["run"]).expect_code(0);
    ran.expect_words(&[
        "device: cpu; no GPU is used",
        "KV pages of",
        "do not fit beside weights and buffers",
    ]);
    let ran = OnGpu::new(&format!("device: cuda, {engine}")).run(&["run"]).expect_code(1);
    ran.expect_words(&[
        "do not fit",
        "raise engine.gpu_memory_utilization",
        "quantization to fp8",
        "smaller model",
    ]);
    let ran = OnGpu::new("device: [cuda:0, cuda:1]").run(&["run"]).expect_code(1);
    ran.expect_words(&["cannot use GPU cuda:1", "there is no CUDA device 1", "nvidia-smi -L"]);
}
