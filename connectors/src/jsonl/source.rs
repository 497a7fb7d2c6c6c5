//! Reads JSONL files, or a stream of JSONL, line by line.
//!
//! Invariant: each line that is not blank is delivered once, as a row or as a rejected row; no line ends the run.
//! Files are read twice, first for the schema; of a stream only the first rows decide the schema, and are kept
//! until they are read. A file is read up to the size it had when it was opened. Compressed files are not read.

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Cursor, Read};
use std::path::Path;
use std::sync::Arc;

use arrow::array::RecordBatch;
use arrow::datatypes::{Schema, SchemaRef};
use arrow::json::ReaderBuilder;

use super::infer::Inference;
use super::lines::{Line, Lines, MAX_LINE_BYTES};
use super::shape::Shape;
use crate::files;
use crate::source::{
    BatchLimits, InputFile, MAX_REJECTED_BYTES, Position, RejectedRow, Source, SourceBatch, SourceError,
};

#[cfg(test)]
mod tests;

/// Of a stream, this many lines decide the schema,
pub const STDIN_SAMPLE_ROWS: usize = 1000;
/// or fewer if they reach this size.
pub const STDIN_SAMPLE_BYTES: usize = 8 << 20;

const EXTENSIONS: [&str; 2] = ["jsonl", "ndjson"];
const READ_BYTES: usize = 256 << 10;
/// The most bytes of a batch whatever the limits say: text offsets are 32 bits wide.
const MAX_BATCH_BYTES: usize = 1 << 30;

type Reader = Lines<Box<dyn BufRead + Send>>;

/// The rows of one JSONL file, of a folder of them, of a glob pattern or of a stream.
pub struct JsonlSource {
    inputs: Vec<InputFile>,
    is_stream: bool,
    num_rows: Option<u64>,
    schema: SchemaRef,
    shape: Shape,
    limits: BatchLimits,
    next: Position,
    /// Stands at `next`; none before a file is opened.
    reader: Option<Reader>,
}

impl JsonlSource {
    /// Opens `path`, or standard input for `-`; `columns` picks and orders top-level columns.
    pub fn open(path: &Path, columns: Option<&[String]>, limits: BatchLimits) -> Result<Self, SourceError> {
        if path == Path::new("-") {
            return Self::from_stream(path, Box::new(BufReader::new(io::stdin())), columns, limits);
        }
        if fs::metadata(path).is_ok_and(|meta| !meta.is_file() && !meta.is_dir()) {
            let pipe = File::open(path).map_err(|error| files::read_error(path, error))?;
            return Self::from_stream(path, Box::new(BufReader::new(pipe)), columns, limits);
        }
        let inputs = files::resolve(path, &EXTENSIONS)?;
        let (mut inference, mut num_rows) = (Inference::default(), 0);
        for input in &inputs {
            let mut lines = open_file(input)?;
            while let Some((_, line)) = lines.read().map_err(|error| files::read_error(&input.path, error))? {
                num_rows += u64::from(line != Line::Blank);
                if let Line::Text(text) = line {
                    inference.observe(text);
                }
            }
        }
        Self::new(inputs, Some(num_rows), None, &inference.schema(), columns, limits)
    }

    /// Reads a stream which cannot go back; `name` stands for it in errors.
    pub fn from_stream(
        name: &Path,
        mut stream: Box<dyn BufRead + Send>,
        columns: Option<&[String]>,
        limits: BatchLimits,
    ) -> Result<Self, SourceError> {
        let io_error = |error| files::read_error(name, error);
        let mut sample = Vec::new();
        for _ in 0..STDIN_SAMPLE_ROWS {
            // A line longer than allowed is cut here and joined again by the chain below.
            let line = Read::by_ref(&mut stream).take(MAX_LINE_BYTES as u64 + 2);
            let read = { line }.read_until(b'\n', &mut sample).map_err(io_error)?;
            if read == 0 || sample.len() >= STDIN_SAMPLE_BYTES {
                break;
            }
        }
        let mut inference = Inference::default();
        let mut lines = Lines::new(sample.as_slice(), MAX_LINE_BYTES);
        while let Some((_, line)) = lines.read().map_err(io_error)? {
            if let Line::Text(text) = line {
                inference.observe(text);
            }
        }
        let inputs = vec![InputFile { path: name.to_owned(), bytes: 0 }];
        let whole: Box<dyn BufRead + Send> = Box::new(Cursor::new(sample).chain(stream));
        let reader = Lines::new(whole, MAX_LINE_BYTES);
        Self::new(inputs, None, Some(reader), &inference.schema(), columns, limits)
    }

