//! Bad input of every kind: a clear message that names the place and what to do, the right exit code, and
//! nothing lost.
#![expect(clippy::unwrap_used, reason = "helpers of tests may panic")]

use std::fs;
use std::io::{Seek, SeekFrom, Write};
use std::os::unix::fs::PermissionsExt;
use std::process::Command;
use std::sync::Arc;

use arrow::array::{ArrayRef, Int64Array, RecordBatch, StringArray};
use serde_json::Value;
use tidemill_tests::{Pipeline, binary, default_model, read_parts, write_parquet};

const DEFINITION: &str = "\
name: bad
model: { name: fake }
source: { parquet: { path: input.parquet, columns: [id, body] } }
steps:
  - generate:
      name: summary
      prompt: |
        Summarize.
        {{ body }}
      max_tokens: 8
sink: { parquet: { path: out/results } }
errors: { jsonl: { path: out/errors.jsonl }, budget: 50% }
";

/// Keys of the engine, and what is said of them.
const ENGINE_KEYS: [(&str, &[&str]); 13] = [
    ("gpu_memory_utilization: 0", &["gpu_memory_utilization is 0", "at most 1", "such as 0.9"]),
    ("gpu_memory_utilization: 1.5", &["gpu_memory_utilization is 1.5", "at most 1"]),
    ("gpu_memory_utilization: .nan", &["gpu_memory_utilization is NaN"]),
    ("gpu_memory_utilization: most", &["most"]),
    ("deterministic: maybe", &["maybe"]),
    ("dtype: float32", &["float32", "bfloat16", "float16"]),
    ("device: cpu, dtype: float16", &["engine.dtype is float16", "needs a GPU", "computes with int8"]),
    ("quantization: int4", &["int4", "fp8"]),
    ("kv_cache_dtype: int8", &["int8", "fp8"]),
    ("device: cpu, quantization: fp8", &["engine.quantization is fp8", "needs a GPU", "computes with int8"]),
    ("device: '[cpu:0]', kv_cache_dtype: fp8", &["no device", "[cpu:0]"]),
    (
        "device: [cpu:0, cpu:1], kv_cache_dtype: fp8",
        &["kv_cache_dtype is fp8", "leave it out", "auto or cuda"],
    ),
    ("device: reference, quantization: fp8", &["the reference computes with f32"]),
];

fn articles(num_rows: usize) -> RecordBatch {
    RecordBatch::try_from_iter([
        ("id", Arc::new(Int64Array::from_iter_values(0..num_rows as i64)) as ArrayRef),
        ("body", Arc::new(StringArray::from_iter_values((0..num_rows).map(|row| format!("Article {row}."))))),
    ])
    .unwrap()
}

fn pipeline(definition: &str) -> Pipeline {
    let pipeline = Pipeline::new(definition);
    write_parquet(&pipeline.path("input.parquet"), &articles(300), 100).unwrap();
    pipeline
}

/// Checks a definition and expects these words in the error.
#[track_caller]
fn check(change: (&str, &str), words: &[&str]) {
    assert!(DEFINITION.contains(change.0), "{:?} is not in the definition", change.0);
    let pipeline = pipeline(&DEFINITION.replace(change.0, change.1));
    pipeline.run(&["check"]).expect_code(2).expect_words(words);
}

