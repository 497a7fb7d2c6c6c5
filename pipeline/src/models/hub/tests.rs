use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};

use serde_json::json;

use super::*;

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
const NEXT_COMMIT: &str = "89abcdef0123456789abcdef0123456789abcdef";

/// A hub with one repository, `org/model`.
struct FakeHub {
    endpoint: String,
    state: Arc<Mutex<State>>,
}

struct State {
    commit: &'static str,
    files: BTreeMap<&'static str, Vec<u8>>,
    /// What the hub says the weights' SHA-256 is, if not the truth.
    sha256: Option<String>,
    has_sha256: bool,
    token: Option<&'static str>,
    requests: Vec<String>,
}

impl FakeHub {
    fn start(files: &[(&'static str, &str)]) -> Self {
        let files = files.iter().map(|(name, text)| (*name, text.as_bytes().to_vec())).collect();
        let state = State {
            commit: COMMIT,
            files,
            sha256: None,
            has_sha256: true,
            token: None,
            requests: Vec::new(),
        };
        let state = Arc::new(Mutex::new(state));
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let endpoint = format!("http://{}/", listener.local_addr().unwrap());
        let shared = Arc::clone(&state);
        // Ends with the test's process.
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                answer(stream.unwrap(), &mut shared.lock().unwrap());
            }
        });
        Self { endpoint, state }
    }

    fn hub(&self, cache: &Path, token: Option<&str>) -> Hub {
        Hub::new(&self.endpoint, token.map(str::to_owned), cache.to_owned(), false)
    }

    fn num_requests(&self) -> usize {
        self.state.lock().unwrap().requests.len()
    }
}

/// One request a connection. As on the hub, every file is answered by a redirect: weights from another host, which must
/// not see the token, the rest from another path, which asks for it again.
fn answer(stream: TcpStream, state: &mut State) {
    let mut lines = BufReader::new(stream.try_clone().unwrap()).lines().map(Result::unwrap);
    let path = lines.next().unwrap().split(' ').nth(1).unwrap().to_owned();
    let headers: Vec<String> = lines.take_while(|line| !line.is_empty()).collect();
    let wanted = state.token.map(|token| format!("authorization: Bearer {token}"));
    let has_header = |wanted: &str| headers.iter().any(|header| header.eq_ignore_ascii_case(wanted));
    let has_token = headers.iter().any(|header| header.to_ascii_lowercase().starts_with("authorization"));
    let is_allowed = match path.starts_with("/blobs/") {
        true => !has_token,
        false => wanted.is_none_or(|wanted| has_header(&wanted)),
    };
    state.requests.push(path.clone());
    let commit = state.commit;
    let file = path.strip_prefix(&format!("/org/model/resolve/{commit}/"));
    let (status, location, body) = if !is_allowed {
        ("401 Unauthorized", None, Vec::new())
    } else if path == "/api/models/org/model/revision/main?blobs=true" {
        ("200 OK", None, info(state).to_string().into_bytes())
    } else if let Some(file) = file.filter(|file| file.ends_with(".safetensors")) {
        let port = stream.local_addr().unwrap().port();
        ("302 Found", Some(format!("http://localhost:{port}/blobs/{file}")), b"moved".to_vec())
    } else if let Some(file) = file {
        ("307 Temporary Redirect", Some(format!("/api/resolve-cache/{file}")), b"moved".to_vec())
    } else if let Some(body) = path
        .strip_prefix("/blobs/")
        .or(path.strip_prefix("/api/resolve-cache/"))
        .and_then(|file| state.files.get(file))
    {
        ("200 OK", None, body.clone())
    } else {
        ("404 Not Found", None, Vec::new())
    };
    let location = location.map(|to| format!("Location: {to}\r\n")).unwrap_or_default();
    let head =
        format!("HTTP/1.1 {status}\r\nContent-Length: {}\r\n{location}Connection: close\r\n\r\n", body.len());
    (&stream).write_all(&[head.as_bytes(), &body].concat()).unwrap();
}

