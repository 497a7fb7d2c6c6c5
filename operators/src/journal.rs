//! Remembers every answer before it goes downstream, so that a crash never pays for the same tokens twice.
//!
//! Keyed by content: the prompt's tokens, the model, the sampling parameters. What a key stands for never
//! changes, so an entry is written once and needs no order. A journal belongs to one output and is deleted
//! with its last commit; positions and epochs are not kept here but in the sink's manifest.
//!
//! Answers that become durable together are one value of the store, under a number that grows: the keys are random,
//! and a store ordered by them would write a page for each. Where a key is found is kept in memory, which
//! [`rotate`](Journal::rotate) bounds, and is read from the values when the journal is opened.

use std::ops::Range;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ahash::AHashMap;
use redb::{Database, ReadableDatabase, ReadableTable, TableDefinition};
use serde::{Deserialize, Serialize};
use tidemill_kernels::step::SamplingParams;

use crate::document::Generated;

/// Part of every key. Raise it when the same inputs may give another answer.
const ENGINE_VERSION: u32 = 1;
/// Of the store's pages: what is written is seldom read.
const CACHE_BYTES: usize = 2 << 20;
const ANSWERS: TableDefinition<'static, u64, &[u8]> = TableDefinition::new("answer-batches");
/// What was written before the last rotation.
const OLDER: TableDefinition<'static, u64, &[u8]> = TableDefinition::new("older-answer-batches");

/// Names an answer by everything it depends on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct JournalKey(pub [u8; 32]);

#[derive(Debug, thiserror::Error)]
#[error("cannot {action} the journal {path}")]
pub struct JournalError {
    action: &'static str,
    path: String,
    #[source]
    source: Box<redb::Error>,
}

/// A durable map from keys to answers.
#[derive(Clone)]
pub struct Journal {
    database: Arc<Database>,
    index: Arc<Mutex<Index>>,
    path: Arc<str>,
}

/// Where answers are.
#[derive(Default)]
struct Index {
    answers: AHashMap<JournalKey, Place>,
    older: AHashMap<JournalKey, Place>,
    next_batch: u64,
}

/// Bytes of a value; small, since there are many.
#[derive(Clone, Copy)]
struct Place {
    batch: u64,
    start: u32,
    len: u32,
}

impl JournalKey {
    pub fn new(model_digest: &str, token_ids: &[u32], max_tokens: u32, sampling: &SamplingParams) -> Self {
        let mut hasher = blake3::Hasher::new();
        hasher.update(&ENGINE_VERSION.to_le_bytes());
        hasher.update(&(model_digest.len() as u64).to_le_bytes());
        hasher.update(model_digest.as_bytes());
        hasher.update(&max_tokens.to_le_bytes());
        hasher.update(&sampling.temperature.to_le_bytes());
        hasher.update(&sampling.top_p.to_le_bytes());
        hasher.update(&sampling.top_k.to_le_bytes());
        hasher.update(&sampling.seed.to_le_bytes());
        let neutral = SamplingParams::GREEDY;
        let later = [
            (sampling.min_p, neutral.min_p),
            (sampling.repetition_penalty, neutral.repetition_penalty),
            (sampling.presence_penalty, neutral.presence_penalty),
            (sampling.frequency_penalty, neutral.frequency_penalty),
        ];
        // What came later changes no key without it.
        let has_later = later.iter().any(|(value, neutral)| value != neutral);
        hasher.update(&[u8::from(sampling.ignore_eos) | u8::from(has_later) << 1]);
        for (value, _) in later.iter().filter(|_| has_later) {
            hasher.update(&value.to_le_bytes());
        }
        let mut bytes = [0; 4 * 64];
        for token_ids in token_ids.chunks(64) {
            for (to, token_id) in bytes.chunks_exact_mut(4).zip(token_ids) {
                to.copy_from_slice(&token_id.to_le_bytes());
            }
            hasher.update(&bytes[..4 * token_ids.len()]);
        }
        Self(*hasher.finalize().as_bytes())
    }
}

impl std::fmt::Display for JournalKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl Journal {
    /// Opens the journal at `path`, or makes an empty one.
    pub fn open(path: &Path) -> Result<Self, JournalError> {
        let name: Arc<str> = path.display().to_string().into();
        let fail = |source: redb::Error| failed("open", &name, source);
        let mut database = Database::builder();
        let database =
            database.set_cache_size(CACHE_BYTES).create(path).map_err(|error| fail(error.into()))?;
        // The tables must exist before the first look-up.
        let transaction = database.begin_write().map_err(|error| fail(error.into()))?;
        let mut index = Index::default();
        for (definition, is_older) in [(OLDER, true), (ANSWERS, false)] {
            let table = transaction.open_table(definition).map_err(|error| fail(error.into()))?;
            for entry in table.iter().map_err(|error| fail(error.into()))? {
                let (batch, answers) = entry.map_err(|error| fail(error.into()))?;
                index.add(batch.value(), answers.value(), is_older);
            }
        }
        transaction.commit().map_err(|error| fail(error.into()))?;
        Ok(Self { database: Arc::new(database), index: Arc::new(Mutex::new(index)), path: name })
    }

