//! The list of what is committed: one line a commit, and a line is the commit.
//!
//! A line that a crash cut short was never a commit and is removed. A line in the middle that cannot be
//! read means that the file was changed from outside, and nothing is guessed.

use std::fs::{File, OpenOptions};
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::sink::Part;
use crate::source::{Checkpoint, InputFile};

const FORMAT: u32 = 1;
/// A commit is a few hundred bytes; a file beyond this is not a manifest.
const MAX_BYTES: u64 = 1 << 30;

/// What the commits belong to.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Header {
    pub format: u32,
    /// Where the errors go, seen from the folder of the manifest: recovery cuts and removes there.
    pub errors: PathBuf,
    pub definition: Value,
    pub inputs: Vec<InputFile>,
}

/// Results and errors up to a position of the input.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Commit {
    pub position: Checkpoint,
    pub output: Option<Part>,
    pub errors: Option<Part>,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Line {
    Header(Header),
    Commit(Commit),
    Finished {},
}

/// An open manifest.
#[derive(Debug)]
pub struct Manifest {
    path: PathBuf,
    file: File,
    pub header: Option<Header>,
    pub commits: Vec<Commit>,
    pub finished: bool,
}

#[derive(Debug, thiserror::Error)]
pub enum ManifestError {
    #[error("cannot {action} manifest {path}")]
    Io {
        action: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("manifest {path} is not readable at line {line}: {reason}")]
    Corrupt { path: PathBuf, line: usize, reason: String },
}

impl Manifest {
    /// Opens a manifest, or makes an empty one.
    pub fn open(path: &Path) -> Result<Self, ManifestError> {
        let fail = |action| move |source| ManifestError::Io { action, path: path.to_owned(), source };
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path);
        let mut file = file.map_err(fail("open"))?;
        let len = file.metadata().map_err(fail("read"))?.len();
        if len > MAX_BYTES {
            let reason = format!("{len} bytes are too long for a manifest");
            return Err(ManifestError::Corrupt { path: path.to_owned(), line: 0, reason });
        }
        let mut bytes = Vec::with_capacity(len as usize);
        file.read_to_end(&mut bytes).map_err(fail("read"))?;
        let whole = bytes.iter().rposition(|&byte| byte == b'\n').map_or(0, |end| end + 1);
        if whole < bytes.len() {
            file.set_len(whole as u64).map_err(fail("repair"))?;
            file.sync_all().map_err(fail("repair"))?;
        }
        file.seek(SeekFrom::Start(whole as u64)).map_err(fail("read"))?;
        let mut manifest =
            Self { path: path.to_owned(), file, header: None, commits: Vec::new(), finished: false };
        for (index, line) in bytes[..whole].split(|&byte| byte == b'\n').enumerate() {
            if !line.is_empty() {
                manifest.take_in(index + 1, line)?;
            }
        }
        Ok(manifest)
    }

    fn take_in(&mut self, number: usize, line: &[u8]) -> Result<(), ManifestError> {
        let corrupt =
            |reason: String| ManifestError::Corrupt { path: self.path.clone(), line: number, reason };
        match serde_json::from_slice(line).map_err(|error| corrupt(error.to_string()))? {
            Line::Header(header) if number == 1 && header.format == FORMAT => self.header = Some(header),
            Line::Header(header) => return Err(corrupt(format!("a header of format {}", header.format))),
            Line::Commit(_) | Line::Finished {} if self.header.is_none() => {
                return Err(corrupt("the header is missing".to_owned()));
            }
            Line::Commit(_) | Line::Finished {} if self.finished => {
                return Err(corrupt("it goes on after it was finished".to_owned()));
            }
            Line::Commit(commit) => self.commits.push(commit),
            Line::Finished {} => self.finished = true,
        }
        Ok(())
    }

    /// The header of a manifest whose commits may be unreadable.
    pub fn read_header(path: &Path) -> Option<Header> {
        let mut line = Vec::new();
        let mut file = BufReader::new(File::open(path).ok()?.take(MAX_BYTES));
        file.read_until(b'\n', &mut line).ok()?;
        match serde_json::from_slice(&line).ok()? {
            Line::Header(header) => Some(header),
            Line::Commit(_) | Line::Finished {} => None,
        }
    }

    /// Begins an empty manifest.
    pub fn begin(
        &mut self,
        definition: Value,
        inputs: Vec<InputFile>,
        errors: PathBuf,
    ) -> Result<(), ManifestError> {
        assert!(self.header.is_none(), "begun already");
        let header = Header { format: FORMAT, errors, definition, inputs };
        self.append(&Line::Header(header.clone()))?;
        self.header = Some(header);
        Ok(())
    }

    /// The commit point: when this returns, the commit is durable.
    pub fn commit(&mut self, commit: Commit) -> Result<(), ManifestError> {
        assert!(self.header.is_some() && !self.finished, "not open for commits");
        self.append(&Line::Commit(commit.clone()))?;
        self.commits.push(commit);
        Ok(())
    }

    /// Says that the input was used up. Again is harmless.
    pub fn finish(&mut self) -> Result<(), ManifestError> {
        if self.finished {
            return Ok(());
        }
        self.append(&Line::Finished {})?;
        self.finished = true;
        Ok(())
    }

    fn append(&mut self, line: &Line) -> Result<(), ManifestError> {
        let mut bytes = serde_json::to_vec(line).expect("plain data");
        bytes.push(b'\n');
        let written = self.file.write_all(&bytes).and_then(|()| self.file.sync_all());
        written.map_err(|source| ManifestError::Io { action: "write", path: self.path.clone(), source })
    }
}

#[cfg(test)]
mod tests;
