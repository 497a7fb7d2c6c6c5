//! Holds the rules of the house that neither the compiler nor clippy knows: who may depend on whom, how files are
//! laid out, what is never committed.
//!
//! A rule collects every breach before it fails, and each message says what to do. Rules read what git would commit,
//! so ignored build outputs never matter. Lint levels are not here: they are in `Cargo.toml` and `clippy.toml`.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};

const MAX_FILE_LINES: usize = 600;
const MAX_INLINE_TEST_LINES: usize = 80;
const MAX_FILE_BYTES: u64 = 1 << 20;

/// Which crates of the workspace a crate may, and does, depend on.
const EDGES: [(&str, &[&str]); 6] = [
    ("tidemill-connectors", &[]),
    ("tidemill-cuda-emulation", &[]),
    // Only in its tests.
    ("tidemill-kernels", &["tidemill-cuda-emulation"]),
    ("tidemill-operators", &["tidemill-kernels"]),
    // The pipeline names kernels only to open weights and build the `Model` that it hands to the operators.
    ("tidemill", &["tidemill-connectors", "tidemill-kernels", "tidemill-operators"]),
    (
        "tidemill-tests",
        &[
            "tidemill",
            "tidemill-connectors",
            "tidemill-cuda-emulation",
            "tidemill-kernels",
            "tidemill-operators",
        ],
    ),
];

const FOLDERS: [&str; 10] = [
    ".ci",
    "connectors",
    "deploy",
    "docs",
    "examples",
    "kernels",
    "operators",
    "pipeline",
    "scripts",
    "tests",
];

