use std::fs;
use std::path::PathBuf;

use ::parquet::arrow::ArrowWriter;
use ::parquet::basic::Compression;
use ::parquet::file::properties::{EnabledStatistics, WriterProperties};
use arrow::array::*;
use arrow::buffer::{NullBuffer, OffsetBuffer};
use arrow::datatypes::*;

use super::*;

const LIMITS: BatchLimits = BatchLimits { max_rows: 100, max_bytes: 1 << 20 };

fn write(path: &Path, rows: &RecordBatch, row_group_rows: usize) {
    let properties = WriterProperties::builder()
        .set_max_row_group_row_count(Some(row_group_rows))
        .set_data_page_row_count_limit(7)
        .set_write_batch_size(7)
        .set_compression(Compression::ZSTD(Default::default()))
        .build();
    let mut writer =
        ArrowWriter::try_new(File::create(path).unwrap(), rows.schema(), Some(properties)).unwrap();
    writer.write(rows).unwrap();
    writer.close().unwrap();
}

/// Columns `id` and `text`; ids start at `first`.
fn plain_rows(first: i64, num_rows: usize) -> RecordBatch {
    let ids = Int64Array::from_iter_values(first..first + num_rows as i64);
    let texts = StringArray::from_iter_values((0..num_rows).map(|i| format!("text {}", first + i as i64)));
    RecordBatch::try_from_iter([("id", Arc::new(ids) as ArrayRef), ("text", Arc::new(texts))]).unwrap()
}

fn folder(files: &[(i64, usize)]) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for (index, (first, num_rows)) in files.iter().enumerate() {
        write(&dir.path().join(format!("{index}.parquet")), &plain_rows(*first, *num_rows), 30);
    }
    dir
}

fn drain(source: &mut dyn Source) -> Result<Vec<SourceBatch>, SourceError> {
    let mut batches = Vec::new();
    while let Some(batch) = source.next_batch()? {
        assert_eq!(batch.rows.num_rows(), batch.row_numbers.len());
        assert_eq!(batch.start.file, batch.file);
        assert_eq!(batch.end.file, batch.file);
        assert_eq!(batch.rows.schema(), source.schema());
        batches.push(batch);
    }
    Ok(batches)
}

fn ids(batches: &[SourceBatch]) -> Vec<i64> {
    let column = |b: &SourceBatch| b.rows["id"].as_primitive::<Int64Type>().values().to_vec();
    batches.iter().flat_map(column).collect()
}

