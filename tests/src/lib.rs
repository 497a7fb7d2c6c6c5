//! What the integration tests share: the real binary, small inputs, and what a run left behind.
#![forbid(unsafe_code)]

pub mod golden;
pub mod gpu;
pub mod kafka;
pub mod tiny;

use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::OnceLock;

use anyhow::{Context as _, Result, ensure};
use arrow::array::RecordBatch;
use parquet::arrow::ArrowWriter;
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use parquet::file::properties::WriterProperties;
use serde_json::Value;

/// The workspace's folder.
pub fn workspace() -> PathBuf {
    // A test that was carried to another machine has what it reads with it (scripts/gpu_tests.sh).
    std::env::var_os("TIDEMILL_SOURCES").map(PathBuf::from).unwrap_or_else(|| {
        Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("tests/ lies in the workspace").to_owned()
    })
}

/// The `tidemill` binary of the profile under test, built once.
pub fn binary() -> &'static Path {
    static BINARY: OnceLock<PathBuf> = OnceLock::new();
    BINARY.get_or_init(|| {
        let mut cargo = Command::new(env!("CARGO"));
        cargo.current_dir(workspace()).args([
            "build",
            "--quiet",
            "--package",
            "tidemill",
            "--bin",
            "tidemill",
        ]);
        cargo.arg("--message-format=json-render-diagnostics");
        // What cargo tells this test about itself would make build scripts of dependencies run anew.
        for (name, _) in std::env::vars_os() {
            let name = name.to_string_lossy();
            if ["CARGO_PKG_", "CARGO_MANIFEST_", "CARGO_CRATE_"].iter().any(|prefix| name.starts_with(prefix))
            {
                cargo.env_remove(&*name);
            }
        }
        if !cfg!(debug_assertions) {
            cargo.arg("--release");
        }
        let output = cargo.stderr(Stdio::inherit()).output().expect("cargo runs");
        assert!(output.status.success(), "the binary does not build");
        let messages = String::from_utf8_lossy(&output.stdout);
        let executable = messages
            .lines()
            .filter_map(|line| serde_json::from_str::<Value>(line).ok())
            .find_map(|message| {
                (message["target"]["name"] == "tidemill")
                    .then(|| message["executable"].as_str().map(PathBuf::from))?
            });
        executable.expect("cargo names the binary it built")
    })
}

/// A folder with a pipeline in it; deleted with the value.
pub struct Pipeline {
    pub folder: tempfile::TempDir,
    /// Environment of every run.
    pub env: Vec<(&'static str, String)>,
}

impl Pipeline {
    pub fn new(definition: &str) -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        fs::write(folder.path().join("pipeline.yaml"), definition).expect("a writable folder");
        Self { folder, env: Vec::new() }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// `tidemill ARGS… pipeline.yaml`, ready to start.
    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(binary());
        command.args(args).arg(self.path("pipeline.yaml")).stdin(Stdio::null());
        command.envs(self.env.iter().map(|(key, value)| (*key, value.as_str())));
        command
    }

    /// Runs to the end.
    pub fn run(&self, args: &[&str]) -> Ran {
        Ran(self.command(args).output().expect("the binary starts"))
    }

    /// Starts and returns; standard error goes to a file of the folder.
    pub fn start(&self, args: &[&str], log: &str) -> Child {
        let log = File::create(self.path(log)).expect("a writable folder");
        self.command(args).stdout(Stdio::null()).stderr(log).spawn().expect("the binary starts")
    }

    /// Journal keys of the prompts that a run has given to its engine, from its log of the ledger.
    pub fn computed(&self, log: &str) -> Vec<String> {
        self.ledger(log).into_iter().map(|(key, _)| key).collect()
    }

    /// The same with the tokens of each. A line that is not whole yet is left out.
    pub fn ledger(&self, log: &str) -> Vec<(String, usize)> {
        let text = fs::read_to_string(self.path(log)).expect("the run has a log");
        let whole = text.rfind('\n').map_or("", |end| &text[..end]);
        let entry = |line: &str| {
            let (key, tokens) = line.split("key=").nth(1)?.split_once(" tokens=")?;
            Some((key.to_owned(), tokens.trim().parse().ok()?))
        };
        whole.lines().filter_map(entry).collect()
    }

