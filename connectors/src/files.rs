//! From what the user names, a file, a folder or a glob pattern, to the sorted list of files to read.
//!
//! Invariant: the list depends only on the names below the path, never on the order the file system lists them.
//! Names that begin with `.` or `_` are skipped below a folder and in a pattern, so that temporary files and
//! the state of Tidemill itself are never read as data. Links to folders are not followed: there are no cycles.

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::source::{InputFile, SourceError};

/// The most files of one input.
pub const MAX_FILES: usize = 1_000_000;
/// Folders nested deeper than this are an error of the file system.
const MAX_DEPTH: usize = 256;

/// The files that `path` means; in a folder those with one of `extensions`. Never empty.
pub fn resolve(path: &Path, extensions: &[&str]) -> Result<Vec<InputFile>, SourceError> {
    let mut found = Vec::new();
    match fs::metadata(path) {
        Ok(meta) if meta.is_dir() => walk(path, extensions, &mut found)?,
        Ok(meta) if meta.is_file() => found.push(InputFile { path: path.to_owned(), bytes: meta.len() }),
        Ok(_) => return Err(SourceError::NotAFile { path: path.to_owned() }),
        Err(error) if is_absent(&error) && is_pattern(path) => match_pattern(path, extensions, &mut found)?,
        Err(error) => return Err(read_error(path, error)),
    }
    if found.is_empty() {
        let wanted = extensions.iter().map(|e| format!("`*.{e}`")).collect::<Vec<_>>().join(" and ");
        return Err(SourceError::NoFiles { path: path.to_owned(), wanted });
    }
    found.sort_by(|a, b| a.path.cmp(&b.path));
    found.dedup_by(|a, b| a.path == b.path);
    Ok(found)
}

/// Says a missing file as such: it is by far the most frequent mistake.
pub(crate) fn read_error(path: &Path, source: io::Error) -> SourceError {
    if is_absent(&source) {
        SourceError::NotFound { path: path.to_owned() }
    } else {
        SourceError::Io { path: path.to_owned(), source }
    }
}

fn is_absent(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory)
}

fn is_pattern(path: &Path) -> bool {
    path.to_str().is_some_and(|text| text.contains(['*', '?', '[']))
}

fn is_skipped(name: &OsStr) -> bool {
    matches!(name.as_encoded_bytes().first(), Some(b'.' | b'_'))
}

fn has_extension(path: &Path, extensions: &[&str]) -> bool {
    let extension = path.extension().and_then(OsStr::to_str);
    extension.is_some_and(|have| extensions.iter().any(|want| have.eq_ignore_ascii_case(want)))
}

fn push(found: &mut Vec<InputFile>, path: PathBuf, bytes: u64, root: &Path) -> Result<(), SourceError> {
    if found.len() == MAX_FILES {
        return Err(SourceError::TooManyFiles { path: root.to_owned(), max_files: MAX_FILES });
    }
    found.push(InputFile { path, bytes });
    Ok(())
}

fn walk(root: &Path, extensions: &[&str], found: &mut Vec<InputFile>) -> Result<(), SourceError> {
    let mut folders = vec![(root.to_owned(), 0)];
    while let Some((folder, depth)) = folders.pop() {
        let io_error = |source| SourceError::Io { path: folder.clone(), source };
        if depth > MAX_DEPTH {
            return Err(io_error(io::Error::other("folders are nested too deep")));
        }
        for entry in fs::read_dir(&folder).map_err(io_error)? {
            let entry = entry.map_err(io_error)?;
            let (name, path) = (entry.file_name(), entry.path());
            if is_skipped(&name) {
                continue;
            }
            if entry.file_type().map_err(io_error)?.is_dir() {
                folders.push((path, depth + 1));
                continue;
            }
            if has_extension(&path, extensions) {
                let meta = fs::metadata(&path).map_err(|error| read_error(&path, error))?;
                if meta.is_file() {
                    push(found, path, meta.len(), root)?;
                }
            }
        }
    }
    Ok(())
}