#[test]
fn mistakes_in_a_definition_name_their_place() {
    check(("sink:", "snik:"), &["pipeline.yaml:11:1", "snik"]);
    check(("max_tokens: 8", "max_token: 8"), &["pipeline.yaml:10:7", "max_token", "max_tokens"]);
    check(("max_tokens: 8", "max_tokens: many"), &["pipeline.yaml:10:", "many"]);
    check(("max_tokens: 8", "max_tokens: 0"), &["pipeline.yaml:10:19", "must be at least 1"]);
    for (pair, place, words) in [
        ("temperature: -1", "10:20", "between 0 and 10"),
        ("top_p: 1.5", "10:14", "top_p is 1.5, it must be between 0 and 1"),
        ("min_p: 1", "10:14", "min_p is 1, it must be at least 0 and below 1"),
        ("min_p: -0.1", "10:14", "the most likely token"),
        ("repetition_penalty: 0", "10:27", "repetition_penalty is 0, it must be finite and above 0"),
        ("repetition_penalty: .inf", "10:27", "1 changes nothing"),
        ("presence_penalty: 2.1", "10:25", "presence_penalty is 2.1, it must be between -2 and 2"),
        ("frequency_penalty: .nan", "10:26", "frequency_penalty is NaN"),
        ("frequency_penalty: -3", "10:26", "0 changes nothing"),
    ] {
        let key = format!("steps[0].generate.{}", pair.split(':').next().unwrap());
        check(("max_tokens: 8", pair), &[&format!("pipeline.yaml:{place}"), &key, words]);
    }
    check(("max_tokens: 8", "min_p: low"), &["pipeline.yaml:10:", "low"]);
    check(("{{ body }}", "{{ boby }}"), &["pipeline.yaml:9:9", "\"boby\"", "did you mean \"body\"?"]);
    check(("{{ body }}", "{{ body "), &["pipeline.yaml:9", "not valid Jinja"]);
    check(("[id, body]", "[id, bodi]"), &["pipeline.yaml:3:", "\"bodi\"", "body"]);
    check(("input.parquet", "inputs.parquet"), &["pipeline.yaml:3:", "inputs.parquet"]);
    check(("name: fake", "name: smollm2-135m"), &["pipeline.yaml:2:", "no model", "smollm2-135m-instruct"]);
    check(("name: fake", "name: mine.gguf"), &["no model file", "mine.gguf"]);
    check(("name: fake", "name: fake, device: tpu"), &["pipeline.yaml:2:", "model.device", "\"tpu\"", "cpu"]);
    let engine = |device: &str| format!("engine: {{ device: {device} }}\nsteps:");
    for (device, message) in [
        ("[cpu:0, cpu:2]", "\"cpu:2\" stands where cpu:1 is expected"),
        ("[cpu:0, reference]", "\"reference\" stands where cpu:1 is expected"),
        ("[]", "names no device"),
        ("[gpu]", "no device \"gpu\""),
        ("cuda:x", "no device \"cuda:x\""),
        ("cpu:x", "no device \"cpu:x\""),
        ("[cpu:0, cuda:1]", "\"cuda:1\" stands where cpu:1 is expected"),
        ("[cuda:1, cpu:0]", "\"cpu:0\" stands where a GPU such as cuda:0 is expected"),
        ("[cuda, cuda:1]", "\"cuda\" stands where a GPU such as cuda:0 is expected"),
        ("[cuda:1, cuda:1]", "\"cuda:1\" is named twice"),
    ] {
        check(("steps:", &engine(device)), &["pipeline.yaml:4:19", "engine.device", message, "reference"]);
    }
    check(("steps:", &engine("7")), &["pipeline.yaml:4:", "a device such as"]);
    for (keys, words) in ENGINE_KEYS {
        check(
            ("steps:", &format!("engine: {{ {keys} }}\nsteps:")),
            &[&["pipeline.yaml:4:"][..], words].concat(),
        );
    }
    let twice = "name: fake, quantization: fp8 }\nengine: { quantization: fp8";
    check(("name: fake", twice), &["pipeline.yaml:2:", "given twice", "keep engine.quantization"]);
    let on_cpu = "name: fake, device: cpu, quantization: fp8";
    check(("name: fake", on_cpu), &["pipeline.yaml:2:", "model.quantization is fp8", "needs a GPU"]);
    check(("name: summary", "name: body"), &["pipeline.yaml:6:", "\"body\" that is there already"]);
    check(("name: summary", "name: two words"), &["pipeline.yaml:6:", "cannot name a column"]);
    check(("budget: 50%", "budget: half"), &["pipeline.yaml:12:", "half", "5%"]);
    check(("steps:", "steps: [\nsteps:"), &["pipeline.yaml"]);
    check(("path: out/results", "path: input.parquet"), &["pipeline.yaml:11:", "lies in the input"]);
    check(("{ path: out/errors.jsonl }", "{ path: out/results }"), &["same path"]);
}

#[test]
fn a_missing_definition_is_said_to_be_missing() {
    let pipeline = Pipeline::new("");
    let file = pipeline.path("nowhere.yaml");
    let output = Command::new(binary()).arg("run").arg(&file).output().unwrap();
    tidemill_tests::Ran(output).expect_code(2).expect_words(&["nowhere.yaml", "cannot read the definition"]);
}

