//! A document on its way: one row of an Arrow batch and what the steps have added to it.
//!
//! The row is never copied: a document holds its batch by reference and its index in it, so every column
//! passes through unchanged, whatever its type. A batch is freed with its last document.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use arrow::record_batch::RecordBatch;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::batch::{read_ipc, write_ipc};
use crate::infer::sequence::FinishReason;

/// Where a document came from: the input's number and the 0-based row or line in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct DocumentId {
    pub file: u32,
    pub row: u64,
}

impl fmt::Display for DocumentId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.file, self.row)
    }
}

/// The right to go on with documents. Whoever handed them out may take it back: work on them is then canceled, and
/// none of them is emitted any more. The default is held for ever.
#[derive(Clone, Debug, Default)]
pub struct Lease(Arc<AtomicBool>);

impl Lease {
    pub fn revoke(&self) {
        self.0.store(true, Ordering::Release);
    }

    pub fn is_revoked(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }
}

impl From<Arc<AtomicBool>> for Lease {
    /// Revoked when the flag is set.
    fn from(revoked: Arc<AtomicBool>) -> Self {
        Self(revoked)
    }
}

/// What one `generate` step made of a document.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Generated {
    pub text: String,
    pub finish_reason: FinishReason,
    pub prompt_len: u32,
    pub output_len: u32,
}

/// One input row, with the results of the steps it has passed.
#[derive(Clone, Debug)]
pub struct Document {
    pub id: DocumentId,
    batch: Arc<RecordBatch>,
    index: usize,
    lease: Lease,
    /// By step name.
    pub results: BTreeMap<Arc<str>, Generated>,
}

impl Document {
    /// Row `index` of `batch`.
    pub fn new(id: DocumentId, batch: Arc<RecordBatch>, index: usize, lease: Lease) -> Self {
        assert!(index < batch.num_rows(), "row {index} is beyond the batch");
        Self { id, batch, index, lease, results: BTreeMap::new() }
    }

    pub fn batch(&self) -> &Arc<RecordBatch> {
        &self.batch
    }

    pub fn index(&self) -> usize {
        self.index
    }

    pub fn lease(&self) -> &Lease {
        &self.lease
    }
}

/// A document between processes: its one row as Arrow IPC. A lease is of one process, so it arrives with one of its own.
#[derive(Serialize, Deserialize)]
struct Wire {
    id: DocumentId,
    row: Vec<u8>,
    results: Vec<(String, Generated)>,
}

impl Serialize for Document {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let row = write_ipc(&self.batch.slice(self.index, 1)).map_err(serde::ser::Error::custom)?;
        let results = self.results.iter().map(|(name, value)| (name.to_string(), value.clone())).collect();
        Wire { id: self.id, row, results }.serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for Document {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let wire = Wire::deserialize(deserializer)?;
        let batch = read_ipc(&wire.row).map_err(serde::de::Error::custom)?;
        if batch.num_rows() != 1 {
            return Err(serde::de::Error::custom("a document must be one row"));
        }
        let results = wire.results.into_iter().map(|(name, value)| (name.into(), value)).collect();
        Ok(Self { id: wire.id, batch: Arc::new(batch), index: 0, lease: Lease::default(), results })
    }
}

/// Why a document has no answer; the word written to the errors sink.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ErrorKind {
    /// The source could not make a row of it.
    Malformed,
    /// A column that the template prints is null.
    Null,
    /// Every column that the template prints is empty.
    Empty,
    /// The template failed on this row.
    Template,
    /// Prompt and answer do not fit the model or the KV cache.
    TooLong,
    /// The sink does not take records of this size.
    TooLarge,
}

impl ErrorKind {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Malformed => "malformed",
            Self::Null => "null",
            Self::Empty => "empty",
            Self::Template => "template",
            Self::TooLong => "too_long",
            Self::TooLarge => "too_large",
        }
    }
}

/// A document that left by the errors stream.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct RecordError {
    pub id: DocumentId,
    /// The step that refused it; `None` if the source did.
    pub step: Option<String>,
    pub kind: ErrorKind,
    pub message: String,
    pub payload: Payload,
}

/// The refused document itself, so that nothing is lost.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Payload {
    /// The bytes the source could not read as a row, as text, possibly cut.
    Raw(String),
    Row(Box<Document>),
}
