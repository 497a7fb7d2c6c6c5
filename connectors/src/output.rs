//! Both sinks of a run and its manifest, committed together.
//!
//! A commit makes the parts of both sinks durable, appends one line to the manifest (the commit point), and
//! then shows the parts. A crash before the line loses the parts, which the next run makes again; a crash
//! after it loses nothing, since opening shows what the manifest holds. So each input row is in the output
//! exactly once. Streams have no manifest: they begin anew with every run.

use std::fmt;
use std::fs::{self, File};
use std::path::{Component, Path, PathBuf};

use arrow::array::RecordBatch;
use arrow::datatypes::SchemaRef;
use serde_json::Value;

use self::changes::changes;
use crate::jsonl::JsonlSink;
use crate::manifest::{Commit, Manifest, ManifestError};
use crate::parquet::ParquetSink;
use crate::sink::{Part, Sink, SinkError, sync_folder};
use crate::source::{Checkpoint, InputFile};

mod changes;

const MANIFEST: &str = "manifest.jsonl";
const LOCK: &str = "lock";
const STDOUT: &str = "-";

/// Where rows go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SinkSpec {
    /// A folder of part files.
    Parquet { path: PathBuf },
    /// A file, or `-` for standard output.
    Jsonl { path: PathBuf },
    /// JSON lines on standard error.
    Stderr,
}

/// What [`Output::open`] opens.
#[derive(Clone, Debug)]
pub struct OutputSpec {
    pub sink: SinkSpec,
    pub errors: SinkSpec,
    pub output_schema: SchemaRef,
    pub errors_schema: SchemaRef,
}

/// Where a run begins.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Resume {
    Fresh,
    /// Rows before `position` are committed.
    Continue {
        position: Checkpoint,
        rows: u64,
        errors: u64,
    },
    Finished {
        rows: u64,
        errors: u64,
    },
}

/// An open output; no other process can open it meanwhile.
pub struct Output {
    sink: Box<dyn Sink>,
    errors: Box<dyn Sink>,
    state: Option<State>,
    /// A write or a commit went wrong, so what is staged is unknown: only opening anew can tell.
    failed: bool,
    _locks: Vec<Lock>,
}

struct State {
    folder: PathBuf,
    manifest: Manifest,
}

struct Lock(File);

impl Drop for Lock {
    /// Closing alone is not enough: a child process has a copy of the file until it runs its program.
    fn drop(&mut self) {
        // A lock that cannot be let go is let go with the process.
        drop(self.0.unlock());
    }
}

#[derive(Debug, thiserror::Error)]
pub enum OutputError {
    #[error(transparent)]
    Sink(#[from] SinkError),
    #[error(transparent)]
    Manifest(ManifestError),
    #[error("output {path} is in use by another run")]
    Locked { path: PathBuf },
    #[error("output {path} was made by another definition: {changes}")]
    DefinitionChanged { path: PathBuf, changes: String },
    #[error("input {input} has changed since output {path} was begun")]
    InputsChanged { path: PathBuf, input: PathBuf },
    #[error("errors of output {path} went to {before} and would now go to {now}")]
    ErrorsMoved { path: PathBuf, before: PathBuf, now: PathBuf },
    #[error("results and errors have the same path {path}")]
    SamePath { path: PathBuf },
    #[error("output failed before and takes nothing more until it is opened anew")]
    Failed,
    #[error("output {path} is there already and no manifest tells where it is from")]
    Occupied { path: PathBuf },
}

impl From<ManifestError> for OutputError {
    /// A manifest that cannot be written is a matter of the disk, like any file of the output.
    fn from(error: ManifestError) -> Self {
        match error {
            ManifestError::Io { action, path, source } => SinkError::io(action, &path, source).into(),
            ManifestError::Corrupt { .. } => Self::Manifest(error),
        }
    }
}

impl OutputError {
    /// What the user can do.
    pub fn help(&self) -> Option<String> {
        Some(match self {
            Self::Sink(error) => return error.help(),
            Self::Manifest(_) => "the output was changed from outside: start anew with --force".to_owned(),
            Self::Locked { .. } => "wait for the other run, or give this one another path".to_owned(),
            Self::DefinitionChanged { .. } => {
                "take the change back to go on, give the sink another path, or start anew with --force"
                    .to_owned()
            }
            Self::InputsChanged { .. } => {
                "bring the input back to go on, give the sink another path, or start anew with --force"
                    .to_owned()
            }
            Self::ErrorsMoved { .. } => {
                "put the errors where they were, or give the sink another path".to_owned()
            }
            Self::SamePath { .. } => "give the errors a path of their own".to_owned(),
            Self::Failed => "run again: what was committed is kept".to_owned(),
            Self::Occupied { .. } => "move it away, or give the sink another path".to_owned(),
        })
    }
}

impl SinkSpec {
    fn open(&self, schema: SchemaRef) -> Result<Box<dyn Sink>, SinkError> {
        Ok(match self {
            Self::Parquet { path } => Box::new(ParquetSink::open(path, schema)?),
            Self::Jsonl { path } if path.as_os_str() == STDOUT => Box::new(JsonlSink::stdout()),
            Self::Jsonl { path } => Box::new(JsonlSink::open(path)?),
            Self::Stderr => Box::new(JsonlSink::stderr()),
        })
    }

