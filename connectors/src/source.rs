//! What every source of rows offers, whatever its format: batches with the exact address of each row.
//!
//! Invariant: reading from a [`Position`] yields the same rows in every run over the same inputs, however the
//! rows were cut into batches before. A bad row is a value, [`RejectedRow`]; only a broken input is an error.
//! Retries and parallel reading are absent: one source is one sequence of rows.

use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use arrow::array::RecordBatch;
use arrow::datatypes::SchemaRef;
use serde::{Deserialize, Serialize};

use crate::kafka::KafkaError;

/// The most bytes of a rejected row which are kept.
pub const MAX_REJECTED_BYTES: usize = 64 << 10;

/// The next row to read. The end of a file may be said as its number of rows or as row 0 of the next file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Position {
    /// Index into [`Source::inputs`].
    pub file: u32,
    /// 0-based; in line-based formats the number of the line, blank lines counted.
    pub row: u64,
}

/// Where to go on after what is committed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Checkpoint {
    /// Of inputs that are read one after the other.
    Row(Position),
    /// Of inputs that are read side by side: the next row of each, by name.
    Offsets(BTreeMap<String, u64>),
}

impl From<Position> for Checkpoint {
    fn from(position: Position) -> Self {
        Self::Row(position)
    }
}

impl Checkpoint {
    /// The state before anything is read.
    pub fn start(side_by_side: bool) -> Self {
        if side_by_side { Self::Offsets(BTreeMap::new()) } else { Self::Row(Position::default()) }
    }

    /// Takes in that everything before `end` in its input is done.
    pub fn advance(&mut self, end: Position, names: &InputNames) {
        match self {
            Self::Row(position) => *position = end,
            Self::Offsets(offsets) => {
                offsets.insert(names.get(end.file).to_string(), end.row);
            }
        }
    }
}

/// The names of inputs by their number; a stream adds to them while it is read.
#[derive(Clone, Debug, Default)]
pub struct InputNames {
    names: Arc<RwLock<Vec<Arc<str>>>>,
}

impl InputNames {
    pub fn of_files(files: &[InputFile]) -> Self {
        let names = files.iter().map(|file| file.path.display().to_string().into()).collect();
        Self { names: Arc::new(RwLock::new(names)) }
    }

    /// The number of a name, which is added if it is new.
    pub fn number(&self, name: &str) -> u32 {
        let mut names = self.names.write().unwrap_or_else(PoisonError::into_inner);
        let known = names.iter().position(|known| &**known == name);
        known.unwrap_or_else(|| {
            names.push(name.into());
            names.len() - 1
        }) as u32
    }

    /// A number that was never given out is its own name.
    pub fn get(&self, number: u32) -> Arc<str> {
        let names = self.names.read().unwrap_or_else(PoisonError::into_inner);
        names.get(number as usize).cloned().unwrap_or_else(|| number.to_string().into())
    }
}

/// One file to read, with its size when the source was opened.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct InputFile {
    pub path: PathBuf,
    pub bytes: u64,
}

/// Rows of one file or partition; never of two.
#[derive(Clone, Debug)]
pub struct SourceBatch {
    pub rows: RecordBatch,
    pub file: u32,
    /// The 0-based number of each row in its file. `[rows.num_rows()]`
    pub row_numbers: Vec<u64>,
    /// Rows between `start` and `end` which could not be read.
    pub rejected: Vec<RejectedRow>,
    /// The rejected rows as they came, if the source keeps more of them than text. `[rejected.len()]`
    pub rejected_rows: Option<RecordBatch>,
    /// Set when the rows are another reader's from now on: nothing of them may be written any more.
    pub revoked: Arc<AtomicBool>,
    pub start: Position,
    /// Where to continue after this batch; in the same file as `start`.
    pub end: Position,
}

/// A row which is malformed or does not fit the schema.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RejectedRow {
    pub file: u32,
    pub row: u64,
    pub reason: String,
    /// The start of the row, at most [`MAX_REJECTED_BYTES`]; bytes which are not UTF-8 are replaced.
    pub raw: String,
}

/// Where a batch ends. A single row above `max_bytes` is still delivered, alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BatchLimits {
    pub max_rows: usize,
    /// Decoded bytes for columnar formats, bytes of text for line-based ones.
    pub max_bytes: usize,
}

impl BatchLimits {
    /// Panics if a limit is zero: the plan checks both.
    pub(crate) fn check(self) -> Self {
        assert!(self.max_rows > 0, "max_rows is positive");
        assert!(self.max_bytes > 0, "max_bytes is positive");
        self
    }
}

/// What a source has to say when it is asked for rows.
#[derive(Debug)]
pub enum Read {
    Batch(SourceBatch),
    /// Nothing now; ask again.
    Idle,
    End,
}

/// A sequence of rows; of a stream, one that goes on.
pub trait Source: Send {
    /// The schema of every batch.
    fn schema(&self) -> SchemaRef;

    /// The files in the order they are read.
    fn inputs(&self) -> &[InputFile];

    /// All rows, rejected ones included; `None` if only reading can tell.
    fn num_rows(&self) -> Option<u64>;

    /// Names for the numbers in batches.
    fn names(&self) -> InputNames {
        InputNames::of_files(self.inputs())
    }

