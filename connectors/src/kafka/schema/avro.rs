//! Avro: values of a record schema as JSON objects.
//!
//! As Avro's own JSON encoding, but a union's value stands without the name of its type. Bytes become text with a
//! character for each, times and dates the numbers that they are.
//!
//! The data decides how deep a value of a schema that contains itself goes, and decoding follows it, so such schemas are
//! refused; and so are lists of what takes no bytes, of which a few bytes claim any number.

use std::collections::BTreeMap;
use std::io::Read;

use apache_avro::Schema;
use apache_avro::reader::datum::GenericDatumReader;
use apache_avro::schema::{NamespaceRef, RecordSchema};
use apache_avro::types::Value;
use apache_avro::util::max_allocation_bytes;
use serde_json::Value as Json;

use super::Registered;

/// The most that one list or text of a record may take in memory.
const MAX_ALLOCATION: usize = 64 << 20;

/// A schema with those that it refers to.
#[derive(Debug)]
pub struct AvroSchema {
    schema: Schema,
    others: Vec<Schema>,
}

impl AvroSchema {
    pub fn new(found: &Registered) -> Result<Self, String> {
        max_allocation_bytes(MAX_ALLOCATION);
        let others = found.references.iter().map(|(_, text)| text);
        let (schema, others) =
            Schema::parse_str_with_list(&found.text, others).map_err(|error| error.to_string())?;
        let mut names = Names::default();
        others.iter().chain([&schema]).for_each(|one| names.collect(one, None));
        for one in others.iter().chain([&schema]) {
            names.takes_nothing(one, None, &mut Vec::new())?;
        }
        if !matches!(schema, Schema::Record(_)) {
            return Err("not a record, so it has no fields".to_owned());
        }
        Ok(Self { schema, others })
    }

    /// A value as a JSON object.
    pub fn decode(&self, bytes: &[u8]) -> Result<String, String> {
        let mut bytes = Bytes { rest: bytes, is_short: false };
        let fail = |error: apache_avro::Error| error.to_string();
        let value = GenericDatumReader::builder(&self.schema)
            .writer_schemata(self.others.iter().chain([&self.schema]).collect())
            .map_err(fail)?
            .build()
            .map_err(fail)?
            .read_value(&mut bytes)
            .map_err(fail)?;
        if bytes.is_short {
            return Err("it ends too early".to_owned());
        }
        if !bytes.rest.is_empty() {
            return Err(format!("{} bytes are left", bytes.rest.len()));
        }
        Ok(json(value).to_string())
    }
}

/// Remembers that more was asked for than there is: of a text that is cut off, the library makes a null.
struct Bytes<'a> {
    rest: &'a [u8],
    is_short: bool,
}

impl Read for Bytes<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        self.is_short |= self.rest.is_empty() && !buffer.is_empty();
        self.rest.read(buffer)
    }
}

fn json(value: Value) -> Json {
    match value {
        Value::Null => Json::Null,
        Value::Boolean(value) => Json::Bool(value),
        Value::Int(number) | Value::Date(number) | Value::TimeMillis(number) => number.into(),
        Value::Long(number)
        | Value::TimeMicros(number)
        | Value::TimestampMillis(number)
        | Value::TimestampMicros(number)
        | Value::TimestampNanos(number)
        | Value::LocalTimestampMillis(number)
        | Value::LocalTimestampMicros(number)
        | Value::LocalTimestampNanos(number) => number.into(),
        Value::Float(number) => float(number.into()),
        Value::Double(number) => float(number),
        Value::String(text) | Value::Enum(_, text) => Json::String(text),
        Value::Uuid(id) => Json::String(id.to_string()),
        Value::Bytes(bytes) | Value::Fixed(_, bytes) => characters(&bytes),
        Value::Decimal(decimal) => {
            Vec::<u8>::try_from(&decimal).map_or(Json::Null, |bytes| characters(&bytes))
        }
        Value::BigDecimal(number) => Json::String(number.to_string()),
        Value::Duration(duration) => characters(&<[u8; 12]>::from(duration)),
        Value::Union(_, value) => json(*value),
        Value::Array(items) => Json::Array(items.into_iter().map(json).collect()),
        Value::Map(entries) => {
            let entries: BTreeMap<_, _> = entries.into_iter().collect();
            Json::Object(entries.into_iter().map(|(key, value)| (key, json(value))).collect())
        }
        Value::Record(fields) => {
            Json::Object(fields.into_iter().map(|(name, value)| (name, json(value))).collect())
        }
    }
}

/// What JSON has no number for is written as text.
fn float(number: f64) -> Json {
    serde_json::Number::from_f64(number).map_or_else(|| Json::String(number.to_string()), Json::Number)
}

fn characters(bytes: &[u8]) -> Json {
    Json::String(bytes.iter().map(|&byte| char::from(byte)).collect())
}

/// What records contain, to find what must not be decoded.
#[derive(Default)]
struct Names<'a> {
    /// By full name, with the namespace of what is within.
    records: BTreeMap<String, (&'a RecordSchema, NamespaceRef<'a>)>,
    /// Found to end, and whether values take no bytes.
    known: BTreeMap<String, bool>,
}

