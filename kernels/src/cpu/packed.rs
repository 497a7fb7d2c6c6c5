//! Where packed weights live: in memory, or mapped from a file that an earlier start has left.
//!
//! Packing takes about a second for a small model and minutes for a large one, a mapping takes none; and processes that map the
//! same file share its memory. Matrices stand in the file in the order in which they are made, panels then
//! scales, so that order is part of the format. A file appears under its name by a rename when it is complete, and
//! is used only if its header names the same weights and its length is right; else it is made again.

use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use memmap2::Mmap;

/// To be raised when the layout of panels or the quantization changes.
const FORMAT_VERSION: u32 = 1;
/// Starts of panels and scales are multiples of it: a cache line.
const ALIGNMENT: usize = 64;
const MAGIC: &[u8; 16] = b"tidemill packed\n";

/// Makes the matrices of a model one after the other.
pub(crate) struct Packing {
    state: Mutex<State>,
}

enum State {
    Memory,
    /// Bytes from `at` on are not used yet.
    Mapped {
        map: Arc<Mmap>,
        at: usize,
    },
    Writing(Writer),
}

struct Writer {
    file: BufWriter<File>,
    len: usize,
    partial: PathBuf,
    path: PathBuf,
    /// The first failure: the file is given up, the matrices stay in memory.
    error: Option<io::Error>,
}

/// Bytes and scales of one matrix.
pub(super) enum PackedMatrix {
    Memory { panels: AlignedBytes, scales: Vec<f32> },
    Mapped { map: Arc<Mmap>, panels: std::ops::Range<usize>, scales: std::ops::Range<usize> },
}

impl PackedMatrix {
    pub(super) fn panels(&self) -> &[u8] {
        match self {
            Self::Memory { panels, .. } => panels.bytes(),
            Self::Mapped { map, panels, .. } => &map[panels.clone()],
        }
    }

    pub(super) fn scales(&self) -> &[f32] {
        match self {
            Self::Memory { scales, .. } => scales,
            Self::Mapped { map, scales, .. } => {
                let bytes = &map[scales.clone()];
                // SAFETY: any bits are an f32, and whole ones are cut off.
                let (before, scales, after) = unsafe { bytes.align_to::<f32>() };
                assert!(before.is_empty() && after.is_empty(), "scales start at a multiple of {ALIGNMENT}");
                scales
            }
        }
    }
}

impl Packing {
    /// Packs into memory.
    pub(crate) fn in_memory() -> Self {
        Self { state: Mutex::new(State::Memory) }
    }

    /// Maps the packed weights at `path`, or packs and leaves them there for the next start. `identity` names
    /// the weights; a file of other ones is replaced. The cache is a convenience: what goes wrong with it is logged.
    pub(crate) fn cached(path: &Path, identity: &str) -> Self {
        let state = match open(path, identity) {
            Ok(map) => State::Mapped { map: Arc::new(map), at: header(identity, 0).len() },
            Err(reason) => {
                tracing::debug!(?path, %reason, "packing the weights");
                match Writer::create(path, identity) {
                    Ok(writer) => State::Writing(writer),
                    Err(error) => {
                        tracing::warn!(?path, %error, "packed weights cannot be kept for the next start");
                        State::Memory
                    }
                }
            }
        };
        Self { state: Mutex::new(state) }
    }

