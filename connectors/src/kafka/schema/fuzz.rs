//! Seeded: damaged values of either encoding are refused or decoded, quickly, and never more than that.

use super::avro::AvroSchema;
use super::protobuf::ProtobufSchema;
use super::{Registered, split};
use crate::random::Random;

const ROUNDS: u64 = 20_000;

const AVRO: &str = r#"{"type": "record", "name": "A", "fields": [
    {"name": "id", "type": "long"}, {"name": "kind", "type": {"type": "enum", "name": "K", "symbols": ["x", "y"]}},
    {"name": "tags", "type": {"type": "array", "items": ["null", "string", "double"]}},
    {"name": "more", "type": {"type": "map", "values": {"type": "fixed", "name": "F", "size": 3}}},
    {"name": "price", "type": {"type": "bytes", "logicalType": "decimal", "precision": 9, "scale": 2}},
    {"name": "at", "type": {"type": "long", "logicalType": "timestamp-millis"}}]}"#;
const AVRO_VALUE: &[u8] = b"\x0e\x02\x04\x02\x04ok\x04\0\0\0\0\0\0\xf0\x3f\0\x02\x02kabc\0\x04\x01\x02\x0e";

const PROTOBUF: &str = r#"syntax = "proto3"; import "google/protobuf/struct.proto";
    message A { int64 id = 1; repeated double scores = 2; map<string, A> more = 3; bytes raw = 4;
    google.protobuf.Struct any = 5; oneof either { string name = 6; sint32 number = 7; } }"#;
const PROTOBUF_VALUE: &[u8] =
    b"\0\x08\x07\x12\x08\0\0\0\0\0\0\xf0\x3f\x1a\x07\x0a\x01k\x12\x02\x08\x01\x22\x02\xff\xfe\x32\x03Ada";

fn damage(value: &[u8], random: &mut Random) -> Vec<u8> {
    let mut value = value.to_vec();
    for _ in 0..=random.below(4) {
        let at = random.below(value.len() as u64) as usize;
        match random.below(4) {
            0 => value[at] = random.below(256) as u8,
            1 => value.insert(at, random.below(256) as u8),
            2 => value.truncate(at.max(1)),
            _ => value[at] ^= 1 << random.below(8),
        }
    }
    value
}

#[test]
fn damaged_values_are_refused_or_decoded() {
    let registered = |text: &str| Registered { text: text.to_owned(), references: vec![] };
    let avro = AvroSchema::new(&registered(AVRO)).unwrap();
    let protobuf = ProtobufSchema::new(&registered(PROTOBUF)).unwrap();
    assert!(avro.decode(AVRO_VALUE).unwrap().contains(r#""tags":["ok",1.0]"#));
    assert!(protobuf.decode(PROTOBUF_VALUE).unwrap().contains(r#""name":"Ada""#));
    let mut num_decoded = [0; 2];
    for seed in 0..ROUNDS {
        let mut random = Random(seed);
        for (which, text) in [
            avro.decode(&damage(AVRO_VALUE, &mut random)),
            protobuf.decode(&damage(PROTOBUF_VALUE, &mut random)),
        ]
        .into_iter()
        .enumerate()
        {
            let Ok(text) = text else { continue };
            let value: serde_json::Value = serde_json::from_str(&text).unwrap();
            assert!(value.is_object(), "seed {seed}: {text}");
            num_decoded[which] += 1;
        }
        // Of a frame, whatever it is, either the schema or the fault is found.
        let _ = split(&damage(b"\0\0\0\0\x07value", &mut random));
    }
    assert!(num_decoded.iter().all(|&num| num > 100 && num < ROUNDS), "{num_decoded:?}");
}
