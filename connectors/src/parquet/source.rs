//! Reads Parquet files, row group by row group and page by page.
//!
//! Invariant: at most one batch and one page of each column is in memory, whatever the size of file and row
//! group. How many bytes a row decodes to is unknown beforehand (a dictionary of one long text may stand for
//! a million rows), so rows are decoded in small chunks which are joined until a limit is reached.
//! Filters on rows and the page index are absent: every row of the chosen columns is read.

use std::collections::{BTreeSet, VecDeque};
use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use ::parquet::arrow::ProjectionMask;
use ::parquet::arrow::arrow_reader::{
    ArrowReaderMetadata, ArrowReaderOptions, ParquetRecordBatchReader, ParquetRecordBatchReaderBuilder,
};
use ::parquet::basic::Type;
use ::parquet::file::metadata::{ParquetMetaData, RowGroupMetaData};
use arrow::array::{Array, RecordBatch, RecordBatchOptions};
use arrow::compute::concat_batches;
use arrow::datatypes::{DataType, Schema, SchemaRef};

use crate::files;
use crate::source::{BatchLimits, InputFile, Position, Source, SourceBatch, SourceError};

mod guard;
#[cfg(test)]
mod tests;

const EXTENSIONS: [&str; 2] = ["parquet", "pq"];
/// The most rows decoded at once.
const MAX_CHUNK_ROWS: usize = 1024;
/// The same for columns whose metadata does not tell how large their values are.
const MAX_CHUNK_ROWS_UNSIZED: usize = 64;
/// The most bytes of a batch whatever the limits say: text offsets are 32 bits wide.
const MAX_BATCH_BYTES: usize = 1 << 30;

/// The rows of one Parquet file, of a folder of them or of a glob pattern.
pub struct ParquetSource {
    inputs: Vec<InputFile>,
    /// Of each input.
    num_rows: Vec<u64>,
    schema: SchemaRef,
    columns: Option<Vec<String>>,
    limits: BatchLimits,
    next: Position,
    reader: Option<FileReader>,
}

/// Reads on in the file of `next`.
struct FileReader {
    batches: ParquetRecordBatchReader,
    /// Decoded and not delivered yet, in order.
    chunks: VecDeque<RecordBatch>,
    /// For each column of the schema, its index in what `batches` yields.
    order: Vec<usize>,
    row_group_ends: Vec<u64>,
    /// Why decoding ended early; said after the rows before it are delivered.
    failed: Option<String>,
}

impl ParquetSource {
    /// Opens `path` and reads the schema of every file; `columns` picks and orders top-level columns.
    pub fn open(path: &Path, columns: Option<&[String]>, limits: BatchLimits) -> Result<Self, SourceError> {
        let inputs = files::resolve(path, &EXTENSIONS)?;
        let mut num_rows = Vec::with_capacity(inputs.len());
        let mut schema: Option<Schema> = None;
        for input in &inputs {
            let (_, metadata) = open_file(input)?;
            num_rows.push(row_group_ends(&input.path, metadata.metadata())?.last().copied().unwrap_or(0));
            let found = pick(&input.path, metadata.schema(), columns)?.0;
            schema = Some(match schema {
                None => found,
                Some(first) => unify(first, &found, &inputs[0].path, &input.path)?,
            });
        }
        Ok(Self {
            num_rows,
            schema: Arc::new(schema.expect("resolved inputs are never empty")),
            columns: columns.map(<[String]>::to_vec),
            limits: limits.check(),
            next: Position::default(),
            reader: None,
            inputs,
        })
    }