#[test]
fn truncated_and_corrupt_parquet_is_named() {
    for len in [0, 3, 100, 2000] {
        let pipeline = pipeline(DEFINITION);
        let file = fs::OpenOptions::new().write(true).open(pipeline.path("input.parquet")).unwrap();
        file.set_len(len).unwrap();
        pipeline.run(&["check"]).expect_code(2).expect_words(&["pipeline.yaml:3:", "input.parquet"]);
    }
    // A hole in the data pages: the footer is fine, so it is found while reading.
    let pipeline = pipeline(DEFINITION);
    let mut file = fs::OpenOptions::new().write(true).open(pipeline.path("input.parquet")).unwrap();
    file.seek(SeekFrom::Start(10)).unwrap();
    file.write_all(&[0xff; 400]).unwrap();
    pipeline.run(&["run", "--quiet"]).expect_code(1).expect_words(&["input.parquet"]);
}

#[test]
fn bad_documents_leave_with_their_reason_and_the_rest_is_answered() {
    let pipeline = Pipeline::new(DEFINITION);
    let huge = "tide ".repeat(1 << 20);
    let bodies =
        [Some("Rain fell."), None, Some(""), Some(" \n "), Some(huge.as_str()), Some("The sun shone.")];
    let rows = RecordBatch::try_from_iter_with_nullable([
        ("id", Arc::new(Int64Array::from_iter_values(0..6)) as ArrayRef, false),
        ("body", Arc::new(StringArray::from_iter(bodies)) as ArrayRef, true),
    ])
    .unwrap();
    write_parquet(&pipeline.path("input.parquet"), &rows, 100).unwrap();
    let definition = DEFINITION.replace("50%", "4");
    fs::write(pipeline.path("pipeline.yaml"), &definition).unwrap();
    pipeline.run(&["run", "--quiet"]).expect_code(0);
    let errors = pipeline.jsonl("out/errors.jsonl");
    let seen: Vec<(u64, &str)> = errors
        .iter()
        .map(|error| (error["row"].as_u64().unwrap(), error["kind"].as_str().unwrap()))
        .collect();
    assert_eq!(seen, [(1, "null"), (2, "empty"), (3, "empty"), (4, "too_long")]);
    assert!(errors[0]["message"].as_str().unwrap().contains("\"body\""));
    assert!(errors.iter().all(|error| error["source"].as_str().unwrap().ends_with("input.parquet")));
    let document: Value = serde_json::from_str(errors[3]["document"].as_str().unwrap()).unwrap();
    assert_eq!(document["body"].as_str().unwrap().len(), huge.len(), "the document is kept whole");
    let results: usize =
        read_parts(&pipeline.path("out/results")).unwrap().iter().map(|batch| batch.num_rows()).sum();
    assert_eq!(results, 2);
}

#[test]
fn too_many_errors_stop_the_run_with_a_code_of_their_own() {
    let pipeline = Pipeline::new(&DEFINITION.replace("50%", "1%"));
    let bodies = (0..400).map(|row| (row % 2 == 0).then_some("A short article."));
    let rows = RecordBatch::try_from_iter_with_nullable([
        ("id", Arc::new(Int64Array::from_iter_values(0..400)) as ArrayRef, false),
        ("body", Arc::new(StringArray::from_iter(bodies)) as ArrayRef, true),
    ])
    .unwrap();
    write_parquet(&pipeline.path("input.parquet"), &rows, 100).unwrap();
    pipeline.run(&["run", "--quiet"]).expect_code(3).expect_words(&["documents failed", "error budget"]);
}