fn info(state: &State) -> serde_json::Value {
    let siblings = state.files.iter().map(|(name, bytes)| {
        let sha256 = state.sha256.clone().unwrap_or_else(|| hex(&Sha256::digest(bytes)));
        match name.ends_with(".safetensors") && state.has_sha256 {
            true => json!({ "rfilename": name, "size": bytes.len(), "lfs": { "sha256": sha256 } }),
            false => json!({ "rfilename": name, "size": bytes.len() }),
        }
    });
    json!({ "sha": state.commit, "siblings": siblings.collect::<Vec<_>>(), "tags": ["license:apache-2.0"] })
}

const FILES: [(&str, &str); 4] = [
    ("config.json", "{}"),
    ("tokenizer.json", "{}"),
    ("model.safetensors", "weights"),
    ("README.md", "read"),
];

fn name() -> HubName {
    HubName::parse("org/model").unwrap()
}

#[test]
fn a_model_is_fetched_once_and_its_revision_pinned() {
    let (server, cache) = (FakeHub::start(&FILES), tempfile::tempdir().unwrap());
    let hub = server.hub(cache.path(), None);
    assert_eq!(hub.find(&name()), None);
    let said = Mutex::new(Vec::new());
    let snapshot = hub.pull(&name(), false, &|what| said.lock().unwrap().push(what.to_owned())).unwrap();
    assert_eq!(snapshot.commit, COMMIT);
    assert_eq!(fs::read(snapshot.folder.join("model.safetensors")).unwrap(), b"weights");
    assert!(!snapshot.folder.join("README.md").exists(), "only what makes the model is fetched");
    assert!(said.lock().unwrap()[0].contains("its license: apache-2.0"));
    assert_eq!(hub.snapshots(), [(name(), snapshot.clone())]);
    // The branch moves on; the model stays what it was, without a question to the hub.
    server.state.lock().unwrap().commit = NEXT_COMMIT;
    let num_requests = server.num_requests();
    assert_eq!(hub.pull(&name(), false, &|_| {}).unwrap(), snapshot);
    assert_eq!(server.num_requests(), num_requests);
    assert_eq!(hub.pull(&name(), true, &|_| {}).unwrap().commit, NEXT_COMMIT);
    assert_eq!(hub.find(&name()).unwrap().commit, NEXT_COMMIT);
    let pinned = HubName::parse(&format!("org/model@{COMMIT}")).unwrap();
    assert_eq!(hub.find(&pinned), Some(snapshot));
}

#[test]
fn an_interrupted_fetch_is_continued() {
    let (server, cache) = (FakeHub::start(&FILES), tempfile::tempdir().unwrap());
    let hub = server.hub(cache.path(), None);
    server.state.lock().unwrap().sha256 = Some("0".repeat(64));
    let error = hub.pull(&name(), false, &|_| {}).unwrap_err();
    assert!(matches!(&error, HubError::Corrupt { file, .. } if file == "model.safetensors"), "{error}");
    assert_eq!(hub.find(&name()), None);
    server.state.lock().unwrap().sha256 = None;
    server.state.lock().unwrap().requests.clear();
    let snapshot = hub.pull(&name(), false, &|_| {}).unwrap();
    let asked = server.state.lock().unwrap().requests.clone();
    assert!(!asked.iter().any(|path| path.ends_with("config.json")), "{asked:?}");
    let mut files: Vec<_> =
        fs::read_dir(snapshot.folder).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    files.sort();
    assert_eq!(files, ["config.json", "model.safetensors", "tokenizer.json"]);
}