    fn file_reader(&self) -> Result<FileReader, SourceError> {
        let input = &self.inputs[self.next.file as usize];
        let (file, metadata) = open_file(input)?;
        let row_group_ends = row_group_ends(&input.path, metadata.metadata())?;
        let (found, roots) = pick(&input.path, metadata.schema(), self.columns.as_deref())?;
        unify(self.schema.as_ref().clone(), &found, &self.inputs[0].path, &input.path)?;
        if row_group_ends.last().copied().unwrap_or(0) != self.num_rows[self.next.file as usize] {
            return Err(corrupt(&input.path, "the number of rows changed since the run began".into()));
        }

        let first_group = row_group_ends.partition_point(|&end| end <= self.next.row);
        let group_start = if first_group == 0 { 0 } else { row_group_ends[first_group - 1] };
        let offset =
            usize::try_from(self.next.row - group_start).expect("a row group fits into memory addresses");
        let num_groups = row_group_ends.len();
        let mask = ProjectionMask::roots(metadata.parquet_schema(), roots.iter().copied());
        let chunk_rows = chunk_rows(&metadata.metadata().row_groups()[first_group..], &mask, self.limits);
        let sorted: BTreeSet<usize> = roots.iter().copied().collect();
        let order = roots.iter().map(|root| sorted.range(..root).count()).collect();
        let batches = guard::catch(|| {
            ParquetRecordBatchReaderBuilder::new_with_metadata(file, metadata)
                .with_row_groups((first_group..num_groups).collect())
                .with_projection(mask)
                .with_offset(offset)
                .with_batch_size(chunk_rows)
                .build()
        });
        let batches = batches.map_err(|reason| corrupt(&input.path, reason))?;
        Ok(FileReader { batches, chunks: VecDeque::new(), order, row_group_ends, failed: None })
    }

    /// The next rows of the current file, which has at least one more.
    fn read(&mut self) -> Result<RecordBatch, SourceError> {
        let mut reader = match self.reader.take() {
            Some(reader) => reader,
            None => self.file_reader()?,
        };
        let file = self.next.file as usize;
        let left = self.num_rows[file] - self.next.row;
        let result =
            reader.next_rows(&self.schema, self.limits).and_then(|rows| match rows.num_rows() as u64 {
                0 => Err(format!("{left} rows are missing")),
                n if n > left => Err(format!("{} rows too many", n - left)),
                _ => Ok(rows),
            });
        // After an error the reader is gone: the next call starts anew, at the same row.
        match result {
            Ok(rows) => {
                self.reader = Some(reader);
                Ok(rows)
            }
            Err(reason) => Err(SourceError::Corrupt {
                path: self.inputs[file].path.clone(),
                format: "Parquet",
                row_group: Some(reader.row_group_ends.partition_point(|&end| end <= self.next.row)),
                row: Some(self.next.row),
                reason,
            }),
        }
    }
}

impl Source for ParquetSource {
    fn schema(&self) -> SchemaRef {
        self.schema.clone()
    }

    fn inputs(&self) -> &[InputFile] {
        &self.inputs
    }

    fn num_rows(&self) -> Option<u64> {
        Some(self.num_rows.iter().fold(0, |sum, rows| sum.saturating_add(*rows)))
    }

    fn seek(&mut self, position: Position) -> Result<(), SourceError> {
        let file = position.file as usize;
        let end = self.num_rows.get(file).copied().or((file == self.inputs.len()).then_some(0));
        if end.is_none_or(|end| position.row > end) {
            return Err(SourceError::NoSuchPosition { position });
        }
        if position != self.next {
            self.next = position;
            self.reader = None;
        }
        Ok(())
    }

    fn next_batch(&mut self) -> Result<Option<SourceBatch>, SourceError> {
        loop {
            let Some(&num_rows) = self.num_rows.get(self.next.file as usize) else { return Ok(None) };
            if self.next.row < num_rows {
                break;
            }
            self.next = Position { file: self.next.file + 1, row: 0 };
            self.reader = None;
        }
        let rows = self.read()?;
        let start = self.next;
        self.next.row += rows.num_rows() as u64;
        let row_numbers = (start.row..self.next.row).collect();
        Ok(Some(SourceBatch {
            rows,
            file: start.file,
            row_numbers,
            rejected: Vec::new(),
            rejected_rows: None,
            revoked: Arc::default(),
            start,
            end: self.next,
        }))
    }
}

