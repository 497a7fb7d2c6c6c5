//! Records as rows: the value as text, and everything else in one struct column.
//!
//! Columns: `value` (text; JSON where its field says so) and `kafka` with topic, partition, offset, timestamp, key and
//! headers. What could not be decoded is kept with the bytes it had, under the same names.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use arrow::array::{
    ArrayRef, BinaryBuilder, Int32Builder, Int64Builder, MapBuilder, MapFieldNames, RecordBatch,
    StringBuilder, StructArray, TimestampMillisecondBuilder,
};
use arrow::datatypes::{DataType, Field, Fields, Schema, SchemaRef, TimeUnit};
use rdkafka::Message;
use rdkafka::message::Headers;

use crate::source::{MAX_REJECTED_BYTES, Position, RejectedRow, SourceBatch};

/// The column of the record's value.
pub const VALUE: &str = "value";
/// The column of everything else.
pub const KAFKA: &str = "kafka";
/// Metadata of the value's field: how its text is to be read.
pub const FORMAT: &str = "tidemill.format";

fn headers_type() -> DataType {
    let entry = Fields::from(vec![
        Field::new("key", DataType::Utf8, false),
        Field::new("value", DataType::Binary, true),
    ]);
    DataType::Map(Arc::new(Field::new("entries", DataType::Struct(entry), false)), false)
}

fn kafka_fields() -> Fields {
    Fields::from(vec![
        Field::new("topic", DataType::Utf8, false),
        Field::new("partition", DataType::Int32, false),
        Field::new("offset", DataType::Int64, false),
        Field::new("timestamp", DataType::Timestamp(TimeUnit::Millisecond, Some("+00:00".into())), true),
        Field::new("key", DataType::Binary, true),
        Field::new("headers", headers_type(), false),
    ])
}

/// The schema of every batch.
pub fn kafka_schema(is_json: bool) -> SchemaRef {
    let mut value = Field::new(VALUE, DataType::Utf8, false);
    if is_json {
        value = value.with_metadata([(FORMAT.to_owned(), "json".to_owned())]);
    }
    Arc::new(Schema::new(vec![value, Field::new(KAFKA, DataType::Struct(kafka_fields()), false)]))
}

fn rejected_schema() -> SchemaRef {
    let value = Field::new(VALUE, DataType::Binary, true);
    Arc::new(Schema::new(vec![value, Field::new(KAFKA, DataType::Struct(kafka_fields()), false)]))
}

/// Collects the records of one partition.
pub(super) struct RowsBuilder {
    schema: SchemaRef,
    values: StringBuilder,
    kafka: KafkaBuilder,
    row_numbers: Vec<u64>,
    rejected: Vec<(u64, String)>,
    rejected_values: BinaryBuilder,
    rejected_kafka: KafkaBuilder,
    first: Option<u64>,
    end: u64,
}

impl RowsBuilder {
    /// Most batches have no more than `num_rows`.
    pub(super) fn new(schema: SchemaRef, num_rows: usize) -> Self {
        Self {
            schema,
            values: StringBuilder::with_capacity(num_rows, 0),
            kafka: KafkaBuilder::new(num_rows),
            row_numbers: Vec::with_capacity(num_rows),
            rejected: Vec::new(),
            rejected_values: BinaryBuilder::with_capacity(0, 0),
            rejected_kafka: KafkaBuilder::new(0),
            first: None,
            end: 0,
        }
    }

    pub(super) fn len(&self) -> usize {
        self.row_numbers.len() + self.rejected.len()
    }

    /// Adds a record with its text, or with the reason why there is none.
    pub(super) fn push(&mut self, message: &impl Message, text: Result<impl AsRef<str>, String>) {
        let headers = headers(message);
        let text = text.and_then(|text| match &headers {
            Ok(_) => Ok(text),
            Err(reason) => Err(reason.clone()),
        });
        let headers = headers.unwrap_or_default();
        let offset = message.offset() as u64;
        self.first.get_or_insert(offset);
        self.end = offset + 1;
        match text {
            Ok(text) => {
                self.values.append_value(text);
                self.kafka.push(message, &headers);
                self.row_numbers.push(offset);
            }
            Err(reason) => {
                self.rejected_values.append_option(message.payload());
                self.rejected_kafka.push(message, &headers);
                self.rejected.push((offset, reason));
            }
        }
    }