impl<'a> Names<'a> {
    fn collect(&mut self, schema: &'a Schema, namespace: NamespaceRef<'a>) {
        match schema {
            Schema::Array(array) => self.collect(&array.items, namespace),
            Schema::Map(map) => self.collect(&map.types, namespace),
            Schema::Union(union) => union.variants().iter().for_each(|one| self.collect(one, namespace)),
            Schema::Record(record) => {
                let namespace = record.name.namespace().or(namespace);
                self.records.insert(record.name.fullname(namespace), (record, namespace));
                record.fields.iter().for_each(|field| self.collect(&field.schema, namespace));
            }
            _ => {}
        }
    }

    /// Whether values of the schema take no bytes. `enclosing` are the records around it.
    fn takes_nothing(
        &mut self,
        schema: &'a Schema,
        namespace: NamespaceRef<'a>,
        enclosing: &mut Vec<String>,
    ) -> Result<bool, String> {
        match schema {
            Schema::Null => Ok(true),
            Schema::Fixed(fixed) => Ok(fixed.size == 0),
            Schema::Map(map) => self.takes_nothing(&map.types, namespace, enclosing).map(|_| false),
            Schema::Array(array) => match self.takes_nothing(&array.items, namespace, enclosing)? {
                true => Err("a list of values that take no bytes is not supported".to_owned()),
                false => Ok(false),
            },
            Schema::Union(union) => {
                for one in union.variants() {
                    self.takes_nothing(one, namespace, enclosing)?;
                }
                Ok(false)
            }
            Schema::Record(RecordSchema { name, .. }) | Schema::Ref { name } => {
                let full_name = name.fullname(name.namespace().or(namespace));
                if enclosing.contains(&full_name) {
                    return Err(format!("{full_name} contains itself, which is not supported"));
                }
                if let Some(&known) = self.known.get(&full_name) {
                    return Ok(known);
                }
                // Other named types take bytes.
                let Some(&(record, namespace)) = self.records.get(&full_name) else { return Ok(false) };
                enclosing.push(full_name.clone());
                let mut takes_nothing = true;
                for field in &record.fields {
                    takes_nothing &= self.takes_nothing(&field.schema, namespace, enclosing)?;
                }
                enclosing.pop();
                self.known.insert(full_name, takes_nothing);
                Ok(takes_nothing)
            }
            _ => Ok(false),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn registered(text: &str, references: &[(&str, &str)]) -> Registered {
        let references = references.iter().map(|(name, text)| ((*name).to_owned(), (*text).to_owned()));
        Registered { text: text.to_owned(), references: references.collect() }
    }

    fn refused(text: &str) -> String {
        AvroSchema::new(&registered(text, &[])).unwrap_err()
    }

    #[test]
    fn a_value_is_a_json_object() {
        let author = r#"{"type": "record", "name": "Author", "namespace": "news", "fields": [
            {"name": "name", "type": "string"}]}"#;
        let article = r#"{"type": "record", "name": "Article", "namespace": "news", "fields": [
            {"name": "id", "type": "long"}, {"name": "author", "type": ["null", "Author"]},
            {"name": "tags", "type": {"type": "array", "items": "string"}},
            {"name": "raw", "type": "bytes"}, {"name": "score", "type": "double"}]}"#;
        let schema = AvroSchema::new(&registered(article, &[("news.Author", author)])).unwrap();
        let mut bytes = vec![14, 2, 6, b'A', b'd', b'a', 2, 2, b'x', 0, 4, 0x41, 0xFF];
        bytes.extend(f64::NAN.to_le_bytes());
        let expected = r#"{"id":7,"author":{"name":"Ada"},"tags":["x"],"raw":"Aÿ","score":"NaN"}"#;
        assert_eq!(schema.decode(&bytes).unwrap(), expected);
        for len in 0..bytes.len() {
            assert!(schema.decode(&bytes[..len]).is_err(), "{len} bytes");
        }
        bytes.push(0);
        assert_eq!(schema.decode(&bytes).unwrap_err(), "1 bytes are left");
        let huge = [14, 0, 0xFE, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0x7F];
        assert!(schema.decode(&huge).is_err(), "a list that claims to be huge");
    }

    #[test]
    fn schemas_that_data_could_abuse_are_refused() {
        let list = r#"{"type": "record", "name": "L", "namespace": "n", "fields": [
            {"name": "next", "type": ["null", "n.L"]}]}"#;
        assert_eq!(refused(list), "n.L contains itself, which is not supported");
        let nulls = r#"{"type": "record", "name": "N", "fields": [
            {"name": "e", "type": {"type": "record", "name": "E", "fields": []}},
            {"name": "all", "type": {"type": "array", "items": "E"}}]}"#;
        assert!(refused(nulls).starts_with("a list of values that take no bytes"));
        assert!(refused(r#""string""#).starts_with("not a record"));
        assert!(!refused("{").is_empty());
        let text = r#"{"type": "record", "name": "T", "fields": [{"name": "t", "type": "string"}]}"#;
        let schema = AvroSchema::new(&registered(text, &[])).unwrap();
        assert_eq!(schema.decode(&[4, b'o', b'k']).unwrap(), r#"{"t":"ok"}"#);
        assert_eq!(schema.decode(&[4, b'o']).unwrap_err(), "it ends too early");
    }
}
