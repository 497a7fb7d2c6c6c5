//! Finds a schema which fits as many rows as possible.
//!
//! Every value votes for the kind of its column, and the most frequent kind wins: one odd row among many is
//! rejected later, whether it comes first or last, and never turns a column of numbers into text.
//! Keys keep the order in which they were first seen. Dates and the like stay text: nothing is guessed.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use arrow::datatypes::{DataType, Field, Fields, Schema};
use serde::Deserialize;
use serde::de::{DeserializeSeed, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};

/// The most keys of all objects together; keys beyond it are not read.
const MAX_KEYS: usize = 10_000;

/// Collects the kinds of values over rows.
#[derive(Default)]
pub(super) struct Inference {
    row: Node,
    num_keys: usize,
}

/// What was seen in one place.
#[derive(Default)]
struct Node {
    texts: u64,
    objects: u64,
    lists: u64,
    numbers: u64,
    bools: u64,
    num: Numbers,
    item: Option<Box<Node>>,
    /// With the order of first sight.
    keys: BTreeMap<String, (usize, Node)>,
}

#[derive(Default)]
struct Numbers {
    fraction: bool,
    negative: bool,
    /// Above `i64::MAX`.
    large: bool,
}

impl Inference {
    /// Takes a row into account; one which is not a JSON object is passed over.
    pub(super) fn observe(&mut self, line: &[u8]) {
        // A row broken halfway must not leave columns behind.
        let is_object = line.iter().find(|byte| !byte.is_ascii_whitespace()) == Some(&b'{');
        if !is_object || serde_json::from_slice::<IgnoredAny>(line).is_err() {
            return;
        }
        let mut json = serde_json::Deserializer::from_slice(line);
        let observe = Observe { node: &mut self.row, num_keys: &mut self.num_keys };
        // What fails only here, such as half a surrogate pair, is rejected when the row is read.
        let _ = observe.deserialize(&mut json);
    }

    /// All columns in the order of first sight, all of them nullable.
    pub(super) fn schema(&self) -> Schema {
        if self.num_keys >= MAX_KEYS {
            tracing::warn!(
                max_keys = MAX_KEYS,
                "too many different keys in JSON objects, the last ones are left out"
            );
        }
        Schema::new(self.row.fields())
    }
}

impl Node {
    fn fields(&self) -> Fields {
        let mut keys: Vec<_> = self.keys.iter().collect();
        keys.sort_by_key(|(_, (order, _))| *order);
        keys.into_iter().map(|(key, (_, node))| Field::new(key, node.data_type(), true)).collect()
    }

    fn data_type(&self) -> DataType {
        let most = [self.texts, self.objects, self.lists, self.numbers, self.bools].into_iter().max();
        match most.unwrap_or(0) {
            // Only nulls: text can be written in every format.
            0 => DataType::Utf8,
            most if most == self.texts => DataType::Utf8,
            // A struct without fields cannot be written as Parquet, a map without entries can.
            most if most == self.objects && self.keys.is_empty() => text_map(),
            most if most == self.objects => DataType::Struct(self.fields()),
            most if most == self.lists => {
                let item = self.item.as_ref().map_or(DataType::Utf8, |item| item.data_type());
                DataType::List(Arc::new(Field::new_list_field(item, true)))
            }
            most if most == self.numbers => match self.num {
                Numbers { fraction: true, .. } | Numbers { negative: true, large: true, .. } => {
                    DataType::Float64
                }
                Numbers { large: true, .. } => DataType::UInt64,
                _ => DataType::Int64,
            },
            _ => DataType::Boolean,
        }
    }
}

fn text_map() -> DataType {
    let entry = vec![Field::new("key", DataType::Utf8, false), Field::new("value", DataType::Utf8, true)];
    DataType::Map(Arc::new(Field::new("key_value", DataType::Struct(entry.into()), false)), false)
}

/// A key as it stands in the line, copied only if it has escapes.
#[derive(Deserialize)]
pub(super) struct Key<'a>(#[serde(borrow)] pub(super) Cow<'a, str>);

struct Observe<'a> {
    node: &'a mut Node,
    num_keys: &'a mut usize,
}

impl<'de> DeserializeSeed<'de> for Observe<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Observe<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_unit<E>(self) -> Result<(), E> {
        Ok(())
    }

    fn visit_bool<E>(self, _: bool) -> Result<(), E> {
        self.node.bools += 1;
        Ok(())
    }

    fn visit_i64<E>(self, value: i64) -> Result<(), E> {
        self.node.numbers += 1;
        self.node.num.negative |= value < 0;
        Ok(())
    }

    fn visit_u64<E>(self, value: u64) -> Result<(), E> {
        self.node.numbers += 1;
        self.node.num.large |= i64::try_from(value).is_err();
        Ok(())
    }

    fn visit_f64<E>(self, _: f64) -> Result<(), E> {
        self.node.numbers += 1;
        self.node.num.fraction = true;
        Ok(())
    }

    fn visit_str<E>(self, _: &str) -> Result<(), E> {
        self.node.texts += 1;
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut values: A) -> Result<(), A::Error> {
        self.node.lists += 1;
        let item = self.node.item.get_or_insert_default();
        while values.next_element_seed(Observe { node: item, num_keys: self.num_keys })?.is_some() {}
        Ok(())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<(), A::Error> {
        self.node.objects += 1;
        while let Some(Key(key)) = entries.next_key()? {
            if !self.node.keys.contains_key(key.as_ref()) {
                if *self.num_keys >= MAX_KEYS {
                    entries.next_value::<IgnoredAny>()?;
                    continue;
                }
                *self.num_keys += 1;
                let order = self.node.keys.len();
                self.node.keys.insert(key.clone().into_owned(), (order, Node::default()));
            }
            let (_, node) = self.node.keys.get_mut(key.as_ref()).expect("the key was just inserted");
            entries.next_value_seed(Observe { node, num_keys: self.num_keys })?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(lines: &[&str], expected: &str) {
        let mut inference = Inference::default();
        lines.iter().for_each(|line| inference.observe(line.as_bytes()));
        let schema = inference.schema();
        let columns: Vec<_> =
            schema.fields().iter().map(|f| format!("{}: {}", f.name(), f.data_type())).collect();
        assert_eq!(columns.join("; "), expected);
    }

    #[test]
    fn kinds_are_found() {
        check(&[r#"{"b":1,"a":"x","c":true,"d":null}"#], "b: Int64; a: Utf8; c: Boolean; d: Utf8");
        check(&[r#"{"a":1}"#, r#"{"a":1.5,"b":[null]}"#], "a: Float64; b: List(Utf8)");
        check(&[r#"{"a":18446744073709551615}"#, r#"{"a":1}"#], "a: UInt64");
        check(&[r#"{"a":18446744073709551615}"#, r#"{"a":-1}"#], "a: Float64");
        check(&[r#"{"a":{"x":1}}"#, r#"{"a":{"y":[true]}}"#], r#"a: Struct("x": Int64, "y": List(Boolean))"#);
        check(&[], "");
    }

    #[test]
    fn the_most_frequent_kind_wins() {
        check(&[r#"{"a":"odd"}"#, r#"{"a":1}"#, r#"{"a":2}"#], "a: Int64");
        check(&[r#"{"a":{}}"#, r#"{"a":["x"]}"#, r#"{"a":["y"]}"#], "a: List(Utf8)");
    }

    #[test]
    fn broken_rows_leave_nothing_behind() {
        check(&[r#"{"x":1,"#, "[1]", "7", r#"{"a":1}"#, r#"{"b":1} {"c":2}"#], "a: Int64");
    }
}
