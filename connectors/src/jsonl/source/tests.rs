use arrow::array::*;
use arrow::datatypes::{DataType, Float64Type, Int64Type};

use super::*;

const LIMITS: BatchLimits = BatchLimits { max_rows: 100, max_bytes: 1 << 20 };

fn drain(source: &mut dyn Source) -> Vec<SourceBatch> {
    let mut batches: Vec<SourceBatch> = Vec::new();
    while let Some(batch) = source.next_batch().unwrap() {
        assert_eq!(batch.rows.num_rows(), batch.row_numbers.len());
        assert_eq!(batch.rows.schema(), source.schema());
        assert_eq!((batch.start.file, batch.end.file), (batch.file, batch.file));
        let numbers = batch.row_numbers.iter().chain(batch.rejected.iter().map(|rejected| &rejected.row));
        assert!(numbers.into_iter().all(|row| (batch.start.row..batch.end.row).contains(row)));
        batches.push(batch);
    }
    batches
}

/// Each row as (file, row number, JSON or reason), in order.
fn listing(batches: &[SourceBatch]) -> Vec<(u32, u64, String)> {
    let mut all = Vec::new();
    for batch in batches {
        let mut json = Vec::new();
        let mut writer = arrow::json::LineDelimitedWriter::new(&mut json);
        writer.write(&batch.rows).unwrap();
        writer.finish().unwrap();
        let text = String::from_utf8(json).unwrap();
        if batch.rows.num_columns() > 0 {
            all.extend(
                batch.row_numbers.iter().zip(text.lines()).map(|(row, line)| (batch.file, *row, line.into())),
            );
        }
        all.extend(batch.rejected.iter().map(|r| (r.file, r.row, r.reason.clone())));
    }
    all.sort();
    all
}

fn folder(files: &[&[u8]]) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for (index, bytes) in files.iter().enumerate() {
        fs::write(dir.path().join(format!("{index}.jsonl")), bytes).unwrap();
    }
    dir
}

/// Reads one file, as a file and as a stream, in batches of several sizes.
#[track_caller]
fn check(bytes: &'static [u8], expected: &[(u64, &str)]) {
    let dir = folder(&[bytes]);
    let expected: Vec<_> = expected.iter().map(|(row, text)| (0, *row, text.to_string())).collect();
    for max_rows in [1, 2, 100] {
        let limits = BatchLimits { max_rows, ..LIMITS };
        let mut file = JsonlSource::open(dir.path(), None, limits).unwrap();
        assert_eq!(file.num_rows(), Some(expected.len() as u64));
        assert_eq!(listing(&drain(&mut file)), expected);
        let mut stream = JsonlSource::from_stream(Path::new("-"), Box::new(bytes), None, limits).unwrap();
        assert_eq!(stream.num_rows(), None);
        assert_eq!(listing(&drain(&mut stream)), expected);
    }
}

