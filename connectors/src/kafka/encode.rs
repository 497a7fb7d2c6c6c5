//! Rows as the values of records: JSON objects.
//!
//! The text of a JSON `value` is taken over as it is, with the other columns put in at its end; only the names of its
//! fields are looked at, since a column of the same name replaces a field. The `kafka` column is not written: key,
//! headers and timestamp travel in the record itself.

use std::borrow::Cow;
use std::collections::BTreeMap;

use arrow::array::{Array, AsArray, RecordBatch};
use arrow::datatypes::{DataType, Field, FieldRef, Schema, UInt32Type};
use arrow::error::ArrowError;
use arrow::json::writer::{LineDelimited, WriterBuilder};
use serde::Deserialize;
use serde_json::value::RawValue;

use super::rows::{FORMAT, KAFKA, VALUE};

/// Most rows get no more bytes than this besides their `value`.
const MAX_ADDED: usize = 256;

/// The object of each row.
pub fn encode_values(rows: &RecordBatch) -> Result<Vec<Vec<u8>>, ArrowError> {
    let schema = rows.schema();
    let is_json = |field: &FieldRef| {
        field.name() == VALUE && field.metadata().get(FORMAT).is_some_and(|format| format == "json")
    };
    let value = schema.fields().iter().position(is_json);
    let others: Vec<usize> = (0..rows.num_columns())
        .filter(|&index| Some(index) != value && schema.field(index).name() != KAFKA)
        .collect();
    let mut values: Vec<Vec<u8>> = (0..rows.num_rows()).map(|_| Vec::new()).collect();
    let names: Vec<&str> = others.iter().map(|&index| schema.field(index).name().as_str()).collect();
    // Text without `answer` is text without `answer_finish_reason`.
    let is_implied = |name: &&str| names.iter().any(|other| other != name && name.contains(other));
    let signs: Vec<&str> = names.iter().copied().filter(|name| !is_implied(name)).collect();
    for (row, out) in values.iter_mut().enumerate() {
        match value {
            Some(value) => begin_with(out, rows.column(value).as_string::<i32>().value(row), &names, &signs),
            None => out.push(b'{'),
        }
    }
    for &index in &others {
        append(&mut values, rows.column(index), schema.field(index))?;
    }
    for out in &mut values {
        out.push(b'}');
    }
    Ok(values)
}

#[derive(Deserialize)]
#[serde(transparent)]
struct Fields<'a> {
    #[serde(borrow)]
    fields: BTreeMap<Cow<'a, str>, &'a RawValue>,
}

/// The object's text without its last brace, and without the fields that columns replace. Where none of the `signs` is in
/// the text, there are no such fields.
fn begin_with(out: &mut Vec<u8>, object: &str, names: &[&str], signs: &[&str]) {
    let object = object.trim();
    out.reserve(object.len() + MAX_ADDED);
    // The name somewhere in the text is rare, and only then a look is worth it.
    let may_clash = signs.iter().any(|name| object.contains(name)) || object.contains("\\u");
    if may_clash && let Ok(Fields { mut fields }) = serde_json::from_str::<Fields<'_>>(object) {
        let num_fields = fields.len();
        fields.retain(|name, _| !names.contains(&name.as_ref()));
        if fields.len() < num_fields {
            let kept = serde_json::to_vec(&fields).expect("strings and raw values");
            out.extend_from_slice(&kept[..kept.len() - 1]);
            return;
        }
    }
    out.extend_from_slice(object.strip_suffix('}').unwrap_or("{").trim_end().as_bytes());
}