impl FileReader {
    /// Joins chunks up to a limit; no rows only at the end of the file. The error is about the first row not
    /// delivered.
    fn next_rows(&mut self, schema: &SchemaRef, limits: BatchLimits) -> Result<RecordBatch, String> {
        let max_bytes = limits.max_bytes.min(MAX_BATCH_BYTES);
        let (mut taken, mut num_rows, mut num_bytes) = (Vec::new(), 0, 0);
        while num_rows < limits.max_rows {
            if self.chunks.is_empty() && self.failed.is_none() {
                self.failed = self.decode_chunk(schema, max_bytes).err();
            }
            let Some(chunk) = self.chunks.pop_front() else { break };
            let bytes = decoded_bytes(&chunk);
            if num_rows > 0 && num_bytes + bytes > max_bytes {
                self.chunks.push_front(chunk);
                break;
            }
            let rows = chunk.num_rows().min(limits.max_rows - num_rows);
            if rows < chunk.num_rows() {
                self.chunks.push_front(chunk.slice(rows, chunk.num_rows() - rows));
            }
            taken.push(chunk.slice(0, rows));
            num_rows += rows;
            num_bytes += bytes;
        }
        if taken.is_empty()
            && let Some(reason) = &self.failed
        {
            return Err(reason.clone());
        }
        if taken.len() == 1 {
            return Ok(taken.remove(0));
        }
        match guard::catch(|| concat_batches(schema, &taken)) {
            // With no columns the number of rows is all there is.
            Ok(_) if schema.fields().is_empty() => with_schema(schema, Vec::new(), num_rows),
            Ok(rows) => Ok(rows),
            // Dictionaries which do not fit into one index type together are delivered chunk by chunk.
            Err(_) if taken.len() > 1 => {
                for chunk in taken.drain(1..).rev() {
                    self.chunks.push_front(chunk);
                }
                Ok(taken.remove(0))
            }
            Err(reason) => Err(reason),
        }
    }

    /// Decodes on, and cuts what turns out larger than a batch. Adds nothing at the end of the file.
    fn decode_chunk(&mut self, schema: &SchemaRef, max_bytes: usize) -> Result<(), String> {
        let Some(chunk) = guard::catch(|| self.batches.next().transpose())? else { return Ok(()) };
        let num_rows = chunk.num_rows();
        if num_rows == 0 {
            return Ok(());
        }
        let columns = self.order.iter().map(|&index| chunk.column(index).clone()).collect();
        let chunk = with_schema(schema, columns, num_rows)?;
        let num_pieces = decoded_bytes(&chunk).div_ceil(max_bytes).clamp(1, num_rows);
        let piece_rows = num_rows.div_ceil(num_pieces);
        for start in (0..num_rows).step_by(piece_rows) {
            self.chunks.push_back(chunk.slice(start, piece_rows.min(num_rows - start)));
        }
        Ok(())
    }
}

fn with_schema(
    schema: &SchemaRef,
    columns: Vec<Arc<dyn Array>>,
    num_rows: usize,
) -> Result<RecordBatch, String> {
    let options = RecordBatchOptions::new().with_row_count(Some(num_rows));
    RecordBatch::try_new_with_options(schema.clone(), columns, &options).map_err(|error| error.to_string())
}

fn open_file(input: &InputFile) -> Result<(File, ArrowReaderMetadata), SourceError> {
    let path = &input.path;
    let file = File::open(path).map_err(|error| files::read_error(path, error))?;
    if input.bytes == 0 {
        return Err(corrupt(path, "the file is empty".into()));
    }
    let metadata = guard::catch(|| ArrowReaderMetadata::load(&file, ArrowReaderOptions::new()));
    Ok((file, metadata.map_err(|reason| corrupt(path, reason))?))
}

fn corrupt(path: &Path, reason: String) -> SourceError {
    SourceError::Corrupt { path: path.to_owned(), format: "Parquet", row_group: None, row: None, reason }
}

/// The number of rows up to the end of each row group.
fn row_group_ends(path: &Path, metadata: &ParquetMetaData) -> Result<Vec<u64>, SourceError> {
    let mut total = 0_u64;
    let add = |(index, group): (usize, &RowGroupMetaData)| {
        let rows = u64::try_from(group.num_rows()).ok();
        total = rows
            .and_then(|rows| total.checked_add(rows))
            .ok_or_else(|| corrupt(path, format!("row group {index} has {} rows", group.num_rows())))?;
        Ok(total)
    };
    metadata.row_groups().iter().enumerate().map(add).collect()
}

