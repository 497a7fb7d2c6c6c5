//! Every column type passes through a pipeline unchanged, nested ones and nulls too, and row groups are
//! streamed: memory does not grow with the file.
#![expect(clippy::unwrap_used, reason = "helpers of tests may panic")]

use std::fs;
use std::sync::Arc;

use arrow::array::{
    Array, ArrayRef, BinaryArray, BooleanArray, Date32Array, Decimal128Array, DictionaryArray, Float64Array,
    Int64Array, ListArray, RecordBatch, StringArray, StructArray, TimestampMicrosecondArray, UInt8Array,
};
use arrow::compute::concat_batches;
use arrow::datatypes::{DataType, Field, Int32Type, Schema};
use serde_json::Value;
use tidemill_tests::{Pipeline, read_parts, write_parquet};

const DEFINITION: &str = "\
name: passthrough
model: { name: fake }
source: { parquet: { path: data } }
steps:
  - generate: { name: answer, prompt: 'Say {{ id }}', max_tokens: 4 }
sink: { parquet: { path: out } }
";

/// One column of each kind, with nulls in all but the first.
fn zoo(first: i64, len: i64) -> RecordBatch {
    let numbers = || (first..first + len).map(|n| (n % 5 != 3).then_some(n));
    let texts = || numbers().map(|n| n.map(|n| format!("text {n} ü 🌊")));
    let inner = StructArray::from(vec![
        (
            Arc::new(Field::new("n", DataType::Int64, true)),
            Arc::new(Int64Array::from_iter(numbers())) as ArrayRef,
        ),
        (Arc::new(Field::new("t", DataType::Utf8, true)), Arc::new(StringArray::from_iter(texts()))),
    ]);
    let lists = ListArray::from_iter_primitive::<Int32Type, _, _>(
        numbers().map(|n| n.map(|n| (0..n as i32 % 4).map(Some).chain([None]).collect::<Vec<_>>())),
    );
    let dictionary: DictionaryArray<Int32Type> =
        numbers().map(|n| n.map(|n| if n % 2 == 0 { "even" } else { "odd" })).collect();
    let stamps = TimestampMicrosecondArray::from_iter(numbers()).with_timezone("+02:00");
    let decimals = Decimal128Array::from_iter(numbers().map(|n| n.map(i128::from)));
    let columns: Vec<(&str, ArrayRef)> = vec![
        ("id", Arc::new(Int64Array::from_iter_values(first..first + len))),
        ("text", Arc::new(StringArray::from_iter(texts()))),
        ("flag", Arc::new(BooleanArray::from_iter(numbers().map(|n| n.map(|n| n % 2 == 0))))),
        ("small", Arc::new(UInt8Array::from_iter(numbers().map(|n| n.map(|n| n as u8))))),
        ("ratio", Arc::new(Float64Array::from_iter(numbers().map(|n| n.map(|n| n as f64 / 3.0))))),
        ("bytes", Arc::new(BinaryArray::from_iter(texts()))),
        ("day", Arc::new(Date32Array::from_iter(numbers().map(|n| n.map(|n| n as i32))))),
        ("stamp", Arc::new(stamps)),
        ("price", Arc::new(decimals.with_precision_and_scale(12, 3).unwrap())),
        ("section", Arc::new(dictionary)),
        ("tags", Arc::new(lists)),
        ("inner", Arc::new(inner)),
    ];
    let fields: Vec<Field> = columns
        .iter()
        .map(|(name, column)| {
            let field = Field::new(*name, column.data_type().clone(), *name != "id");
            let unit = [("unit".to_owned(), format!("of {name}"))];
            field.with_metadata(
                std::collections::BTreeMap::from(unit).into_iter().collect::<arrow::datatypes::Metadata>(),
            )
        })
        .collect();
    RecordBatch::try_new(
        Arc::new(Schema::new(fields)),
        columns.into_iter().map(|(_, column)| column).collect(),
    )
    .unwrap()
}

#[test]
fn every_column_type_comes_out_as_it_went_in() {
    let pipeline = Pipeline::new(DEFINITION);
    fs::create_dir(pipeline.path("data")).unwrap();
    write_parquet(&pipeline.path("data/a.parquet"), &zoo(0, 700), 150).unwrap();
    write_parquet(&pipeline.path("data/b.parquet"), &zoo(700, 333), 1000).unwrap();
    pipeline.run(&["run", "--quiet", "--workers", "2"]).expect_code(0);
    let parts = read_parts(&pipeline.path("out")).unwrap();
    let out = concat_batches(&parts[0].schema(), &parts).unwrap();
    let expected = zoo(0, 1033);
    assert_eq!(out.num_rows(), expected.num_rows());
    for (index, field) in expected.schema().fields().iter().enumerate() {
        assert_eq!(out.schema().field(index), field.as_ref());
        assert_eq!(out.column(index).as_ref(), expected.column(index).as_ref(), "column {}", field.name());
    }
    assert_eq!(out.num_columns(), expected.num_columns() + 4);
}

#[test]
fn memory_does_not_grow_with_the_file() {
    let peak = |row_groups: i64| {
        let definition = DEFINITION.replace("max_tokens: 4", "max_tokens: 1");
        let pipeline = Pipeline::new(&(definition + "credit: { documents: 64, bytes: 4MiB }\n"));
        fs::create_dir(pipeline.path("data")).unwrap();
        for file in 0..row_groups {
            // Text that does not compress away: 4 MiB a file, in row groups of 1 MiB.
            let ids: Vec<i64> = (file * 256..(file + 1) * 256).collect();
            let mut state = file as u64 + 1;
            let texts = ids.iter().map(|_| {
                let letters = (0..16_384).map(|_| {
                    state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                    char::from(b'a' + (state >> 59) as u8 % 26)
                });
                letters.collect::<String>()
            });
            let texts: StringArray = texts.map(Some).collect();
            let columns: [(&str, ArrayRef); 2] =
                [("id", Arc::new(Int64Array::from(ids))), ("text", Arc::new(texts))];
            let rows = RecordBatch::try_from_iter(columns).unwrap();
            write_parquet(&pipeline.path(&format!("data/{file:03}.parquet")), &rows, 64).unwrap();
        }
        let summary = pipeline.path("summary.json");
        pipeline.run(&["run", "--summary", summary.to_str().unwrap()]).expect_code(0);
        let summary: Value = serde_json::from_str(&fs::read_to_string(summary).unwrap()).unwrap();
        assert_eq!(summary["documents"], row_groups * 256);
        summary["peak_memory_bytes"].as_u64().unwrap()
    };
    // Row groups are written at 32 MiB, so both have had some, and the allocator has kept one or two of them.
    let (small, large) = (peak(32), peak(64));
    assert!(large < small + (48 << 20), "{} MiB for 128 MiB, {} MiB for 256 MiB", small >> 20, large >> 20);
}