/// One column of every kind, with nulls. `[50]`
fn zoo() -> RecordBatch {
    let n = 50_usize;
    let null = |i: usize| i % 5 == 3;
    let nulls = || Some(NullBuffer::from_iter((0..n).map(|i| !null(i))));
    let texts: Vec<_> = (0..n).map(|i| (!null(i)).then(|| format!("é{}", i % 9))).collect();
    let numbers: Vec<_> = (0..n as i64).map(|i| (i % 5 != 3).then_some(i * 1_000_003)).collect();
    let item = |data_type| Arc::new(Field::new_list_field(data_type, true));
    let lengths = || OffsetBuffer::<i32>::from_lengths((0..n).map(|i| if null(i) { 0 } else { i % 4 }));
    let total = lengths().last();
    let leaf: ArrayRef = Arc::new(Int32Array::from_iter((0..total).map(|i| (i % 6 != 1).then_some(i))));
    let list = ListArray::new(item(DataType::Int32), lengths(), leaf, nulls());
    let inner = StructArray::new(
        Fields::from(vec![
            Field::new("role", DataType::Utf8, true),
            Field::new("tags", list.data_type().clone(), true),
        ]),
        vec![Arc::new(StringArray::from(texts.clone())), Arc::new(list.clone())],
        nulls(),
    );
    let ones = OffsetBuffer::<i32>::from_lengths((0..n).map(|_| 1));
    let messages = ListArray::new(item(inner.data_type().clone()), ones, Arc::new(inner.clone()), None);
    let mut map = MapBuilder::new(None, StringBuilder::new(), Int64Builder::new());
    for (i, number) in numbers.iter().enumerate() {
        map.keys().append_value(format!("k{i}"));
        map.values().append_option(*number);
        map.append(true).unwrap();
    }
    let decimals = || Decimal128Array::from_iter(numbers.iter().map(|v| v.map(i128::from)));
    let dictionary: DictionaryArray<Int32Type> = texts.iter().map(|t| t.as_deref()).collect();
    let bytes: Vec<_> = texts.iter().map(|t| t.as_ref().map(String::as_bytes)).collect();
    let time = || TimestampMicrosecondArray::from(numbers.clone());
    let fixed = FixedSizeBinaryArray::try_from_sparse_iter_with_size((0..n).map(|i| Some([i as u8; 16])), 16);
    let columns: Vec<(&str, ArrayRef)> = vec![
        ("bool", Arc::new(BooleanArray::from_iter((0..n).map(|i| (!null(i)).then_some(i % 2 == 0))))),
        ("i8", Arc::new(Int8Array::from_iter((0..n).map(|i| (!null(i)).then_some(i as i8))))),
        ("u64", Arc::new(UInt64Array::from_iter((0..n).map(|i| Some(u64::MAX - i as u64))))),
        ("f16", Arc::new(Float16Array::from_iter_values((0..n).map(|_| Default::default())))),
        ("f32", Arc::new(Float32Array::from_iter_values((0..n).map(|i| i as f32 / 3.0)))),
        ("f64", Arc::new(Float64Array::from_iter_values((0..n).map(|i| -(i as f64) / 7.0)))),
        ("text", Arc::new(StringArray::from(texts.clone()))),
        ("large_text", Arc::new(LargeStringArray::from(texts.clone()))),
        ("text_view", Arc::new(StringViewArray::from_iter(texts.clone()))),
        ("binary", Arc::new(BinaryArray::from_opt_vec(bytes))),
        ("fixed", Arc::new(fixed.unwrap())),
        ("date", Arc::new(Date32Array::from_iter_values(0..n as i32))),
        ("time_of_day", Arc::new(Time64MicrosecondArray::from(numbers.clone()))),
        ("duration", Arc::new(DurationMicrosecondArray::from(numbers.clone()))),
        ("naive", Arc::new(time())),
        ("zoned", Arc::new(time().with_timezone("Europe/Amsterdam"))),
        ("nanos", Arc::new(TimestampNanosecondArray::from(numbers.clone()).with_timezone("+02:00"))),
        ("decimal", Arc::new(decimals().with_precision_and_scale(30, 4).unwrap())),
        ("dictionary", Arc::new(dictionary)),
        ("nothing", Arc::new(NullArray::new(n))),
        ("list", Arc::new(list)),
        ("struct", Arc::new(inner)),
        ("messages", Arc::new(messages)),
        ("map", Arc::new(map.finish())),
    ];
    let with_note = |(name, column): &(&str, ArrayRef)| {
        let note = ("note".to_owned(), format!("about {name}"));
        Field::new(*name, column.data_type().clone(), true).with_metadata([note])
    };
    let schema = Schema::new(columns.iter().map(with_note).collect::<Vec<_>>());
    RecordBatch::try_new(Arc::new(schema), columns.into_iter().map(|(_, column)| column).collect()).unwrap()
}

#[test]
fn every_type_passes_unchanged() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("zoo.parquet");
    let rows = zoo();
    write(&path, &rows, 20);
    for max_rows in [1, 13, 20, 1000] {
        let mut source = ParquetSource::open(&path, None, BatchLimits { max_rows, ..LIMITS }).unwrap();
        assert_eq!(source.schema(), rows.schema());
        let batches = drain(&mut source).unwrap();
        let read: Vec<_> = batches.into_iter().map(|batch| batch.rows).collect();
        assert_eq!(concat_batches(&rows.schema(), &read).unwrap(), rows);
    }
}

#[test]
fn columns_are_picked_and_ordered() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("zoo.parquet");
    let rows = zoo();
    write(&path, &rows, 20);
    let columns = ["messages", "i8", "map", "bool"].map(String::from);
    let mut source = ParquetSource::open(&path, Some(&columns), LIMITS).unwrap();
    let batch = source.next_batch().unwrap().unwrap();
    assert_eq!(batch.rows.num_columns(), 4);
    for (index, name) in columns.iter().enumerate() {
        assert_eq!(batch.rows.schema().field(index).name(), name);
        assert_eq!(batch.rows.column(index), rows.column_by_name(name).unwrap());
    }
    let none: [String; 0] = [];
    let batches = drain(&mut ParquetSource::open(&path, Some(&none), LIMITS).unwrap()).unwrap();
    assert_eq!(batches.iter().map(|batch| batch.rows.num_rows()).sum::<usize>(), 50);

    let error = ParquetSource::open(&path, Some(&["txt".into()]), LIMITS).err().unwrap();
    assert!(error.help().unwrap().contains("large_text"), "{error}");
    assert!(matches!(error, SourceError::UnknownColumn { name, available }
        if name == "txt" && available.len() == 24));
}