#[test]
fn nested_rows_pass() {
    check(
        b"\xef\xbb\xbf{\"id\":1,\"m\":[{\"role\":\"user\",\"n\":null}],\"e\":{}}\r\n{\"id\":2,\"m\":[],\"e\":{}}",
        &[(0, r#"{"id":1,"m":[{"role":"user"}],"e":{}}"#), (1, r#"{"id":2,"m":[],"e":{}}"#)],
    );
}

#[test]
fn odd_lines_are_rejected_and_the_others_read() {
    check(
        b"{\"a\":1}\n\nnot json\n{\"a\":\"x\"}\n  \n[1]\nnull\n{\"a\":2}{\"a\":3}\n{\"a\":4,\n}\n{\"a\":5}\n{\"a\":\"\xff\"}\n{}\n{\"a\":6}\n",
        &[
            (0, r#"{"a":1}"#),
            (2, "malformed JSON at column 2: expected ident"),
            (3, "column \"a\": expected a 64-bit integer, found text"),
            (5, "expected an object, found a list"),
            (6, "expected an object, found null"),
            (7, "malformed JSON at column 8: trailing characters"),
            (8, "malformed JSON at column 7: EOF while parsing a value"),
            (9, "malformed JSON at column 1: expected value"),
            (10, r#"{"a":5}"#),
            (11, "invalid UTF-8 at byte 6"),
            (12, "{}"),
            (13, r#"{"a":6}"#),
        ],
    );
}

#[test]
fn nothing_is_lost_in_numbers_and_text() {
    check(
        b"{\"i\":9007199254740993,\"u\":18446744073709551615,\"f\":1,\"t\":\"\\u00e9\\ud83d\\ude00\"}\n{\"f\":0.5}\n",
        &[
            (0, r#"{"i":9007199254740993,"u":18446744073709551615,"f":1.0,"t":"é😀"}"#),
            (1, r#"{"f":0.5}"#),
        ],
    );
}

#[test]
fn half_a_surrogate_pair_rejects_its_row_only() {
    let dir =
        folder(&[b"{\"a\":\"x\"}\n{\"a\":\"\\ud800\"}\n{\"b\":\"\\ud800\",\"a\":\"y\"}\n{\"a\":\"z\"}\n"]);
    let columns = ["a".to_owned()];
    let mut source = JsonlSource::open(dir.path(), Some(&columns), LIMITS).unwrap();
    let batches = drain(&mut source);
    assert_eq!(batches.len(), 1);
    assert_eq!(batches[0].row_numbers, [0, 3]);
    assert_eq!(batches[0].rejected.iter().map(|rejected| rejected.row).collect::<Vec<_>>(), [1, 2]);
}

#[test]
fn hopeless_files_still_do_not_stop() {
    check(b"", &[]);
    check(b"\n\n", &[]);
    check(b"\x1f\x8b\x08", &[(0, "invalid UTF-8 at byte 1")]);
    let deep = Box::leak("[".repeat(100_000).into_bytes().into_boxed_slice());
    let dir = folder(&[deep]);
    let batches = drain(&mut JsonlSource::open(dir.path(), None, LIMITS).unwrap());
    assert_eq!(batches[0].rejected[0].raw.len(), MAX_REJECTED_BYTES);
}

#[test]
fn a_line_above_the_limit_is_rejected() {
    let mut bytes = b"{\"a\":1}\n{\"a\":\"".to_vec();
    bytes.resize(bytes.len() + MAX_LINE_BYTES, b'x');
    bytes.extend(b"\"}\n{\"a\":2}\n");
    let stream = Box::new(Cursor::new(bytes.clone()));
    let dir = folder(&[&bytes]);
    let file = JsonlSource::open(dir.path(), None, LIMITS).unwrap();
    for mut source in [file, JsonlSource::from_stream(Path::new("-"), stream, None, LIMITS).unwrap()] {
        let batches = drain(&mut source);
        assert_eq!(batches[0].row_numbers, [0, 2]);
        assert_eq!(batches[0].rejected[0].row, 1);
        assert!(batches[0].rejected[0].raw.len() <= MAX_REJECTED_BYTES);
    }
}

#[test]
fn columns_are_picked_and_ordered() {
    let dir = folder(&[b"{\"a\":1,\"b\":[1.5],\"c\":true}\n"]);
    let open = |columns: &[&str]| {
        let columns: Vec<_> = columns.iter().map(|column| column.to_string()).collect();
        JsonlSource::open(dir.path(), Some(&columns), LIMITS)
    };
    let mut source = open(&["c", "a"]).unwrap();
    assert_eq!(source.schema().fields().iter().map(|f| f.name().as_str()).collect::<Vec<_>>(), ["c", "a"]);
    assert_eq!(drain(&mut source)[0].rows["a"].as_primitive::<Int64Type>().values(), &[1]);
    assert_eq!(drain(&mut open(&[]).unwrap())[0].row_numbers, [0]);
    let error = open(&["A"]).err().unwrap();
    assert_eq!(error.help().unwrap(), "available columns: a, b, c");
    assert!(matches!(error, SourceError::UnknownColumn { name, .. } if name == "A"));
}

#[test]
fn one_schema_for_all_files() {
    let dir = folder(&[b"{\"a\":1}\n", b"", b"{\"a\":2.5,\"b\":\"x\"}\n{\"a\":1}\n"]);
    let mut source = JsonlSource::open(dir.path(), None, LIMITS).unwrap();
    assert_eq!(source.schema().field(0).data_type(), &DataType::Float64);
    let batches = drain(&mut source);
    assert_eq!(batches.iter().map(|batch| batch.file).collect::<Vec<_>>(), [0, 2]);
    assert_eq!(batches[1].rows["a"].as_primitive::<Float64Type>().values(), &[2.5, 1.0]);
}

#[test]
fn batches_end_at_limits() {
    let dir = folder(&["{\"a\":\"0123456789\"}\n".repeat(10).as_bytes()]);
    let sizes = |max_rows, max_bytes| {
        let mut source = JsonlSource::open(dir.path(), None, BatchLimits { max_rows, max_bytes }).unwrap();
        drain(&mut source).iter().map(|batch| batch.rows.num_rows()).collect::<Vec<_>>()
    };
    assert_eq!(sizes(4, 1000), [4, 4, 2]);
    assert_eq!(sizes(100, 50), [3, 3, 3, 1]);
    assert_eq!(sizes(100, 1), [1; 10]);
}

#[test]
fn seek_is_exact_to_every_line() {
    let dir = folder(&[b"{\"a\":0}\n\nbad\n{\"a\":1}\n\n", b"", b"\n{\"a\":2}"]);
    let mut source = JsonlSource::open(dir.path(), None, BatchLimits { max_rows: 2, ..LIMITS }).unwrap();
    let all = listing(&drain(&mut source));
    assert_eq!(all.len(), 4);
    for (file, num_lines) in [(2, 2), (0, 5), (1, 0)] {
        for row in 0..=num_lines {
            source.seek(Position { file, row }).unwrap();
            let expected: Vec<_> = all.iter().filter(|(f, r, _)| (*f, *r) >= (file, row)).cloned().collect();
            assert_eq!(listing(&drain(&mut source)), expected);
        }
        source.seek(Position { file, row: num_lines + 1 }).unwrap_err();
    }
    source.seek(Position { file: 3, row: 0 }).unwrap();
    assert!(source.next_batch().unwrap().is_none());
    source.seek(Position { file: 3, row: 1 }).unwrap_err();
    source.seek(Position { file: 4, row: 0 }).unwrap_err();
}

#[test]
fn a_stream_replays_its_sample_and_goes_forward_only() {
    let bytes: Vec<u8> = (0..2500).flat_map(|i| format!("{{\"a\":{i}}}\n").into_bytes()).collect();
    let open = || {
        let stream = Box::new(Cursor::new(bytes.clone()));
        JsonlSource::from_stream(Path::new("-"), stream, None, LIMITS).unwrap()
    };
    let mut source = open();
    let batches = drain(&mut source);
    let numbers: Vec<_> = batches.iter().flat_map(|batch| batch.row_numbers.clone()).collect();
    assert_eq!(numbers, (0..2500).collect::<Vec<_>>());
    let mut source = open();
    source.seek(Position { file: 0, row: 1700 }).unwrap();
    assert_eq!(source.next_batch().unwrap().unwrap().row_numbers[0], 1700);
    let error = source.seek(Position { file: 0, row: 3 }).unwrap_err();
    assert!(matches!(error, SourceError::NotSeekable { from: 1800, to: 3, .. }));
}

#[test]
fn after_the_sample_of_a_stream_rows_which_do_not_fit_are_rejected() {
    let mut text = "{\"a\":1}\n".repeat(STDIN_SAMPLE_ROWS);
    text.push_str("{\"a\":1.5}\n{\"a\":9223372036854775808}\n{\"a\":2,\"new\":1}\n");
    let stream = Box::new(Cursor::new(text.into_bytes()));
    let mut source = JsonlSource::from_stream(Path::new("-"), stream, None, LIMITS).unwrap();
    let all = listing(&drain(&mut source));
    assert_eq!(all[1000].2, "column \"a\": expected a 64-bit integer, found the number 1.5");
    assert_eq!(all[1001].2, "column \"a\": expected a 64-bit integer, found the integer 9223372036854775808");
    assert_eq!(all[1002].2, r#"{"a":2}"#);
}

#[test]
fn damaged_bytes_never_panic() {
    let line = r#"{"id":12,"x":-1.5e3,"t":"é\u00e9\n","m":[{"role":"user","c":null}],"b":true,"e":{}}"#;
    let whole = format!("{line}\n").repeat(6).into_bytes();
    let seed = 0x6a73_6f6e_u64;
    println!("seed {seed}");
    let mut state = seed;
    let mut random = |below: usize| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state % below as u64) as usize
    };
    let marks = b"\n\"{}[]:,\\u0-e\xff \r";
    for _ in 0..3000 {
        let mut damaged = whole.clone();
        for _ in 0..=random(6) {
            let at = random(damaged.len());
            damaged[at] = marks[random(marks.len())];
        }
        damaged.truncate(random(damaged.len() + 1));
        let num_lines = damaged.split(|b| *b == b'\n').filter(|l| !l.trim_ascii().is_empty()).count();
        let stream = Box::new(Cursor::new(damaged));
        let mut source = JsonlSource::from_stream(Path::new("-"), stream, None, LIMITS).unwrap();
        let total: usize = drain(&mut source).iter().map(|b| b.rows.num_rows() + b.rejected.len()).sum();
        assert_eq!(total, num_lines);
    }
}
