use std::fs;

use serde_json::json;

use super::*;
use crate::source::Position;

fn commit(row: u64) -> Commit {
    let part = Part { name: "part-00000.parquet".into(), rows: row, bytes: 9 };
    Commit { position: Position { file: 0, row }.into(), output: Some(part), errors: None }
}

fn made(path: &Path) -> Vec<u8> {
    let mut manifest = Manifest::open(path).unwrap();
    manifest.begin(json!({ "a": [1, null, "é\n"] }), Vec::new(), "e.jsonl".into()).unwrap();
    manifest.commit(commit(1)).unwrap();
    manifest.commit(commit(2)).unwrap();
    manifest.finish().unwrap();
    fs::read(path).unwrap()
}

/// What is read from these bytes: the number of commits, or the line of the error.
fn read(path: &Path, bytes: &[u8]) -> Result<usize, usize> {
    fs::write(path, bytes).unwrap();
    match Manifest::open(path) {
        Ok(manifest) => Ok(manifest.commits.len()),
        Err(ManifestError::Corrupt { line, .. }) => Err(line),
        Err(error) => panic!("{error}"),
    }
}

#[test]
fn what_is_written_is_read() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("manifest.jsonl");
    assert_eq!(Manifest::read_header(&path), None);
    made(&path);
    let manifest = Manifest::open(&path).unwrap();
    assert_eq!(manifest.commits, [commit(1), commit(2)]);
    assert!(manifest.finished);
    assert_eq!(Manifest::read_header(&path), manifest.header);
}

#[test]
fn half_a_line_is_removed() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("manifest.jsonl");
    let whole = made(&path);
    assert_eq!(read(&path, &[&whole[..], b"{\"commit\":"].concat()), Ok(2));
    assert_eq!(fs::read(&path).unwrap(), whole);
    let header = whole.iter().position(|byte| *byte == b'\n').unwrap();
    assert_eq!(read(&path, &whole[..header]), Ok(0));
    assert_eq!(fs::read(&path).unwrap(), b"");
    assert_eq!(Manifest::read_header(&path), None);
}

#[test]
fn lines_that_make_no_sense_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("manifest.jsonl");
    let text = String::from_utf8(made(&path)).unwrap();
    let lines: Vec<&str> = text.split_inclusive('\n').collect();
    let (header, first, finished) = (lines[0], lines[1], lines[3]);
    let newer = header.replace("\"format\":1", "\"format\":2");
    for (text, expected) in [
        (String::new(), Ok(0)),
        ([header, first].concat(), Ok(1)),
        ([header, first, "{\"com"].concat(), Ok(1)),
        (first.to_owned(), Err(1)),
        ([header, header].concat(), Err(2)),
        ([header, "{\"com\n", first].concat(), Err(2)),
        ([header, "\0\0\0\n", first].concat(), Err(2)),
        ([header, first, finished, first].concat(), Err(4)),
        ([header, finished, finished].concat(), Err(3)),
        (newer, Err(1)),
    ] {
        assert_eq!(read(&path, text.as_bytes()), expected, "{text}");
    }
}

#[test]
fn damaged_bytes_never_panic_and_never_add_a_commit() {
    let folder = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap();
    let path = folder.path().join("manifest.jsonl");
    let whole = made(&path);
    let mut state = 7_u64;
    let mut below = |n: usize| {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 33) as usize % n
    };
    for _ in 0..3000 {
        let mut bytes = whole.clone();
        for _ in 0..=below(4) {
            let at = below(bytes.len());
            bytes[at] = b"\n\0{}\",:9\xff"[below(9)];
        }
        bytes.truncate(below(bytes.len()) + 1);
        assert!(read(&path, &bytes).is_ok_and(|commits| commits <= 2) || read(&path, &bytes).is_err());
        Manifest::read_header(&path);
    }
}
