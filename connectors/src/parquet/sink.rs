//! Part files in a folder.
//!
//! A part is written under a hidden temporary name and renamed when it is committed, so whoever reads
//! `part-*.parquet` never sees rows that may be taken back.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::path::{Path, PathBuf};

use arrow::array::RecordBatch;
use arrow::datatypes::SchemaRef;
use parquet::arrow::ArrowWriter;
use parquet::basic::{Compression, ZstdLevel};
use parquet::file::properties::WriterProperties;

use crate::sink::{Part, Sink, SinkError, sync_folder};

/// Rows a row group holds at most: enough to compress well, few enough to stream.
const MAX_ROW_GROUP_ROWS: usize = 65_536;

/// Encoded bytes a row group holds at most, since it waits in memory until it is whole.
const MAX_ROW_GROUP_BYTES: usize = 32 << 20;

/// Writes `part-00000.parquet` and so on.
pub struct ParquetSink {
    folder: PathBuf,
    schema: SchemaRef,
    next_part: u64,
    writer: Option<ArrowWriter<File>>,
    staged_rows: u64,
}

impl ParquetSink {
    /// Makes the folder if it is not there.
    pub fn open(folder: &Path, schema: SchemaRef) -> Result<Self, SinkError> {
        fs::create_dir_all(folder).map_err(|source| SinkError::io("create", folder, source))?;
        Ok(Self { folder: folder.to_owned(), schema, next_part: 0, writer: None, staged_rows: 0 })
    }

    fn part_name(&self) -> String {
        format!("part-{:05}.parquet", self.next_part)
    }

    fn temporary(&self, name: &str) -> PathBuf {
        self.folder.join(format!(".{name}.tmp"))
    }

    fn writer(&mut self) -> Result<&mut ArrowWriter<File>, SinkError> {
        if self.writer.is_none() {
            let path = self.temporary(&self.part_name());
            let file = File::create(&path).map_err(|source| SinkError::io("create", &path, source))?;
            let properties = WriterProperties::builder()
                .set_compression(Compression::ZSTD(ZstdLevel::default()))
                .set_max_row_group_row_count(Some(MAX_ROW_GROUP_ROWS))
                .set_max_row_group_bytes(Some(MAX_ROW_GROUP_BYTES))
                .build();
            let writer = ArrowWriter::try_new(file, SchemaRef::clone(&self.schema), Some(properties))
                .map_err(|source| SinkError::encode(&path, source.into()))?;
            self.writer = Some(writer);
        }
        Ok(self.writer.as_mut().expect("made above"))
    }

    /// Names of the files in the folder that are ours.
    fn files(&self) -> Result<Vec<String>, SinkError> {
        let read = |source| SinkError::io("read", &self.folder, source);
        let mut names = Vec::new();
        for file in fs::read_dir(&self.folder).map_err(read)? {
            if let Ok(name) = file.map_err(read)?.file_name().into_string()
                && is_ours(&name)
            {
                names.push(name);
            }
        }
        names.sort();
        Ok(names)
    }
}

/// `part-00000.parquet`, or `.part-00000.parquet.tmp`.
fn is_ours(name: &str) -> bool {
    let name = name.strip_prefix('.').and_then(|name| name.strip_suffix(".tmp")).unwrap_or(name);
    let number = name.strip_prefix("part-").and_then(|name| name.strip_suffix(".parquet"));
    number.is_some_and(|number| number.len() >= 5 && number.bytes().all(|byte| byte.is_ascii_digit()))
}

impl Sink for ParquetSink {
    fn write(&mut self, rows: &RecordBatch) -> Result<(), SinkError> {
        if rows.num_rows() == 0 {
            return Ok(());
        }
        let path = self.temporary(&self.part_name());
        self.writer()?.write(rows).map_err(|source| SinkError::encode(&path, source.into()))?;
        self.staged_rows += rows.num_rows() as u64;
        Ok(())
    }

    fn staged_rows(&self) -> u64 {
        self.staged_rows
    }

    fn staged_bytes(&self) -> u64 {
        self.writer.as_ref().map_or(0, |writer| (writer.bytes_written() + writer.in_progress_size()) as u64)
    }

    fn prepare(&mut self) -> Result<Option<Part>, SinkError> {
        let Some(mut writer) = self.writer.take() else { return Ok(None) };
        let name = self.part_name();
        let path = self.temporary(&name);
        writer.finish().map_err(|source| SinkError::encode(&path, source.into()))?;
        let file = writer.inner();
        file.sync_all().map_err(|source| SinkError::io("sync", &path, source))?;
        let bytes = file.metadata().map_err(|source| SinkError::io("read", &path, source))?.len();
        // The temporary name must survive too: committing rolls forward from it.
        sync_folder(&self.folder)?;
        self.next_part += 1;
        Ok(Some(Part { name, rows: std::mem::take(&mut self.staged_rows), bytes }))
    }

    fn publish(&mut self, part: &Part) -> Result<(), SinkError> {
        let (temporary, path) = (self.temporary(&part.name), self.folder.join(&part.name));
        if temporary.exists() {
            fs::rename(&temporary, &path).map_err(|source| SinkError::io("rename", &path, source))?;
            sync_folder(&self.folder)?;
        } else if !path.exists() {
            return Err(SinkError::Missing { path });
        }
        Ok(())
    }

    fn recover(&mut self, committed: &[Part]) -> Result<(), SinkError> {
        for part in committed {
            self.publish(part)?;
            let path = self.folder.join(&part.name);
            let found = fs::metadata(&path).map_err(|source| SinkError::io("read", &path, source))?.len();
            if found != part.bytes {
                return Err(SinkError::Shortened { path, found, committed: part.bytes });
            }
        }
        let kept: BTreeSet<&str> = committed.iter().map(|part| part.name.as_str()).collect();
        for name in self.files()? {
            if !kept.contains(name.as_str()) {
                let path = self.folder.join(&name);
                fs::remove_file(&path).map_err(|source| SinkError::io("remove", &path, source))?;
            }
        }
        self.writer = None;
        self.staged_rows = 0;
        self.next_part = committed.len() as u64;
        Ok(())
    }

    fn occupied(&self) -> Result<Option<PathBuf>, SinkError> {
        // A temporary file was never shown to anyone.
        let is_part = |name: &&String| !name.starts_with('.');
        Ok(self.files()?.iter().find(is_part).map(|name| self.folder.join(name)))
    }
}

#[cfg(test)]
mod tests;
