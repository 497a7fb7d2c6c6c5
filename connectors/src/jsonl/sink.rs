//! JSON lines in one growing file, or on a stream.
//!
//! Rows wait in memory until they are committed; then they are appended and synced. What a crash left
//! beyond the committed length is cut off before anything is added. A stream (standard output, a pipe, a
//! device) cannot be cut: it is flushed at each commit, and after a crash rows come again.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use arrow::array::RecordBatch;
use arrow::json::writer::{LineDelimited, WriterBuilder};

use crate::sink::{Part, Sink, SinkError, sync_folder};

/// Writes JSON lines.
pub struct JsonlSink {
    path: PathBuf,
    target: Target,
    staged: Vec<u8>,
    staged_rows: u64,
    /// Length of what is committed or prepared.
    len: u64,
}

enum Target {
    File(File),
    Stream(Box<dyn Write + Send>),
}

impl JsonlSink {
    /// Opens a file, without changing it; its folder is made if need be.
    pub fn open(path: &Path) -> Result<Self, SinkError> {
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder).map_err(|source| SinkError::io("create", folder, source))?;
        }
        // A pipe must be opened for writing alone: with a reading end of our own it would never be seen broken.
        let is_stream = path.exists() && !path.is_file();
        let file = OpenOptions::new().write(true).create(!is_stream).truncate(false).open(path);
        let file = file.map_err(|source| SinkError::io("open", path, source))?;
        let is_file = file.metadata().map_err(|source| SinkError::io("open", path, source))?.is_file();
        let target = if is_file { Target::File(file) } else { Target::Stream(Box::new(file)) };
        Ok(Self::new(path, target))
    }

    /// Standard output.
    pub fn stdout() -> Self {
        Self::new(Path::new("standard output"), Target::Stream(Box::new(io::stdout())))
    }

    /// Standard error.
    pub fn stderr() -> Self {
        Self::new(Path::new("standard error"), Target::Stream(Box::new(io::stderr())))
    }

    fn new(path: &Path, target: Target) -> Self {
        Self { path: path.to_owned(), target, staged: Vec::new(), staged_rows: 0, len: 0 }
    }

    fn append(&mut self) -> io::Result<()> {
        match &mut self.target {
            Target::File(file) => {
                file.seek(SeekFrom::Start(self.len))?;
                let written = file.write_all(&self.staged).and_then(|()| file.sync_all());
                // Half a line is of use to nobody. If the cut fails too, the next run makes it.
                written.inspect_err(|_| drop(file.set_len(self.len)))
            }
            Target::Stream(stream) => {
                stream.write_all(&self.staged)?;
                stream.flush()
            }
        }
    }
}

impl Sink for JsonlSink {
    fn write(&mut self, rows: &RecordBatch) -> Result<(), SinkError> {
        let before = self.staged.len();
        let mut writer =
            WriterBuilder::new().with_explicit_nulls(true).build::<_, LineDelimited>(&mut self.staged);
        let written = writer.write(rows).and_then(|()| writer.finish());
        drop(writer);
        if let Err(source) = written {
            self.staged.truncate(before);
            return Err(SinkError::encode(&self.path, source.into()));
        }
        self.staged_rows += rows.num_rows() as u64;
        Ok(())
    }

    fn staged_rows(&self) -> u64 {
        self.staged_rows
    }

    fn staged_bytes(&self) -> u64 {
        self.staged.len() as u64
    }

    fn prepare(&mut self) -> Result<Option<Part>, SinkError> {
        if self.staged_rows == 0 {
            return Ok(None);
        }
        self.append().map_err(|source| SinkError::io("write", &self.path, source))?;
        self.len += self.staged.len() as u64;
        self.staged.clear();
        let name = self.path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        Ok(Some(Part { name, rows: std::mem::take(&mut self.staged_rows), bytes: self.len }))
    }

    fn publish(&mut self, _part: &Part) -> Result<(), SinkError> {
        Ok(())
    }

    fn recover(&mut self, committed: &[Part]) -> Result<(), SinkError> {
        let Target::File(file) = &mut self.target else { return Ok(()) };
        let fail = |source| SinkError::io("cut", &self.path, source);
        let found = file.metadata().map_err(fail)?.len();
        let len = committed.last().map_or(0, |part| part.bytes);
        if found < len {
            return Err(SinkError::Shortened { path: self.path.clone(), found, committed: len });
        }
        file.set_len(len).map_err(fail)?;
        file.sync_all().map_err(fail)?;
        sync_folder(self.path.parent().unwrap_or(Path::new("")))?;
        self.staged.clear();
        self.staged_rows = 0;
        self.len = len;
        Ok(())
    }

    fn occupied(&self) -> Result<Option<PathBuf>, SinkError> {
        let Target::File(file) = &self.target else { return Ok(None) };
        let len = file.metadata().map_err(|source| SinkError::io("read", &self.path, source))?.len();
        Ok((len > 0).then(|| self.path.clone()))
    }
}

#[cfg(test)]
mod tests;
