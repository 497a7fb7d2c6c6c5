mod commits;
mod safety;

use std::sync::Arc;

use arrow::array::{ArrayRef, Int64Array};
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use serde_json::json;

use super::*;
use crate::source::Position;

/// In memory where there is such a folder: these tests sync often.
pub(super) fn scratch() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap()
}

pub(super) fn rows(ids: std::ops::Range<i64>) -> RecordBatch {
    RecordBatch::try_from_iter([("id", Arc::new(Int64Array::from_iter_values(ids)) as ArrayRef)]).unwrap()
}

fn spec(folder: &Path, is_parquet: bool) -> OutputSpec {
    let schema = rows(0..1).schema();
    let sink = if is_parquet {
        SinkSpec::Parquet { path: folder.join("results") }
    } else {
        SinkSpec::Jsonl { path: folder.join("results.jsonl") }
    };
    let errors = SinkSpec::Jsonl { path: folder.join("errors.jsonl") };
    OutputSpec { sink, errors, output_schema: SchemaRef::clone(&schema), errors_schema: schema }
}

fn inputs() -> Vec<InputFile> {
    vec![InputFile { path: "a.parquet".into(), bytes: 7 }]
}

fn open(folder: &Path, is_parquet: bool) -> (Output, Resume) {
    Output::open(spec(folder, is_parquet), &json!({ "a": 1 }), &inputs(), false).unwrap()
}

fn refused(folder: &Path, definition: &Value, inputs: &[InputFile]) -> OutputError {
    match Output::open(spec(folder, true), definition, inputs, false) {
        Ok(_) => panic!("opened"),
        Err(error) => error,
    }
}

pub(super) fn at(row: u64) -> Position {
    Position { file: 0, row }
}

/// Ids that a reader of the output sees.
fn visible(folder: &Path, is_parquet: bool) -> Vec<i64> {
    if is_parquet { parts(&folder.join("results")) } else { lines(&folder.join("results.jsonl")) }
}

/// Ids in the part files of a folder, those with a committed name only.
pub(super) fn parts(folder: &Path) -> Vec<i64> {
    let mut parts: Vec<PathBuf> = fs::read_dir(folder).unwrap().map(|file| file.unwrap().path()).collect();
    parts.retain(|path| path.file_name().unwrap().to_str().unwrap().starts_with("part-"));
    parts.sort();
    let mut ids = Vec::new();
    for part in parts {
        let reader =
            ParquetRecordBatchReaderBuilder::try_new(File::open(part).unwrap()).unwrap().build().unwrap();
        for batch in reader {
            let batch = batch.unwrap();
            let column = batch.column(0).as_any().downcast_ref::<Int64Array>().unwrap().clone();
            ids.extend(column.values().iter());
        }
    }
    ids
}

pub(super) fn lines(path: &Path) -> Vec<i64> {
    let text = fs::read_to_string(path).unwrap_or_default();
    let parse = |line: &str| serde_json::from_str::<Value>(line).unwrap()["id"].as_i64().unwrap();
    text.lines().map(parse).collect()
}

#[test]
fn a_run_goes_on_where_it_was_and_finishes_once() {
    for is_parquet in [true, false] {
        let folder = tempfile::tempdir().unwrap();
        let (mut output, resume) = open(folder.path(), is_parquet);
        assert_eq!(resume, Resume::Fresh);
        output.write(&rows(0..5)).unwrap();
        output.write_errors(&rows(90..91)).unwrap();
        output.commit(at(6)).unwrap();
        output.write(&rows(5..9)).unwrap();
        drop(output);
        assert_eq!(visible(folder.path(), is_parquet), [0, 1, 2, 3, 4]);
        let (mut output, resume) = open(folder.path(), is_parquet);
        assert_eq!(resume, Resume::Continue { position: at(6).into(), rows: 5, errors: 1 });
        output.write(&rows(5..9)).unwrap();
        output.commit(at(10)).unwrap();
        output.finish().unwrap();
        drop(output);
        assert_eq!(visible(folder.path(), is_parquet), (0..9).collect::<Vec<_>>());
        assert_eq!(lines(&folder.path().join("errors.jsonl")), [90]);
        assert_eq!(open(folder.path(), is_parquet).1, Resume::Finished { rows: 9, errors: 1 });
    }
}