#[test]
fn an_output_is_neither_overwritten_nor_mixed() {
    let pipeline = pipeline(DEFINITION);
    pipeline.run(&["run", "--quiet"]).expect_code(0);
    let before = read_parts(&pipeline.path("out/results")).unwrap();
    pipeline.run(&["run"]).expect_code(0).expect_words(&["nothing to do", "300 rows"]);
    let changed = DEFINITION.replace("max_tokens: 8", "max_tokens: 9");
    fs::write(pipeline.path("pipeline.yaml"), &changed).unwrap();
    pipeline.run(&["run"]).expect_code(1).expect_words(&["max_tokens", "8", "9", "--force"]);
    assert_eq!(read_parts(&pipeline.path("out/results")).unwrap(), before);
    fs::write(pipeline.path("out/results/notes.txt"), "mine").unwrap();
    pipeline.run(&["run", "--quiet", "--force"]).expect_code(0);
    assert_ne!(read_parts(&pipeline.path("out/results")).unwrap(), before);
    assert!(pipeline.path("out/results/notes.txt").exists(), "a foreign file is not ours to delete");
}

#[test]
fn an_unwritable_output_is_refused_before_the_model_is_loaded() {
    let pipeline = pipeline(DEFINITION);
    // Root may write anywhere, so a file stands where the folder should be.
    fs::write(pipeline.path("out"), "a file").unwrap();
    pipeline.run(&["run", "--quiet"]).expect_code(1).expect_words(&["out"]);
    let read_only = pipeline.path("read-only");
    fs::create_dir(&read_only).unwrap();
    fs::set_permissions(&read_only, fs::Permissions::from_mode(0o555)).unwrap();
    fs::write(pipeline.path("pipeline.yaml"), DEFINITION.replace("out/", "/proc/nowhere/")).unwrap();
    pipeline.run(&["run", "--quiet"]).expect_code(1).expect_words(&["/proc/nowhere"]);
}

#[test]
fn a_full_disk_is_an_error_that_names_the_file() {
    let definition = DEFINITION.replace("parquet: { path: out/results }", "jsonl: { path: /dev/full }");
    let pipeline = pipeline(&definition);
    let ran = pipeline.run(&["run", "--quiet"]).expect_code(1);
    ran.expect_words(&["/dev/full", "space"]);
}

#[test]
fn truncated_and_absurd_model_files_are_refused() {
    let model = fs::read(default_model()).unwrap();
    let mut absurd = model[..4096].to_vec();
    // The number of tensors, then the number of metadata entries, at their places in the header.
    absurd[8..16].copy_from_slice(&u64::MAX.to_le_bytes());
    let mut endless = model[..4096].to_vec();
    endless[16..24].copy_from_slice(&(u64::MAX / 2).to_le_bytes());
    let cases: [(&str, &[u8]); 6] = [
        ("empty", b""),
        ("magic", b"PK\x03\x04 not a model"),
        ("header", &model[..40]),
        ("cut", &model[..model.len() / 2]),
        ("absurd", &absurd),
        ("endless", &endless),
    ];
    for (name, bytes) in cases {
        let file = format!("{name}.gguf");
        let pipeline = pipeline(&DEFINITION.replace("name: fake", &format!("name: {file}")));
        fs::write(pipeline.path(&file), bytes).unwrap();
        pipeline.run(&["run", "--quiet"]).expect_code(1).expect_words(&[&file]);
        let output =
            Command::new(binary()).args(["models", "inspect"]).arg(pipeline.path(&file)).output().unwrap();
        tidemill_tests::Ran(output).expect_code(1).expect_words(&[&file]);
    }
}

#[test]
fn a_corrupt_model_in_the_cache_is_never_used() {
    let real = default_model();
    let cache = tempfile::tempdir().unwrap();
    let folder = cache.path().join("models/smollm2-135m-instruct");
    fs::create_dir_all(&folder).unwrap();
    let copy = folder.join(real.file_name().unwrap());
    let mut bytes = fs::read(&real).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&copy, bytes).unwrap();
    let mut pipeline = pipeline(&DEFINITION.replace("name: fake", "name: smollm2-135m-instruct"));
    pipeline.env.push(("TIDEMILL_CACHE", cache.path().to_str().unwrap().to_owned()));
    pipeline.run(&["run", "--quiet"]).expect_code(1).expect_words(&["corrupt", "SHA-256", "models pull"]);
}

#[test]
fn an_unknown_model_on_the_command_line_suggests_names() {
    let output = Command::new(binary()).args(["models", "pull", "smolm"]).output().unwrap();
    tidemill_tests::Ran(output).expect_code(2).expect_words(&["no model \"smolm\"", "smollm2-135m-instruct"]);
}
