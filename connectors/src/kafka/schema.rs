//! Records whose schema is in a registry: Confluent's wire format, and what it needs of the registry.
//!
//! A value begins with a zero byte and the schema's id, four bytes, big end first. A schema is asked for once. What the
//! registry does not know is a fault of the record; that it cannot be asked is nobody's, and passes.
//!
//! The protocol is that of Confluent's Schema Registry; others (Apicurio, Karapace, Redpanda) speak it too.

pub mod avro;
pub mod protobuf;

use std::collections::BTreeMap;
use std::time::Duration;

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use serde::Deserialize;

use super::format::DecodeError;
use avro::AvroSchema;
use protobuf::ProtobufSchema;

/// The registry answers within this time, or not at all.
const TIMEOUT: Duration = Duration::from_secs(5);
/// The largest answer, in bytes.
const MAX_ANSWER: u64 = 4 << 20;
/// Schemas that one refers to, with those that these refer to.
const MAX_REFERENCES: usize = 256;
/// Known schemas, and ids that are known not to be one.
const MAX_KNOWN: usize = 10_000;

/// Where schemas are registered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RegistrySpec {
    pub url: String,
    pub username: Option<String>,
    pub password: Option<String>,
}

/// What the values of a topic are encoded as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Encoding {
    Avro,
    Protobuf,
}

impl Encoding {
    fn name(self) -> &'static str {
        match self {
            Self::Avro => "AVRO",
            Self::Protobuf => "PROTOBUF",
        }
    }
}

/// Decodes values by the schemas that their ids name.
#[derive(Debug)]
pub struct Schemas {
    registry: Registry,
    encoding: Encoding,
    /// By id; the reason where there is no such schema, or none that can be used.
    known: BTreeMap<u32, Result<Schema, String>>,
}

#[derive(Debug)]
enum Schema {
    Avro(Box<AvroSchema>),
    Protobuf(ProtobufSchema),
}

impl Schemas {
    pub fn new(spec: &RegistrySpec, encoding: Encoding) -> Self {
        Self { registry: Registry::new(spec), encoding, known: BTreeMap::new() }
    }

    /// The value as a JSON object.
    pub fn decode(&mut self, payload: &[u8]) -> Result<String, DecodeError> {
        let (id, value) = split(payload).map_err(DecodeError::Record)?;
        if !self.known.contains_key(&id) {
            let schema = match self.registry.schema(id, self.encoding) {
                Err(RegistryError::Unavailable(reason)) => return Err(DecodeError::Registry(reason)),
                Err(RegistryError::Unknown(reason)) => Err(reason),
                Ok(found) => self.compile(&found).map_err(|reason| format!("schema {id}: {reason}")),
            };
            // Ids that data makes up must not use up memory.
            if self.known.len() >= MAX_KNOWN {
                self.known.clear();
            }
            self.known.insert(id, schema);
        }
        let schema = self.known[&id].as_ref().map_err(|reason| DecodeError::Record(reason.clone()))?;
        let decoded = match schema {
            Schema::Avro(schema) => schema.decode(value),
            Schema::Protobuf(schema) => schema.decode(value),
        };
        decoded.map_err(|reason| DecodeError::Record(format!("not a value of schema {id}: {reason}")))
    }

    fn compile(&self, found: &Registered) -> Result<Schema, String> {
        match self.encoding {
            Encoding::Avro => AvroSchema::new(found).map(|schema| Schema::Avro(Box::new(schema))),
            Encoding::Protobuf => ProtobufSchema::new(found).map(Schema::Protobuf),
        }
    }
}

/// The schema's id, and what it is the schema of.
fn split(payload: &[u8]) -> Result<(u32, &[u8]), String> {
    match payload {
        [0, a, b, c, d, value @ ..] => Ok((u32::from_be_bytes([*a, *b, *c, *d]), value)),
        [0, ..] | [] => Err(format!("{} bytes are too few for the id of a schema", payload.len())),
        [first, ..] => Err(format!("begins with byte {first:#04x}, not with the zero before a schema's id")),
    }
}

/// A schema with those that it refers to, what is referred to before what refers to it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Registered {
    pub text: String,
    /// By the names that are referred to.
    pub references: Vec<(String, String)>,
}

enum RegistryError {
    /// It may answer later.
    Unavailable(String),
    /// There is no such schema.
    Unknown(String),
}

#[derive(Debug)]
struct Registry {
    agent: ureq::Agent,
    url: String,
    authorization: Option<String>,
}

/// An answer of the registry.
#[derive(Deserialize)]
struct Answer {
    schema: String,
    #[serde(rename = "schemaType")]
    schema_type: Option<String>,
    #[serde(default)]
    references: Vec<Reference>,
}