/// Adds a column's values as a field of every object.
fn append(values: &mut [Vec<u8>], column: &dyn Array, field: &Field) -> Result<(), ArrowError> {
    let mut name = serde_json::to_vec(field.name()).expect("a string");
    name.push(b':');
    let begin = |out: &mut Vec<u8>| {
        if out.last() != Some(&b'{') {
            out.push(b',');
        }
        out.extend_from_slice(&name);
    };
    match field.data_type() {
        DataType::Utf8 => {
            for (out, text) in values.iter_mut().zip(column.as_string::<i32>()) {
                begin(out);
                serde_json::to_writer(out, &text).expect("memory takes it");
            }
        }
        DataType::UInt32 => {
            for (out, number) in values.iter_mut().zip(column.as_primitive::<UInt32Type>()) {
                begin(out);
                serde_json::to_writer(out, &number).expect("memory takes it");
            }
        }
        _ => {
            let schema = Schema::new(vec![field.clone()]);
            let rows = RecordBatch::try_new(schema.into(), vec![column.slice(0, column.len())])?;
            let mut lines = Vec::new();
            let mut writer =
                WriterBuilder::new().with_explicit_nulls(true).build::<_, LineDelimited>(&mut lines);
            writer.write(&rows)?;
            writer.finish()?;
            drop(writer);
            for (out, line) in values.iter_mut().zip(lines.split(|&byte| byte == b'\n')) {
                begin(out);
                // `{"name":…}`: what stands between.
                out.extend_from_slice(&line[1 + name.len()..line.len() - 1]);
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use arrow::array::{Int64Array, ListArray, StringArray, UInt32Array};
    use arrow::datatypes::Int32Type;
    use serde_json::{Value, json};

    use super::*;

    fn encode(value: &str, summary: &str, is_json: bool) -> String {
        let mut field = Field::new(VALUE, DataType::Utf8, false);
        if is_json {
            field = field.with_metadata([(FORMAT.to_owned(), "json".to_owned())]);
        }
        let schema = Schema::new(vec![
            field,
            Field::new("summary", DataType::Utf8, true),
            Field::new("summary_output_tokens", DataType::UInt32, false),
        ]);
        let rows = RecordBatch::try_new(
            Arc::new(schema),
            vec![
                Arc::new(StringArray::from(vec![value])),
                Arc::new(StringArray::from(vec![summary])),
                Arc::new(UInt32Array::from(vec![7])),
            ],
        );
        String::from_utf8(encode_values(&rows.unwrap()).unwrap().remove(0)).unwrap()
    }

    #[test]
    fn fields_are_added_to_the_text_as_it_was() {
        let got = encode(" {\"b\" : 1.50, \"a\":[ ]} ", "x \"y\"\n", true);
        assert_eq!(got, r#"{"b" : 1.50, "a":[ ],"summary":"x \"y\"\n","summary_output_tokens":7}"#);
        assert_eq!(encode("{}", "x", true), r#"{"summary":"x","summary_output_tokens":7}"#);
        assert_eq!(encode("{ }", "x", true), r#"{"summary":"x","summary_output_tokens":7}"#);
        let got = encode("plain {", "x", false);
        assert_eq!(got, r#"{"value":"plain {","summary":"x","summary_output_tokens":7}"#);
    }

    #[test]
    fn a_column_replaces_a_field_of_its_name() {
        for object in [r#"{"summary": {"deep": 1}, "z": 1}"#, r#"{"s\u0075mmary": 3, "z": 1}"#] {
            let got: Value = serde_json::from_str(&encode(object, "new", true)).unwrap();
            assert_eq!(got, json!({"z": 1, "summary": "new", "summary_output_tokens": 7}));
        }
        let kept = r#"{"title": "a summary", "deep": {"summary": 1}}"#;
        assert!(encode(kept, "new", true).starts_with(&kept[..kept.len() - 1]));
    }

    #[test]
    fn other_columns_are_json_too() {
        let lists = ListArray::from_iter_primitive::<Int32Type, _, _>([Some(vec![Some(1), None]), None]);
        let rows = RecordBatch::try_from_iter_with_nullable([
            ("id", Arc::new(Int64Array::from(vec![Some(7), None])) as _, true),
            ("tags", Arc::new(lists) as _, true),
        ]);
        let got = encode_values(&rows.unwrap()).unwrap();
        assert_eq!(got, [&br#"{"id":7,"tags":[1,null]}"#[..], br#"{"id":null,"tags":null}"#]);
    }
}
