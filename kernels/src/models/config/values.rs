//! Named values of a checkpoint's metadata, with the checks that every reader of them needs.
//!
//! Invariant: each error names the file, the key and what is there. Null is the same as nothing.

use std::path::Path;

use crate::models::ModelError;

#[derive(Clone, Debug)]
pub(super) enum Value {
    Integer(u64),
    Float(f64),
    Bool(bool),
    Text(String),
    List(Vec<Value>),
    /// Described for an error.
    Other(String),
}

pub(super) struct Values<'a> {
    pub(super) path: &'a Path,
    pub(super) find: &'a dyn Fn(&str) -> Option<Value>,
}

impl Values<'_> {
    pub(super) fn has(&self, key: &str) -> bool {
        self.get(key).is_some()
    }

    pub(super) fn get(&self, key: &str) -> Option<Value> {
        (self.find)(key)
    }

    /// A number from 1 to `max`.
    pub(super) fn size(&self, key: &str, max: u32) -> Result<u32, ModelError> {
        match self.required(key)? {
            Value::Integer(value) if (1..=u64::from(max)).contains(&value) => Ok(value as u32),
            _ => Err(self.invalid(key, format!("a number from 1 to {max}"))),
        }
    }

    pub(super) fn size_or(&self, key: &str, max: u32, default: u32) -> Result<u32, ModelError> {
        if self.has(key) { self.size(key, max) } else { Ok(default) }
    }

    pub(super) fn float(&self, key: &str, min: f32, max: f32) -> Result<f32, ModelError> {
        let value = match self.required(key)? {
            Value::Float(value) => value as f32,
            Value::Integer(value) => value as f32,
            _ => f32::NAN,
        };
        if !(min..=max).contains(&value) {
            return Err(self.invalid(key, format!("a number from {min} to {max}")));
        }
        Ok(value)
    }

    pub(super) fn float_or(&self, key: &str, min: f32, max: f32, default: f32) -> Result<f32, ModelError> {
        if self.has(key) { self.float(key, min, max) } else { Ok(default) }
    }

    pub(super) fn flag_or(&self, key: &str, default: bool) -> Result<bool, ModelError> {
        match self.get(key) {
            None => Ok(default),
            Some(Value::Bool(value)) => Ok(value),
            Some(_) => Err(self.invalid(key, "true or false".to_owned())),
        }
    }

    pub(super) fn text(&self, key: &str) -> Result<String, ModelError> {
        match self.required(key)? {
            Value::Text(text) => Ok(text),
            _ => Err(self.invalid(key, "a text".to_owned())),
        }
    }

    pub(super) fn text_or(&self, key: &str, default: &str) -> Result<String, ModelError> {
        if self.has(key) { self.text(key) } else { Ok(default.to_owned()) }
    }

    pub(super) fn invalid(&self, key: &str, expected: String) -> ModelError {
        let value = self.get(key).map_or_else(|| "nothing".to_owned(), |value| value.describe());
        ModelError::InvalidValue { path: self.path.to_owned(), key: key.to_owned(), value, expected }
    }

    fn required(&self, key: &str) -> Result<Value, ModelError> {
        self.get(key)
            .ok_or_else(|| ModelError::MissingKey { path: self.path.to_owned(), key: key.to_owned() })
    }
}

impl Value {
    fn describe(&self) -> String {
        match self {
            Self::Integer(value) => value.to_string(),
            Self::Float(value) => value.to_string(),
            Self::Bool(value) => value.to_string(),
            Self::Text(text) => format!("{text:?}"),
            Self::List(values) => format!("a list of {} values", values.len()),
            Self::Other(what) => what.clone(),
        }
    }
}
