//! Models of the Hugging Face hub, by name: `org/name`, or `org/name@revision`.
//!
//! The cache is the hub's own (`HF_HOME`), in its layout, so models that other tools fetched are found. Invariant: a
//! revision means the commit it meant when it was fetched, until it is fetched again by force; a file appears under its
//! name only when it is whole, and weights only when their SHA-256 was seen to be right.
//! Absent: data sets, uploads, and repositories without safetensors.

#[cfg(test)]
mod tests;

use std::fmt;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;
use sha2::{Digest, Sha256};
use ureq::config::RedirectAuthHeaders;

use super::digest::hex;
use super::folder::{CONFIG_FILE, TOKENIZER_FILE, WEIGHTS_FILE, is_complete, model_files};
use super::pull::copy_hashed;

const ENDPOINT: &str = "https://huggingface.co";
const DEFAULT_REVISION: &str = "main";
/// What the hub says about a repository; some list thousands of files.
const MAX_ANSWER_BYTES: u64 = 32 << 20;
/// A single file of the hub is at most 500 GB.
const MAX_FILE_BYTES: u64 = 500_000_000_000;
const MAX_NAME_LEN: usize = 96;
const CONNECT_TIMEOUT: Duration = Duration::from_secs(20);
/// For the answer to begin, and for each further piece of it.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(60);

#[derive(Debug, thiserror::Error)]
pub enum HubError {
    #[error("no folder for models of the hub: neither HF_HOME, XDG_CACHE_HOME nor HOME is set")]
    NoCache,
    #[error("model {name} is not here, and HF_HUB_OFFLINE forbids to fetch it")]
    Offline { name: String },
    #[error("cannot reach the hub at {endpoint}")]
    Unreachable {
        endpoint: String,
        #[source]
        source: Box<ureq::Error>,
    },
    #[error("the hub at {endpoint} refuses model {name}: HTTP status {status}")]
    Refused { endpoint: String, name: String, status: u16 },
    #[error("the answer of the hub at {endpoint} is not readable: {what}")]
    Answer { endpoint: String, what: String },
    #[error("model {name} of the hub has no {what}")]
    Lacks { name: String, what: &'static str },
    #[error("file {file:?} of model {name} came with {what}")]
    Corrupt { name: String, file: String, what: String },
    #[error("cannot {action} {path}")]
    Io {
        action: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
}

impl HubError {
    /// What the user can do.
    pub fn help(&self) -> String {
        match self {
            Self::NoCache => "set HF_HOME to a folder".to_owned(),
            Self::Offline { .. } => "unset HF_HUB_OFFLINE, or fetch the model on another machine".to_owned(),
            Self::Unreachable { .. } => {
                "check the network; HF_ENDPOINT names a mirror; or copy the model's folder here and give its path".to_owned()
            }
            Self::Refused { status: 401 | 403, .. } => {
                "accept the model's license on its page, and set HF_TOKEN to a token that may read it".to_owned()
            }
            Self::Refused { .. } => "check the model's name and revision; a private one needs HF_TOKEN".to_owned(),
            Self::Answer { .. } => "check HF_ENDPOINT and the proxy".to_owned(),
            Self::Lacks { .. } => {
                "take a model with config.json, tokenizer.json and safetensors, or a GGUF file".to_owned()
            }
            Self::Corrupt { .. } => "fetch it again".to_owned(),
            Self::Io { .. } => "check the folder's permissions and free space".to_owned(),
        }
    }
}

/// Which model, and which revision of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HubName {
    pub org: String,
    pub name: String,
    /// A branch, a tag or a commit.
    pub revision: String,
}

/// A model in the cache.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    pub folder: PathBuf,
    /// The commit that the revision stands for.
    pub commit: String,
}

/// A hub and its cache on this machine.
#[derive(Debug)]
pub struct Hub {
    endpoint: String,
    token: Option<String>,
    cache: PathBuf,
    is_offline: bool,
}