    /// Where the manifest and the journal lie; `None` for what cannot be continued.
    fn state_folder(&self) -> Option<PathBuf> {
        match self {
            Self::Parquet { path } => Some(path.join("_tidemill")),
            Self::Jsonl { path } if path.as_os_str() == STDOUT => None,
            Self::Jsonl { path } if path.exists() && !path.is_file() => None,
            Self::Jsonl { path } => {
                let mut name = path.clone().into_os_string();
                name.push(".tidemill");
                Some(name.into())
            }
            Self::Stderr => None,
        }
    }

    fn path(&self) -> PathBuf {
        match self {
            Self::Parquet { path } | Self::Jsonl { path } => path.clone(),
            Self::Stderr => PathBuf::from("standard error"),
        }
    }
}

impl fmt::Display for SinkSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.path().display())
    }
}

impl Output {
    /// Opens an output and tells where to go on. `definition` is whatever decides the rows; work is only
    /// continued for an equal one over the same inputs. `force` removes what an earlier run made.
    pub fn open(
        spec: OutputSpec,
        definition: &Value,
        inputs: &[InputFile],
        force: bool,
    ) -> Result<(Self, Resume), OutputError> {
        let path = spec.sink.path();
        let Some(folder) = spec.sink.state_folder() else {
            let sink = spec.sink.open(spec.output_schema)?;
            let mut errors = spec.errors.open(spec.errors_schema)?;
            let locks = Vec::from_iter(lock_target(&spec.errors)?);
            if let Some(path) = errors.occupied()? {
                return Err(OutputError::Occupied { path });
            }
            errors.recover(&[])?;
            return Ok((Self { sink, errors, state: None, failed: false, _locks: locks }, Resume::Fresh));
        };
        fs::create_dir_all(&folder).map_err(|source| SinkError::io("create", &folder, source))?;
        let mut locks = vec![lock(&folder, &path)?];
        let mut sink = spec.sink.open(spec.output_schema)?;
        let mut errors = spec.errors.open(spec.errors_schema)?;
        if seen_from(&folder, &path) == seen_from(&folder, &spec.errors.path()) {
            return Err(OutputError::SamePath { path });
        }
        locks.extend(lock_target(&spec.sink)?);
        locks.extend(lock_target(&spec.errors)?);
        let errors_path = seen_from(&folder, &spec.errors.path());
        let now = inputs.iter().map(|input| InputFile { path: seen_from(&folder, &input.path), ..*input });
        let now: Vec<InputFile> = now.collect();
        let has_manifest = fs::metadata(folder.join(MANIFEST)).is_ok_and(|file| file.len() > 0);
        if force && has_manifest {
            // Errors are only ours to remove where the manifest says that they went.
            let before = Manifest::read_header(&folder.join(MANIFEST));
            if before.is_some_and(|header| header.errors == errors_path) {
                errors.recover(&[])?;
            } else if let Some(path) = errors.occupied()? {
                return Err(OutputError::Occupied { path });
            }
            sink.recover(&[])?;
            clear(&folder)?;
        }
        let mut manifest = Manifest::open(&folder.join(MANIFEST))?;
        match &manifest.header {
            None => {
                if let Some(path) = sink.occupied()?.or(errors.occupied()?) {
                    return Err(OutputError::Occupied { path });
                }
                manifest.begin(definition.clone(), now, errors_path)?;
                for made in [&folder, &path, &spec.errors.path()] {
                    sync_parents(made)?;
                }
            }
            Some(header) => {
                let changes = changes(&header.definition, definition);
                if !changes.is_empty() {
                    return Err(OutputError::DefinitionChanged { path, changes });
                }
                if header.errors != errors_path {
                    let before = folder.join(&header.errors);
                    return Err(OutputError::ErrorsMoved { path, before, now: spec.errors.path() });
                }
                if let Some(index) = changed_input(&header.inputs, &now) {
                    let before = || folder.join(&header.inputs[index].path);
                    let input = inputs.get(index).map_or_else(before, |input| input.path.clone());
                    return Err(OutputError::InputsChanged { path, input });
                }
            }
        }
        let resume = recover(&manifest, sink.as_mut(), errors.as_mut())?;
        let state = State { folder, manifest };
        Ok((Self { sink, errors, state: Some(state), failed: false, _locks: locks }, resume))
    }

