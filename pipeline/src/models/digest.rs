//! SHA-256 of model files, remembered in the cache, so that a start does not read gigabytes to name them.
//!
//! A remembered digest counts only while device, inode, length and times are those that the file had before it was
//! hashed, and it is kept only for a file that had been left alone for a while: two changes within the grain of a
//! file system's clock look like one. Whoever may write to the cache is trusted, as with the models in it.

use std::fs::{self, File, Metadata};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use sha2::{Digest, Sha256};

use super::pull::{PullError, cache_folder, io_error};

/// Longer than the grain of the times of any file system in use.
const QUIET: Duration = Duration::from_secs(3);
/// Above it hashing may take longer than a user waits without a word.
const LARGE_BYTES: u64 = 1 << 30;

/// Hex SHA-256 of a file; `say` is told if it takes a while.
#[expect(clippy::disallowed_methods, reason = "files carry the time of day; below it is a value")]
pub fn file_digest(path: &Path, say: &dyn Fn(&str)) -> Result<String, PullError> {
    remembered(path, &cache_folder()?.join("digests"), SystemTime::now(), say)
}

fn remembered(path: &Path, folder: &Path, now: SystemTime, say: &dyn Fn(&str)) -> Result<String, PullError> {
    let mut file = File::open(path).map_err(io_error("open", path))?;
    let metadata = file.metadata().map_err(io_error("read", path))?;
    let stamp = stamp(&metadata);
    let record = record_path(path, folder)?;
    if let Some(known) = fs::read_to_string(&record).ok().and_then(|text| digest_for(&text, &stamp)) {
        return Ok(known);
    }
    if metadata.len() >= LARGE_BYTES {
        say(&format!("hashing {} ({} MB), once", path.display(), metadata.len() / 1_000_000));
    }
    let mut hasher = Sha256::new();
    io::copy(&mut file, &mut hasher).map_err(io_error("read", path))?;
    let digest = hex(&hasher.finalize());
    if now.duration_since(changed(&metadata)).is_ok_and(|quiet| quiet >= QUIET) {
        // Only a shortcut: without the record the next start hashes again.
        let _ = keep(&record, &format!("{stamp} {digest}\n"));
    }
    Ok(digest)
}

/// Whole or not at all: another start may read it just now.
fn keep(record: &Path, text: &str) -> io::Result<()> {
    fs::create_dir_all(record.parent().expect("a file in a folder"))?;
    let partial = record.with_extension(format!("partial-{}", std::process::id()));
    fs::write(&partial, text)?;
    fs::rename(partial, record)
}

fn record_path(path: &Path, folder: &Path) -> Result<PathBuf, PullError> {
    let path = path.canonicalize().map_err(io_error("read", path))?;
    Ok(folder.join(hex(&Sha256::digest(path.as_os_str().as_encoded_bytes()))))
}

fn digest_for(record: &str, stamp: &str) -> Option<String> {
    let digest = record.strip_suffix('\n')?.strip_prefix(stamp)?.strip_prefix(' ')?;
    (digest.len() == 64 && digest.bytes().all(|byte| byte.is_ascii_hexdigit())).then(|| digest.to_owned())
}

fn stamp(file: &Metadata) -> String {
    let (modified, changed) = ((file.mtime(), file.mtime_nsec()), (file.ctime(), file.ctime_nsec()));
    format!(
        "{} {} {} {}.{:09} {}.{:09}",
        file.dev(),
        file.ino(),
        file.len(),
        modified.0,
        modified.1,
        changed.0,
        changed.1
    )
}

/// When the file was last written, renamed or had its times set; that time cannot be set.
fn changed(file: &Metadata) -> SystemTime {
    UNIX_EPOCH + Duration::from_secs(u64::try_from(file.ctime()).unwrap_or(0))
}

pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The digest, asked for some seconds after the file was changed.
    fn digest_after(seconds: u64, path: &Path, records: &Path) -> String {
        let now = changed(&fs::metadata(path).unwrap()) + Duration::from_secs(seconds);
        remembered(path, records, now, &|_| ()).unwrap()
    }

    fn num_records(folder: &Path) -> usize {
        fs::read_dir(folder).map_or(0, Iterator::count)
    }

    #[test]
    fn a_digest_is_remembered_until_the_file_changes() {
        let dir = tempfile::tempdir().unwrap();
        let (path, records) = (dir.path().join("weights"), dir.path().join("digests"));
        let digest = || digest_after(60, &path, &records);
        fs::write(&path, "abc").unwrap();
        let abc = digest();
        assert_eq!(abc, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
        assert_eq!(num_records(&records), 1);
        // What is remembered is what is answered.
        let record = fs::read_dir(&records).unwrap().next().unwrap().unwrap().path();
        let text = fs::read_to_string(&record).unwrap();
        fs::write(&record, text.replace(&abc, &"0".repeat(64))).unwrap();
        assert_eq!(digest(), "0".repeat(64));
        // A broken record is not.
        fs::write(&record, text.replace(&abc, "0000")).unwrap();
        assert_eq!(digest(), abc);
        // Another content of the same length and modification time, in the same place.
        let other = dir.path().join("other");
        fs::write(&other, "abd").unwrap();
        let modified = fs::metadata(&path).unwrap().modified().unwrap();
        File::options().write(true).open(&other).unwrap().set_modified(modified).unwrap();
        fs::rename(&other, &path).unwrap();
        assert_ne!(digest(), abc);
    }

    #[test]
    fn a_file_that_was_just_written_is_not_remembered() {
        let dir = tempfile::tempdir().unwrap();
        let (path, records) = (dir.path().join("weights"), dir.path().join("digests"));
        fs::write(&path, "abc").unwrap();
        digest_after(1, &path, &records);
        assert_eq!(num_records(&records), 0);
    }
}
