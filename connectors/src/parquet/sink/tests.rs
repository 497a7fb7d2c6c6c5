use std::sync::Arc;

use arrow::array::*;
use arrow::buffer::OffsetBuffer;
use arrow::datatypes::{DataType, Field, Fields, Int32Type, Schema};
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;

use super::*;

fn text_field() -> Field {
    Field::new("text", DataType::Utf8, true)
}

/// One column of most kinds, three rows each with a null in it.
fn zoo() -> RecordBatch {
    let texts = || Arc::new(StringArray::from(vec![Some("é"), None, Some("")])) as ArrayRef;
    let numbers = || Arc::new(Int64Array::from(vec![Some(i64::MIN), None, Some(7)])) as ArrayRef;
    let fields = Fields::from(vec![text_field(), Field::new("n", DataType::Int64, true)]);
    let pair =
        StructArray::new(fields.clone(), vec![texts(), numbers()], Some(vec![true, true, false].into()));
    let item = Arc::new(Field::new_list_field(DataType::Struct(fields), true));
    let offsets = OffsetBuffer::from_lengths([2, 0, 1]);
    let turns = ListArray::new(item, offsets, Arc::new(pair.clone()), Some(vec![true, false, true].into()));
    let mut map = MapBuilder::new(None, StringBuilder::new(), Int32Builder::new());
    map.keys().append_value("k");
    map.values().append_value(1);
    map.append(true).unwrap();
    map.append(false).unwrap();
    map.append(true).unwrap();
    let times = TimestampMicrosecondArray::from(vec![Some(-1), None, Some(1 << 50)]);
    let columns: Vec<(&str, ArrayRef)> = vec![
        ("texts", texts()),
        ("numbers", numbers()),
        ("pair", Arc::new(pair)),
        ("turns", Arc::new(turns)),
        ("map", Arc::new(map.finish())),
        ("zoned", Arc::new(times.clone().with_timezone("Europe/Berlin"))),
        ("local", Arc::new(times)),
        ("seconds", Arc::new(Time32SecondArray::from(vec![Some(1), None, Some(86_399)]))),
        ("date", Arc::new(Date32Array::from(vec![Some(-1), None, Some(20_000)]))),
        ("bool", Arc::new(BooleanArray::from(vec![Some(true), None, Some(false)]))),
        ("half", Arc::new(Float32Array::from(vec![Some(f32::INFINITY), None, Some(-0.0)]))),
        ("bytes", Arc::new(BinaryArray::from_opt_vec(vec![Some(b"\xff\x00"), None, Some(b"")]))),
        ("large", Arc::new(LargeStringArray::from(vec![Some("x"), None, Some("y")]))),
        ("view", Arc::new(StringViewArray::from(vec![Some("longer than twelve bytes"), None, Some("")]))),
        (
            "fixed",
            Arc::new(
                FixedSizeBinaryArray::try_from_sparse_iter_with_size(
                    [Some(b"ab"), None, Some(b"cd")].into_iter(),
                    2,
                )
                .unwrap(),
            ),
        ),
        (
            "decimal",
            Arc::new(
                Decimal128Array::from(vec![Some(-1), None, Some(10_i128.pow(37))])
                    .with_precision_and_scale(38, 10)
                    .unwrap(),
            ),
        ),
        (
            "wide",
            Arc::new(
                Decimal256Array::from(vec![
                    None,
                    None,
                    Some(arrow::datatypes::i256::MAX.wrapping_div(10.into())),
                ])
                .with_precision_and_scale(76, 0)
                .unwrap(),
            ),
        ),
        (
            "dictionary",
            Arc::new([Some("a"), None, Some("a")].into_iter().collect::<DictionaryArray<Int32Type>>()),
        ),
        ("u8", Arc::new(UInt8Array::from(vec![Some(255), None, Some(0)]))),
        ("u64", Arc::new(UInt64Array::from(vec![Some(u64::MAX), None, Some(0)]))),
        ("null", Arc::new(NullArray::new(3))),
    ];
    let note = |name: &str| [("note".to_owned(), format!("about {name}"))];
    let fields: Vec<Field> = columns
        .iter()
        .map(|(name, column)| Field::new(*name, column.data_type().clone(), true).with_metadata(note(name)))
        .collect();
    let schema = Schema::new(fields).with_metadata(note("all"));
    RecordBatch::try_new(Arc::new(schema), columns.into_iter().map(|(_, column)| column).collect()).unwrap()
}

fn numbers(range: std::ops::Range<i64>) -> RecordBatch {
    let column = Arc::new(Int64Array::from_iter_values(range)) as ArrayRef;
    RecordBatch::try_from_iter([("n", column)]).unwrap()
}