    /// Stages results.
    pub fn write(&mut self, rows: &RecordBatch) -> Result<(), OutputError> {
        self.attempt(|output| Ok(output.sink.write(rows)?))
    }

    /// Stages errors.
    pub fn write_errors(&mut self, rows: &RecordBatch) -> Result<(), OutputError> {
        self.attempt(|output| Ok(output.errors.write(rows)?))
    }

    pub fn staged_rows(&self) -> u64 {
        self.sink.staged_rows() + self.errors.staged_rows()
    }

    pub fn staged_bytes(&self) -> u64 {
        self.sink.staged_bytes() + self.errors.staged_bytes()
    }

    /// Commits all that is staged; `position` is where it ends in the input.
    pub fn commit(&mut self, position: impl Into<Checkpoint>) -> Result<(), OutputError> {
        self.attempt(|output| output.commit_staged(position.into()))
    }

    fn commit_staged(&mut self, position: Checkpoint) -> Result<(), OutputError> {
        let output = self.sink.prepare()?;
        let errors = self.errors.prepare()?;
        if let Some(state) = &mut self.state {
            state.manifest.commit(Commit { position, output: output.clone(), errors: errors.clone() })?;
        }
        for (sink, part) in [(&mut self.sink, output), (&mut self.errors, errors)] {
            if let Some(part) = part {
                sink.publish(&part)?;
            }
        }
        Ok(())
    }

    /// Says that the input was used up; nothing may be staged.
    pub fn finish(&mut self) -> Result<(), OutputError> {
        self.attempt(|output| {
            assert_eq!(output.staged_rows(), 0, "finished with rows that are not committed");
            match &mut output.state {
                Some(state) => Ok(state.manifest.finish()?),
                None => Ok(()),
            }
        })
    }

    fn attempt(
        &mut self,
        work: impl FnOnce(&mut Self) -> Result<(), OutputError>,
    ) -> Result<(), OutputError> {
        if self.failed {
            return Err(OutputError::Failed);
        }
        let result = work(self);
        self.failed = result.is_err();
        result
    }

    /// Where a run may keep what it needs to go on; `None` if it cannot.
    pub fn state_dir(&self) -> Option<&Path> {
        self.state.as_ref().map(|state| state.folder.as_path())
    }
}