    /// Continues at `position`, exactly. Of a stream, none but [`resume`](Self::resume) is asked.
    fn seek(&mut self, position: Position) -> Result<(), SourceError>;

    /// Continues after what is committed.
    fn resume(&mut self, checkpoint: &Checkpoint) -> Result<(), SourceError> {
        match checkpoint {
            Checkpoint::Row(position) => self.seek(*position),
            Checkpoint::Offsets(_) => Err(SourceError::OtherKind),
        }
    }

    /// The next rows, or `None` at the end. A batch may hold rejected rows only.
    fn next_batch(&mut self) -> Result<Option<SourceBatch>, SourceError>;

    /// As [`next_batch`](Self::next_batch), but a stream returns in a moment, with or without rows.
    fn read(&mut self) -> Result<Read, SourceError> {
        Ok(self.next_batch()?.map_or(Read::End, Read::Batch))
    }

    /// How many rows the next batches may have, within the limits of the source: more, the faster they are taken.
    fn set_batch_rows(&mut self, _max_rows: usize) {}

    /// Whether to go on reading after the end until what was read is at the output: a group throws out who does not
    /// poll, and may bring more.
    fn reads_on(&self) -> bool {
        false
    }

    /// Called instead of [`read`](Self::read) again and again while nobody takes rows, which is for `held_back` now.
    fn hold_back(&mut self, _held_back: Duration) -> Result<(), SourceError> {
        Ok(())
    }
}

/// Why an input as a whole cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    #[error("no file or folder {path:?}")]
    NotFound { path: PathBuf },

    #[error("no input files in {path:?}")]
    NoFiles { path: PathBuf, wanted: String },

    #[error("more than {max_files} input files in {path:?}")]
    TooManyFiles { path: PathBuf, max_files: usize },

    #[error("input {path:?} is not a regular file")]
    NotAFile { path: PathBuf },

    #[error("malformed glob pattern {path:?}: {reason}")]
    Pattern { path: PathBuf, reason: String },

    #[error("cannot read {path:?}")]
    Io {
        path: PathBuf,
        #[source]
        source: io::Error,
    },

    #[error("corrupt {format} file {path:?}{}: {reason}", place(*row_group, *row))]
    Corrupt {
        path: PathBuf,
        format: &'static str,
        row_group: Option<usize>,
        /// The first row which was not read.
        row: Option<u64>,
        reason: String,
    },

    #[error("no column {name:?}")]
    UnknownColumn { name: String, available: Vec<String> },

    #[error("column {name:?} occurs twice in {path:?}")]
    DuplicateColumn { path: PathBuf, name: String },

    #[error("schema of {path:?} differs from {first:?} at column {column:?}: {reason}")]
    SchemaDiffers { path: PathBuf, first: PathBuf, column: String, reason: String },

    #[error("no row {} in file {} of the input", position.row, position.file)]
    NoSuchPosition { position: Position },

    #[error("stream {path:?} cannot go back from row {from} to row {to}")]
    NotSeekable { path: PathBuf, from: u64, to: u64 },

    #[error("the output was begun with another kind of input")]
    OtherKind,

    #[error(transparent)]
    Kafka(#[from] KafkaError),
}

impl SourceError {
    /// What the user can do about it.
    pub fn help(&self) -> Option<String> {
        Some(match self {
            Self::NotFound { .. } => "check the path; a relative path starts at the current folder".into(),
            Self::NoFiles { wanted, .. } => {
                format!("looked for {wanted}; names that begin with `.` or `_` are skipped")
            }
            Self::TooManyFiles { .. } => "name a smaller folder or a narrower pattern".into(),
            Self::NotAFile { .. } => "name a file, a folder or a glob pattern".into(),
            Self::Pattern { .. } => {
                "`*`, `?`, `[a-z]` and `**` are special; write `[*]` for a literal star".into()
            }
            Self::Io { source, .. } => match source.kind() {
                io::ErrorKind::PermissionDenied => "this user may not read it: check its permissions".into(),
                io::ErrorKind::NotFound => "it was there when the run began: was it moved?".into(),
                _ => return None,
            },
            Self::Corrupt { .. } => {
                "the file is cut off, damaged or of another format: write it again".into()
            }
            Self::UnknownColumn { available, .. } if available.is_empty() => {
                "the input has no columns".into()
            }
            Self::UnknownColumn { available, .. } => format!("available columns: {}", available.join(", ")),
            Self::DuplicateColumn { .. } => "give each column a name of its own".into(),
            Self::SchemaDiffers { .. } => {
                "all files of one input need the same columns: read the others in a run of their own".into()
            }
            Self::NoSuchPosition { .. } => "the input is shorter than it was: was it replaced?".into(),
            Self::NotSeekable { .. } => "write the stream to a file first: a file can be resumed".into(),
            Self::OtherKind => "give the sink another path, or start anew with --force".into(),
            Self::Kafka(error) => return error.help(),
        })
    }
}

fn place(row_group: Option<usize>, row: Option<u64>) -> String {
    match (row_group, row) {
        (Some(group), Some(row)) => format!(", row group {group}, from row {row} on"),
        (Some(group), None) => format!(", row group {group}"),
        (None, Some(row)) => format!(", from row {row} on"),
        (None, None) => String::new(),
    }
}
