//! The order of a commit, and what is left when it is cut short at any point.

use std::sync::Mutex;

use super::*;

/// Cuts the manifest of two commits at every byte: whole lines count, the rest was never there.
#[test]
fn a_torn_manifest_line_was_never_a_commit() {
    let made = scratch();
    let path = Path::new("results/_tidemill/manifest.jsonl");
    let (mut output, _) = open(made.path(), true);
    let header = fs::read(made.path().join(path)).unwrap().len();
    output.write(&rows(0..2)).unwrap();
    output.commit(at(2)).unwrap();
    output.write(&rows(2..4)).unwrap();
    output.commit(at(4)).unwrap();
    drop(output);
    let whole = fs::read(made.path().join(path)).unwrap();
    for len in 0..=whole.len() {
        let folder = scratch();
        fs::create_dir_all(folder.path().join("results/_tidemill")).unwrap();
        for part in ["part-00000.parquet", "part-00001.parquet"] {
            let part = Path::new("results").join(part);
            fs::copy(made.path().join(&part), folder.path().join(&part)).unwrap();
        }
        fs::write(folder.path().join(path), &whole[..len]).unwrap();
        let opened = Output::open(spec(folder.path(), true), &json!({ "a": 1 }), &inputs(), false);
        if len < header {
            // Parts are only ever made under a whole header: these are somebody else's.
            assert!(matches!(opened, Err(OutputError::Occupied { .. })), "cut to {len} bytes");
            assert_eq!(visible(folder.path(), true), [0, 1, 2, 3]);
            continue;
        }
        let num_commits = whole[header..len].iter().filter(|byte| **byte == b'\n').count() as u64;
        let rows = 2 * num_commits;
        let expected = match num_commits {
            0 => Resume::Fresh,
            _ => Resume::Continue { position: at(rows).into(), rows, errors: 0 },
        };
        assert_eq!(opened.unwrap().1, expected, "cut to {len} bytes");
        assert_eq!(visible(folder.path(), true), (0..rows as i64).collect::<Vec<_>>(), "cut to {len} bytes");
    }
}

fn refusal(spec: OutputSpec, force: bool) -> OutputError {
    match Output::open(spec, &json!({ "a": 1 }), &inputs(), force) {
        Ok(_) => panic!("opened"),
        Err(error) => error,
    }
}

#[test]
fn a_commit_may_hold_a_position_only_and_an_end_is_said_once() {
    fn is_send<T: Send>(_: &T) {}
    for is_parquet in [true, false] {
        let folder = scratch();
        let (mut output, _) = open(folder.path(), is_parquet);
        is_send(&output);
        output.write(&rows(0..0)).unwrap();
        assert_eq!((output.staged_rows(), output.staged_bytes()), (0, 0));
        output.commit(at(9)).unwrap();
        let state = output.state_dir().unwrap().to_owned();
        assert!(state.join("manifest.jsonl").exists());
        drop(output);
        let (mut output, resume) = open(folder.path(), is_parquet);
        assert_eq!(resume, Resume::Continue { position: at(9).into(), rows: 0, errors: 0 });
        output.write(&rows(0..2)).unwrap();
        output.write_errors(&rows(0..1)).unwrap();
        assert_eq!(output.staged_rows(), 3);
        assert!(output.staged_bytes() > 0);
        output.commit(at(12)).unwrap();
        output.finish().unwrap();
        output.finish().unwrap();
        drop(output);
        assert_eq!(open(folder.path(), is_parquet).1, Resume::Finished { rows: 2, errors: 1 });
    }
}

#[test]
fn force_clears_the_state_folder_whatever_is_in_it() {
    let folder = scratch();
    drop(open(folder.path(), true));
    let state = folder.path().join("results/_tidemill");
    fs::create_dir(state.join("journal")).unwrap();
    fs::write(state.join("journal/0"), "x").unwrap();
    fs::write(state.join("manifest.jsonl"), "garbage\n").unwrap();
    let error = refusal(spec(folder.path(), true), false);
    assert!(matches!(error, OutputError::Manifest(ManifestError::Corrupt { line: 1, .. })), "{error:?}");
    let (_, resume) = Output::open(spec(folder.path(), true), &json!({ "a": 1 }), &inputs(), true).unwrap();
    assert_eq!(resume, Resume::Fresh);
    assert!(!state.join("journal").exists());
}

#[test]
fn an_output_that_cannot_be_made_names_its_path() {
    let folder = scratch();
    fs::write(folder.path().join("file"), "").unwrap();
    for is_parquet in [true, false] {
        let error = refusal(spec(&folder.path().join("file"), is_parquet), false);
        assert!(error.to_string().contains("file/results"), "{error}");
        assert!(error.help().is_some());
    }
}

/// A sink that does nothing but tell when, by the lines of the manifest, and fails at one of its calls.
struct Recorder {
    name: &'static str,
    manifest: PathBuf,
    log: Arc<Mutex<Vec<String>>>,
    fails_at: Option<&'static str>,
}

impl Recorder {
    fn call(&self, what: &str) -> Result<(), SinkError> {
        let num_lines = fs::read_to_string(&self.manifest).unwrap().lines().count();
        self.log.lock().unwrap().push(format!("{what} {} at {num_lines}", self.name));
        let fails = self.fails_at == Some(what);
        if fails { Err(SinkError::BrokenPipe { path: self.name.into() }) } else { Ok(()) }
    }
}

impl Sink for Recorder {
    fn write(&mut self, _rows: &RecordBatch) -> Result<(), SinkError> {
        Ok(())
    }
    fn staged_rows(&self) -> u64 {
        1
    }
    fn staged_bytes(&self) -> u64 {
        0
    }
    fn prepare(&mut self) -> Result<Option<Part>, SinkError> {
        self.call("prepare")?;
        Ok(Some(Part { name: self.name.to_owned(), rows: 1, bytes: 1 }))
    }
    fn publish(&mut self, _part: &Part) -> Result<(), SinkError> {
        self.call("publish")
    }
    fn recover(&mut self, _committed: &[Part]) -> Result<(), SinkError> {
        Ok(())
    }
    fn occupied(&self) -> Result<Option<PathBuf>, SinkError> {
        Ok(None)
    }
}

#[test]
fn the_manifest_line_comes_between_making_durable_and_showing() {
    let steps =
        ["prepare results at 1", "prepare errors at 1", "publish results at 2", "publish errors at 2"];
    for (fails_at, num_steps) in
        [(None, 4), (Some((0, "prepare")), 1), (Some((1, "prepare")), 2), (Some((0, "publish")), 3)]
    {
        let folder = scratch();
        let (mut output, _) = open(folder.path(), true);
        let log = Arc::new(Mutex::new(Vec::new()));
        let recorder = |index: usize, name| -> Box<dyn Sink> {
            let manifest = folder.path().join("results/_tidemill/manifest.jsonl");
            let fails_at = fails_at.filter(|(at, _)| *at == index).map(|(_, what)| what);
            Box::new(Recorder { name, manifest, log: Arc::clone(&log), fails_at })
        };
        output.sink = recorder(0, "results");
        output.errors = recorder(1, "errors");
        assert_eq!(output.commit(at(1)).is_ok(), fails_at.is_none());
        assert_eq!(*log.lock().unwrap(), steps[..num_steps]);
        assert_eq!(output.commit(at(2)).is_ok(), fails_at.is_none());
        if fails_at.is_some() {
            assert!(matches!(output.finish(), Err(OutputError::Failed)));
        }
    }
}
