//! The measurements run, count what they say they count, and refuse what they cannot measure. No speed is judged.
#![expect(clippy::unwrap_used, reason = "helpers of tests may panic")]

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::Value;
use tidemill_tests::gpu::FakeDriver;
use tidemill_tests::tiny::write_model;
use tidemill_tests::{Ran, binary};

fn bench(args: &[&str], folder: &Path) -> Ran {
    let output =
        Command::new(binary()).arg("bench").args(args).current_dir(folder).stdin(Stdio::null()).output();
    Ran(output.unwrap())
}

fn json(path: &Path) -> Value {
    serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap()
}

#[test]
fn the_engine_is_measured_beside_the_machine() {
    let folder = tempfile::tempdir().unwrap();
    let args = ["engine", "--model", "fake", "--repeat", "1", "--threads", "1", "--json", "engine.json"];
    let ran = bench(&args, folder.path()).expect_code(0);
    for word in
        ["prefill 2048", "decode, shared 512, batch 64", "decode, distinct 512, batch 16", "first token"]
    {
        assert!(ran.stdout().contains(word), "{word} is missing in\n{}", ran.stdout());
    }
    let report = json(&folder.path().join("engine.json"));
    for peak in ["int8_gops", "f32_gflops", "read_gb_per_second", "copy_gb_per_second"] {
        assert!(report["machine"][peak].as_f64().unwrap() > 0.0, "{peak}: {report}");
    }
    for figure in report["figures"].as_array().unwrap() {
        assert!(figure["tokens_per_second"].as_f64().unwrap() > 0.0, "{figure}");
        assert_eq!(figure["samples"].as_array().unwrap().len(), 1);
    }
}

/// Beside a driver that plays a GPU: all of the way from the command line to kernels, at no speed.
#[test]
fn the_engine_is_measured_on_a_gpu() {
    let folder = tempfile::tempdir().unwrap();
    write_model(&folder.path().join("tiny"));
    let driver = FakeDriver::new().unwrap();
    let settings = [
        ("bf16", "auto", "bf16", "decode, batch 4"),
        ("fp8", "fp8", "fp8", "prefill 512"),
        ("f16", "auto", "f16", "decode, batch 4"),
    ];
    for (dtype, kv_cache_dtype, kv_cache, only) in settings {
        let mut command = Command::new(binary());
        driver.serve(command.current_dir(folder.path()).args(["bench", "engine", "--device", "cuda"]));
        command.args(["--model", "./tiny", "--peak-size", "64", "--repeat", "1", "--json", "gpu.json"]);
        command.args(["--dtype", dtype, "--kv-cache-dtype", kv_cache_dtype, "--only", only]);
        let ran = Ran(command.output().unwrap()).expect_code(0);
        let report = json(&folder.path().join("gpu.json"));
        assert_eq!(report["device"], "cuda:0 (fake H100)");
        assert_eq!((&report["weights"], &report["kv_cache"]), (&dtype.into(), &kv_cache.into()));
        for ceiling in ["half_tflops", "weight_tflops", "copy_gb_per_second"] {
            assert!(report["ceilings"][ceiling].as_f64().unwrap() > 0.0, "{ceiling}: {report}");
        }
        for rate in ["bus_gb_per_second", "weights_gb_per_second"] {
            assert!(report["loading"][rate].as_f64().unwrap() > 0.0, "{rate}: {report}");
        }
        let rows: Vec<&str> =
            report["rows"].as_array().unwrap().iter().map(|row| row["name"].as_str().unwrap()).collect();
        assert!(!rows.is_empty() && rows.iter().all(|name| name.starts_with(only)), "{rows:?}");
        for row in report["rows"].as_array().unwrap() {
            assert!(row["fraction"].as_f64().unwrap() > 0.0, "{row}");
        }
        assert!(ran.stdout().contains(only) && ran.stdout().contains("memory copied"), "{}", ran.stdout());
    }
}

#[test]
fn the_offline_job_answers_every_request_in_full() {
    let folder = tempfile::tempdir().unwrap();
    let line = |id| format!("{{\"id\": {id}, \"system\": \"You edit.\", \"user\": \"News {id}\"}}\n");
    fs::write(folder.path().join("requests.jsonl"), (0..30).map(line).collect::<String>()).unwrap();
    for device in ["auto", "[cpu:0, cpu:1]"] {
        let args = ["offline", "--requests", "requests.jsonl", "--model", "fake", "--device", device];
        let more = ["--repeat", "2", "--max-tokens", "5", "--json", "offline.json"];
        bench(&[&args[..], &more].concat(), folder.path()).expect_code(0);
        let report = json(&folder.path().join("offline.json"));
        assert_eq!(report["summary"]["documents"], 30, "on {device}");
        assert_eq!(report["summary"]["output_tokens"], 150, "on {device}");
        assert_eq!(report["samples"].as_array().unwrap().len(), 2);
    }
}

#[test]
fn what_cannot_be_measured_is_said() {
    let folder = tempfile::tempdir().unwrap();
    bench(&["offline"], folder.path()).expect_code(1).expect_words(&["no requests file", "offline_job.py"]);
    bench(&["engine", "--model", "smollm"], folder.path())
        .expect_code(2)
        .expect_words(&["smollm2-135m-instruct"]);
    bench(&["engine", "--shape", "qwen3-8b"], folder.path())
        .expect_code(1)
        .expect_words(&["on a GPU only", "--device cuda"]);
    bench(&["engine", "--device", "tpu"], folder.path()).expect_code(2).expect_words(&["cuda and cuda:N"]);
    // No machine has so many.
    bench(&["engine", "--device", "cuda:999", "--shape", "smollm2-135m"], folder.path())
        .expect_code(1)
        .expect_words(&["cannot use GPU cuda:999"]);
    fs::write(folder.path().join("requests.jsonl"), "{\"system\": \"a\", \"user\": \"b\"}\n").unwrap();
    let args = ["offline", "--requests", "requests.jsonl", "--model", "fake", "--device", "tpu"];
    bench(&args, folder.path()).expect_code(2).expect_words(&["no device \"tpu\"", "cpu:0"]);
}
