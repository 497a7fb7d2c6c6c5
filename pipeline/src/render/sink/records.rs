//! Finished documents and refused ones as records of the output's topics.
//!
//! A result keeps the key, the headers (so the trace context too) and the timestamp of the record it is made from. A
//! refused record goes to the errors topic as it was read, byte for byte, with what became of it in its headers, so it
//! can be sent to the input again.

use std::sync::Arc;

use arrow::array::{Array, AsArray, RecordBatch, StructArray};
use arrow::datatypes::{Int32Type, TimestampMillisecondType};
use arrow::error::ArrowError;
use tidemill_connectors::kafka::encode::encode_values;
use tidemill_connectors::kafka::record::{Headers, OutRecord, Target, header};
use tidemill_connectors::kafka::rows::{KAFKA, VALUE};
use tidemill_connectors::source::InputNames;
use tidemill_operators::document::{Document, ErrorKind, Payload, RecordError};
use tidemill_operators::template::Template;

use super::rows::{Rows, payload};
use crate::plan::kafka::TopicPlan;

/// Turns documents into records.
pub struct Records {
    rows: Rows,
    names: InputNames,
    pipeline: String,
    key: Option<Template>,
    value: Option<Template>,
    headers: Vec<(String, Template)>,
    keeps_partition: bool,
    /// The most bytes of a result.
    limit: usize,
}

impl Records {
    pub fn new(rows: Rows, names: InputNames, pipeline: &str, plan: &TopicPlan, limit: usize) -> Self {
        let compile =
            |source: &String| Template::new(source).expect("compiled once when the plan was checked");
        Self {
            rows,
            names,
            pipeline: pipeline.to_owned(),
            key: plan.key.as_ref().map(compile),
            value: plan.value.as_ref().map(compile),
            headers: plan.headers.iter().map(|(name, source)| (name.clone(), compile(source))).collect(),
            keeps_partition: plan.keeps_partition,
            limit,
        }
    }

    /// A record for each document, in the order given; those that cannot be written are added to `errors`.
    pub fn results(
        &self,
        documents: &[Document],
        errors: &mut Vec<RecordError>,
    ) -> Result<Vec<OutRecord>, ArrowError> {
        if documents.is_empty() {
            return Ok(Vec::new());
        }
        let values: Vec<Option<Vec<u8>>> = match &self.value {
            Some(_) => vec![None; documents.len()],
            None => encode_values(&self.rows.results(documents)?)?.into_iter().map(Some).collect(),
        };
        let mut records = Vec::with_capacity(documents.len());
        for (document, value) in documents.iter().zip(values) {
            match self.result(document, value) {
                Ok(record) => records.push(record),
                Err((kind, message)) => errors.push(RecordError {
                    id: document.id,
                    step: None,
                    kind,
                    message,
                    payload: Payload::Row(Box::new(document.clone())),
                }),
            }
        }
        Ok(records)
    }

    fn result(&self, document: &Document, value: Option<Vec<u8>>) -> Result<OutRecord, (ErrorKind, String)> {
        let origin = Origin::of(document.batch(), document.index());
        let render = |template: &Template| {
            let text = template.render_value(document).map_err(|error| (error.kind, error.message))?;
            Ok(text.into_bytes())
        };
        let key = match &self.key {
            Some(template) => Some(render(template)?),
            None => origin.as_ref().and_then(|origin| origin.key().map(<[u8]>::to_vec)),
        };
        let value = match &self.value {
            Some(template) => Some(render(template)?),
            None => value,
        };
        let mut headers = origin.as_ref().map(Origin::headers).unwrap_or_default();
        for (name, template) in &self.headers {
            headers.push((name.clone(), Some(render(template)?)));
        }
        let partition = origin.as_ref().map(Origin::partition).filter(|_| self.keeps_partition);
        let record = OutRecord {
            target: Target::Results,
            key,
            value,
            headers,
            partition,
            timestamp: origin.as_ref().and_then(Origin::timestamp),
            input: document.id.file,
            row: document.id.row,
            num_refused: 0,
        };
        let num_bytes = record.num_bytes();
        if num_bytes > self.limit {
            let message = format!("the result takes {num_bytes} bytes, the topic's limit is {}", self.limit);
            return Err((ErrorKind::TooLarge, message));
        }
        Ok(record)
    }