#[derive(Deserialize)]
struct Reference {
    name: String,
    subject: String,
    version: u32,
}

impl Registry {
    fn new(spec: &RegistrySpec) -> Self {
        let config =
            ureq::Agent::config_builder().timeout_global(Some(TIMEOUT)).http_status_as_error(false).build();
        let authorization = spec.username.as_ref().map(|username| {
            let password = spec.password.as_deref().unwrap_or_default();
            format!("Basic {}", BASE64_STANDARD.encode(format!("{username}:{password}")))
        });
        Self { agent: config.into(), url: spec.url.trim_end_matches('/').to_owned(), authorization }
    }

    fn schema(&self, id: u32, encoding: Encoding) -> Result<Registered, RegistryError> {
        let answer = self.get(&format!("schemas/ids/{id}"))?;
        let found = answer.schema_type.as_deref().unwrap_or("AVRO");
        if found != encoding.name() {
            let reason = format!("schema {id} is of type {found}, the topic's format is {}", encoding.name());
            return Err(RegistryError::Unknown(reason));
        }
        let mut references = Vec::new();
        self.resolve(answer.references, &mut references, 0)?;
        Ok(Registered { text: answer.schema, references })
    }

    fn resolve(
        &self,
        wanted: Vec<Reference>,
        found: &mut Vec<(String, String)>,
        depth: usize,
    ) -> Result<(), RegistryError> {
        for Reference { name, subject, version } in wanted {
            if found.iter().any(|(known, _)| *known == name) {
                continue;
            }
            if found.len() >= MAX_REFERENCES || depth >= MAX_REFERENCES {
                let reason = format!("a schema refers to more than {MAX_REFERENCES} others");
                return Err(RegistryError::Unknown(reason));
            }
            let answer = self.get(&format!("subjects/{}/versions/{version}", encode(&subject)))?;
            self.resolve(answer.references, found, depth + 1)?;
            found.push((name, answer.schema));
        }
        Ok(())
    }

    fn get(&self, path: &str) -> Result<Answer, RegistryError> {
        let url = format!("{}/{path}", self.url);
        let unavailable = |reason: String| {
            RegistryError::Unavailable(format!("the schema registry does not answer at {url}: {reason}"))
        };
        let mut request = self.agent.get(&url).header("accept", "application/vnd.schemaregistry.v1+json");
        if let Some(authorization) = &self.authorization {
            request = request.header("authorization", authorization);
        }
        let mut response = request.call().map_err(|error| unavailable(error.to_string()))?;
        let status = response.status();
        if status == 404 {
            return Err(RegistryError::Unknown(format!("the schema registry knows no {path}")));
        }
        let text = response
            .body_mut()
            .with_config()
            .limit(MAX_ANSWER)
            .read_to_string()
            .map_err(|error| unavailable(error.to_string()))?;
        if !status.is_success() {
            return Err(unavailable(format!("status {status}")));
        }
        serde_json::from_str(&text).map_err(|error| unavailable(format!("not an answer: {error}")))
    }
}

/// A subject as a part of a path.
fn encode(subject: &str) -> String {
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-._~".contains(&byte);
    subject
        .bytes()
        .map(|byte| if is_plain(byte) { char::from(byte).to_string() } else { format!("%{byte:02X}") })
        .collect()
}

#[cfg(test)]
mod fuzz;
#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_frame_is_checked() {
        assert_eq!(split(&[0, 0, 0, 1, 2, 7, 8]).unwrap(), (258, &[7, 8][..]));
        assert_eq!(split(&[0, 0, 0, 1]).unwrap_err(), "4 bytes are too few for the id of a schema");
        assert!(split(b"{\"id\": 1}").unwrap_err().contains("begins with byte 0x7b"));
        assert!(split(b"").is_err());
        assert_eq!(encode("a/b value-1"), "a%2Fb%20value-1");
    }

    #[test]
    fn a_registry_that_cannot_be_asked_is_waited_for() {
        let spec =
            RegistrySpec { url: "http://127.0.0.1:1/apis/".to_owned(), username: None, password: None };
        let mut schemas = Schemas::new(&spec, Encoding::Avro);
        for _ in 0..2 {
            let Err(DecodeError::Registry(reason)) = schemas.decode(&[0, 0, 0, 0, 7, 1]) else {
                panic!("answered")
            };
            assert!(reason.contains("http://127.0.0.1:1/apis/schemas/ids/7"), "{reason}");
        }
        assert!(matches!(schemas.decode(b"plain"), Err(DecodeError::Record(_))));
    }
}
