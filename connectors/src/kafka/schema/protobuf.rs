//! Protobuf: messages as JSON objects, by the standard mapping, with the names of fields as the schema writes them.
//!
//! Fields without presence are there with their default, so templates may name them. How deep messages go is
//! bounded by the decoder.

use std::fmt;

use prost_reflect::{DynamicMessage, FileDescriptor, MessageDescriptor, SerializeOptions};
use protox::Compiler;
use protox::file::{ChainFileResolver, File, FileResolver, GoogleFileResolver};

use super::Registered;

/// The name of the schema itself among its files.
const MAIN: &str = "tidemill-registered.proto";
/// The longest path to a message within messages.
const MAX_PATH: usize = 32;

/// A file of messages, with those that it imports.
pub struct ProtobufSchema {
    file: FileDescriptor,
}

/// Files by name.
struct Files(Vec<(String, String)>);

impl FileResolver for Files {
    fn open_file(&self, name: &str) -> Result<File, protox::Error> {
        let found = self.0.iter().find(|(known, _)| known == name);
        let (_, text) = found.ok_or_else(|| protox::Error::file_not_found(name))?;
        File::from_source(name, text)
    }
}

impl ProtobufSchema {
    pub fn new(found: &Registered) -> Result<Self, String> {
        let mut files = Files(found.references.clone());
        files.0.push((MAIN.to_owned(), found.text.clone()));
        let mut resolver = ChainFileResolver::new();
        resolver.add(files);
        resolver.add(GoogleFileResolver::new());
        let mut compiler = Compiler::with_file_resolver(resolver);
        compiler.include_imports(true).open_file(MAIN).map_err(|error| error.to_string())?;
        let file = compiler.descriptor_pool().get_file_by_name(MAIN).expect("it was just compiled");
        Ok(Self { file })
    }

    /// A message, after the path to its type, as a JSON object.
    pub fn decode(&self, mut bytes: &[u8]) -> Result<String, String> {
        let path = read_path(&mut bytes)?;
        let descriptor = self.message(&path).ok_or_else(|| format!("it has no message {path:?}"))?;
        let message = DynamicMessage::decode(descriptor, bytes).map_err(|error| error.to_string())?;
        let options = SerializeOptions::new()
            .use_proto_field_name(true)
            .skip_default_fields(false)
            .stringify_64_bit_integers(false);
        let mut text = Vec::new();
        let mut json = serde_json::Serializer::new(&mut text);
        message.serialize_with_options(&mut json, &options).map_err(|error| error.to_string())?;
        let text = String::from_utf8(text).expect("JSON is text");
        // Some well-known types are no objects in JSON.
        if text.starts_with('{') { Ok(text) } else { Err("not a message with fields".to_owned()) }
    }

    fn message(&self, path: &[usize]) -> Option<MessageDescriptor> {
        let (first, rest) = path.split_first()?;
        let top = self.file.messages().nth(*first)?;
        rest.iter().try_fold(top, |message, &index| message.child_messages().nth(index))
    }
}

/// Where the message's type is: its place among the file's messages, then among those within it.
fn read_path(bytes: &mut &[u8]) -> Result<Vec<usize>, String> {
    let len = read_index(bytes)?;
    if len == 0 {
        // Short for the first one.
        return Ok(vec![0]);
    }
    if len > MAX_PATH {
        return Err(format!("a path of {len} messages is too long"));
    }
    (0..len).map(|_| read_index(bytes)).collect()
}

/// A zigzag number that is not below zero.
fn read_index(bytes: &mut &[u8]) -> Result<usize, String> {
    let mut number = 0_u64;
    for shift in (0..35).step_by(7) {
        let (&byte, rest) = bytes.split_first().ok_or("it ends before the message")?;
        *bytes = rest;
        number |= u64::from(byte & 0x7F) << shift;
        if byte < 0x80 {
            return if number & 1 == 0 {
                Ok((number >> 1) as usize)
            } else {
                Err("the path to the message has a negative number".to_owned())
            };
        }
    }
    Err("the path to the message is damaged".to_owned())
}

impl fmt::Debug for ProtobufSchema {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ProtobufSchema").field("file", &self.file.name()).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ARTICLE: &str = r#"
        syntax = "proto3";
        package news;
        import "author.proto";
        import "google/protobuf/timestamp.proto";
        message Article {
            int64 article_id = 1;
            string title = 2;
            Author author = 3;
            google.protobuf.Timestamp at = 4;
            message Tag { string name = 1; Tag inner = 2; }
        }"#;
    const AUTHOR: &str = r#"syntax = "proto3"; package news; message Author { string name = 1; }"#;

    fn schema() -> ProtobufSchema {
        let references = vec![("author.proto".to_owned(), AUTHOR.to_owned())];
        ProtobufSchema::new(&Registered { text: ARTICLE.to_owned(), references }).unwrap()
    }

    #[test]
    fn a_message_is_a_json_object() {
        let bytes = b"\x00\x08\x07\x1a\x05\x0a\x03Ada\x22\x02\x08\x01";
        let expected = r#"{"article_id":7,"title":"","author":{"name":"Ada"},"at":"1970-01-01T00:00:01Z"}"#;
        assert_eq!(schema().decode(bytes).unwrap(), expected);
        // Two steps: the first message, and the first within it.
        let nested = schema().decode(b"\x04\x00\x00\x0a\x01x").unwrap();
        assert_eq!(nested, r#"{"name":"x"}"#);
    }

    #[test]
    fn damage_is_told() {
        let schema = schema();
        for (bytes, reason) in [
            (&b""[..], "ends before the message"),
            (b"\x02\x08", "no message [4]"),
            (b"\x01", "negative"),
            (b"\xff\xff\xff\xff\xff\xff", "damaged"),
            (b"\x80\x80\x80\x80\x02", "too long"),
            (b"\x00\x08", "varint"),
        ] {
            let found = schema.decode(bytes).unwrap_err();
            assert!(found.contains(reason), "{found}");
        }
        // Tags within tags, a thousand deep.
        let mut deep = Vec::new();
        for _ in 0..1000 {
            let mut outer = vec![0x12];
            let mut len = deep.len();
            while len >= 0x80 {
                outer.push((len & 0x7F) as u8 | 0x80);
                len >>= 7;
            }
            outer.push(len as u8);
            outer.extend(&deep);
            deep = outer;
        }
        assert!(schema.decode(&[&[4, 0, 0][..], &deep].concat()).is_err());
        let broken = Registered { text: "message {".to_owned(), references: vec![] };
        assert!(!ProtobufSchema::new(&broken).unwrap_err().is_empty());
    }
}
