//! What a pipeline on topics keeps on disk: the journal, and by what name it commits.
//!
//! Several processes may run the same definition; each takes a slot of the folder for itself, the first that is free.
//! A process that comes back to a slot has the name of the one before it, fences it, and finds its answers.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use tidemill_connectors::kafka::KafkaError;

/// The most processes that share a folder.
const MAX_SLOTS: usize = 1024;

/// A slot that is ours as long as this lives.
#[derive(Debug)]
pub struct Slot {
    pub folder: PathBuf,
    /// Tells this slot from all others anywhere.
    pub id: String,
    _lock: File,
}

impl Slot {
    /// Takes the first free slot.
    pub fn take(folder: &Path) -> Result<Self, KafkaError> {
        let fail = |path: &Path| {
            let path = path.to_owned();
            move |source| KafkaError::State { path, source }
        };
        for number in 0..MAX_SLOTS {
            let slot = folder.join(number.to_string());
            fs::create_dir_all(&slot).map_err(fail(&slot))?;
            let lock = File::create(slot.join("lock")).map_err(fail(&slot))?;
            match lock.try_lock() {
                Ok(()) => {
                    let id = id(&slot).map_err(fail(&slot))?;
                    return Ok(Self { folder: slot, id, _lock: lock });
                }
                Err(fs::TryLockError::WouldBlock) => {}
                Err(fs::TryLockError::Error(source)) => return Err(fail(&slot)(source)),
            }
        }
        Err(fail(folder)(io::Error::other(format!("{MAX_SLOTS} processes use it already"))))
    }
}

/// The slot's random name, made once.
fn id(slot: &Path) -> io::Result<String> {
    let path = slot.join("id");
    if let Ok(id) = fs::read_to_string(&path)
        && id.len() == 16
        && id.chars().all(|c| c.is_ascii_hexdigit())
    {
        return Ok(id);
    }
    let mut random = [0; 8];
    io::Read::read_exact(&mut File::open("/dev/urandom")?, &mut random)?;
    let id: String = random.iter().map(|byte| format!("{byte:02x}")).collect();
    fs::write(slot.join("id.new"), &id)?;
    fs::rename(slot.join("id.new"), path)?;
    Ok(id)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_process_has_a_slot_and_finds_it_again() {
        let folder = tempfile::tempdir().unwrap();
        let first = Slot::take(folder.path()).unwrap();
        let second = Slot::take(folder.path()).unwrap();
        assert_ne!(first.folder, second.folder);
        assert_ne!(first.id, second.id);
        let id = first.id.clone();
        drop(first);
        assert_eq!(Slot::take(folder.path()).unwrap().id, id);
    }
}