    /// One matrix, made by `pack` unless it is there; `pack` gets zeros.
    pub(super) fn matrix(
        &self,
        panels_len: usize,
        num_scales: usize,
        pack: impl FnOnce(&mut [u8], &mut [f32]),
    ) -> PackedMatrix {
        let scales_len = num_scales * size_of::<f32>();
        let mut state = self.state();
        if let State::Mapped { map, at } = &mut *state {
            let panels = *at..*at + panels_len;
            let scales_start = panels.end.next_multiple_of(ALIGNMENT);
            let scales = scales_start..scales_start + scales_len;
            *at = scales.end.next_multiple_of(ALIGNMENT);
            if *at <= map.len() {
                return PackedMatrix::Mapped { map: Arc::clone(map), panels, scales };
            }
            tracing::warn!("the file of packed weights is shorter than its model");
            *state = State::Memory;
        }
        let mut panels = AlignedBytes::zeroed(panels_len);
        let mut scales = vec![0.0; num_scales];
        pack(panels.bytes_mut(), &mut scales);
        if let State::Writing(writer) = &mut *state {
            writer.write(panels.bytes());
            // SAFETY: the bytes of floats may be looked at.
            let (_, bytes, _) = unsafe { scales.align_to::<u8>() };
            writer.write(bytes);
        }
        PackedMatrix::Memory { panels, scales }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The last matrix was made.
    pub(crate) fn finish(&self) {
        if let State::Writing(writer) = std::mem::replace(&mut *self.state(), State::Memory) {
            let path = writer.path.clone();
            if let Err(error) = writer.finish() {
                tracing::warn!(?path, %error, "packed weights cannot be kept for the next start");
            }
        }
    }
}

/// The start of a file, padded; `len` is that of the whole file.
fn header(identity: &str, len: usize) -> Vec<u8> {
    let mut header = MAGIC.to_vec();
    header.extend(FORMAT_VERSION.to_le_bytes());
    header.extend((len as u64).to_le_bytes());
    header.extend((identity.len() as u32).to_le_bytes());
    header.extend(identity.as_bytes());
    header.resize(header.len().next_multiple_of(ALIGNMENT), 0);
    header
}

fn open(path: &Path, identity: &str) -> io::Result<Mmap> {
    let file = File::open(path)?;
    // SAFETY: the file is replaced by renames only, never written to under its name.
    let map = unsafe { Mmap::map(&file)? };
    match map.starts_with(&header(identity, map.len())) {
        true => Ok(map),
        false => Err(io::Error::other("the file holds other weights")),
    }
}

impl Writer {
    fn create(path: &Path, identity: &str) -> io::Result<Self> {
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder)?;
        }
        let partial = path.with_extension(format!("partial-{}", std::process::id()));
        let mut file = BufWriter::new(File::create(&partial)?);
        let header = header(identity, 0);
        file.write_all(&header)?;
        Ok(Self { file, len: header.len(), partial, path: path.to_owned(), error: None })
    }

    fn write(&mut self, bytes: &[u8]) {
        if self.error.is_some() {
            return;
        }
        let padding = [0; ALIGNMENT];
        let padding = &padding[..bytes.len().next_multiple_of(ALIGNMENT) - bytes.len()];
        self.len += bytes.len() + padding.len();
        let written = self.file.write_all(bytes).and_then(|()| self.file.write_all(padding));
        self.error = written.err();
    }

    fn finish(mut self) -> io::Result<()> {
        let result = self.publish();
        if result.is_err() {
            // It is of no use, and may be why the disk is full.
            let _ = fs::remove_file(&self.partial);
        }
        result
    }

    fn publish(&mut self) -> io::Result<()> {
        if let Some(error) = self.error.take() {
            return Err(error);
        }
        self.file.flush()?;
        let at = MAGIC.len() + size_of::<u32>();
        self.file.get_ref().write_all_at(&(self.len as u64).to_le_bytes(), at as u64)?;
        self.file.get_ref().sync_all()?;
        fs::rename(&self.partial, &self.path)
    }
}

/// Bytes that start at a cache line.
pub(super) struct AlignedBytes {
    memory: Vec<u8>,
    start: usize,
    len: usize,
}

impl AlignedBytes {
    /// Costs nothing until bytes are written: a plain vector of zeros is taken from the system untouched, which an
    /// allocation with an alignment of its own would not be.
    pub(super) fn zeroed(len: usize) -> Self {
        let memory = vec![0; len + ALIGNMENT];
        let start = memory.as_ptr().align_offset(ALIGNMENT);
        Self { memory, start, len }
    }

    pub(super) fn bytes(&self) -> &[u8] {
        &self.memory[self.start..self.start + self.len]
    }

    pub(super) fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.memory[self.start..self.start + self.len]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn matrices(packing: &Packing) -> Vec<(Vec<u8>, Vec<f32>, bool)> {
        let mut all = Vec::new();
        for (i, (panels_len, num_scales)) in [(128, 3), (64, 1), (192, 20)].into_iter().enumerate() {
            let mut packed = false;
            let matrix = packing.matrix(panels_len, num_scales, |panels, scales| {
                panels.fill(i as u8 + 1);
                scales.fill(i as f32 + 0.5);
                packed = true;
            });
            all.push((matrix.panels().to_vec(), matrix.scales().to_vec(), packed));
        }
        packing.finish();
        all
    }

    #[test]
    fn a_second_start_maps_what_the_first_has_packed_unless_it_is_of_other_weights_or_damaged() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("sub/weights.packed");
        let packed = |identity| matrices(&Packing::cached(&path, identity));
        let first = packed("a");
        assert!(first.iter().all(|(.., packed)| *packed));
        let second = packed("a");
        assert!(second.iter().all(|(.., packed)| !*packed));
        assert!(first.iter().zip(&second).all(|(a, b)| (&a.0, &a.1) == (&b.0, &b.1)));
        assert!(packed("b").iter().all(|(.., packed)| *packed), "other weights");
        let whole = fs::read(&path).expect("a file");
        fs::write(&path, &whole[..whole.len() - 64]).expect("a shorter file");
        assert!(packed("b").iter().all(|(.., packed)| *packed), "a damaged file");
        assert_eq!(fs::read(&path).expect("a file"), whole);
        assert_eq!(
            fs::read_dir(folder.path().join("sub")).expect("a folder").count(),
            1,
            "nothing else is left"
        );
    }

    #[test]
    fn without_a_place_for_the_file_the_weights_are_packed_all_the_same() {
        assert_eq!(
            matrices(&Packing::cached(Path::new("/dev/null/x"), "a")),
            matrices(&Packing::in_memory())
        );
    }
}
