//! What an output must never do to files that are not its own, or with a commit that failed.

use std::sync::Arc;

use arrow::array::{ArrayRef, Int64Array};
use serde_json::json;

use crate::output::*;

fn rows(ids: std::ops::Range<i64>) -> RecordBatch {
    RecordBatch::try_from_iter([("id", Arc::new(Int64Array::from_iter_values(ids)) as ArrayRef)]).unwrap()
}

fn at(row: u64) -> crate::source::Position {
    crate::source::Position { file: 0, row }
}

fn try_open(sink: SinkSpec, errors: SinkSpec, force: bool) -> Result<(Output, Resume), OutputError> {
    let schema = rows(0..1).schema();
    let spec = OutputSpec { sink, errors, output_schema: SchemaRef::clone(&schema), errors_schema: schema };
    Output::open(spec, &json!({ "a": 1 }), &[], force)
}

fn jsonl(folder: &Path, name: &str) -> SinkSpec {
    SinkSpec::Jsonl { path: folder.join(name) }
}

fn parquet(folder: &Path, name: &str) -> SinkSpec {
    SinkSpec::Parquet { path: folder.join(name) }
}

/// The errors path is no part of the definition: pointing it at a file of the user's must not cut that file.
#[test]
fn a_moved_errors_path_keeps_a_foreign_file() {
    for force in [false, true] {
        for commit in [false, true] {
            let folder = tempfile::tempdir().unwrap();
            let (mut output, _) =
                try_open(parquet(folder.path(), "out"), jsonl(folder.path(), "e.jsonl"), false).unwrap();
            if commit {
                output.write(&rows(0..2)).unwrap();
                output.commit(at(2)).unwrap();
            }
            drop(output);
            fs::write(folder.path().join("mine.jsonl"), "precious\n").unwrap();
            let result = try_open(parquet(folder.path(), "out"), jsonl(folder.path(), "mine.jsonl"), force);
            let left = fs::read_to_string(folder.path().join("mine.jsonl")).unwrap();
            assert_eq!(left, "precious\n", "force {force}, commit {commit}, opened {}", result.is_ok());
        }
    }
}

#[test]
fn a_moved_errors_folder_keeps_foreign_parts() {
    let folder = tempfile::tempdir().unwrap();
    drop(try_open(jsonl(folder.path(), "o.jsonl"), jsonl(folder.path(), "e.jsonl"), false).unwrap());
    let foreign = folder.path().join("other/part-00000.parquet");
    fs::create_dir_all(foreign.parent().unwrap()).unwrap();
    fs::write(&foreign, "precious").unwrap();
    let result = try_open(jsonl(folder.path(), "o.jsonl"), parquet(folder.path(), "other"), false);
    assert!(foreign.exists(), "foreign part removed, opened {}", result.is_ok());
}

/// Results to a stream, errors to files: what an earlier run left there must not be overwritten.
#[test]
fn a_streamed_run_does_not_overwrite_errors() {
    let folder = tempfile::tempdir().unwrap();
    let stream = || SinkSpec::Jsonl { path: "/dev/null".into() };
    fs::write(folder.path().join("e.jsonl"), "a long line that is not ours at all\n").unwrap();
    if let Ok((mut output, _)) = try_open(stream(), jsonl(folder.path(), "e.jsonl"), false) {
        output.write_errors(&rows(0..1)).unwrap();
        output.commit(at(1)).unwrap();
    }
    let text = fs::read_to_string(folder.path().join("e.jsonl")).unwrap();
    assert_eq!(text, "a long line that is not ours at all\n");
}

#[test]
fn a_streamed_run_does_not_replace_error_parts() {
    let folder = tempfile::tempdir().unwrap();
    let stream = || SinkSpec::Jsonl { path: "/dev/null".into() };
    let part = folder.path().join("e/part-00000.parquet");
    fs::create_dir_all(part.parent().unwrap()).unwrap();
    fs::write(&part, "precious").unwrap();
    if let Ok((mut output, _)) = try_open(stream(), parquet(folder.path(), "e"), false) {
        output.write_errors(&rows(0..1)).unwrap();
        output.commit(at(1)).unwrap();
    }
    assert_eq!(fs::read(&part).unwrap(), b"precious");
}

/// Two runs with results of their own but one errors file.
#[test]
fn two_runs_cannot_share_an_errors_sink() {
    let folder = tempfile::tempdir().unwrap();
    let (mut a, _) = try_open(parquet(folder.path(), "a"), jsonl(folder.path(), "e.jsonl"), false).unwrap();
    if let Ok((mut b, _)) = try_open(parquet(folder.path(), "b"), jsonl(folder.path(), "e.jsonl"), false) {
        a.write_errors(&rows(0..1)).unwrap();
        a.commit(at(1)).unwrap();
        b.write_errors(&rows(7..8)).unwrap();
        b.commit(at(1)).unwrap();
        let text = fs::read_to_string(folder.path().join("e.jsonl")).unwrap();
        assert_eq!(text.lines().count(), 2, "{text}");
    }
}