/// What the hub says about a repository, as far as it is needed.
#[derive(Deserialize)]
struct Info {
    sha: String,
    siblings: Vec<Sibling>,
    #[serde(default)]
    tags: Vec<String>,
}

#[derive(Deserialize)]
struct Sibling {
    rfilename: String,
    size: Option<u64>,
    lfs: Option<Lfs>,
}

#[derive(Deserialize)]
struct Lfs {
    sha256: String,
}

impl HubName {
    /// None if this cannot be a name of the hub.
    pub fn parse(text: &str) -> Option<Self> {
        let (repository, revision) = text.split_once('@').unwrap_or((text, DEFAULT_REVISION));
        let (org, name) = repository.split_once('/')?;
        let is_word = |word: &str| {
            let is_fine = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
            let starts_fine = word.starts_with(|c: char| c.is_ascii_alphanumeric());
            starts_fine && word.len() <= MAX_NAME_LEN && word.chars().all(is_fine) && !word.contains("..")
        };
        let owned = str::to_owned;
        [org, name, revision].into_iter().all(is_word).then(|| Self {
            org: owned(org),
            name: owned(name),
            revision: owned(revision),
        })
    }

    /// Without the revision.
    fn repository(&self) -> String {
        format!("{}/{}", self.org, self.name)
    }
}

impl fmt::Display for HubName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.org, self.name)?;
        if self.revision != DEFAULT_REVISION { write!(f, "@{}", self.revision) } else { Ok(()) }
    }
}

impl Hub {
    pub fn new(endpoint: &str, token: Option<String>, cache: PathBuf, is_offline: bool) -> Self {
        Self { endpoint: endpoint.trim_end_matches('/').to_owned(), token, cache, is_offline }
    }

    /// As `HF_ENDPOINT`, `HF_TOKEN`, `HF_HOME`, `HF_HUB_CACHE` and `HF_HUB_OFFLINE` say.
    pub fn from_env() -> Result<Self, HubError> {
        let var = |name| std::env::var_os(name).filter(|value| !value.is_empty());
        let text = |name| var(name).and_then(|value| value.into_string().ok());
        let home = var("HF_HOME")
            .map(PathBuf::from)
            .or_else(|| var("XDG_CACHE_HOME").map(|folder| PathBuf::from(folder).join("huggingface")))
            .or_else(|| var("HOME").map(|folder| PathBuf::from(folder).join(".cache/huggingface")))
            .ok_or(HubError::NoCache)?;
        let saved_token = || fs::read_to_string(home.join("token")).ok();
        let token = text("HF_TOKEN").or_else(saved_token).map(|token| token.trim().to_owned());
        let cache = var("HF_HUB_CACHE").map_or_else(|| home.join("hub"), PathBuf::from);
        let is_offline = text("HF_HUB_OFFLINE").is_some_and(|value| value != "0");
        let endpoint = text("HF_ENDPOINT").unwrap_or_else(|| ENDPOINT.to_owned());
        Ok(Self::new(&endpoint, token.filter(|token| !token.is_empty()), cache, is_offline))
    }

    /// The model as it was fetched, if it is here whole.
    pub fn find(&self, name: &HubName) -> Option<Snapshot> {
        let folder = self.folder(name);
        let commit = match is_commit(&name.revision) {
            true => name.revision.clone(),
            false => fs::read_to_string(folder.join("refs").join(&name.revision)).ok()?.trim().to_owned(),
        };
        let folder = folder.join("snapshots").join(&commit);
        (is_commit(&commit) && is_complete(&folder)).then_some(Snapshot { folder, commit })
    }