/// The chosen columns in the order asked for, each with its index in the file.
fn pick(path: &Path, file: &Schema, columns: Option<&[String]>) -> Result<(Schema, Vec<usize>), SourceError> {
    let mut roots = Vec::new();
    let all = file.fields().iter().map(|field| field.name());
    for name in columns.map_or_else(|| all.collect::<Vec<_>>(), |columns| columns.iter().collect()) {
        let mut found = file.fields().iter().enumerate().filter(|(_, field)| field.name() == name);
        let (root, _) = found.next().ok_or_else(|| SourceError::UnknownColumn {
            name: name.clone(),
            available: file.fields().iter().map(|field| field.name().clone()).collect(),
        })?;
        if found.next().is_some() {
            return Err(SourceError::DuplicateColumn { path: path.to_owned(), name: name.clone() });
        }
        if !roots.contains(&root) {
            roots.push(root);
        }
    }
    let schema = file.project(&roots).map_err(|error| corrupt(path, error.to_string()))?;
    Ok((schema, roots))
}

/// `first`, nullable wherever one of the two is; any other difference is an error.
fn unify(first: Schema, other: &Schema, first_path: &Path, path: &Path) -> Result<Schema, SourceError> {
    let differs = |column: &str, reason: String| SourceError::SchemaDiffers {
        path: path.to_owned(),
        first: first_path.to_owned(),
        column: column.to_owned(),
        reason,
    };
    let mut fields = Vec::with_capacity(first.fields().len());
    for (index, field) in first.fields().iter().enumerate() {
        let Some(have) = other.fields().get(index) else {
            return Err(differs(field.name(), "the column is missing".into()));
        };
        if have.name() != field.name() {
            return Err(differs(field.name(), format!("column {:?} is in its place", have.name())));
        }
        if have.data_type() != field.data_type() {
            return Err(differs(
                field.name(),
                format!("the type is {} and not {}", have.data_type(), field.data_type()),
            ));
        }
        fields.push(field.as_ref().clone().with_nullable(field.is_nullable() || have.is_nullable()));
    }
    if let Some(extra) = other.fields().get(fields.len()) {
        return Err(differs(extra.name(), "the column is not in the first file".into()));
    }
    Ok(Schema::new_with_metadata(fields, first.metadata))
}

/// How many rows to decode at once, by the row group with the largest rows.
fn chunk_rows(groups: &[RowGroupMetaData], mask: &ProjectionMask, limits: BatchLimits) -> usize {
    let mut most = MAX_CHUNK_ROWS;
    let mut row_bytes = 1;
    for group in groups {
        let mut bytes = 0_u64;
        for (leaf, column) in group.columns().iter().enumerate() {
            if !mask.leaf_included(leaf) {
                continue;
            }
            let text_bytes = column.unencoded_byte_array_data_bytes();
            if column.column_type() == Type::BYTE_ARRAY && text_bytes.is_none() {
                most = MAX_CHUNK_ROWS_UNSIZED;
            }
            let stored = column.uncompressed_size().max(text_bytes.unwrap_or(0));
            bytes = bytes.saturating_add(u64::try_from(stored).unwrap_or(0));
        }
        row_bytes = row_bytes.max(bytes / u64::try_from(group.num_rows()).unwrap_or(1).max(1));
    }
    let fitting = limits.max_bytes as u64 / row_bytes;
    usize::try_from(fitting).unwrap_or(most).clamp(1, most.min(limits.max_rows))
}

/// What the rows take; for types that share buffers between chunks an upper bound.
fn decoded_bytes(rows: &RecordBatch) -> usize {
    let column_bytes = |column: &Arc<dyn Array>| {
        let whole = column.get_array_memory_size();
        if has_views(column.data_type()) {
            return whole;
        }
        column.to_data().get_slice_memory_size().unwrap_or(whole)
    };
    rows.columns().iter().map(column_bytes).fold(0, usize::saturating_add)
}

fn has_views(data_type: &DataType) -> bool {
    match data_type {
        DataType::Utf8View | DataType::BinaryView => true,
        DataType::List(field) | DataType::LargeList(field) | DataType::FixedSizeList(field, _) => {
            has_views(field.data_type())
        }
        DataType::Map(field, _) => has_views(field.data_type()),
        DataType::Struct(fields) => fields.iter().any(|field| has_views(field.data_type())),
        DataType::Dictionary(_, values) => has_views(values),
        _ => false,
    }
}