    /// Rows of a JSONL output, in order; none if there is no such file.
    pub fn jsonl(&self, name: &str) -> Vec<Value> {
        let text = fs::read_to_string(self.path(name)).unwrap_or_default();
        text.lines().map(|line| serde_json::from_str(line).expect("a line of JSON")).collect()
    }
}

/// What a server on this machine answers, head and body; `None` while there is none.
pub fn http_get(port: u16, path: &str) -> Option<String> {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).ok()?;
    write!(stream, "GET {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n").ok()?;
    let mut text = String::new();
    stream.read_to_string(&mut text).ok()?;
    Some(text)
}

/// A finished process.
pub struct Ran(pub Output);

impl Ran {
    pub fn stderr(&self) -> String {
        String::from_utf8_lossy(&self.0.stderr).into_owned()
    }

    pub fn stdout(&self) -> String {
        String::from_utf8_lossy(&self.0.stdout).into_owned()
    }

    #[track_caller]
    pub fn expect_code(self, code: i32) -> Self {
        assert_eq!(
            self.0.status.code(),
            Some(code),
            "stdout:\n{}\nstderr:\n{}",
            self.stdout(),
            self.stderr()
        );
        self
    }

    /// Every word must stand somewhere in the error output, line breaks of the report aside.
    #[track_caller]
    pub fn expect_words(self, words: &[&str]) -> Self {
        let stderr = self.stderr();
        let text = flat(&stderr);
        for word in words {
            assert!(text.contains(&flat(word)), "{word:?} is not in:\n{stderr}");
        }
        self
    }
}

/// Text without the frame and the line breaks that a report adds.
fn flat(text: &str) -> String {
    text.replace(['│', '×', '╰', '─', '·', '▶', '╭', '┬', '|'], " ")
        .split_whitespace()
        .collect::<Vec<_>>()
        .join(" ")
}

/// Writes a Parquet file.
pub fn write_parquet(path: &Path, rows: &RecordBatch, max_row_group_rows: usize) -> Result<()> {
    let properties =
        WriterProperties::builder().set_max_row_group_row_count(Some(max_row_group_rows)).build();
    let mut writer = ArrowWriter::try_new(File::create(path)?, rows.schema(), Some(properties))?;
    writer.write(rows)?;
    writer.close()?;
    Ok(())
}

/// All rows of a folder of part files, in the order of their names.
pub fn read_parts(folder: &Path) -> Result<Vec<RecordBatch>> {
    let mut parts: Vec<PathBuf> = fs::read_dir(folder)
        .with_context(|| format!("no folder {}", folder.display()))?
        .filter_map(|file| Some(file.ok()?.path()))
        .filter(|file| file.extension().is_some_and(|extension| extension == "parquet"))
        .filter(|file| !file.file_name().is_some_and(|name| name.to_string_lossy().starts_with(['.', '_'])))
        .collect();
    parts.sort();
    let mut batches = Vec::new();
    for part in parts {
        let reader = ParquetRecordBatchReaderBuilder::try_new(File::open(&part)?)?.build()?;
        for batch in reader {
            batches.push(batch?);
        }
    }
    ensure!(batches.iter().all(|batch| batch.num_columns() > 0), "a part without columns");
    Ok(batches)
}

/// The file of the default model.
pub fn default_model() -> PathBuf {
    model(tidemill::models::catalogue::CATALOGUE[0].name)
}

/// The file of a model of the catalogue; fetched by `make models`.
pub fn model(name: &str) -> PathBuf {
    let entry = tidemill::models::catalogue::CATALOGUE.iter().find(|entry| entry.name == name);
    let entry = entry.unwrap_or_else(|| panic!("no model {name:?} in the catalogue"));
    tidemill::models::pull::verified(entry).unwrap_or_else(|error| panic!("{error}; run: make models"))
}
