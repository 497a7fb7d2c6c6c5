//! The seam to an output: rows are staged, made durable, then made visible.
//!
//! A sink does not decide what is committed. It stages rows ([`write`](Sink::write)), makes them durable
//! without showing them ([`prepare`](Sink::prepare)), and shows them when the manifest has taken them in
//! ([`publish`](Sink::publish)). After a crash it is told what the manifest holds, and forgets the rest.

use std::error::Error;
use std::io;
use std::path::{Path, PathBuf};

use arrow::array::RecordBatch;
use serde::{Deserialize, Serialize};

/// A piece of output that is committed as a whole.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Part {
    /// The file's name in the sink's folder.
    pub name: String,
    pub rows: u64,
    /// Parquet: the file's length. JSONL: the file's length up to and with these rows.
    pub bytes: u64,
}

/// One output of a run.
pub trait Sink: Send {
    /// Stages rows; the schema is the one the sink was opened with.
    fn write(&mut self, rows: &RecordBatch) -> Result<(), SinkError>;
    fn staged_rows(&self) -> u64;
    /// About what the staged rows take in memory and on disk.
    fn staged_bytes(&self) -> u64;
    /// Makes the staged rows durable; `None` if there are none.
    fn prepare(&mut self) -> Result<Option<Part>, SinkError>;
    /// Shows a prepared part. Again is harmless.
    fn publish(&mut self, part: &Part) -> Result<(), SinkError>;
    /// Shows the committed parts, which are in the order of their commits, and removes all others of ours.
    fn recover(&mut self, committed: &[Part]) -> Result<(), SinkError>;
    /// A file of this sink's naming, if there is one: output that a manifest must account for.
    fn occupied(&self) -> Result<Option<PathBuf>, SinkError>;
}

#[derive(Debug, thiserror::Error)]
pub enum SinkError {
    #[error("no space left on the disk of {path}")]
    Full {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("cannot {action} output {path}")]
    Io {
        action: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("whoever read {path} has gone")]
    BrokenPipe { path: PathBuf },
    #[error("cannot encode rows for output {path}")]
    Encode {
        path: PathBuf,
        #[source]
        source: Box<dyn Error + Send + Sync>,
    },
    #[error("output {path} has {found} bytes, {committed} were committed")]
    Shortened { path: PathBuf, found: u64, committed: u64 },
    #[error("output part {path} was committed and is gone")]
    Missing { path: PathBuf },
}

impl SinkError {
    /// What the user can do.
    pub fn help(&self) -> Option<String> {
        Some(match self {
            Self::Full { .. } => "free some space and run again: what was committed is kept".to_owned(),
            Self::Io { .. } => "check that the folder exists, is a folder, and may be written".to_owned(),
            Self::BrokenPipe { .. } => return None,
            Self::Encode { .. } => {
                "a column type may not fit the format: Parquet takes all that Arrow has".to_owned()
            }
            Self::Shortened { .. } | Self::Missing { .. } => {
                "the output was changed from outside: bring it back, or start anew with --force".to_owned()
            }
        })
    }

    /// Sorts an I/O error by what the user can do about it.
    pub(crate) fn io(action: &'static str, path: &Path, source: io::Error) -> Self {
        let path = path.to_owned();
        match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Self::Full { path, source },
            io::ErrorKind::BrokenPipe => Self::BrokenPipe { path },
            _ => Self::Io { action, path, source },
        }
    }

    /// As [`io`](Self::io), for errors of encoders that hide an I/O error.
    pub(crate) fn encode(path: &Path, source: Box<dyn Error + Send + Sync>) -> Self {
        let mut cause: Option<&(dyn Error + 'static)> = Some(source.as_ref());
        while let Some(error) = cause {
            if let Some(error) = error.downcast_ref::<io::Error>() {
                return Self::io("write", path, io::Error::new(error.kind(), error.to_string()));
            }
            cause = error.source();
        }
        Self::Encode { path: path.to_owned(), source }
    }
}

/// Makes a folder's entries durable: a rename or a new file in it.
pub(crate) fn sync_folder(folder: &Path) -> Result<(), SinkError> {
    let folder = if folder.as_os_str().is_empty() { Path::new(".") } else { folder };
    std::fs::File::open(folder)
        .and_then(|file| file.sync_all())
        .map_err(|source| SinkError::io("sync the folder of", folder, source))
}
