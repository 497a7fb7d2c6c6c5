//! What `tidemill models list` and `tidemill models inspect` print.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use tidemill_kernels::gguf::{Gguf, TensorView};
use tidemill_kernels::safetensors::Safetensors;

use super::catalogue::{CATALOGUE, FAKE, ModelRef};
use super::folder::CONFIG_FILE;
use super::hub::Hub;
use super::load::LoadError;
use super::pull::{PullError, io_error, verified};

/// The models known by name, and those of the hub that are here.
pub fn list() -> String {
    let mut text = String::new();
    let mut line = |name: &str, here: &str, size: &str, license: &str, about: &str| {
        let _ = writeln!(text, "{name:<24} {here:<12} {size:>8}  {license:<18} {about}");
    };
    for entry in CATALOGUE {
        let here = if verified(entry).is_ok() { "here" } else { "not fetched" };
        line(entry.name, here, &format!("{} MB", entry.bytes / 1_000_000), entry.license, entry.about);
    }
    line(FAKE, "built in", "", "", "answers without weights, for trying a pipeline");
    for (name, snapshot) in Hub::from_env().map(|hub| hub.snapshots()).unwrap_or_default() {
        line(
            &name.to_string(),
            "here",
            "",
            "",
            &format!("of the Hugging Face hub, commit {}", snapshot.commit),
        );
    }
    text
}

/// Everything that a model's files say about it.
pub fn inspect(name: &str, model: &ModelRef) -> Result<String, LoadError> {
    let mut text = String::new();
    let mut field = |key: &str, value: &str| {
        let _ = writeln!(text, "{key:<24}{value}");
    };
    let Some(path) = found(model)? else {
        return Ok(format!("{name} is built in and has no file\n"));
    };
    if let ModelRef::Catalogued(entry) = model {
        field("about", entry.about);
        field("license", entry.license);
        field("sha256", entry.sha256);
    }
    field("path", &path.display().to_string());
    match path.is_dir() {
        true => inspect_folder(&mut text, &path)?,
        false => inspect_gguf(&mut text, &Gguf::open(&path)?),
    }
    Ok(text)
}

/// Where the model is; to look at it is no reason to fetch it.
fn found(model: &ModelRef) -> Result<Option<PathBuf>, LoadError> {
    let missing = |name: String| PullError::Missing { name };
    Ok(match model {
        ModelRef::Fake => None,
        ModelRef::Catalogued(entry) => Some(verified(entry)?),
        ModelRef::File(path) | ModelRef::Folder(path) => Some(path.clone()),
        ModelRef::Hub(name) => {
            Some(Hub::from_env()?.find(name).ok_or_else(|| missing(name.to_string()))?.folder)
        }
    })
}

fn inspect_gguf(text: &mut String, gguf: &Gguf) {
    let _ = writeln!(text, "{:<24}GGUF {}", "format", gguf.version);
    for (key, value) in &gguf.metadata {
        let _ = writeln!(text, "{key:<48}{}", value.describe());
    }
    for name in gguf.tensor_names() {
        tensor(text, name, gguf.tensor(name).expect("it has the name"));
    }
}

fn inspect_folder(text: &mut String, folder: &Path) -> Result<(), LoadError> {
    let _ = writeln!(text, "{:<24}Hugging Face folder", "format");
    let path = folder.join(CONFIG_FILE);
    let config = std::fs::read_to_string(&path).map_err(io_error("read", &path))?;
    let _ = writeln!(text, "{}", config.trim_end());
    let weights = Safetensors::open(folder)?;
    for name in weights.tensor_names() {
        match weights.tensor(name) {
            Ok(view) => tensor(text, name, view),
            // Such a tensor is no reason to show nothing of the others.
            Err(error) => {
                let _ = writeln!(text, "{name:<48}{error}");
            }
        }
    }
    Ok(())
}

fn tensor(text: &mut String, name: &str, view: TensorView<'_>) {
    let _ = writeln!(text, "{name:<48}{} {:?}", view.dtype, view.shape);
}
