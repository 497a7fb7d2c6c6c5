//! Images that were compiled at run time, kept for the next start.
//!
//! An image lies under the hash of all that it was made of, behind the hash of itself, and gets its name when it is
//! whole. So a file that is broken, or that another process writes, is never taken; it is made again.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use crate::cache::user_cache;

const HASH_BYTES: usize = blake3::OUT_LEN;

pub(crate) struct ImageCache {
    /// None where nothing can be kept.
    folder: Option<PathBuf>,
}

impl ImageCache {
    /// The one beside the models.
    pub(crate) fn of_user() -> Self {
        Self { folder: user_cache().map(|cache| cache.join("images")) }
    }

    #[cfg(test)]
    pub(crate) fn at(folder: &Path) -> Self {
        Self { folder: Some(folder.to_owned()) }
    }

    /// The image made of `parts`, which `make` makes where it is not kept.
    pub(crate) fn get_or_make<E>(
        &self,
        parts: &[&str],
        make: impl FnOnce() -> Result<Vec<u8>, E>,
    ) -> Result<Vec<u8>, E> {
        let path = self.folder.as_ref().map(|folder| folder.join(name(parts)));
        if let Some(image) = path.as_deref().and_then(read) {
            return Ok(image);
        }
        let image = make()?;
        if let Some(path) = path
            && let Err(error) = write(&path, &image)
        {
            // The next start compiles again, that is all.
            tracing::debug!(path = %path.display(), %error, "a compiled kernel cannot be kept");
        }
        Ok(image)
    }
}

fn name(parts: &[&str]) -> String {
    let mut hasher = blake3::Hasher::new();
    for part in parts {
        hasher.update(&(part.len() as u64).to_le_bytes());
        hasher.update(part.as_bytes());
    }
    format!("{}.image", hasher.finalize().to_hex())
}

fn read(path: &Path) -> Option<Vec<u8>> {
    let mut bytes = std::fs::read(path).ok()?;
    let image = bytes.get(HASH_BYTES..)?;
    if blake3::hash(image).as_bytes() != bytes.get(..HASH_BYTES)? {
        return None;
    }
    bytes.drain(..HASH_BYTES);
    Some(bytes)
}

fn write(path: &Path, image: &[u8]) -> std::io::Result<()> {
    static NUM_WRITTEN: AtomicU64 = AtomicU64::new(0);
    let number = NUM_WRITTEN.fetch_add(1, Ordering::Relaxed);
    let new = path.with_extension(format!("{}.{number}.new", std::process::id()));
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder)?;
    }
    let mut bytes = blake3::hash(image).as_bytes().to_vec();
    bytes.extend_from_slice(image);
    let result = std::fs::write(&new, bytes).and_then(|()| std::fs::rename(&new, path));
    if result.is_err() {
        let _ = std::fs::remove_file(&new);
    }
    result
}
