//! The files of a Hugging Face folder that make a model, and a digest over them.
//!
//! Invariant: the digest changes with every byte that may change an answer. Other files of the folder are left alone.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::Read;
use std::path::Path;

use serde_json::Value;
use sha2::{Digest, Sha256};

use super::digest::{file_digest, hex};
use super::pull::PullError;

pub const CONFIG_FILE: &str = "config.json";
pub(super) const TOKENIZER_FILE: &str = "tokenizer.json";
pub(super) const WEIGHTS_FILE: &str = "model.safetensors";
pub(super) const INDEX_FILE: &str = "model.safetensors.index.json";
/// As the reader of the weights bounds it.
const MAX_INDEX_BYTES: u64 = 64 << 20;
/// The small files, where a folder has them.
const TEXT_FILES: [&str; 6] = [
    CONFIG_FILE,
    "generation_config.json",
    TOKENIZER_FILE,
    "tokenizer_config.json",
    "chat_template.jinja",
    INDEX_FILE,
];

/// Of a folder's file names, those that make the model, in order.
pub(super) fn model_files<'a>(names: impl IntoIterator<Item = &'a str>) -> Vec<&'a str> {
    let names: BTreeSet<&str> = names.into_iter().collect();
    let is_sharded = !names.contains(WEIGHTS_FILE);
    let is_shard = |name: &str| {
        is_sharded && name.starts_with("model-") && name.ends_with(".safetensors") && !name.contains('/')
    };
    names
        .into_iter()
        .filter(|&name| TEXT_FILES.contains(&name) || name == WEIGHTS_FILE || is_shard(name))
        .collect()
}

/// Whether everything is there that a model needs.
pub(super) fn is_complete(folder: &Path) -> bool {
    let has = |name: &str| folder.join(name).is_file();
    has(CONFIG_FILE)
        && has(TOKENIZER_FILE)
        && (has(WEIGHTS_FILE) || shards(folder).is_some_and(|names| names.iter().all(|name| has(name))))
}

/// The shards that the index names, within the folder; none without a readable index.
fn shards(folder: &Path) -> Option<BTreeSet<String>> {
    let mut text = Vec::new();
    let index = File::open(folder.join(INDEX_FILE)).ok()?;
    // What lies beyond the bound is cut off, and then it is not readable.
    index.take(MAX_INDEX_BYTES).read_to_end(&mut text).ok()?;
    let index: Value = serde_json::from_slice(&text).ok()?;
    let names = index["weight_map"].as_object()?.values();
    let within = |name: &Value| name.as_str().filter(|name| !name.contains('/')).map(str::to_owned);
    names.map(within).collect()
}

/// Hex SHA-256 over the names and contents of the files that make the model.
pub fn digest(folder: &Path, say: &dyn Fn(&str)) -> Result<String, PullError> {
    let mut files: BTreeSet<String> = TEXT_FILES.map(str::to_owned).into();
    files.insert(WEIGHTS_FILE.to_owned());
    files.retain(|name| folder.join(name).exists());
    if !files.contains(WEIGHTS_FILE) {
        // Shards may have any name; those that the index names are the ones that are read.
        files.extend(shards(folder).unwrap_or_default());
    }
    let mut hasher = Sha256::new();
    for name in files {
        hasher.update(format!("{name} {}\n", file_digest(&folder.join(&name), say)?));
    }
    Ok(hex(&hasher.finalize()))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn digest_of(folder: &Path) -> Result<String, PullError> {
        digest(folder, &|_| ())
    }

    #[test]
    fn the_digest_covers_what_makes_the_model() {
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| fs::write(folder.path().join(name), text).unwrap();
        write(CONFIG_FILE, "{}");
        write(WEIGHTS_FILE, "weights");
        let before = digest_of(folder.path()).unwrap();
        assert!(!is_complete(folder.path()), "there is no tokenizer");
        write("README.md", "other");
        write("model-00001-of-00001.safetensors", "not used beside a single file");
        assert_eq!(digest_of(folder.path()).unwrap(), before);
        write(TOKENIZER_FILE, "{}");
        assert!(is_complete(folder.path()));
        assert_ne!(digest_of(folder.path()).unwrap(), before);
        fs::remove_file(folder.path().join(WEIGHTS_FILE)).unwrap();
        write(
            INDEX_FILE,
            r#"{"weight_map":{"a":"model-00001-of-00001.safetensors","b":"model-2.safetensors"}}"#,
        );
        assert!(!is_complete(folder.path()));
        write("model-2.safetensors", "");
        assert!(is_complete(folder.path()));
    }

    #[test]
    fn the_digest_covers_shards_of_any_name_within_the_folder() {
        let parent = tempfile::tempdir().unwrap();
        let folder = parent.path().join("model");
        fs::create_dir(&folder).unwrap();
        let write = |name: &str, text: &str| fs::write(folder.join(name), text).unwrap();
        write(CONFIG_FILE, "{}");
        write(TOKENIZER_FILE, "{}");
        write(INDEX_FILE, r#"{"weight_map":{"a":"weights_a.safetensors"}}"#);
        assert!(digest_of(&folder).is_err(), "the shard is missing");
        write("weights_a.safetensors", "one");
        let before = digest_of(&folder).unwrap();
        write("weights_a.safetensors", "two");
        assert_ne!(digest_of(&folder).unwrap(), before);
        fs::write(parent.path().join("weights_b.safetensors"), "outside").unwrap();
        write(INDEX_FILE, r#"{"weight_map":{"a":"../weights_b.safetensors"}}"#);
        assert!(!is_complete(&folder));
    }
}
