use std::fs;

use expect_test::{Expect, expect};

use super::*;
use crate::quant::{Dtype, dequantize};

/// A file of a header and data.
pub(super) fn file(header: &str, data: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes(), header.as_bytes(), data].concat()
}

fn floats(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

fn one(name: &str, value: f32) -> Vec<u8> {
    file(&format!(r#"{{"{name}":{{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}}}"#), &floats(&[value]))
}

fn folder(files: &[(&str, &[u8])]) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for (name, bytes) in files {
        fs::write(folder.path().join(name), bytes).unwrap();
    }
    folder
}

#[test]
fn tensors_of_a_single_file_are_views() {
    let header = r#"{"__metadata__":{"format":"pt"},
        "b":{"dtype":"BF16","shape":[2],"data_offsets":[24,28]},
        "a":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]},
        "i":{"dtype":"I64","shape":[],"data_offsets":[28,36]},
        "none":{"dtype":"F16","shape":[0,4],"data_offsets":[36,36]}}"#;
    let data = [floats(&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]), vec![0x80, 0x3f, 0, 0x40], vec![0; 8]].concat();
    let folder = folder(&[(SINGLE_FILE, &file(header, &data))]);
    let weights = Safetensors::open(folder.path()).unwrap();
    assert_eq!(weights.path(), folder.path());
    assert_eq!(weights.tensor_names().collect::<Vec<_>>(), ["a", "b", "i", "none"]);
    let tensor = weights.tensor("a").unwrap();
    assert_eq!((tensor.dtype, tensor.shape), (Dtype::F32, &[2, 3][..]));
    let tensor = weights.tensor("b").unwrap();
    let mut values = [0.0; 2];
    dequantize(tensor.dtype, tensor.data, &mut values);
    assert_eq!((tensor.dtype, values), (Dtype::Bf16, [1.0, 2.0]));
    assert!(weights.tensor("none").unwrap().data.is_empty());
    let error = weights.tensor("i").unwrap_err().to_string();
    assert!(error.contains("tensor \"i\" of weights") && error.contains("has the type I64"), "{error}");
    assert!(matches!(weights.tensor("c"), Err(SafetensorsError::MissingTensor { .. })));
}

#[test]
fn shards_are_found_by_the_index() {
    let index =
        br#"{"metadata":{"total_size":8},"weight_map":{"a":"m-1.safetensors","b":"m-2.safetensors"}}"#;
    let (a, b) = (one("a", 1.0), one("b", 2.0));
    let files: [(&str, &[u8]); 3] = [("m-1.safetensors", &a), ("m-2.safetensors", &b), (INDEX_FILE, index)];
    let good = folder(&files);
    let weights = Safetensors::open(good.path()).unwrap();
    assert_eq!(weights.tensor("a").unwrap().data, floats(&[1.0]));
    assert_eq!(weights.tensor("b").unwrap().data, floats(&[2.0]));
    // Each shard must hold what the index says, and no tensor may be in two.
    for (shard, bytes) in [("m-2.safetensors", one("c", 2.0)), ("m-2.safetensors", one("a", 2.0))] {
        let bad = folder(&files);
        fs::write(bad.path().join(shard), bytes).unwrap();
        assert!(matches!(Safetensors::open(bad.path()), Err(SafetensorsError::Invalid { .. })));
    }
    fs::remove_file(good.path().join("m-1.safetensors")).unwrap();
    assert!(matches!(Safetensors::open(good.path()), Err(SafetensorsError::Io { .. })));
}

#[test]
fn an_index_cannot_leave_its_folder() {
    for name in
        ["../m.safetensors", "/m.safetensors", "a/b.safetensors", "..", "x\\y.safetensors", ".m.safetensors"]
    {
        let index = serde_json::json!({ "weight_map": { "a": name } }).to_string();
        let folder = folder(&[(INDEX_FILE, index.as_bytes())]);
        let error = Safetensors::open(folder.path()).unwrap_err().to_string();
        assert!(error.contains("is not a plain file name"), "{name}: {error}");
    }
}

#[track_caller]
fn check(bytes: &[u8], expected: Expect) {
    expected.assert_eq(&parse::parse(bytes).expect_err("the file is wrong"));
}

#[test]
fn false_claims_are_errors() {
    let entry = |dtype: &str, shape: &str, range: &str| {
        file(&format!(r#"{{"a":{{"dtype":"{dtype}","shape":{shape},"data_offsets":{range}}}}}"#), &[0; 8])
    };
    check(b"short", expect!["the file is too short for a header"]);
    check(
        &u64::MAX.to_le_bytes(),
        expect!["a header of 18446744073709551615 bytes does not fit into 0 bytes"],
    );
    check(
        &file("[1]", &[]),
        expect!["the header is not readable: invalid type: sequence, expected a map at line 1 column 0"],
    );
    check(&file("{}", &[0; 3]), expect!["3 bytes after the last tensor"]);
    check(&entry("F32", "[2]", "[0,9]"), expect![[r#"tensor "a" has the range 0..9, the data has 8 bytes"#]]);
    check(&entry("F32", "[2]", "[8,0]"), expect![[r#"tensor "a" has the range 8..0, the data has 8 bytes"#]]);
    check(
        &entry("U8", "[1]", "[18446744073709551615,18446744073709551615]"),
        expect![[
            r#"tensor "a" has the range 18446744073709551615..18446744073709551615, the data has 8 bytes"#
        ]],
    );
    check(&entry("F32", "[3]", "[0,8]"), expect![[r#"tensor "a" of type F32 and shape [3] has 8 bytes"#]]);
    check(
        &entry("F32", "[4611686018427387904,4]", "[0,8]"),
        expect![[r#"tensor "a" of type F32 and shape [4611686018427387904, 4] has 8 bytes"#]],
    );
    check(&entry("F32", "[1]", "[4,8]"), expect![[r#"tensor "a" does not follow the one before it"#]]);
    check(&entry("F32", "[1]", "[0,4]"), expect!["4 bytes after the last tensor"]);
    check(&entry("F32", "[1,1,1,1,1,1,1,1,2]", "[0,8]"), expect![[r#"tensor "a" has 9 dimensions"#]]);
    let overlap = r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}"#;
    check(&file(overlap, &[0; 8]), expect![[r#"tensor "b" does not follow the one before it"#]]);
}