    /// The batch; `None` without records.
    pub(super) fn finish(mut self, input: u32, revoked: Arc<AtomicBool>) -> Option<SourceBatch> {
        let start = self.first?;
        let values: ArrayRef = Arc::new(self.values.finish());
        let rows = RecordBatch::try_new(self.schema, vec![values, self.kafka.finish()])
            .expect("columns are built as the schema says");
        let raw = self.rejected_values.finish();
        let rejected: Vec<RejectedRow> = self
            .rejected
            .into_iter()
            .zip(&raw)
            .map(|((row, reason), raw)| {
                let raw = raw.unwrap_or_default();
                let raw = String::from_utf8_lossy(&raw[..raw.len().min(MAX_REJECTED_BYTES)]).into_owned();
                RejectedRow { file: input, row, reason, raw }
            })
            .collect();
        let rejected_rows = (!rejected.is_empty()).then(|| {
            RecordBatch::try_new(rejected_schema(), vec![Arc::new(raw), self.rejected_kafka.finish()])
                .expect("columns are built as the schema says")
        });
        Some(SourceBatch {
            rows,
            file: input,
            row_numbers: self.row_numbers,
            rejected,
            rejected_rows,
            revoked,
            start: Position { file: input, row: start },
            end: Position { file: input, row: self.end },
        })
    }
}

/// In order; a name may occur twice.
type HeaderRefs<'a> = Vec<(&'a str, Option<&'a [u8]>)>;

/// A record's headers, or why they cannot be read. Nothing else may read them: the client's library panics where a name
/// is not UTF-8, and has no other way to read it.
pub(super) fn headers(message: &impl Message) -> Result<HeaderRefs<'_>, String> {
    read_headers(message.headers())
}

fn read_headers<H: Headers>(headers: Option<&H>) -> Result<HeaderRefs<'_>, String> {
    let Some(headers) = headers else { return Ok(Vec::new()) };
    let read = || headers.iter().map(|header| (header.key, header.value)).collect();
    std::panic::catch_unwind(std::panic::AssertUnwindSafe(read))
        .map_err(|_| "the name of a header is not UTF-8".to_owned())
}

/// What a record takes, its headers too where they can be read.
pub(super) fn num_bytes_of(message: &impl Message) -> usize {
    let len = |bytes: Option<&[u8]>| bytes.map_or(0, <[u8]>::len);
    let headers = headers(message).unwrap_or_default();
    let in_headers: usize = headers.iter().map(|(name, value)| name.len() + len(*value)).sum();
    len(message.payload()) + len(message.key()) + in_headers
}

struct KafkaBuilder {
    topic: StringBuilder,
    partition: Int32Builder,
    offset: Int64Builder,
    timestamp: TimestampMillisecondBuilder,
    key: BinaryBuilder,
    headers: MapBuilder<StringBuilder, BinaryBuilder>,
}

impl KafkaBuilder {
    fn new(num_rows: usize) -> Self {
        let names =
            MapFieldNames { entry: "entries".to_owned(), key: "key".to_owned(), value: "value".to_owned() };
        let (keys, values) = (StringBuilder::with_capacity(0, 0), BinaryBuilder::with_capacity(0, 0));
        Self {
            topic: StringBuilder::with_capacity(num_rows, 0),
            partition: Int32Builder::with_capacity(num_rows),
            offset: Int64Builder::with_capacity(num_rows),
            timestamp: TimestampMillisecondBuilder::with_capacity(num_rows).with_timezone("+00:00"),
            key: BinaryBuilder::with_capacity(num_rows, 0),
            headers: MapBuilder::with_capacity(Some(names), keys, values, num_rows),
        }
    }

    fn push(&mut self, message: &impl Message, headers: &[(&str, Option<&[u8]>)]) {
        self.topic.append_value(message.topic());
        self.partition.append_value(message.partition());
        self.offset.append_value(message.offset());
        self.timestamp.append_option(message.timestamp().to_millis().filter(|&millis| millis >= 0));
        self.key.append_option(message.key());
        for (name, value) in headers {
            self.headers.keys().append_value(name);
            self.headers.values().append_option(*value);
        }
        self.headers.append(true).expect("as many keys as values");
    }

    fn finish(&mut self) -> ArrayRef {
        let columns: Vec<ArrayRef> = vec![
            Arc::new(self.topic.finish()),
            Arc::new(self.partition.finish()),
            Arc::new(self.offset.finish()),
            Arc::new(self.timestamp.finish()),
            Arc::new(self.key.finish()),
            Arc::new(self.headers.finish()),
        ];
        Arc::new(StructArray::new(kafka_fields(), columns, None))
    }
}

#[cfg(test)]
mod tests {
    use rdkafka::message::Header;

    use super::*;

    /// As those of a record with a name that is not UTF-8: the library panics when it is read.
    struct BadName;

    impl Headers for BadName {
        fn count(&self) -> usize {
            1
        }

        fn try_get(&self, _index: usize) -> Option<Header<'_, &[u8]>> {
            panic!("the name is not UTF-8")
        }
    }

    #[test]
    fn a_library_that_panics_on_data_rejects_the_record_and_no_more() {
        let reason = read_headers(Some(&BadName)).unwrap_err();
        assert!(reason.contains("not UTF-8"), "{reason}");
        assert_eq!(read_headers(None::<&BadName>), Ok(Vec::new()));
    }
}