    /// Fetches a model unless it is here; with `force`, what its revision stands for now. `say` is told what takes time.
    pub fn pull(&self, name: &HubName, force: bool, say: &dyn Fn(&str)) -> Result<Snapshot, HubError> {
        if !force && let Some(found) = self.find(name) {
            return Ok(found);
        }
        if self.is_offline {
            return Err(HubError::Offline { name: name.to_string() });
        }
        let agent = agent();
        let info = self.info(&agent, name)?;
        let files = model_files(info.siblings.iter().map(|sibling| sibling.rfilename.as_str()));
        let has_weights = files.iter().any(|file| file.ends_with(".safetensors"));
        for (has, what) in [
            (files.contains(&CONFIG_FILE), CONFIG_FILE),
            (files.contains(&TOKENIZER_FILE), TOKENIZER_FILE),
            (has_weights, WEIGHTS_FILE),
        ] {
            if !has {
                return Err(HubError::Lacks { name: name.to_string(), what });
            }
        }
        let license = info.tags.iter().find_map(|tag| tag.strip_prefix("license:")).unwrap_or("not named");
        say(&format!("{name} is at commit {}, its license: {license}", info.sha));
        let folder = self.folder(name).join("snapshots").join(&info.sha);
        fs::create_dir_all(&folder).map_err(io_error("create", &folder))?;
        let wanted: Vec<&Sibling> =
            info.siblings.iter().filter(|sibling| files.contains(&sibling.rfilename.as_str())).collect();
        let is_unverifiable =
            |file: &&&Sibling| file.lfs.is_none() && file.rfilename.ends_with(".safetensors");
        if let Some(file) = wanted.iter().find(is_unverifiable) {
            let what = format!("it has no SHA-256 of {:?}", file.rfilename);
            return Err(HubError::Answer { endpoint: self.endpoint.clone(), what });
        }
        for (number, file) in (1..).zip(&wanted) {
            if force || !folder.join(&file.rfilename).is_file() {
                let megabytes = file.size.unwrap_or(0).div_ceil(1_000_000);
                let of = wanted.len();
                say(&format!("fetching {name}, file {number} of {of}: {} ({megabytes} MB)", file.rfilename));
                self.fetch(&agent, name, &info.sha, file, &folder)?;
            }
        }
        if !is_commit(&name.revision) {
            self.record(name, &info.sha)?;
        }
        match is_complete(&folder) {
            true => Ok(Snapshot { folder, commit: info.sha }),
            false => Err(HubError::Lacks { name: name.to_string(), what: "shards that its index names" }),
        }
    }