/// A folder that matches is walked; a file that matches is taken whatever its extension.
fn match_pattern(path: &Path, extensions: &[&str], found: &mut Vec<InputFile>) -> Result<(), SourceError> {
    let text = path.to_str().expect("a pattern is UTF-8: it was searched for stars");
    let options = glob::MatchOptions { require_literal_leading_dot: true, ..Default::default() };
    let bad =
        |error: glob::PatternError| SourceError::Pattern { path: path.to_owned(), reason: error.msg.into() };
    for entry in glob::glob_with(text, options).map_err(bad)? {
        let entry = entry.map_err(|error| {
            let path = error.path().to_owned();
            read_error(&path, error.into())
        })?;
        if !names_allowed(&entry, path) {
            continue;
        }
        let meta = fs::metadata(&entry).map_err(|error| read_error(&entry, error))?;
        if meta.is_dir() {
            // `**` matches folders and then the files in them once more; `resolve` removes the doubles.
            walk(&entry, extensions, found)?;
        } else if meta.is_file() {
            push(found, entry, meta.len(), path)?;
        }
    }
    Ok(())
}

/// Whether the pattern itself writes out every name of the match that would be skipped otherwise.
fn names_allowed(entry: &Path, pattern: &Path) -> bool {
    let written = |name: &OsStr| pattern.components().any(|part| part.as_os_str() == name);
    let same_start = |name: &OsStr| {
        let last = pattern.file_name().map(OsStr::as_encoded_bytes).unwrap_or_default();
        entry.file_name() == Some(name) && last.first() == name.as_encoded_bytes().first()
    };
    entry.components().all(|part| {
        let name = part.as_os_str();
        !is_skipped(name) || written(name) || same_start(name)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tree(names: &[&str]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for name in names {
            let path = dir.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, name).unwrap();
        }
        dir
    }

    #[track_caller]
    fn check(dir: &tempfile::TempDir, what: &str, expected: &[&str]) {
        let found = resolve(&dir.path().join(what), &["parquet", "pq"]).unwrap();
        let names: Vec<_> =
            found.iter().map(|f| f.path.strip_prefix(dir.path()).unwrap().to_str().unwrap()).collect();
        assert_eq!(names, expected);
        assert!(found.iter().zip(expected).all(|(f, e)| f.bytes == e.len() as u64));
    }

    #[test]
    fn folders_and_patterns_are_sorted_and_skip_hidden_names() {
        let dir = tree(&[
            "b.parquet",
            "a.parquet",
            "sub/c.PQ",
            "sub/deep/d.parquet",
            "notes.txt",
            ".hidden.parquet",
            "_tidemill/x.parquet",
            "sub/_temporary/y.parquet",
            "_raw.parquet",
        ]);
        let all = ["a.parquet", "b.parquet", "sub/c.PQ", "sub/deep/d.parquet"];
        check(&dir, "", &all);
        check(&dir, "sub", &all[2..]);
        check(&dir, "*.parquet", &all[..2]);
        check(&dir, "**/*.parquet", &["a.parquet", "b.parquet", "sub/deep/d.parquet"]);
        check(&dir, "s*", &all[2..]);
        check(&dir, "*.txt", &["notes.txt"]);
        check(&dir, "_tidemill/*.parquet", &["_tidemill/x.parquet"]);
        check(&dir, "_r*.parquet", &["_raw.parquet"]);
        check(&dir, "_raw.parquet", &["_raw.parquet"]);
    }

    #[test]
    fn a_file_named_like_a_pattern_is_that_file() {
        let dir = tree(&["a[1].parquet", "a1.parquet"]);
        check(&dir, "a[1].parquet", &["a[1].parquet"]);
    }

    #[test]
    fn nothing_found_says_what_was_looked_for() {
        let dir = tree(&["x.txt"]);
        let error = |what: &str| resolve(&dir.path().join(what), &["parquet"]).unwrap_err();
        assert!(matches!(error("missing"), SourceError::NotFound { path } if path.ends_with("missing")));
        assert!(matches!(error("x.txt/y"), SourceError::NotFound { .. }));
        assert!(matches!(error("*.parquet"), SourceError::NoFiles { .. }));
        assert!(error("").help().unwrap().contains("`*.parquet`"));
        assert!(matches!(error("a[.parquet"), SourceError::Pattern { .. }));
        assert!(matches!(resolve(Path::new("/dev/null"), &["parquet"]), Err(SourceError::NotAFile { .. })));
    }

    #[test]
    fn links_to_files_are_read_and_links_to_folders_are_not() {
        let dir = tree(&["blobs/x", "d/a.parquet"]);
        std::os::unix::fs::symlink("../blobs/x", dir.path().join("d/link.parquet")).unwrap();
        std::os::unix::fs::symlink("..", dir.path().join("d/loop")).unwrap();
        let found = resolve(&dir.path().join("d"), &["parquet"]).unwrap();
        assert_eq!(found.len(), 2);
        assert_eq!(found[1].bytes, "blobs/x".len() as u64);
    }
}