/// How a forbidden name is found in code.
#[derive(Clone, Copy)]
enum Name {
    /// Anywhere, in any case: `KafkaSource` names Kafka.
    Part(&'static str),
    /// As a whole identifier in this case.
    Whole(&'static str),
}

use Name::{Part, Whole};

/// What a folder's code, comments aside, never names.
const NEVER_NAMES: [(&str, &[Name]); 4] = [
    ("connectors/", &[Part("timely"), Part("tidemill_kernels"), Part("tidemill_operators"), Whole("Prompt")]),
    ("kernels/", &[Part("timely"), Part("kafka"), Whole("Document")]),
    ("operators/", &[Part("kafka"), Part("parquet")]),
    ("pipeline/", &[Part("rdkafka"), Part("cudarc")]),
];

/// Split so that this file does not hold what it looks for.
const UNFINISHED: [&str; 6] = [
    concat!("#[", "ignore"),
    concat!("#[", "should_panic"),
    concat!("to", "do!"),
    concat!("un", "implemented!"),
    concat!("FIX", "ME"),
    concat!("X", "XX"),
];

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the tests crate lies in the workspace")
}

/// What git has or would add, relative to the root, sorted.
fn files() -> Result<Vec<PathBuf>> {
    let output = Command::new("git")
        // A checkout may belong to another user than the one who tests, as in containers.
        .args(["-c", "safe.directory=*", "ls-files", "-z", "--cached", "--others", "--exclude-standard"])
        .current_dir(root())
        .output()
        .context("git is needed to list the files of the tree")?;
    ensure!(output.status.success(), "git ls-files failed: {}", String::from_utf8_lossy(&output.stderr));
    let names = String::from_utf8(output.stdout).context("file names must be UTF-8")?;
    let files: BTreeSet<PathBuf> = names.split_terminator('\0').map(PathBuf::from).collect();
    // Files deleted from the tree but not yet from the index are gone.
    Ok(files.into_iter().filter(|file| root().join(file).is_file()).collect())
}

/// Files with one of these extensions, with their text.
fn texts(extensions: &[&str]) -> Result<Vec<(PathBuf, String)>> {
    let wanted = |file: &PathBuf| {
        file.extension().and_then(|extension| extension.to_str()).is_some_and(|e| extensions.contains(&e))
    };
    files()?
        .into_iter()
        .filter(wanted)
        .map(|file| {
            let text =
                fs::read_to_string(root().join(&file)).with_context(|| format!("cannot read {file:?}"))?;
            Ok((file, text))
        })
        .collect()
}

fn is_test_file(file: &Path) -> bool {
    file.starts_with("tests") || file.file_stem().is_some_and(|stem| stem == "tests" || stem == "fuzz")
}

/// Line of the `#[cfg(test)]` before an inline test module, if there is one.
fn inline_tests_start(text: &str) -> Option<usize> {
    let lines: Vec<&str> = text.lines().collect();
    (1..lines.len()).find(|&line| {
        lines[line - 1].trim() == "#[cfg(test)]"
            && lines[line].starts_with("mod ")
            && lines[line].ends_with('{')
    })
}

/// The text with comments blanked out; lines stay where they are.
fn without_comments(text: &str) -> String {
    let mut code = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(first) = rest.chars().next() {
        let len = if rest.starts_with("//") {
            rest.find('\n').unwrap_or(rest.len())
        } else if rest.starts_with("/*") {
            block_comment_len(rest)
        } else {
            let len = literal_len(rest).unwrap_or(first.len_utf8());
            code.push_str(&rest[..len]);
            rest = &rest[len..];
            continue;
        };
        code.extend(rest[..len].chars().filter(|&c| c == '\n'));
        rest = &rest[len..];
    }
    code
}

fn block_comment_len(text: &str) -> usize {
    let mut depth = 0;
    let mut at = 0;
    while at < text.len() {
        match &text.as_bytes()[at..] {
            [b'/', b'*', ..] => (depth, at) = (depth + 1, at + 2),
            [b'*', b'/', ..] => (depth, at) = (depth - 1, at + 2),
            _ => at += 1,
        }
        if depth == 0 {
            return at;
        }
    }
    text.len()
}

/// Length of the string or character literal that the text begins with, so that a `//` inside is no comment.
fn literal_len(text: &str) -> Option<usize> {
    if let Some(raw) = text.strip_prefix('r') {
        let num_hashes = raw.len() - raw.trim_start_matches('#').len();
        let body = raw[num_hashes..].strip_prefix('"')?;
        let end = format!("\"{}", "#".repeat(num_hashes));
        return Some(body.find(&end).map_or(text.len(), |at| 2 + num_hashes + at + end.len()));
    }
    let quote = text.chars().next().filter(|c| matches!(c, '"' | '\''))?;
    let mut chars = text.char_indices().skip(1);
    let mut num_chars = 0;
    while let Some((at, c)) = chars.next() {
        match c {
            '\\' => drop(chars.next()),
            _ if c == quote => return Some(at + 1),
            // A quote with more than a character behind it, `\u{…}` aside, is a lifetime.
            _ if quote == '\'' && num_chars > 0 && !text.starts_with("'\\") => return None,
            _ => {}
        }
        num_chars += 1;
    }
    Some(text.len())
}

fn names(line: &str, name: Name) -> bool {
    match name {
        Part(part) => line.to_lowercase().contains(part),
        Whole(word) => line.split(|c: char| !c.is_alphanumeric() && c != '_').any(|found| found == word),
    }
}

/// Fails with every breach found, and what to do about it.
#[track_caller]
fn hold<const N: usize>(findings: [(&str, Vec<String>); N]) {
    let broken: Vec<String> = findings
        .into_iter()
        .filter(|(_, breaches)| !breaches.is_empty())
        .map(|(advice, breaches)| format!("{advice}\n  {}", breaches.join("\n  ")))
        .collect();
    assert!(broken.is_empty(), "\n{}\n", broken.join("\n"));
}

/// What the manifests say.
#[derive(Default)]
struct Manifests {
    /// The dependencies of each crate of the workspace which lie in the workspace too.
    edges: BTreeMap<String, BTreeSet<String>>,
    /// Crates that depend on anyhow outside tests.
    anyhow_users: Vec<String>,
}

fn manifests() -> Result<Manifests> {
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--no-deps", "--offline", "--format-version", "1"])
        .current_dir(root())
        .output()?;
    ensure!(output.status.success(), "cargo metadata failed: {}", String::from_utf8_lossy(&output.stderr));
    let metadata: serde_json::Value = serde_json::from_slice(&output.stdout)?;
    let text = |value: &serde_json::Value| value.as_str().unwrap_or_default().to_owned();
    let mut manifests = Manifests::default();
    for package in metadata["packages"].as_array().context("metadata lists packages")? {
        let name = text(&package["name"]);
        let mut inside = BTreeSet::new();
        for dependency in package["dependencies"].as_array().context("a package lists dependencies")? {
            // A path means that it is one of ours.
            if !dependency["path"].is_null() {
                inside.insert(text(&dependency["name"]));
            }
            let for_tests = dependency["kind"] == "dev" || name == "tidemill-tests";
            if dependency["name"] == "anyhow" && !for_tests {
                manifests.anyhow_users.push(name.clone());
            }
        }
        manifests.edges.insert(name, inside);
    }
    Ok(manifests)
}

#[test]
fn crate_edges() -> Result<()> {
    let Manifests { edges: found, anyhow_users } = manifests()?;
    let allowed: BTreeMap<String, BTreeSet<String>> = EDGES
        .iter()
        .map(|(name, edges)| (name.to_string(), edges.iter().map(|edge| edge.to_string()).collect()))
        .collect();
    let unknown =
        found.keys().filter(|name| !allowed.contains_key(*name)).map(|name| format!("crate {name}"));
    let missing =
        allowed.keys().filter(|name| !found.contains_key(*name)).map(|name| format!("no crate {name}"));
    let mut breaches: Vec<String> = unknown.chain(missing).collect();
    for (name, edges) in &found {
        let expected = allowed.get(name).cloned().unwrap_or_default();
        breaches.extend(edges.difference(&expected).map(|edge| format!("{name} → {edge} is not allowed")));
        breaches.extend(expected.difference(edges).map(|edge| format!("{name} → {edge} is gone")));
    }
    hold([
        (
            "move the code to the crate that may hold it, or change EDGES and the table in ARCHITECTURE.md:",
            breaches,
        ),
        ("use a thiserror enum; anyhow is for tests only, so make it a dev-dependency:", anyhow_users),
    ]);
    Ok(())
}

#[test]
fn layers_do_not_name_each_other() -> Result<()> {
    let mut breaches = Vec::new();
    for (file, text) in texts(&["rs", "cu", "cuh"])? {
        let forbidden = NEVER_NAMES.iter().filter(|(folder, _)| file.starts_with(folder));
        for name in forbidden.flat_map(|(_, names)| *names) {
            for (index, line) in without_comments(&text).lines().enumerate() {
                if names(line, *name) {
                    breaches.push(format!("{}:{}: {}", file.display(), index + 1, line.trim()));
                }
            }
        }
    }
    hold([(
        "these names belong to another crate; move the code or pass what it needs as an argument:",
        breaches,
    )]);
    Ok(())
}

#[test]
fn miette_is_only_at_the_edge() -> Result<()> {
    let allowed = |file: &Path| {
        let name = file.to_string_lossy().into_owned();
        name == "pipeline/src/main.rs" || name.starts_with("pipeline/src/report")
    };
    let breaches = texts(&["rs"])?
        .into_iter()
        .filter(|(file, _)| !file.starts_with("tests") && !allowed(file))
        .filter(|(_, text)| without_comments(text).lines().any(|line| names(line, Whole("miette"))))
        .map(|(file, _)| file.display().to_string())
        .collect();
    hold([(
        "return a thiserror enum; only pipeline/src/main.rs and pipeline/src/report turn it into miette:",
        breaches,
    )]);
    Ok(())
}

#[test]
fn unsafe_is_only_in_kernels() -> Result<()> {
    let mut breaches = Vec::new();
    for file in
        ["connectors/src/lib.rs", "operators/src/lib.rs", "pipeline/src/lib.rs", "pipeline/src/main.rs"]
    {
        let text = fs::read_to_string(root().join(file)).with_context(|| format!("cannot read {file}"))?;
        if !text.lines().any(|line| line == "#![forbid(unsafe_code)]") {
            breaches.push(file.to_owned());
        }
    }
    hold([("add #![forbid(unsafe_code)] below the module docs; unsafe code goes to kernels:", breaches)]);
    Ok(())
}

#[test]
fn files_are_short() -> Result<()> {
    let (mut files, mut inline) = (Vec::new(), Vec::new());
    for (file, text) in texts(&["rs", "cu", "cuh", "py", "sh"])? {
        if is_test_file(&file) {
            continue;
        }
        let num_lines = text.lines().count();
        let num_code_lines = inline_tests_start(&text).map_or(num_lines, |line| line - 1);
        if num_code_lines > MAX_FILE_LINES {
            files.push(format!("{}: {num_code_lines} lines", file.display()));
        }
        if num_lines - num_code_lines > MAX_INLINE_TEST_LINES {
            inline.push(format!("{}: {} lines of tests", file.display(), num_lines - num_code_lines));
        }
    }
    hold([
        (&format!("split these files, {MAX_FILE_LINES} lines without tests is the limit:"), files),
        (
            &format!("move tests above {MAX_INLINE_TEST_LINES} lines to tests.rs in the folder of the file:"),
            inline,
        ),
    ]);
    Ok(())
}

#[test]
fn files_are_laid_out() -> Result<()> {
    let (mut modules, mut docs, mut unfinished) = (Vec::new(), Vec::new(), Vec::new());
    for (file, text) in texts(&["rs"])? {
        let shown = file.display();
        let stem = file.file_stem().and_then(|stem| stem.to_str()).unwrap_or_default();
        if stem == "mod" {
            modules.push(shown.to_string());
        }
        // The docs of foo/tests.rs are those of foo.rs.
        if stem != "tests" && !text.starts_with("//!") {
            docs.push(shown.to_string());
        }
        for (index, line) in text.lines().enumerate() {
            for word in UNFINISHED.iter().chain(&[concat!("dbg", "!")]).filter(|word| line.contains(**word)) {
                unfinished.push(format!("{shown}:{}: {word}", index + 1));
            }
        }
    }
    hold([
        ("write foo.rs beside foo/, not foo/mod.rs:", modules),
        ("begin the file with //! docs: purpose, invariant, what is deliberately absent:", docs),
        ("finish this, or leave it out and say so:", unfinished),
    ]);
    Ok(())
}

#[test]
fn text_is_clean() -> Result<()> {
    let mut breaches = Vec::new();
    for (file, text) in texts(&["rs", "cu", "cuh", "py", "sh", "toml", "md", "yaml", "yml"])? {
        for (index, line) in text.lines().enumerate() {
            if line.ends_with([' ', '\t', '\r']) {
                breaches.push(format!("{}:{}: white space at the end", file.display(), index + 1));
            }
            if line.contains('\t') && file.extension().is_some_and(|extension| extension == "rs") {
                breaches.push(format!("{}:{}: a tab", file.display(), index + 1));
            }
        }
        if !text.ends_with('\n') {
            breaches.push(format!("{}: no newline at the end", file.display()));
        }
    }
    hold([("clean these lines (cargo fmt does most of it):", breaches)]);
    Ok(())
}

#[test]
fn rust_is_formatted() -> Result<()> {
    let output =
        Command::new(env!("CARGO")).args(["fmt", "--all", "--check"]).current_dir(root()).output()?;
    let diff = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success(),
        "run cargo fmt --all\n{diff}{}",
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(())
}

#[test]
fn folders_are_fixed() -> Result<()> {
    let files = files()?;
    let found: BTreeSet<&str> = files
        .iter()
        .filter(|file| file.components().count() > 1)
        .filter_map(|file| file.iter().next()?.to_str())
        .collect();
    let expected = BTreeSet::from(FOLDERS);
    let new = found.difference(&expected).map(|folder| format!("{folder}/ is new"));
    let gone = expected.difference(&found).map(|folder| format!("{folder}/ is gone"));
    hold([("keep to the folders of ARCHITECTURE.md:", new.chain(gone).collect())]);
    Ok(())
}

#[test]
fn cases_are_complete() -> Result<()> {
    let files = files()?;
    let mut incomplete = Vec::new();
    for (folder, needed) in
        [("examples", &["README.md", "pipeline.yaml"][..]), ("tests/pipelines", &["pipeline.yaml"])]
    {
        let cases: BTreeSet<PathBuf> = files
            .iter()
            .filter_map(|file| file.strip_prefix(folder).ok())
            .filter(|file| file.components().count() > 1)
            .filter_map(|file| Some(Path::new(folder).join(file.iter().next()?)))
            .collect();
        assert!(!cases.is_empty(), "no case found in {folder}/");
        let missing = cases.iter().flat_map(|case| needed.iter().map(|name| case.join(name)));
        incomplete
            .extend(missing.filter(|file| !files.contains(file)).map(|file| file.display().to_string()));
    }
    hold([("add these files, so that every case can be read and run:", incomplete)]);
    Ok(())
}

#[test]
fn files_are_small() -> Result<()> {
    let mut breaches = Vec::new();
    for file in files()? {
        let num_bytes = fs::metadata(root().join(&file))?.len();
        if num_bytes > MAX_FILE_BYTES {
            breaches.push(format!("{}: {} KiB", file.display(), num_bytes >> 10));
        }
    }
    hold([("fetch models and data, do not commit them (the limit is 1 MiB a file):", breaches)]);
    Ok(())
}

/// The rules above stand on this: a name in a comment is no breach, one in a string is.
#[test]
fn comments_are_told_from_code() {
    let text = "let a = \"http://x\"; // timely\n/* kafka /* nested */\n timely */ let b = r#\"// kept\"#;\n\
                let c = ('\"', '\\'', '\\u{7f}'); // gone\nfn d<'a>(e: &'a str) {} // gone\n";
    let code = "let a = \"http://x\"; \n\n let b = r#\"// kept\"#;\n\
                let c = ('\"', '\\'', '\\u{7f}'); \nfn d<'a>(e: &'a str) {} \n";
    assert_eq!(without_comments(text), code);
    assert!(names("struct KafkaSource;", Part("kafka")));
    assert!(names("use crate::Document;", Whole("Document")));
    assert!(!names("struct DocumentedField;", Whole("Document")));
    assert_eq!(inline_tests_start("fn a() {}\n\n#[cfg(test)]\nmod tests {\n}\n"), Some(3));
    assert_eq!(inline_tests_start("#[cfg(test)]\nmod tests;\n"), None);
}