#[test]
fn batches_end_at_limits_and_files() {
    let dir = folder(&[(0, 70), (70, 0), (70, 31)]);
    let limits = BatchLimits { max_rows: 40, ..LIMITS };
    let mut source = ParquetSource::open(dir.path(), None, limits).unwrap();
    assert_eq!(source.num_rows(), Some(101));
    assert_eq!(source.inputs().len(), 3);
    let batches = drain(&mut source).unwrap();
    let shape: Vec<_> = batches.iter().map(|b| (b.file, b.start.row, b.end.row)).collect();
    assert_eq!(shape, [(0, 0, 40), (0, 40, 70), (2, 0, 31)]);
    assert_eq!(ids(&batches), (0..101).collect::<Vec<_>>());
    assert_eq!(batches[1].row_numbers, (40..70).collect::<Vec<_>>());
}

#[test]
fn one_long_text_for_all_rows_does_not_fill_the_memory() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("long.parquet");
    let text = "x".repeat(100_000);
    let texts = StringArray::from_iter_values((0..2000).map(|_| &text));
    let rows = RecordBatch::try_from_iter([("text", Arc::new(texts) as ArrayRef)]).unwrap();
    for statistics in [EnabledStatistics::None, EnabledStatistics::Chunk] {
        let properties = WriterProperties::builder().set_statistics_enabled(statistics).build();
        let file = File::create(&path).unwrap();
        let mut writer = ArrowWriter::try_new(file, rows.schema(), Some(properties)).unwrap();
        writer.write(&rows).unwrap();
        writer.close().unwrap();
        assert!(fs::metadata(&path).unwrap().len() < 1_000_000);
        let limits = BatchLimits { max_rows: 5000, max_bytes: 1_000_000 };
        let batches = drain(&mut ParquetSource::open(&path, None, limits).unwrap()).unwrap();
        assert_eq!(batches.iter().map(|batch| batch.rows.num_rows()).sum::<usize>(), 2000);
        assert!(batches.iter().all(|batch| batch.rows.num_rows() <= 10));
    }
}

#[test]
fn seek_is_exact_to_every_row() {
    let dir = folder(&[(0, 65), (65, 0), (65, 20)]);
    let limits = BatchLimits { max_rows: 17, ..LIMITS };
    let mut source = ParquetSource::open(dir.path(), None, limits).unwrap();
    for (file, rows, first) in [(0, 65, 0), (1, 0, 65), (2, 20, 65)] {
        for row in 0..=rows {
            source.seek(Position { file, row }).unwrap();
            let expected: Vec<_> = (first + row as i64..85).collect();
            assert_eq!(ids(&drain(&mut source).unwrap()), expected);
        }
    }
    source.seek(Position { file: 3, row: 0 }).unwrap();
    assert!(source.next_batch().unwrap().is_none());
    for position in
        [Position { file: 0, row: 66 }, Position { file: 3, row: 1 }, Position { file: 4, row: 0 }]
    {
        assert!(matches!(source.seek(position), Err(SourceError::NoSuchPosition { .. })));
    }
}

#[test]
fn files_of_another_schema_are_named() {
    let dir = folder(&[(0, 5)]);
    let other = dir.path().join("1.parquet");
    let changed: ArrayRef = Arc::new(Int32Array::from(vec![1]));
    let text: ArrayRef = Arc::new(StringArray::from(vec!["a"]));
    let check = |columns: Vec<(&str, ArrayRef)>, expected: &str| {
        write(&other, &RecordBatch::try_from_iter(columns).unwrap(), 30);
        match ParquetSource::open(dir.path(), None, LIMITS).err().unwrap() {
            SourceError::SchemaDiffers { path, column, .. } => {
                assert_eq!(path, other);
                assert_eq!(column, expected);
            }
            error => panic!("{error}"),
        }
    };
    check(vec![("id", changed.clone()), ("text", text.clone())], "id");
    check(vec![("text", text.clone()), ("id", changed.clone())], "id");
    let id: ArrayRef = Arc::new(Int64Array::from(vec![1]));
    check(vec![("id", id.clone())], "text");
    check(vec![("id", id.clone()), ("text", text.clone()), ("more", text)], "more");
    // Columns which are not read may differ.
    let columns = ["id".to_owned()];
    let mut source = ParquetSource::open(dir.path(), Some(&columns), LIMITS).unwrap();
    assert_eq!(drain(&mut source).unwrap().len(), 2);
}

