//! A real schema registry for tests: Apicurio, started by the same script that users have.

use std::process::{Command, Stdio};
use std::sync::OnceLock;

use serde_json::{Value, json};

/// A registry that this process has started; it ends with it.
pub struct Registry {
    _folder: tempfile::TempDir,
    url: String,
}

impl Registry {
    /// The one that all tests of a binary share.
    pub fn shared() -> &'static Self {
        static REGISTRY: OnceLock<Registry> = OnceLock::new();
        REGISTRY.get_or_init(Self::start)
    }

    fn start() -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let output = Command::new("sh")
            .arg(crate::workspace().join("scripts/registry.sh"))
            .arg("start")
            .arg("--dir")
            .arg(folder.path())
            .args(["--parent", &std::process::id().to_string()])
            .stdin(Stdio::null())
            .output()
            .expect("sh runs");
        assert!(output.status.success(), "no registry: {}", String::from_utf8_lossy(&output.stderr));
        let text = String::from_utf8_lossy(&output.stdout);
        let url = text.lines().find_map(|line| line.strip_prefix("SCHEMA_REGISTRY_URL="));
        Self { _folder: folder, url: url.expect("the script names the registry").to_owned() }
    }

    pub fn url(&self) -> &str {
        &self.url
    }

    /// Port it listens on.
    pub fn port(&self) -> u16 {
        let rest = self.url.strip_prefix("http://127.0.0.1:").expect("it is on loopback");
        rest.split('/').next().and_then(|port| port.parse().ok()).expect("a port")
    }

    /// Registers a schema; `references` are names with the subjects of schemas that are registered, in their first
    /// version. Returns its id.
    pub fn register(&self, subject: &str, kind: &str, schema: &str, references: &[(&str, &str)]) -> u32 {
        let references: Vec<Value> = references
            .iter()
            .map(|(name, subject)| json!({"name": name, "subject": subject, "version": 1}))
            .collect();
        let body = json!({"schema": schema, "schemaType": kind, "references": references});
        let mut response = ureq::post(format!("{}/subjects/{subject}/versions", self.url))
            .header("content-type", "application/vnd.schemaregistry.v1+json")
            .send(body.to_string())
            .expect("the registry takes it");
        let answer = response.body_mut().read_to_string().expect("the registry answers");
        let answer: Value = serde_json::from_str(&answer).expect("JSON");
        answer["id"].as_u64().expect("an id") as u32
    }
}