#[test]
fn a_manifest_changed_from_outside_is_not_guessed_at() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("results/_tidemill/manifest.jsonl");
    drop(open(folder.path(), true));
    let header = fs::read_to_string(&path).unwrap();
    for (text, line) in
        [(format!("{header}{{\"comm"), 0), (format!("{header}garbage\n"), 2), ("{}\n".to_owned(), 1)]
    {
        fs::write(&path, text).unwrap();
        match Output::open(spec(folder.path(), true), &json!({ "a": 1 }), &inputs(), false) {
            Ok(_) => assert_eq!(line, 0),
            Err(error) => assert!(error.to_string().contains(&format!("at line {line}")), "{error}"),
        }
    }
}

#[test]
fn other_work_is_not_continued() {
    let folder = tempfile::tempdir().unwrap();
    let (output, _) = open(folder.path(), true);
    assert!(matches!(refused(folder.path(), &json!({ "a": 1 }), &inputs()), OutputError::Locked { .. }));
    drop(output);
    let changed = refused(folder.path(), &json!({ "a": 2, "b": [1] }), &inputs()).to_string();
    assert!(changed.ends_with("a was 1 and is 2, b was null and is [1]"), "{changed}");
    let grown = vec![InputFile { path: "a.parquet".into(), bytes: 8 }];
    assert!(matches!(refused(folder.path(), &json!({ "a": 1 }), &grown), OutputError::InputsChanged { .. }));
    assert!(matches!(refused(folder.path(), &json!({ "a": 1 }), &[]), OutputError::InputsChanged { .. }));
}

#[test]
fn force_removes_what_is_ours_and_nothing_else() {
    let folder = tempfile::tempdir().unwrap();
    let (mut output, _) = open(folder.path(), true);
    output.write(&rows(0..2)).unwrap();
    output.commit(at(2)).unwrap();
    output.finish().unwrap();
    drop(output);
    let foreign = folder.path().join("results/part-x.parquet");
    fs::write(&foreign, "not ours").unwrap();
    let (_, resume) = Output::open(spec(folder.path(), true), &json!({ "a": 2 }), &inputs(), true).unwrap();
    assert_eq!(resume, Resume::Fresh);
    assert!(foreign.exists() && !folder.path().join("results/part-00000.parquet").exists());
    let other = tempfile::tempdir().unwrap();
    fs::write(other.path().join("results.jsonl"), "{}\n").unwrap();
    for force in [false, true] {
        let opened = Output::open(spec(other.path(), false), &json!({}), &[], force);
        assert!(matches!(opened, Err(OutputError::Occupied { .. })));
    }
}

#[test]
fn a_full_disk_is_told_apart() {
    let folder = tempfile::tempdir().unwrap();
    let mut spec = spec(folder.path(), false);
    spec.sink = SinkSpec::Jsonl { path: "/dev/full".into() };
    let (mut output, resume) = Output::open(spec, &json!({}), &[], false).unwrap();
    assert_eq!(resume, Resume::Fresh);
    output.write(&rows(0..100)).unwrap();
    let error = output.commit(at(100)).unwrap_err();
    assert!(matches!(error, OutputError::Sink(SinkError::Full { .. })), "{error:?}");
}

#[test]
fn a_lost_part_is_noticed() {
    let folder = tempfile::tempdir().unwrap();
    for is_parquet in [true, false] {
        let (mut output, _) = open(folder.path(), is_parquet);
        output.write(&rows(0..2)).unwrap();
        output.commit(at(2)).unwrap();
        drop(output);
        let name = if is_parquet { "results/part-00000.parquet" } else { "results.jsonl" };
        fs::remove_file(folder.path().join(name)).unwrap();
        let opened = Output::open(spec(folder.path(), is_parquet), &json!({ "a": 1 }), &inputs(), false);
        assert!(matches!(opened, Err(OutputError::Sink(_))));
    }
}