    fn new(
        inputs: Vec<InputFile>,
        num_rows: Option<u64>,
        stream: Option<Reader>,
        inferred: &Schema,
        columns: Option<&[String]>,
        limits: BatchLimits,
    ) -> Result<Self, SourceError> {
        let schema = Arc::new(pick(inferred, columns)?);
        Ok(Self {
            inputs,
            is_stream: stream.is_some(),
            num_rows,
            shape: Shape::of_rows(&schema),
            schema,
            limits: limits.check(),
            next: Position::default(),
            reader: stream,
        })
    }

    /// Moves the reader of the current file, opened when needed, to `row`; it may be the end of the file.
    fn move_to(&mut self, row: u64) -> Result<(), SourceError> {
        let input = &self.inputs[self.next.file as usize];
        let mut reader = match self.reader.take() {
            Some(reader) => reader,
            None => open_file(input)?,
        };
        let found = reader.skip_to(row).map_err(|error| files::read_error(&input.path, error))?;
        self.next.row = reader.position();
        self.reader = Some(reader);
        if found {
            Ok(())
        } else {
            Err(SourceError::NoSuchPosition { position: Position { row, ..self.next } })
        }
    }

    /// Reads lines up to a limit or the end of the current file.
    fn read(&mut self) -> Result<Pending, SourceError> {
        self.move_to(self.next.row)?;
        let reader = self.reader.as_mut().expect("`move_to` leaves a reader");
        let path = &self.inputs[self.next.file as usize].path;
        let max_bytes = self.limits.max_bytes.min(MAX_BATCH_BYTES);
        let mut pending = Pending { file: self.next.file, ..Pending::default() };
        let mut num_bytes = 0;
        while pending.len() < self.limits.max_rows && num_bytes < max_bytes {
            let Some((row, line)) = reader.read().map_err(|error| files::read_error(path, error))? else {
                break;
            };
            match line {
                Line::Blank => {}
                Line::TooLong(start) => {
                    num_bytes += start.len().min(MAX_REJECTED_BYTES);
                    pending.reject(row, start, format!("the line is longer than {MAX_LINE_BYTES} bytes"));
                }
                Line::Text(text) => match self.shape.check(text) {
                    Ok(()) => {
                        num_bytes += text.len();
                        pending.accept(row, text);
                    }
                    Err(reason) => {
                        num_bytes += text.len().min(MAX_REJECTED_BYTES);
                        pending.reject(row, text, reason);
                    }
                },
            }
        }
        self.next.row = reader.position();
        Ok(pending)
    }
}

impl Source for JsonlSource {
    fn schema(&self) -> SchemaRef {
        self.schema.clone()
    }

    fn inputs(&self) -> &[InputFile] {
        &self.inputs
    }

    fn num_rows(&self) -> Option<u64> {
        self.num_rows
    }

    fn seek(&mut self, position: Position) -> Result<(), SourceError> {
        let file = position.file as usize;
        if file > self.inputs.len() || (file == self.inputs.len() && position.row > 0) {
            return Err(SourceError::NoSuchPosition { position });
        }
        if position < self.next {
            if self.is_stream {
                let path = self.inputs[0].path.clone();
                return Err(SourceError::NotSeekable { path, from: self.next.row, to: position.row });
            }
            self.reader = None;
        } else if position.file != self.next.file {
            self.reader = None;
        }
        self.next = Position { file: position.file, row: 0 };
        if file == self.inputs.len() { Ok(()) } else { self.move_to(position.row) }
    }

    fn next_batch(&mut self) -> Result<Option<SourceBatch>, SourceError> {
        while (self.next.file as usize) < self.inputs.len() {
            let start = self.next;
            let pending = self.read()?;
            if pending.len() > 0 {
                return Ok(Some(pending.decode(&self.schema, start, self.next)));
            }
            self.next = Position { file: self.next.file + 1, row: 0 };
            self.reader = None;
        }
        Ok(None)
    }
}