/// Shows what the manifest holds, removes the rest, and tells where to go on.
fn recover(manifest: &Manifest, sink: &mut dyn Sink, errors: &mut dyn Sink) -> Result<Resume, OutputError> {
    let parts = |part: fn(&Commit) -> &Option<Part>| -> Vec<Part> {
        manifest.commits.iter().filter_map(|commit| part(commit).clone()).collect()
    };
    let (output_parts, error_parts) = (parts(|commit| &commit.output), parts(|commit| &commit.errors));
    sink.recover(&output_parts)?;
    errors.recover(&error_parts)?;
    let count = |parts: &[Part]| parts.iter().map(|part| part.rows).sum();
    let (rows, num_errors) = (count(&output_parts), count(&error_parts));
    Ok(match manifest.commits.last() {
        _ if manifest.finished => Resume::Finished { rows, errors: num_errors },
        Some(last) => Resume::Continue { position: last.position.clone(), rows, errors: num_errors },
        None => Resume::Fresh,
    })
}

/// A path as seen from a folder, so that neither the current folder nor a move of the whole tree matters.
/// What is no file (a stream) is left as it is.
fn seen_from(folder: &Path, path: &Path) -> PathBuf {
    let (Ok(folder), Ok(path)) = (fs::canonicalize(folder), fs::canonicalize(path)) else {
        return path.to_owned();
    };
    let common = folder.components().zip(path.components()).take_while(|(a, b)| a == b).count();
    let up = folder.components().skip(common).map(|_| Component::ParentDir);
    up.chain(path.components().skip(common)).collect()
}

/// The new entries of two levels of folders: a path of ours makes up to two folders.
fn sync_parents(path: &Path) -> Result<(), SinkError> {
    for folder in path.ancestors().skip(1).take(2).filter(|folder| folder.is_dir()) {
        sync_folder(folder)?;
    }
    Ok(())
}

/// Keeps others from the files of a sink, whatever manifest they go by. Some network file systems cannot lock
/// folders; the lock of the state folder stands there alone.
fn lock_target(sink: &SinkSpec) -> Result<Option<Lock>, OutputError> {
    let path = sink.path();
    let Some(file) = sink.state_folder().and_then(|_| File::open(&path).ok()) else { return Ok(None) };
    match file.try_lock() {
        Err(fs::TryLockError::WouldBlock) => Err(OutputError::Locked { path }),
        Ok(()) | Err(fs::TryLockError::Error(_)) => Ok(Some(Lock(file))),
    }
}

fn lock(folder: &Path, output: &Path) -> Result<Lock, OutputError> {
    let path = folder.join(LOCK);
    let file = File::create(&path).map_err(|source| SinkError::io("create", &path, source))?;
    match file.try_lock() {
        Ok(()) => Ok(Lock(file)),
        Err(fs::TryLockError::WouldBlock) => Err(OutputError::Locked { path: output.to_owned() }),
        Err(fs::TryLockError::Error(source)) => Err(SinkError::io("lock", &path, source).into()),
    }
}

/// Removes everything in a state folder but the lock, the manifest last.
fn clear(folder: &Path) -> Result<(), SinkError> {
    let fail = |source| SinkError::io("clear", folder, source);
    for file in fs::read_dir(folder).map_err(fail)? {
        let file = file.map_err(fail)?;
        if file.file_name() != LOCK && file.file_name() != MANIFEST {
            let is_folder = file.file_type().map_err(fail)?.is_dir();
            let remove = if is_folder { fs::remove_dir_all } else { fs::remove_file::<PathBuf> };
            remove(file.path()).map_err(fail)?;
        }
    }
    fs::remove_file(folder.join(MANIFEST)).map_err(fail)
}

fn changed_input(before: &[InputFile], now: &[InputFile]) -> Option<usize> {
    (0..before.len().max(now.len())).find(|&index| before.get(index) != now.get(index))
}

#[cfg(test)]
mod fuzz;
#[cfg(test)]
mod tests;