    /// A record of the errors topic.
    pub fn error(&self, error: &RecordError) -> OutRecord {
        let text = |text: &str| Some(text.as_bytes().to_vec());
        let (origin, value) = match &error.payload {
            Payload::Raw(raw) => (None, raw.clone().into_bytes()),
            Payload::Row(document) => {
                let origin = Origin::of(document.batch(), document.index());
                let raw = origin.is_some().then(|| raw_value(document)).flatten();
                (origin, raw.unwrap_or_else(|| payload(&error.payload).into_bytes()))
            }
        };
        let mut headers = origin.as_ref().map(Origin::headers).unwrap_or_default();
        // A record that came from an errors topic has such headers already.
        headers.retain(|(name, _)| !name.starts_with(header::PREFIX));
        headers.extend([
            (header::PIPELINE.to_owned(), text(&self.pipeline)),
            (header::KIND.to_owned(), text(error.kind.as_str())),
            (header::MESSAGE.to_owned(), text(&error.message)),
        ]);
        if let Some(step) = &error.step {
            headers.push((header::STEP.to_owned(), text(step)));
        }
        match &origin {
            Some(origin) => headers.extend([
                (header::ORIGIN.to_owned(), text(origin.topic())),
                (header::ORIGIN_PARTITION.to_owned(), text(&origin.partition().to_string())),
            ]),
            None => headers.push((header::ORIGIN.to_owned(), text(&self.names.get(error.id.file)))),
        }
        headers.push((header::ORIGIN_OFFSET.to_owned(), text(&error.id.row.to_string())));
        OutRecord {
            target: Target::Errors,
            key: origin.as_ref().and_then(|origin| origin.key().map(<[u8]>::to_vec)),
            value: Some(value),
            headers,
            partition: None,
            timestamp: origin.as_ref().and_then(Origin::timestamp),
            input: error.id.file,
            row: error.id.row,
            num_refused: 0,
        }
    }
}

/// The value of a record as it was read; of formats that are not text, as it was decoded.
fn raw_value(document: &Document) -> Option<Vec<u8>> {
    let column = document.batch().column_by_name(VALUE)?;
    if column.is_null(document.index()) {
        return Some(Vec::new());
    }
    if let Some(text) = column.as_string_opt::<i32>() {
        return Some(text.value(document.index()).as_bytes().to_vec());
    }
    Some(column.as_binary_opt::<i32>()?.value(document.index()).to_vec())
}

/// The W3C `traceparent` header of the record that a document was read from.
pub fn trace_parent(document: &Document) -> Option<Arc<str>> {
    let headers = Origin::of(document.batch(), document.index())?.headers();
    let (_, value) = headers.into_iter().find(|(name, _)| name == "traceparent")?;
    String::from_utf8(value?).ok().map(Into::into)
}

/// Where a row was read from: a row of the `kafka` column.
struct Origin<'a> {
    kafka: &'a StructArray,
    index: usize,
}

impl<'a> Origin<'a> {
    fn of(batch: &'a Arc<RecordBatch>, index: usize) -> Option<Self> {
        let kafka = batch.column_by_name(KAFKA)?.as_struct_opt()?;
        // A column of this name in a file is no origin.
        kafka.column_by_name("headers")?.as_map_opt()?;
        Some(Self { kafka, index })
    }

    fn column(&self, name: &str) -> &'a dyn Array {
        self.kafka.column_by_name(name).expect("the source builds all columns")
    }

    fn topic(&self) -> &'a str {
        self.column("topic").as_string::<i32>().value(self.index)
    }

    fn partition(&self) -> i32 {
        self.column("partition").as_primitive::<Int32Type>().value(self.index)
    }

    fn timestamp(&self) -> Option<i64> {
        let timestamps = self.column("timestamp").as_primitive::<TimestampMillisecondType>();
        timestamps.is_valid(self.index).then(|| timestamps.value(self.index))
    }

    fn key(&self) -> Option<&'a [u8]> {
        let keys = self.column("key").as_binary::<i32>();
        keys.is_valid(self.index).then(|| keys.value(self.index))
    }

    fn headers(&self) -> Headers {
        let headers = self.column("headers").as_map();
        if headers.value_length(self.index) == 0 {
            return Headers::new();
        }
        let entries = headers.value(self.index);
        let (names, values) = (entries.column(0).as_string::<i32>(), entries.column(1).as_binary::<i32>());
        names
            .iter()
            .zip(values)
            .map(|(name, value)| (name.unwrap_or_default().to_owned(), value.map(<[u8]>::to_vec)))
            .collect()
    }
}
