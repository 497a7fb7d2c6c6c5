//! Says whether a row fits the schema, and if not, where and why.
//!
//! Invariant: a row that fits is decoded without loss. The decoder of Arrow alone would cut fractions off, read
//! numbers out of text and join two halves of an object which stand on two lines.
//! Keys which the schema does not have are passed over: they are columns nobody asked for.

use std::collections::BTreeMap;
use std::fmt;

use arrow::datatypes::{DataType, Schema};
use serde::de::{DeserializeSeed, Deserializer, Error, IgnoredAny, MapAccess, SeqAccess, Visitor};

use super::infer::Key;

/// The kind of value expected in one place; null fits everywhere.
pub(super) enum Shape {
    Text,
    Bool,
    Int,
    Unsigned,
    Float,
    List(Box<Shape>),
    Object(BTreeMap<String, Shape>),
    /// An object with any keys and text values.
    TextMap,
}

impl Shape {
    pub(super) fn of_rows(schema: &Schema) -> Self {
        Self::Object(schema.fields().iter().map(|f| (f.name().clone(), Self::of(f.data_type()))).collect())
    }

    fn of(data_type: &DataType) -> Self {
        match data_type {
            DataType::Boolean => Self::Bool,
            DataType::Int64 => Self::Int,
            DataType::UInt64 => Self::Unsigned,
            DataType::Float64 => Self::Float,
            DataType::List(item) => Self::List(Box::new(Self::of(item.data_type()))),
            DataType::Struct(fields) => {
                Self::Object(fields.iter().map(|f| (f.name().clone(), Self::of(f.data_type()))).collect())
            }
            DataType::Map(..) => Self::TextMap,
            DataType::Utf8 => Self::Text,
            other => unreachable!("type {other} is never inferred from JSON"),
        }
    }

    fn name(&self) -> &'static str {
        match self {
            Self::Text => "text",
            Self::Bool => "a boolean",
            Self::Int => "a 64-bit integer",
            Self::Unsigned => "an unsigned 64-bit integer",
            Self::Float => "a number",
            Self::List(_) => "a list",
            Self::Object(_) | Self::TextMap => "an object",
        }
    }

    /// Why `line` is not one JSON object of this shape.
    pub(super) fn check(&self, line: &[u8]) -> Result<(), String> {
        if let Err(error) = std::str::from_utf8(line) {
            return Err(format!("invalid UTF-8 at byte {}", error.valid_up_to()));
        }
        let mut state = State { path: String::new(), depth: 0, mismatch: None };
        let mut json = serde_json::Deserializer::from_slice(line);
        let result = Fit { shape: self, state: &mut state }.deserialize(&mut json).and_then(|()| json.end());
        match (result, state.mismatch) {
            (Ok(()), _) => Ok(()),
            (Err(_), Some(mismatch)) => Err(mismatch),
            (Err(error), None) => {
                let text = error.to_string();
                let reason = text.rsplit_once(" at line ").map_or(text.as_str(), |(reason, _)| reason);
                Err(format!("malformed JSON at column {}: {reason}", error.column()))
            }
        }
    }
}

struct State {
    /// Of the value being read: keys with dots between.
    path: String,
    depth: usize,
    mismatch: Option<String>,
}

struct Fit<'a> {
    shape: &'a Shape,
    state: &'a mut State,
}

impl Fit<'_> {
    fn expect<E: Error>(self, fits: bool, found: impl fmt::Display) -> Result<(), E> {
        if fits {
            return Ok(());
        }
        let wanted = self.shape.name();
        let mismatch = match self.state.path.as_str() {
            "" => format!("expected {wanted}, found {found}"),
            path => format!("column {path:?}: expected {wanted}, found {found}"),
        };
        self.state.mismatch = Some(mismatch);
        Err(E::custom("mismatch"))
    }
}

impl<'de> DeserializeSeed<'de> for Fit<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Fit<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.shape.name())
    }

    fn visit_unit<E: Error>(self) -> Result<(), E> {
        // Nothing at all in place of a row is no row.
        let fits = self.state.depth > 0;
        self.expect(fits, "null")
    }

    fn visit_bool<E: Error>(self, _: bool) -> Result<(), E> {
        let fits = matches!(self.shape, Shape::Bool);
        self.expect(fits, "a boolean")
    }

    fn visit_i64<E: Error>(self, value: i64) -> Result<(), E> {
        let fits = match self.shape {
            Shape::Int | Shape::Float => true,
            Shape::Unsigned => value >= 0,
            _ => false,
        };
        self.expect(fits, format_args!("the integer {value}"))
    }

    fn visit_u64<E: Error>(self, value: u64) -> Result<(), E> {
        let fits = match self.shape {
            Shape::Int => i64::try_from(value).is_ok(),
            Shape::Unsigned | Shape::Float => true,
            _ => false,
        };
        self.expect(fits, format_args!("the integer {value}"))
    }

    fn visit_f64<E: Error>(self, value: f64) -> Result<(), E> {
        let fits = matches!(self.shape, Shape::Float);
        self.expect(fits, format_args!("the number {value}"))
    }

    fn visit_str<E: Error>(self, _: &str) -> Result<(), E> {
        let fits = matches!(self.shape, Shape::Text);
        self.expect(fits, "text")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut values: A) -> Result<(), A::Error> {
        let Shape::List(item) = self.shape else { return self.expect(false, "a list") };
        while values.next_element_seed(Fit { shape: item, state: self.state })?.is_some() {}
        Ok(())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<(), A::Error> {
        if !matches!(self.shape, Shape::Object(_) | Shape::TextMap) {
            return self.expect(false, "an object");
        }
        let outer = self.state.path.len();
        self.state.depth += 1;
        while let Some(Key(key)) = entries.next_key()? {
            let shape = match self.shape {
                Shape::Object(keys) => keys.get(key.as_ref()),
                _ => Some(&Shape::Text),
            };
            let Some(shape) = shape else {
                entries.next_value::<IgnoredAny>()?;
                continue;
            };
            if self.state.depth > 1 {
                self.state.path.push('.');
            }
            self.state.path.push_str(&key);
            entries.next_value_seed(Fit { shape, state: self.state })?;
            self.state.path.truncate(outer);
        }
        self.state.depth -= 1;
        Ok(())
    }
}