    /// The answer for each key, if it is known. An entry that cannot be read counts as unknown.
    pub fn get_all<'a>(
        &self,
        keys: impl IntoIterator<Item = &'a JournalKey>,
    ) -> Result<Vec<Option<Generated>>, JournalError> {
        let fail = |source: redb::Error| failed("read", &self.path, source);
        let index = self.index();
        let find = |key| index.answers.get(key).or_else(|| index.older.get(key)).copied();
        let places: Vec<_> = keys.into_iter().map(find).collect();
        drop(index);
        if places.iter().all(Option::is_none) {
            return Ok(places.iter().map(|_| None).collect());
        }
        let transaction = self.database.begin_read().map_err(|error| fail(error.into()))?;
        let mut tables = Vec::new();
        for table in [ANSWERS, OLDER] {
            tables.push(transaction.open_table(table).map_err(|error| fail(error.into()))?);
        }
        let read = |place: Option<Place>| {
            let Some(Place { batch, start, len }) = place else { return Ok(None) };
            for table in &tables {
                if let Some(answers) = table.get(batch).map_err(|error| fail(error.into()))? {
                    let answer = answers.value().get(start as usize..start as usize + len as usize);
                    return Ok(answer.and_then(|answer| serde_json::from_slice(answer).ok()));
                }
            }
            // A rotation came in between.
            Ok(None)
        };
        places.into_iter().map(read).collect()
    }

    /// Forgets what was written before the last rotation; called when all that is committed.
    pub fn rotate(&self) -> Result<(), JournalError> {
        let fail = |source: redb::Error| failed("rotate", &self.path, source);
        let transaction = self.database.begin_write().map_err(|error| fail(error.into()))?;
        transaction.delete_table(OLDER).map_err(|error| fail(error.into()))?;
        transaction.rename_table(ANSWERS, OLDER).map_err(|error| fail(error.into()))?;
        transaction.open_table(ANSWERS).map_err(|error| fail(error.into()))?;
        transaction.commit().map_err(|error| fail(error.into()))?;
        let mut index = self.index();
        index.older = std::mem::take(&mut index.answers);
        Ok(())
    }

    /// Makes the answers durable, in one transaction.
    pub fn put(&self, answers: &[(JournalKey, &Generated)]) -> Result<(), JournalError> {
        let fail = |source: redb::Error| failed("write", &self.path, source);
        let bytes = encode(answers);
        let transaction = self.database.begin_write().map_err(|error| fail(error.into()))?;
        // Numbers are given in the order of the transactions.
        let batch = self.index().next_batch;
        {
            let mut table = transaction.open_table(ANSWERS).map_err(|error| fail(error.into()))?;
            table.insert(batch, bytes.as_slice()).map_err(|error| fail(error.into()))?;
        }
        // Found only once it is durable, but numbered before the next transaction begins.
        self.index().next_batch = batch + 1;
        transaction.commit().map_err(|error| fail(error.into()))?;
        self.index().add(batch, &bytes, false);
        Ok(())
    }

    /// Of all answers.
    pub fn keys(&self) -> Vec<JournalKey> {
        let index = self.index();
        index.older.keys().chain(index.answers.keys()).copied().collect()
    }

    /// Number of answers since the last rotation.
    pub fn len(&self) -> usize {
        self.index().answers.len()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn index(&self) -> MutexGuard<'_, Index> {
        self.index.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Index {
    fn add(&mut self, batch: u64, bytes: &[u8], is_older: bool) {
        let answers = if is_older { &mut self.older } else { &mut self.answers };
        let mut at = 0;
        while let Some((key, range)) = entry(bytes, at) {
            at = range.end;
            // A value is shorter than 4 GiB, so is what is in it.
            let Ok(start) = u32::try_from(range.start) else { break };
            answers.insert(key, Place { batch, start, len: range.len() as u32 });
        }
        self.next_batch = self.next_batch.max(batch + 1);
    }
}

/// For each answer its key, the length of the rest as `u32`, and the answer as JSON.
fn encode(answers: &[(JournalKey, &Generated)]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (key, answer) in answers {
        bytes.extend_from_slice(&key.0);
        let start = bytes.len();
        bytes.extend_from_slice(&[0; 4]);
        serde_json::to_writer(&mut bytes, answer).expect("memory takes plain data");
        let len = u32::try_from(bytes.len() - start - 4).expect("an answer is no gigabytes");
        bytes[start..start + 4].copy_from_slice(&len.to_le_bytes());
    }
    bytes
}

/// The key of the answer that begins at `at`, and where its JSON is. `None` at the end, or if the rest is damaged.
fn entry(bytes: &[u8], at: usize) -> Option<(JournalKey, Range<usize>)> {
    let (key, rest) = bytes.get(at..)?.split_first_chunk::<32>()?;
    let (len, rest) = rest.split_first_chunk::<4>()?;
    let len = u32::from_le_bytes(*len) as usize;
    let start = bytes.len() - rest.len();
    (len <= rest.len()).then(|| (JournalKey(*key), start..start + len))
}

fn failed(action: &'static str, path: &str, source: redb::Error) -> JournalError {
    JournalError { action, path: path.to_owned(), source: Box::new(source) }
}

#[cfg(test)]
mod tests;
