//! From the bytes of a record's value to text: JSON as it is, once it is known to be JSON, any UTF-8, or JSON made of
//! Avro and Protobuf.
//!
//! A verdict is always about one record: what cannot be decoded is rejected with the reason, and the next record is
//! looked at on its own.

use std::borrow::Cow;

use serde_json::value::RawValue;

use super::schema::{Encoding, RegistrySpec, Schemas};

/// What a record's value holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Format {
    /// An object.
    Json,
    /// Any text.
    Text,
    /// By schemas of a registry, as JSON.
    Registered(RegistrySpec, Encoding),
}

/// Why there is no text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DecodeError {
    /// The record is at fault.
    Record(String),
    /// The schema registry cannot be asked now.
    Registry(String),
}

/// Decodes values of one format.
#[derive(Debug)]
pub struct Decoder {
    kind: Kind,
}

#[derive(Debug)]
enum Kind {
    Json,
    Text,
    Registered(Box<Schemas>),
}

impl Decoder {
    pub fn new(format: &Format) -> Self {
        let kind = match format {
            Format::Json => Kind::Json,
            Format::Text => Kind::Text,
            Format::Registered(registry, encoding) => {
                Kind::Registered(Box::new(Schemas::new(registry, *encoding)))
            }
        };
        Self { kind }
    }

    /// Whether the text is JSON.
    pub fn is_json(&self) -> bool {
        !matches!(self.kind, Kind::Text)
    }

    /// The value as text.
    pub fn decode<'a>(&mut self, payload: &'a [u8]) -> Result<Cow<'a, str>, DecodeError> {
        if let Kind::Registered(schemas) = &mut self.kind {
            return schemas.decode(payload).map(Cow::Owned);
        }
        let refuse = |reason: String| DecodeError::Record(reason);
        let text = std::str::from_utf8(payload)
            .map_err(|error| refuse(format!("not UTF-8 at byte {}", error.valid_up_to())))?;
        if self.is_json() {
            // Looked at for its form only.
            let value: &RawValue =
                serde_json::from_str(text).map_err(|error| refuse(format!("not JSON: {error}")))?;
            if !value.get().starts_with('{') {
                return Err(refuse("not a JSON object, but another value".to_owned()));
            }
        }
        Ok(Cow::Borrowed(text))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_verdict_names_the_fault() {
        let mut json = Decoder::new(&Format::Json);
        assert_eq!(json.decode(b" {\"a\": [1, {\"b\": null}]} ").unwrap(), " {\"a\": [1, {\"b\": null}]} ");
        for (payload, reason) in [
            (&b"{\"a\": 1"[..], "EOF while parsing"),
            (b"[1]", "not a JSON object"),
            (b"", "EOF"),
            (b"{} x", "trailing characters"),
            (b"{\"a\": \"\xff\"}", "not UTF-8 at byte 7"),
        ] {
            let Err(DecodeError::Record(found)) = json.decode(payload) else { panic!("{reason}") };
            assert!(found.contains(reason), "{found}");
        }
        let deep = "[".repeat(100_000);
        assert!(json.decode(format!("{{\"a\": {deep}").as_bytes()).is_err(), "too deep");
        let mut text = Decoder::new(&Format::Text);
        assert_eq!(text.decode("ünï".as_bytes()).unwrap(), "ünï");
        assert!(text.decode(b"\xff").is_err());
    }
}