#[test]
fn nullable_in_one_file_is_nullable_in_all() {
    let dir = tempfile::tempdir().unwrap();
    for (name, nullable) in [("a.parquet", false), ("b.parquet", true)] {
        let schema = Arc::new(Schema::new(vec![Field::new("id", DataType::Int64, nullable)]));
        let ids = Arc::new(Int64Array::from(vec![1, 2]));
        write(&dir.path().join(name), &RecordBatch::try_new(schema, vec![ids]).unwrap(), 30);
    }
    let mut source = ParquetSource::open(dir.path(), None, LIMITS).unwrap();
    assert_eq!(ids(&drain(&mut source).unwrap()), [1, 2, 1, 2]);
}

/// The rows, or the error, which must name the file; never a panic.
fn read_damaged(path: &PathBuf) -> Result<Vec<RecordBatch>, String> {
    let named = |error: SourceError| match &error {
        SourceError::Corrupt { path: named, .. } if named == path => error.to_string(),
        error => panic!("{error}"),
    };
    let mut source = ParquetSource::open(path, None, LIMITS).map_err(named)?;
    Ok(drain(&mut source).map_err(named)?.into_iter().map(|batch| batch.rows).collect())
}

#[test]
fn cut_files_are_corrupt() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("zoo.parquet");
    write(&path, &zoo(), 20);
    let whole = fs::read(&path).unwrap();
    let step = whole.len() / 97;
    for len in (0..16).chain((16..whole.len()).step_by(step)).chain(whole.len() - 16..whole.len()) {
        fs::write(&path, &whole[..len]).unwrap();
        assert!(read_damaged(&path).is_err(), "{len} bytes");
    }
    fs::write(&path, "id,text\n1,this is not Parquet\n").unwrap();
    assert!(read_damaged(&path).is_err());
}

#[test]
fn flipped_bytes_never_panic() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("zoo.parquet");
    write(&path, &zoo(), 20);
    let whole = fs::read(&path).unwrap();
    let seed = 0x7469_6465_u64;
    println!("seed {seed}");
    let mut state = seed;
    let mut random = |below: usize| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state % below as u64) as usize
    };
    let mut num_errors = 0;
    for _ in 0..600 {
        let mut damaged = whole.clone();
        for _ in 0..=random(3) {
            let at = random(damaged.len());
            damaged[at] ^= 1 << random(8);
        }
        fs::write(&path, &damaged).unwrap();
        num_errors += usize::from(read_damaged(&path).is_err());
    }
    assert!(num_errors > 0);
}

#[test]
fn a_damaged_row_group_is_named_and_the_rows_before_it_are_read() {
    let dir = folder(&[(0, 90)]);
    let path = dir.path().join("0.parquet");
    let metadata = open_file(&InputFile { path: path.clone(), bytes: 1 }).unwrap().1;
    let column = metadata.metadata().row_group(1).column(0).byte_range();
    let mut bytes = fs::read(&path).unwrap();
    bytes[column.0 as usize..(column.0 + column.1) as usize].fill(0xff);
    fs::write(&path, bytes).unwrap();
    let limits = BatchLimits { max_rows: 10, ..LIMITS };
    let mut source = ParquetSource::open(&path, None, limits).unwrap();
    let mut rows = 0;
    let error = loop {
        match source.next_batch() {
            Ok(batch) => rows += batch.unwrap().rows.num_rows() as u64,
            Err(error) => break error,
        }
    };
    assert_eq!(rows, 30);
    let SourceError::Corrupt { row_group, row, .. } = error else { panic!("{error}") };
    assert_eq!((row_group, row), (Some(1), Some(30)));
    // What comes after the damage can be read by seeking over it.
    source.seek(Position { file: 0, row: 60 }).unwrap();
    assert_eq!(ids(&drain(&mut source).unwrap()), (60..90).collect::<Vec<_>>());
}
