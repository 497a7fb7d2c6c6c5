//! A real broker for tests: Apache Kafka, started by the same script as for the demo, one for a test binary.
//!
//! It is killed with the value, and by a watch in the script if the test process is killed.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::OnceLock;
use std::time::Duration;

use tidemill_connectors::kafka::config::Cluster;
use tidemill_connectors::kafka::tools::{self, Record};

pub mod chaos;
pub mod proxy;
pub mod registry;
pub mod simulation;

/// A broker that this process has started.
pub struct Broker {
    folder: tempfile::TempDir,
    brokers: String,
    /// With TLS and a login, where it was asked for.
    secure: Option<String>,
    /// Ports on which a proxy should listen, and where it should lead to.
    pub proxies: Vec<(u16, u16)>,
}

impl Broker {
    /// Starts one; `num_proxies` are listeners that tell clients to come to a proxy's port.
    pub fn start(num_proxies: usize) -> Self {
        // It may be killed, which a container does not survive.
        Self::start_with(&["--jars", "--proxies", &num_proxies.to_string()])
    }

    /// Starts one that also listens with TLS and SCRAM.
    pub fn start_secure() -> Self {
        Self::start_with(&["--secure"])
    }

    fn start_with(args: &[&str]) -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let mut broker = Self { folder, brokers: String::new(), secure: None, proxies: Vec::new() };
        broker.run_start(args);
        broker
    }

    /// The one that all tests of a binary share.
    pub fn shared() -> &'static Self {
        static BROKER: OnceLock<Broker> = OnceLock::new();
        BROKER.get_or_init(|| Self::start_with(&[]))
    }

    fn run_start(&mut self, args: &[&str]) {
        let output = Command::new("sh")
            .arg(crate::workspace().join("scripts/kafka.sh"))
            .arg("start")
            .arg("--dir")
            .arg(self.folder.path())
            .args(["--parent", &std::process::id().to_string()])
            .args(args)
            // A broker that is here for other things must not be killed by tests.
            .env_remove("KAFKA_BROKERS")
            .stdin(Stdio::null())
            .output()
            .expect("sh runs");
        assert!(output.status.success(), "no broker: {}", String::from_utf8_lossy(&output.stderr));
        self.proxies.clear();
        for line in String::from_utf8_lossy(&output.stdout).lines() {
            let Some((name, value)) = line.split_once('=') else { continue };
            if name == "KAFKA_BROKERS" {
                value.clone_into(&mut self.brokers);
            } else if name == "SECURE" {
                self.secure = Some(value.to_owned());
            } else if name.starts_with("PROXY") {
                let (port, target) = value.split_once(':').expect("PORT:TARGET");
                self.proxies.push((port.parse().expect("a port"), target.parse().expect("a port")));
            }
        }
        assert!(!self.brokers.is_empty(), "the script names the broker");
    }

    fn pid(&self) -> String {
        let path: PathBuf = self.folder.path().join("pid");
        std::fs::read_to_string(path).expect("the script wrote it").trim().to_owned()
    }

    /// As the power goes.
    pub fn kill(&self) {
        let status = Command::new("kill").args(["-9", &self.pid()]).status().expect("kill runs");
        assert!(status.success());
    }

    /// After a kill: the same broker with the same data and ports.
    pub fn restart(&mut self) {
        // What it was started with first is kept in its folder.
        self.run_start(&[]);
    }

    pub fn address(&self) -> &str {
        &self.brokers
    }

    /// The listener with TLS, and the certificate to trust.
    pub fn secure(&self) -> (&str, PathBuf) {
        (self.secure.as_deref().expect("started with it"), self.folder.path().join("ca.pem"))
    }

    pub fn cluster(&self) -> Cluster {
        Cluster { brokers: self.brokers.clone(), options: BTreeMap::new() }
    }

    pub fn create_topic(&self, topic: &str, num_partitions: i32) {
        self.create_topic_with(topic, num_partitions, &[]);
    }

    pub fn create_topic_with(&self, topic: &str, num_partitions: i32, configuration: &[(&str, &str)]) {
        let made = tools::create_topic(&self.cluster(), topic, num_partitions, configuration);
        assert!(made.expect("the broker makes topics"), "topic {topic} is there already");
    }

    pub fn produce(&self, topic: &str, records: impl IntoIterator<Item = Record>) {
        tools::produce(&self.cluster(), topic, records).expect("the broker takes records");
    }

    /// All committed records, by partition and offset.
    pub fn read(&self, topic: &str) -> Vec<Record> {
        tools::read_all(&self.cluster(), topic).expect("the broker gives records")
    }

    pub fn has_open_transaction(&self, topic: &str) -> bool {
        tools::has_open_transaction(&self.cluster(), topic).expect("the broker knows the topic")
    }

    /// Waits for the last transactions: a producer is told of a commit before all partitions are.
    pub fn await_transactions(&self, topic: &str) {
        for _ in 0..200 {
            if !self.has_open_transaction(topic) {
                return;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        panic!("a transaction of topic {topic} stays open");
    }

    pub fn committed(&self, group: &str, topic: &str) -> BTreeMap<i32, i64> {
        tools::committed_offsets(&self.cluster(), group, topic).expect("the broker knows the group")
    }

    pub fn ends(&self, topic: &str) -> BTreeMap<i32, i64> {
        tools::end_offsets(&self.cluster(), topic).expect("the broker knows the topic")
    }
}

impl Drop for Broker {
    fn drop(&mut self) {
        let _ = match std::fs::read_to_string(self.folder.path().join("container")) {
            Ok(container) => Command::new("docker").args(["rm", "--force", container.trim()]).status(),
            Err(_) => Command::new("kill").args(["-9", &self.pid()]).status(),
        };
    }
}