    /// Every model that is here whole.
    pub fn snapshots(&self) -> Vec<(HubName, Snapshot)> {
        let entries = |folder: &Path| -> Vec<String> {
            let entries = fs::read_dir(folder).into_iter().flatten();
            entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok()).collect()
        };
        let mut found = Vec::new();
        for entry in entries(&self.cache) {
            let Some((org, name)) = entry.strip_prefix("models--").and_then(|name| name.split_once("--"))
            else {
                continue;
            };
            for revision in entries(&self.cache.join(&entry).join("refs")) {
                let name = HubName::parse(&format!("{org}/{name}@{revision}"));
                found.extend(name.and_then(|name| Some((name.clone(), self.find(&name)?))));
            }
        }
        found.sort_by_key(|(name, _)| name.to_string());
        found
    }

    fn folder(&self, name: &HubName) -> PathBuf {
        self.cache.join(format!("models--{}--{}", name.org, name.name))
    }

    fn info(&self, agent: &ureq::Agent, name: &HubName) -> Result<Info, HubError> {
        let path = format!("api/models/{}/revision/{}?blobs=true", name.repository(), name.revision);
        let mut answer = self.get(agent, name, &path)?;
        let text = answer.body_mut().with_config().limit(MAX_ANSWER_BYTES).read_to_vec();
        let text = text.map_err(|error| self.unreachable(error))?;
        let unreadable = |what| HubError::Answer { endpoint: self.endpoint.clone(), what };
        let info: Info = serde_json::from_slice(&text).map_err(|error| unreadable(error.to_string()))?;
        match is_commit(&info.sha) {
            true => Ok(info),
            false => Err(unreadable(format!("{:?} is not a commit", info.sha))),
        }
    }

    fn fetch(
        &self,
        agent: &ureq::Agent,
        name: &HubName,
        commit: &str,
        file: &Sibling,
        folder: &Path,
    ) -> Result<(), HubError> {
        let path = format!("{}/resolve/{commit}/{}", name.repository(), file.rfilename);
        let answer = self.get(agent, name, &path)?;
        let partial = folder.join(format!(".{}.{}", file.rfilename, std::process::id()));
        let written = write_verified(answer, name, file, &partial);
        if written.is_err() {
            // What there is of it is of no use.
            let _ = fs::remove_file(&partial);
        }
        written?;
        let path = folder.join(&file.rfilename);
        fs::rename(&partial, &path).map_err(io_error("write", &path))
    }

    /// Remembers what a revision stands for.
    fn record(&self, name: &HubName, commit: &str) -> Result<(), HubError> {
        let folder = self.folder(name).join("refs");
        let (path, partial) = (folder.join(&name.revision), folder.join(format!(".{}", std::process::id())));
        fs::create_dir_all(&folder)
            .and_then(|()| fs::write(&partial, commit))
            .and_then(|()| fs::rename(&partial, &path))
            .map_err(io_error("write", &path))
    }

    fn get(
        &self,
        agent: &ureq::Agent,
        name: &HubName,
        path: &str,
    ) -> Result<ureq::http::Response<ureq::Body>, HubError> {
        let mut request = agent.get(format!("{}/{path}", self.endpoint));
        if let Some(token) = &self.token {
            request = request.header("Authorization", format!("Bearer {token}"));
        }
        request.call().map_err(|error| match error {
            ureq::Error::StatusCode(status) => {
                HubError::Refused { endpoint: self.endpoint.clone(), name: name.to_string(), status }
            }
            error => self.unreachable(error),
        })
    }

    fn unreachable(&self, error: ureq::Error) -> HubError {
        HubError::Unreachable { endpoint: self.endpoint.clone(), source: Box::new(error) }
    }
}

fn agent() -> ureq::Agent {
    let config = ureq::Agent::config_builder()
        // The hub answers for small files from another path of its own, which asks for the token again.
        .redirect_auth_headers(RedirectAuthHeaders::SameHost)
        .timeout_connect(Some(CONNECT_TIMEOUT))
        .timeout_recv_response(Some(ANSWER_TIMEOUT))
        .timeout_per_read(Some(ANSWER_TIMEOUT))
        .user_agent(concat!("tidemill/", env!("CARGO_PKG_VERSION")));
    config.build().into()
}

fn write_verified(
    answer: ureq::http::Response<ureq::Body>,
    name: &HubName,
    file: &Sibling,
    partial: &Path,
) -> Result<(), HubError> {
    let mut to = File::create(partial).map_err(io_error("create", partial))?;
    let mut hasher = Sha256::new();
    let limit = file.size.unwrap_or(MAX_FILE_BYTES);
    // One byte more than there should be shows that there are too many.
    let body = io::Read::take(answer.into_body().into_reader(), limit.saturating_add(1));
    let bytes = copy_hashed(body, &mut to, &mut [&mut hasher]).map_err(io_error("fetch to", partial))?;
    to.sync_all().map_err(io_error("write", partial))?;
    let corrupt = |what| HubError::Corrupt { name: name.to_string(), file: file.rfilename.clone(), what };
    if let Some(size) = file.size.filter(|&size| size != bytes) {
        return Err(corrupt(format!("{bytes} bytes or more, not {size}")));
    }
    let found = hex(&hasher.finalize());
    match &file.lfs {
        Some(lfs) if lfs.sha256 != found => Err(corrupt(format!("the SHA-256 {found}, not {}", lfs.sha256))),
        _ => Ok(()),
    }
}

fn is_commit(text: &str) -> bool {
    text.len() == 40 && text.bytes().all(|byte| byte.is_ascii_hexdigit())
}

fn io_error(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> HubError {
    let path = path.to_owned();
    move |source| HubError::Io { action, path, source }
}
