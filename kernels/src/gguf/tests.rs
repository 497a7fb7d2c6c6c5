use std::path::Path;

use expect_test::{Expect, expect};

use super::build::{Builder, array_head, open};
use super::*;

fn small() -> Builder {
    Builder::new()
        .str("general.architecture", "llama")
        .u32("llama.block_count", 2)
        .f32("eps", 1e-5)
        .str_array("tokens", &["a", "ä", ""])
        .i32_array("types", &[1, -3])
        .tensor("a", &[2, 3], &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
        .tensor("b", &[1], &[7.0])
}

#[track_caller]
fn check(result: Result<Gguf, GgufError>, expected: Expect) {
    expected.assert_eq(&result.expect_err("the file is wrong").to_string());
}

#[test]
fn metadata_and_tensors_are_found() {
    let gguf = small().open().unwrap();
    assert_eq!(gguf.str("general.architecture").unwrap(), "llama");
    assert_eq!(gguf.u32("llama.block_count").unwrap(), 2);
    assert_eq!(gguf.f32("eps").unwrap(), 1e-5);
    assert_eq!(gguf.str_array("tokens").unwrap(), ["a", "ä", ""]);
    assert_eq!(gguf.i32_array("types").unwrap(), [1, -3]);
    assert_eq!(gguf.tensor_names().collect::<Vec<_>>(), ["a", "b"]);
    let tensor = gguf.tensor("a").unwrap();
    assert_eq!((tensor.shape, tensor.dtype, tensor.num_elements()), (&[2, 3][..], Dtype::F32, 6));
    let mut values = [0.0; 6];
    crate::quant::dequantize(tensor.dtype, tensor.data, &mut values);
    assert_eq!(values, [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
}

#[test]
fn missing_and_mistyped_values_name_the_key() {
    let gguf = small().open().unwrap();
    expect![[r#"model file "test.gguf" has no metadata key "no""#]]
        .assert_eq(&gguf.u32("no").unwrap_err().to_string());
    expect![[r#"model file "test.gguf" has an array of 3 strings under metadata key "tokens", expected an integer of 32 bits"#]]
        .assert_eq(&gguf.u32("tokens").unwrap_err().to_string());
    expect![[r#"model file "test.gguf" has no tensor "c""#]]
        .assert_eq(&gguf.tensor("c").unwrap_err().to_string());
}

#[test]
fn files_on_disk_are_mapped() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("small.gguf");
    std::fs::write(&path, small().bytes()).unwrap();
    assert_eq!(Gguf::open(&path).unwrap().u32("llama.block_count").unwrap(), 2);
    std::fs::write(&path, b"").unwrap();
    assert!(matches!(Gguf::open(&path), Err(GgufError::Invalid { .. })));
    assert!(matches!(Gguf::open(folder.path()), Err(GgufError::Io { .. })));
    assert!(matches!(Gguf::open(Path::new("/no/such/file")), Err(GgufError::Io { .. })));
}

#[test]
fn every_truncation_is_an_error() {
    let bytes = small().bytes();
    for len in 0..bytes.len() {
        assert!(open(bytes[..len].to_vec()).is_err(), "the first {len} bytes");
    }
    check(
        open(bytes[..bytes.len() - 1].to_vec()),
        expect![[
            r#"model file "test.gguf" is not a valid GGUF file: tensor "b" needs 4 bytes from 320 + 32 on, the file has 355 at byte 289"#
        ]],
    );
    check(
        open(bytes[..60].to_vec()),
        expect![[
            r#"model file "test.gguf" is not a valid GGUF file: 2 tensors do not fit into the 44 bytes left at byte 16"#
        ]],
    );
}

#[test]
fn absurd_sizes_are_errors() {
    let huge = u64::MAX.to_le_bytes();
    check(
        Builder::new().pair("x", 8, &huge).open(),
        expect![[
            r#"model file "test.gguf" is not a valid GGUF file: the file ends within a metadata value (18446744073709551615 bytes, 19 left) at byte 45"#
        ]],
    );
    check(
        Builder::new().pair("x", 9, &array_head(8, 1 << 40)).open(),
        expect![[
            r#"model file "test.gguf" is not a valid GGUF file: 1099511627776 array elements do not fit into the 15 bytes left at byte 49"#
        ]],
    );
    check(
        Builder::new().tensor_entry("t", &[u64::MAX, 2], 0, 0).open(),
        expect![[
            r#"model file "test.gguf" is not a valid GGUF file: tensor "t" has a dimension of 2 at byte 53"#
        ]],
    );
    check(
        Builder::new().tensor_entry("t", &[1 << 62], 0, 0).open(),
        expect![[
            r#"model file "test.gguf" is not a valid GGUF file: tensor "t" of type F32 cannot have the shape [4611686018427387904] at byte 49"#
        ]],
    );
    check(
        Builder::new().tensor_entry("t", &[1 << 40], 0, 0).open(),
        expect![[
            r#"model file "test.gguf" is not a valid GGUF file: tensor "t" needs 4398046511104 bytes from 64 + 0 on, the file has 64 at byte 57"#
        ]],
    );
    check(
        Builder::new().tensor_entry("t", &[4], 0, u64::MAX - 31).open(),
        expect![[
            r#"model file "test.gguf" is not a valid GGUF file: tensor "t" needs 16 bytes from 64 + 18446744073709551584 on, the file has 64 at byte 57"#
        ]],
    );
    let mut bytes = small().bytes();
    bytes[8..16].copy_from_slice(&huge);
    check(
        open(bytes),
        expect![[
            r#"model file "test.gguf" is not a valid GGUF file: 18446744073709551615 tensors do not fit into the 340 bytes left at byte 16"#
        ]],
    );
}

#[test]
fn malformed_parts_are_errors() {
    let cases = [
        Builder::new().version(4),
        Builder::new().pair("x", 13, &[0]),
        Builder::new().pair("x", 7, &[2]),
        Builder::new().pair("x", 8, &[1, 0, 0, 0, 0, 0, 0, 0, 0xff]),
        Builder::new().u32("x", 1).u32("x", 2),
        Builder::new().u32("general.alignment", 0),
        Builder::new().u32("general.alignment", 24),
        Builder::new().tensor_entry("t", &[], 0, 0),
        Builder::new().tensor_entry("t", &[1, 1, 1, 1, 1], 0, 0),
        Builder::new().tensor_entry("t", &[0], 0, 0),
        Builder::new().tensor_entry("t", &[31], 8, 0),
        Builder::new().tensor("t", &[1], &[0.0]).tensor_entry("u", &[1], 0, 4),
        Builder::new().tensor("t", &[1], &[0.0]).tensor("t", &[1], &[0.0]),
    ];
    for (index, case) in cases.iter().enumerate() {
        assert!(case.open().is_err(), "case {index}");
    }
    check(
        Builder::new().tensor_entry("t", &[256], 10, 0).open(),
        expect![[
            r#"model file "test.gguf" is not a valid GGUF file: tensor "t" has the unsupported type Q2_K (GGUF type 10) at byte 49"#
        ]],
    );
}

#[test]
fn nested_arrays_are_bounded() {
    let mut nested = array_head(0, 0);
    for _ in 0..2 {
        nested = [array_head(9, 1), nested].concat();
    }
    assert!(Builder::new().pair("x", 9, &nested).open().is_ok());
    for _ in 0..1000 {
        nested = [array_head(9, 1), nested].concat();
    }
    check(
        Builder::new().pair("x", 9, &nested).open(),
        expect![[
            r#"model file "test.gguf" is not a valid GGUF file: arrays are nested more than 3 deep at byte 73"#
        ]],
    );
}