/// A commit that failed between the sinks, tried again: rows and counts stay exact after reopening.
#[test]
fn a_failed_commit_is_never_half_repeated() {
    let folder = tempfile::tempdir().unwrap();
    let errors = folder.path().join("errs");
    let open = || try_open(parquet(folder.path(), "out"), SinkSpec::Parquet { path: errors.clone() }, false);
    let (mut output, _) = open().unwrap();
    output.write(&rows(0..2)).unwrap();
    output.write_errors(&rows(0..1)).unwrap();
    // The errors sink fails to sync its folder: the folder is gone.
    fs::rename(&errors, folder.path().join("away")).unwrap();
    assert!(output.commit(at(2)).is_err());
    fs::rename(folder.path().join("away"), &errors).unwrap();
    let again = output.commit(at(2));
    drop(output);
    let (_, resume) = open().unwrap();
    match again {
        Ok(()) => assert_eq!(resume, Resume::Continue { position: at(2).into(), rows: 2, errors: 1 }),
        Err(_) => assert_eq!(resume, Resume::Fresh),
    }
}

#[test]
fn a_full_disk_at_the_manifest_is_no_advice_to_force() {
    let io = std::io::Error::from(std::io::ErrorKind::StorageFull);
    let error = ManifestError::Io { action: "write", path: "m".into(), source: io };
    let help = OutputError::from(error).help().unwrap();
    assert!(!help.contains("--force"), "{help}");
}

/// A committed part that lost its end is noticed.
#[test]
fn a_cut_part_is_noticed() {
    let folder = tempfile::tempdir().unwrap();
    let open = || try_open(parquet(folder.path(), "out"), jsonl(folder.path(), "e.jsonl"), false);
    let (mut output, _) = open().unwrap();
    output.write(&rows(0..2)).unwrap();
    output.commit(at(2)).unwrap();
    drop(output);
    let part = folder.path().join("out/part-00000.parquet");
    fs::write(&part, "cut").unwrap();
    assert!(open().is_err());
}

#[test]
fn no_rows_are_no_part() {
    let folder = tempfile::tempdir().unwrap();
    let (mut output, _) =
        try_open(parquet(folder.path(), "out"), jsonl(folder.path(), "e.jsonl"), false).unwrap();
    output.write(&rows(0..0)).unwrap();
    output.commit(at(1)).unwrap();
    assert!(!folder.path().join("out/part-00000.parquet").exists());
}

/// A named pipe whose reader has gone is a broken pipe and no endless wait.
#[test]
fn a_pipe_without_reader_is_noticed() {
    let folder = tempfile::tempdir().unwrap();
    let pipe = folder.path().join("pipe");
    assert!(std::process::Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    let path = pipe.clone();
    let reader = std::thread::spawn(move || drop(File::open(path).unwrap()));
    let (mut output, _) = try_open(SinkSpec::Jsonl { path: pipe }, SinkSpec::Stderr, false).unwrap();
    reader.join().unwrap();
    output.write(&rows(0..1)).unwrap();
    let result = output.commit(at(1));
    assert!(matches!(result, Err(OutputError::Sink(SinkError::BrokenPipe { .. }))), "{result:?}");
}

#[test]
fn results_and_errors_need_paths_of_their_own() {
    let folder = tempfile::tempdir().unwrap();
    let other = SinkSpec::Parquet { path: folder.path().join("./out/../out") };
    let result = try_open(parquet(folder.path(), "out"), other, false);
    assert!(matches!(result, Err(OutputError::SamePath { .. })));
}

/// Neither the way a path is written nor where the whole tree lies decides whether work goes on.
#[test]
fn a_moved_tree_is_continued() {
    let folder = tempfile::tempdir().unwrap();
    let open = |tree: &Path, bytes| {
        fs::create_dir_all(tree).unwrap();
        fs::write(tree.join("in.jsonl"), "x").unwrap();
        let schema = rows(0..1).schema();
        let spec = OutputSpec {
            sink: parquet(tree, "out"),
            errors: jsonl(tree, "e.jsonl"),
            output_schema: SchemaRef::clone(&schema),
            errors_schema: schema,
        };
        let inputs = [InputFile { path: tree.join("in.jsonl"), bytes }];
        Output::open(spec, &json!({ "a": 1 }), &inputs, false)
    };
    let (mut output, _) = open(&folder.path().join("a"), 1).unwrap();
    output.write(&rows(0..2)).unwrap();
    output.write_errors(&rows(0..1)).unwrap();
    output.commit(at(3)).unwrap();
    drop(output);
    fs::rename(folder.path().join("a"), folder.path().join("b")).unwrap();
    let tree = folder.path().join("./b");
    assert_eq!(open(&tree, 1).unwrap().1, Resume::Continue { position: at(3).into(), rows: 2, errors: 1 });
    let error = open(&tree, 2).map(|_| ()).unwrap_err();
    assert!(matches!(error, OutputError::InputsChanged { input, .. } if input == tree.join("in.jsonl")));
}

#[test]
fn force_starts_anew_over_a_corrupt_manifest() {
    let folder = tempfile::tempdir().unwrap();
    let open = |force| try_open(parquet(folder.path(), "out"), jsonl(folder.path(), "e.jsonl"), force);
    let (mut output, _) = open(false).unwrap();
    output.write(&rows(0..2)).unwrap();
    output.write_errors(&rows(0..1)).unwrap();
    output.commit(at(3)).unwrap();
    drop(output);
    let path = folder.path().join("out/_tidemill/manifest.jsonl");
    let text = fs::read_to_string(&path).unwrap();
    fs::write(&path, format!("{text}garbage\n")).unwrap();
    assert!(matches!(open(false), Err(OutputError::Manifest(_))));
    assert_eq!(open(true).unwrap().1, Resume::Fresh);
    assert_eq!(fs::read(folder.path().join("e.jsonl")).unwrap(), b"");
}
