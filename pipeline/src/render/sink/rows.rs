//! Finished documents and refused ones as Arrow batches again.

use std::sync::Arc;

use arrow::array::{ArrayRef, StringArray, UInt32Array, UInt64Array};
use arrow::compute::{concat_batches, take_record_batch};
use arrow::datatypes::{DataType, Field, Schema, SchemaRef};
use arrow::error::ArrowError;
use arrow::json::writer::{LineDelimited, WriterBuilder};
use arrow::record_batch::RecordBatch;
use tidemill_connectors::source::InputNames;
use tidemill_operators::document::{Document, Generated, Payload, RecordError};

/// Knows the schemas of both outputs.
#[derive(Clone, Debug)]
pub struct Rows {
    input_schema: SchemaRef,
    output_schema: SchemaRef,
    steps: Vec<Arc<str>>,
    /// By file number of a document's id.
    inputs: InputNames,
}

/// The columns of the errors sink: the origin, the reason, and the document as JSON.
pub fn errors_schema() -> SchemaRef {
    Arc::new(Schema::new(vec![
        Field::new("source", DataType::Utf8, false),
        Field::new("row", DataType::UInt64, false),
        Field::new("step", DataType::Utf8, true),
        Field::new("kind", DataType::Utf8, false),
        Field::new("message", DataType::Utf8, false),
        Field::new("document", DataType::Utf8, false),
    ]))
}

impl Rows {
    pub fn new(
        input_schema: SchemaRef,
        output_schema: SchemaRef,
        steps: Vec<Arc<str>>,
        inputs: InputNames,
    ) -> Self {
        Self { input_schema, output_schema, steps, inputs }
    }

    /// The documents' rows, in the order given, with the columns of every step.
    pub fn results(&self, documents: &[Document]) -> Result<RecordBatch, ArrowError> {
        let mut columns = self.input_rows(documents)?.columns().to_vec();
        for step in &self.steps {
            let results: Vec<&Generated> = documents
                .iter()
                .map(|document| {
                    document.results.get(step).expect("a document at the sink has passed all steps")
                })
                .collect();
            let text: StringArray = results.iter().map(|result| Some(&result.text)).collect();
            let reason: StringArray =
                results.iter().map(|result| Some(result.finish_reason.as_str())).collect();
            let prompt: UInt32Array = results.iter().map(|result| result.prompt_len).collect();
            let output: UInt32Array = results.iter().map(|result| result.output_len).collect();
            columns.extend([
                Arc::new(text) as ArrayRef,
                Arc::new(reason),
                Arc::new(prompt),
                Arc::new(output),
            ]);
        }
        RecordBatch::try_new(Arc::clone(&self.output_schema), columns)
    }

    /// The rows of runs of one batch each, joined.
    fn input_rows(&self, documents: &[Document]) -> Result<RecordBatch, ArrowError> {
        let mut parts = Vec::new();
        for run in documents.chunk_by(|a, b| Arc::ptr_eq(a.batch(), b.batch())) {
            let batch = run[0].batch();
            let is_whole = run.len() == batch.num_rows() && run.iter().map(Document::index).eq(0..run.len());
            parts.push(if is_whole {
                RecordBatch::clone(batch)
            } else {
                let indices: UInt32Array = run.iter().map(|document| document.index() as u32).collect();
                take_record_batch(batch, &indices)?
            });
        }
        match parts.len() {
            1 => Ok(parts.remove(0)),
            _ => concat_batches(&self.input_schema, &parts),
        }
    }

    /// The refused documents with their origin and the reason.
    pub fn errors(&self, errors: &[RecordError]) -> Result<RecordBatch, ArrowError> {
        let source: StringArray =
            errors.iter().map(|error| Some(self.inputs.get(error.id.file).to_string())).collect();
        let row: UInt64Array = errors.iter().map(|error| error.id.row).collect();
        let step: StringArray = errors.iter().map(|error| error.step.as_deref()).collect();
        let kind: StringArray = errors.iter().map(|error| Some(error.kind.as_str())).collect();
        let message: StringArray = errors.iter().map(|error| Some(&error.message)).collect();
        let document: StringArray = errors.iter().map(|error| Some(payload(&error.payload))).collect();
        let columns: Vec<ArrayRef> = vec![
            Arc::new(source),
            Arc::new(row),
            Arc::new(step),
            Arc::new(kind),
            Arc::new(message),
            Arc::new(document),
        ];
        RecordBatch::try_new(errors_schema(), columns)
    }
}

/// The row as JSON with the results it had got, or the raw text.
pub(super) fn payload(payload: &Payload) -> String {
    let document = match payload {
        Payload::Raw(raw) => return raw.clone(),
        Payload::Row(document) => document,
    };
    let row = document.batch().slice(document.index(), 1);
    let mut bytes = Vec::new();
    let mut writer = WriterBuilder::new().with_explicit_nulls(true).build::<_, LineDelimited>(&mut bytes);
    let written = writer.write(&row).and_then(|()| writer.finish());
    drop(writer);
    let mut value: serde_json::Value = match written {
        Ok(()) => serde_json::from_slice(&bytes).unwrap_or_default(),
        // A column type without a JSON form: the origin still names the row.
        Err(_) => serde_json::Value::Object(serde_json::Map::new()),
    };
    if let Some(object) = value.as_object_mut() {
        for (step, result) in &document.results {
            object.insert(step.to_string(), result.text.clone().into());
        }
    }
    value.to_string()
}