/// Lines that were read and checked but not decoded.
#[derive(Default)]
struct Pending {
    file: u32,
    text: Vec<u8>,
    /// The end of each line in `text`.
    ends: Vec<usize>,
    row_numbers: Vec<u64>,
    rejected: Vec<RejectedRow>,
}

impl Pending {
    fn len(&self) -> usize {
        self.ends.len() + self.rejected.len()
    }

    fn accept(&mut self, row: u64, line: &[u8]) {
        self.text.extend_from_slice(line);
        self.text.push(b'\n');
        self.ends.push(self.text.len());
        self.row_numbers.push(row);
    }

    fn reject(&mut self, row: u64, line: &[u8], reason: String) {
        let mut raw = String::from_utf8_lossy(&line[..line.len().min(MAX_REJECTED_BYTES)]).into_owned();
        // Replacing broken bytes makes the text longer.
        raw.truncate(raw.floor_char_boundary(MAX_REJECTED_BYTES));
        self.rejected.push(RejectedRow { file: self.file, row, reason, raw });
    }

    fn decode(mut self, schema: &SchemaRef, start: Position, end: Position) -> SourceBatch {
        let rows = decode(schema, &self.text, self.ends.len()).unwrap_or_else(|_| self.decode_each(schema));
        self.rejected.sort_by_key(|rejected| rejected.row);
        SourceBatch {
            rows,
            file: self.file,
            row_numbers: self.row_numbers,
            rejected: self.rejected,
            rejected_rows: None,
            revoked: Arc::default(),
            start,
            end,
        }
    }

    /// Rejects the lines which Arrow refuses, such as those with half a surrogate pair, and decodes the others.
    fn decode_each(&mut self, schema: &SchemaRef) -> RecordBatch {
        let lines = std::mem::take(self);
        self.file = lines.file;
        self.rejected = lines.rejected;
        let mut start = 0;
        for (&end, row) in lines.ends.iter().zip(lines.row_numbers) {
            let line = &lines.text[start..end - 1];
            match decode(schema, line, 1) {
                Ok(_) => self.accept(row, line),
                Err(reason) => self.reject(row, line, reason),
            }
            start = end;
        }
        decode(schema, &self.text, self.ends.len()).expect("each line decodes alone, and so do all together")
    }
}

fn decode(schema: &SchemaRef, text: &[u8], num_rows: usize) -> Result<RecordBatch, String> {
    let plain = |error: arrow::error::ArrowError| {
        let text = error.to_string();
        text.strip_prefix("Json error: ").unwrap_or(&text).to_owned()
    };
    // One more row than expected, so that too many rows show.
    let builder = ReaderBuilder::new(schema.clone()).with_batch_size(num_rows + 1);
    let mut decoder = builder.build_decoder().map_err(plain)?;
    let read = decoder.decode(text).map_err(plain)?;
    let rows = decoder.flush().map_err(plain)?.unwrap_or_else(|| RecordBatch::new_empty(schema.clone()));
    if read == text.len() && rows.num_rows() == num_rows {
        Ok(rows)
    } else {
        Err(format!("{} rows in place of {num_rows}", rows.num_rows()))
    }
}

fn open_file(input: &InputFile) -> Result<Reader, SourceError> {
    let file = File::open(&input.path).map_err(|error| files::read_error(&input.path, error))?;
    let reader = BufReader::with_capacity(READ_BYTES, file.take(input.bytes));
    Ok(Lines::new(Box::new(reader), MAX_LINE_BYTES))
}

/// The chosen columns in the order asked for.
fn pick(inferred: &Schema, columns: Option<&[String]>) -> Result<Schema, SourceError> {
    let Some(columns) = columns else { return Ok(inferred.clone()) };
    let mut picked = Vec::new();
    for name in columns {
        let (index, _) = inferred.column_with_name(name).ok_or_else(|| SourceError::UnknownColumn {
            name: name.clone(),
            available: inferred.fields().iter().map(|field| field.name().clone()).collect(),
        })?;
        if !picked.contains(&index) {
            picked.push(index);
        }
    }
    Ok(inferred.project(&picked).expect("the columns were found in the schema"))
}