#[test]
fn every_type_passes_unchanged() {
    let folder = tempfile::tempdir().unwrap();
    let batch = zoo();
    assert!(batch.columns().iter().all(|column| column.logical_null_count() > 0));
    let mut sink = ParquetSink::open(folder.path(), batch.schema()).unwrap();
    sink.write(&batch).unwrap();
    sink.write(&batch.slice(1, 1)).unwrap();
    assert_eq!(sink.staged_rows(), 4);
    let part = sink.prepare().unwrap().unwrap();
    let path = folder.path().join(&part.name);
    assert!(!path.exists());
    sink.publish(&part).unwrap();
    assert_eq!(
        part,
        Part { name: "part-00000.parquet".into(), rows: 4, bytes: fs::metadata(&path).unwrap().len() }
    );
    let reader = ParquetRecordBatchReaderBuilder::try_new(File::open(&path).unwrap()).unwrap();
    assert_eq!(reader.schema(), &batch.schema());
    let read = reader.build().unwrap().next().unwrap().unwrap();
    for (index, field) in batch.schema().fields().iter().enumerate() {
        let (found, expected) = (read.column(index), batch.column(index));
        assert_eq!(&found.slice(0, 3), expected, "column {}", field.name());
        assert_eq!(&found.slice(3, 1), &expected.slice(1, 1), "row 1 of column {}", field.name());
    }
}

#[test]
fn a_row_group_is_bounded() {
    let folder = tempfile::tempdir().unwrap();
    let rows = numbers(0..200_000);
    let mut sink = ParquetSink::open(folder.path(), rows.schema()).unwrap();
    sink.write(&rows).unwrap();
    let part = sink.prepare().unwrap().unwrap();
    sink.publish(&part).unwrap();
    let file = File::open(folder.path().join(part.name)).unwrap();
    let reader = ParquetRecordBatchReaderBuilder::try_new(file).unwrap();
    let sizes: Vec<i64> = reader.metadata().row_groups().iter().map(|group| group.num_rows()).collect();
    assert_eq!(sizes, [65_536, 65_536, 65_536, 3_392]);
}

#[test]
fn no_rows_make_no_part() {
    let folder = tempfile::tempdir().unwrap();
    let mut sink = ParquetSink::open(folder.path(), numbers(0..1).schema()).unwrap();
    sink.write(&numbers(0..0)).unwrap();
    assert_eq!(sink.prepare().unwrap(), None);
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
}

#[test]
fn recovery_shows_what_is_committed_and_removes_only_what_is_ours() {
    let folder = tempfile::tempdir().unwrap();
    let names = ["notes.txt", "part-1.parquet", "part-00000-a.parquet", ".part-x.parquet.tmp", "_SUCCESS"];
    for name in names {
        fs::write(folder.path().join(name), "not ours").unwrap();
    }
    let mut sink = ParquetSink::open(folder.path(), numbers(0..1).schema()).unwrap();
    assert_eq!(sink.occupied().unwrap(), None);
    let mut parts = Vec::new();
    for start in 0..3 {
        sink.write(&numbers(start..start + 1)).unwrap();
        parts.push(sink.prepare().unwrap().unwrap());
    }
    sink.publish(&parts[0]).unwrap();
    sink.write(&numbers(9..10)).unwrap();
    drop(sink);
    let mut sink = ParquetSink::open(folder.path(), numbers(0..1).schema()).unwrap();
    assert!(sink.occupied().unwrap().is_some());
    sink.recover(&parts[..2]).unwrap();
    let mut found: Vec<_> = fs::read_dir(folder.path())
        .unwrap()
        .map(|file| file.unwrap().file_name().into_string().unwrap())
        .collect();
    found.sort();
    let mut expected = [&names[..], &["part-00000.parquet", "part-00001.parquet"]].concat();
    expected.sort();
    assert_eq!(found, expected);
    sink.write(&numbers(2..3)).unwrap();
    assert_eq!(sink.prepare().unwrap().unwrap().name, "part-00002.parquet");
}

#[test]
fn a_part_of_another_length_is_noticed() {
    let folder = tempfile::tempdir().unwrap();
    let mut sink = ParquetSink::open(folder.path(), numbers(0..1).schema()).unwrap();
    sink.write(&numbers(0..5)).unwrap();
    let part = sink.prepare().unwrap().unwrap();
    sink.publish(&part).unwrap();
    let path = folder.path().join(&part.name);
    let bytes = fs::read(&path).unwrap();
    for len in [0, 1, bytes.len() - 1] {
        fs::write(&path, &bytes[..len]).unwrap();
        let error = sink.recover(std::slice::from_ref(&part)).unwrap_err();
        assert!(matches!(error, SinkError::Shortened { .. }), "{error:?}");
        assert!(error.help().is_some());
    }
}