#[test]
fn shards_are_fetched_and_missing_ones_noticed() {
    let index = r#"{"weight_map":{"a":"model-1-of-2.safetensors","b":"model-2-of-2.safetensors"}}"#;
    let files = [
        ("config.json", "{}"),
        ("tokenizer.json", "{}"),
        ("model.safetensors.index.json", index),
        ("model-1-of-2.safetensors", "a"),
        ("consolidated.safetensors", "the same again"),
    ];
    let (server, cache) = (FakeHub::start(&files), tempfile::tempdir().unwrap());
    let hub = server.hub(cache.path(), None);
    let error = hub.pull(&name(), false, &|_| {}).unwrap_err();
    assert!(matches!(error, HubError::Lacks { what: "shards that its index names", .. }), "{error}");
    server.state.lock().unwrap().files.insert("model-2-of-2.safetensors", b"b".to_vec());
    let snapshot = hub.pull(&name(), false, &|_| {}).unwrap();
    assert!(snapshot.folder.join("model-2-of-2.safetensors").exists());
    assert!(!snapshot.folder.join("consolidated.safetensors").exists());
}

#[test]
fn tokens_are_sent_and_refusals_explained() {
    let (server, cache) = (FakeHub::start(&FILES), tempfile::tempdir().unwrap());
    server.state.lock().unwrap().token = Some("secret");
    let error = server.hub(cache.path(), None).pull(&name(), false, &|_| {}).unwrap_err();
    assert!(matches!(error, HubError::Refused { status: 401, .. }), "{error}");
    assert!(error.help().contains("HF_TOKEN"));
    // A token is sent on within the hub, and not to another host: each refuses the fetch otherwise.
    server.hub(cache.path(), Some("secret")).pull(&name(), false, &|_| {}).unwrap();
    let asked = server.state.lock().unwrap().requests.clone();
    assert!(asked.contains(&"/api/resolve-cache/config.json".to_owned()), "{asked:?}");
    assert!(asked.contains(&"/blobs/model.safetensors".to_owned()), "{asked:?}");
    server.state.lock().unwrap().token = None;
    let other = HubName::parse("org/other").unwrap();
    let error = server.hub(cache.path(), None).pull(&other, false, &|_| {}).unwrap_err();
    assert!(matches!(error, HubError::Refused { status: 404, .. }), "{error}");
}

#[test]
fn what_cannot_be_fetched_says_so() {
    let cache = tempfile::tempdir().unwrap();
    let offline = Hub::new("http://127.0.0.1:1", None, cache.path().to_owned(), true);
    assert!(matches!(offline.pull(&name(), false, &|_| {}), Err(HubError::Offline { .. })));
    let unreachable = Hub::new("http://127.0.0.1:1/", None, cache.path().to_owned(), false);
    let error = unreachable.pull(&name(), false, &|_| {}).unwrap_err();
    assert_eq!(error.to_string(), "cannot reach the hub at http://127.0.0.1:1");
    assert!(error.help().contains("HF_ENDPOINT"));
    let server = FakeHub::start(&FILES);
    server.state.lock().unwrap().has_sha256 = false;
    let error = server.hub(cache.path(), None).pull(&name(), false, &|_| {}).unwrap_err();
    assert!(error.to_string().ends_with(r#"it has no SHA-256 of "model.safetensors""#), "{error}");
    assert_eq!(server.num_requests(), 1, "nothing is fetched that cannot be verified");
    let server = FakeHub::start(&FILES[..2]);
    let error = server.hub(cache.path(), None).pull(&name(), false, &|_| {}).unwrap_err();
    assert_eq!(error.to_string(), "model org/model of the hub has no model.safetensors");
}

#[test]
fn names_cannot_leave_the_cache() {
    for text in
        ["org", "a/b/c", "../b", "a/..", "a/b@../c", "a/b@", "/b", "a/", "a b/c", "-a/b", "a/b@c/d", "./b"]
    {
        assert_eq!(HubName::parse(text), None, "{text}");
    }
    let name = HubName::parse("Qwen/Qwen2.5-0.5B@v1").unwrap();
    assert_eq!((name.to_string().as_str(), name.revision.as_str()), ("Qwen/Qwen2.5-0.5B@v1", "v1"));
}
