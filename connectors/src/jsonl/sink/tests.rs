use std::io::Read;
use std::sync::Arc;

use arrow::array::*;
use arrow::datatypes::Int32Type;
use serde_json::{Value, json};

use super::*;

fn texts(texts: &[Option<&str>]) -> RecordBatch {
    RecordBatch::try_from_iter_with_nullable([(
        "text",
        Arc::new(StringArray::from(texts.to_vec())) as ArrayRef,
        true,
    )])
    .unwrap()
}

fn values(path: &Path) -> Vec<Value> {
    let text = fs::read_to_string(path).unwrap();
    assert!(text.is_empty() || text.ends_with('\n'));
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn a_row_is_a_line_whatever_its_text() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("new/folder/x.jsonl");
    let odd =
        ["", "a\nb\r\n", "\u{0}\u{1f}\u{7f}", "\u{2028}\u{2029}\u{feff}", "\"\\/", "😀", "{\"text\":1}"];
    let mut sink = JsonlSink::open(&path).unwrap();
    sink.recover(&[]).unwrap();
    for text in odd {
        sink.write(&texts(&[Some(text)])).unwrap();
    }
    sink.write(&texts(&[None])).unwrap();
    assert_eq!(sink.staged_rows(), 8);
    assert_eq!(fs::read(&path).unwrap(), b"");
    let part = sink.prepare().unwrap().unwrap();
    sink.publish(&part).unwrap();
    assert_eq!(part, Part { name: "x.jsonl".into(), rows: 8, bytes: fs::metadata(&path).unwrap().len() });
    let mut expected: Vec<Value> = odd.iter().map(|text| json!({ "text": text })).collect();
    expected.push(json!({ "text": null }));
    assert_eq!(values(&path), expected);
    assert_eq!(sink.prepare().unwrap(), None);
}

#[test]
fn values_that_json_has_not_are_null_or_text() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.jsonl");
    let floats = Float64Array::from(vec![Some(f64::NAN), Some(f64::NEG_INFINITY), Some(0.1), None]);
    let lists = ListArray::from_iter_primitive::<Int32Type, _, _>([
        Some(vec![Some(1), None]),
        None,
        Some(vec![]),
        None,
    ]);
    let bytes = BinaryArray::from_opt_vec(vec![Some(b"\xff\x00"), Some(b""), None, None]);
    let dictionary: DictionaryArray<Int32Type> =
        [Some("a"), None, Some("a"), Some("b")].into_iter().collect();
    let batch = RecordBatch::try_from_iter_with_nullable([
        ("f", Arc::new(floats) as ArrayRef, true),
        ("l", Arc::new(lists) as ArrayRef, true),
        ("b", Arc::new(bytes) as ArrayRef, true),
        ("d", Arc::new(dictionary) as ArrayRef, true),
        ("u", Arc::new(UInt64Array::from(vec![u64::MAX; 4])) as ArrayRef, true),
    ])
    .unwrap();
    let mut sink = JsonlSink::open(&path).unwrap();
    sink.write(&batch).unwrap();
    sink.prepare().unwrap();
    let max = u64::MAX;
    assert_eq!(
        values(&path),
        [
            json!({ "f": null, "l": [1, null], "b": "ff00", "d": "a", "u": max }),
            json!({ "f": null, "l": null, "b": "", "d": null, "u": max }),
            json!({ "f": 0.1, "l": [], "b": null, "d": "a", "u": max }),
            json!({ "f": null, "l": null, "b": null, "d": "b", "u": max }),
        ]
    );
}

#[test]
fn rows_that_cannot_be_encoded_stage_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let mut sink = JsonlSink::open(&folder.path().join("x.jsonl")).unwrap();
    let intervals = Arc::new(IntervalYearMonthArray::from(vec![1])) as ArrayRef;
    let union = UnionArray::try_new(
        [(0, Arc::new(arrow::datatypes::Field::new("a", intervals.data_type().clone(), true)))]
            .into_iter()
            .collect(),
        vec![0_i8].into(),
        None,
        vec![intervals],
    )
    .unwrap();
    let batch = RecordBatch::try_from_iter([("x", Arc::new(union) as ArrayRef)]).unwrap();
    assert!(matches!(sink.write(&batch), Err(SinkError::Encode { .. })));
    assert_eq!((sink.staged_rows(), sink.staged_bytes()), (0, 0));
}

#[test]
fn a_reader_that_has_gone_is_told_apart() {
    let (reader, writer) = io::pipe().unwrap();
    drop(reader);
    let mut sink = JsonlSink::new(Path::new("standard output"), Target::Stream(Box::new(writer)));
    sink.write(&texts(&[Some("x")])).unwrap();
    let error = sink.prepare().unwrap_err();
    assert!(matches!(error, SinkError::BrokenPipe { .. }), "{error:?}");
    assert_eq!(error.help(), None);
}

#[test]
fn a_stream_gets_its_rows_with_each_commit() {
    let (mut reader, writer) = io::pipe().unwrap();
    let mut sink = JsonlSink::new(Path::new("standard output"), Target::Stream(Box::new(writer)));
    let mut read = [0; 12];
    for _ in 0..2 {
        sink.write(&texts(&[Some("x")])).unwrap();
        sink.prepare().unwrap().unwrap();
        reader.read_exact(&mut read).unwrap();
        assert_eq!(&read, b"{\"text\":\"x\"}");
        reader.read_exact(&mut read[..1]).unwrap();
    }
}

#[test]
fn a_file_is_cut_to_what_is_committed_and_no_further() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.jsonl");
    let part = Part { name: "x.jsonl".into(), rows: 1, bytes: 13 };
    for (found, is_whole) in [(12, false), (13, true), (14, true), (40, true)] {
        fs::write(&path, "x".repeat(found)).unwrap();
        let mut sink = JsonlSink::open(&path).unwrap();
        let recovered = sink.recover(std::slice::from_ref(&part));
        assert_eq!(recovered.is_ok(), is_whole);
        let len = if is_whole { 13 } else { found };
        assert_eq!(fs::metadata(&path).unwrap().len(), len as u64);
    }
}
