//! Remembers every answer before it goes downstream, so that a crash never pays for the same tokens twice.
//!
//! Keyed by content: the prompt's tokens, the model, the sampling parameters. What a key stands for never
//! changes, so an entry is written once and needs no order. A journal belongs to one output and is deleted
//! with its last commit; positions and epochs are not kept here but in the sink's manifest.

use std::path::Path;
use std::sync::Arc;

use redb::{Database, ReadableDatabase, ReadableTableMetadata, TableDefinition};
use serde::{Deserialize, Serialize};
use tidemill_kernels::step::SamplingParams;

use crate::document::Generated;

/// Part of every key. Raise it when the same inputs may give another answer.
const ENGINE_VERSION: u32 = 1;
const ANSWERS: TableDefinition<'static, [u8; 32], &[u8]> = TableDefinition::new("answers");
/// What was written before the last rotation.
const OLDER: TableDefinition<'static, [u8; 32], &[u8]> = TableDefinition::new("older-answers");

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
    path: Arc<str>,
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
        hasher.update(&[u8::from(sampling.ignore_eos)]);
        for token_id in token_ids {
            hasher.update(&token_id.to_le_bytes());
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
        let database = Database::create(path).map_err(|error| fail(error.into()))?;
        // The table must exist before the first look-up.
        let transaction = database.begin_write().map_err(|error| fail(error.into()))?;
        transaction.open_table(ANSWERS).map_err(|error| fail(error.into()))?;
        transaction.open_table(OLDER).map_err(|error| fail(error.into()))?;
        transaction.commit().map_err(|error| fail(error.into()))?;
        Ok(Self { database: Arc::new(database), path: name })
    }

    /// The answer for each key, if it is known. An entry that cannot be read counts as unknown.
    pub fn get_all<'a>(
        &self,
        keys: impl IntoIterator<Item = &'a JournalKey>,
    ) -> Result<Vec<Option<Generated>>, JournalError> {
        let fail = |source: redb::Error| failed("read", &self.path, source);
        let transaction = self.database.begin_read().map_err(|error| fail(error.into()))?;
        let mut tables = Vec::new();
        for table in [ANSWERS, OLDER] {
            let table = transaction.open_table(table).map_err(|error| fail(error.into()))?;
            if !table.is_empty().map_err(|error| fail(error.into()))? {
                tables.push(table);
            }
        }
        let find = |key: &JournalKey| {
            for table in &tables {
                let entry = table.get(&key.0).map_err(|error| fail(error.into()))?;
                if let Some(generated) = entry.and_then(|entry| serde_json::from_slice(entry.value()).ok()) {
                    return Ok(Some(generated));
                }
            }
            Ok(None)
        };
        keys.into_iter().map(find).collect()
    }

    /// Forgets what was written before the last rotation. An endless run calls it when all that is committed.
    pub fn rotate(&self) -> Result<(), JournalError> {
        let fail = |source: redb::Error| failed("rotate", &self.path, source);
        let transaction = self.database.begin_write().map_err(|error| fail(error.into()))?;
        transaction.delete_table(OLDER).map_err(|error| fail(error.into()))?;
        transaction.rename_table(ANSWERS, OLDER).map_err(|error| fail(error.into()))?;
        transaction.open_table(ANSWERS).map_err(|error| fail(error.into()))?;
        transaction.commit().map_err(|error| fail(error.into()))
    }

    /// Makes the answers durable, in one transaction.
    pub fn put(&self, answers: &[(JournalKey, &Generated)]) -> Result<(), JournalError> {
        let fail = |source: redb::Error| failed("write", &self.path, source);
        let transaction = self.database.begin_write().map_err(|error| fail(error.into()))?;
        {
            let mut table = transaction.open_table(ANSWERS).map_err(|error| fail(error.into()))?;
            for (key, answer) in answers {
                let bytes = serde_json::to_vec(answer).expect("plain data");
                table.insert(&key.0, bytes.as_slice()).map_err(|error| fail(error.into()))?;
            }
        }
        transaction.commit().map_err(|error| fail(error.into()))
    }

    /// Number of answers since the last rotation.
    pub fn len(&self) -> Result<u64, JournalError> {
        let fail = |source: redb::Error| failed("read", &self.path, source);
        let transaction = self.database.begin_read().map_err(|error| fail(error.into()))?;
        let table = transaction.open_table(ANSWERS).map_err(|error| fail(error.into()))?;
        table.len().map_err(|error| fail(error.into()))
    }

    pub fn is_empty(&self) -> Result<bool, JournalError> {
        Ok(self.len()? == 0)
    }
}

fn failed(action: &'static str, path: &str, source: redb::Error) -> JournalError {
    JournalError { action, path: path.to_owned(), source: Box::new(source) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::infer::sequence::FinishReason;

    fn answer(text: &str) -> Generated {
        Generated { text: text.to_owned(), finish_reason: FinishReason::Stop, prompt_len: 3, output_len: 1 }
    }

    fn get(journal: &Journal, key: JournalKey) -> Option<Generated> {
        journal.get_all([&key]).unwrap().remove(0)
    }

    #[test]
    fn remembers_after_reopening() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("journal.redb");
        let key = |n| JournalKey::new("model", &[n], 8, &SamplingParams::GREEDY);
        let journal = Journal::open(&path).unwrap();
        assert!(journal.is_empty().unwrap());
        journal.put(&[(key(1), &answer("one")), (key(2), &answer("two"))]).unwrap();
        drop(journal);
        let journal = Journal::open(&path).unwrap();
        assert_eq!(get(&journal, key(2)), Some(answer("two")));
        assert_eq!(get(&journal, key(3)), None);
        assert_eq!(journal.len().unwrap(), 2);
    }

    #[test]
    fn an_answer_outlives_one_rotation() {
        let folder = tempfile::tempdir().unwrap();
        let key = |n| JournalKey::new("model", &[n], 8, &SamplingParams::GREEDY);
        let journal = Journal::open(&folder.path().join("journal.redb")).unwrap();
        journal.put(&[(key(1), &answer("one"))]).unwrap();
        journal.rotate().unwrap();
        journal.put(&[(key(2), &answer("two"))]).unwrap();
        assert_eq!(get(&journal, key(1)), Some(answer("one")));
        journal.rotate().unwrap();
        assert_eq!(get(&journal, key(1)), None);
        assert_eq!(get(&journal, key(2)), Some(answer("two")));
        assert!(journal.is_empty().unwrap());
    }

    #[test]
    fn a_key_depends_on_everything_that_decides_the_answer() {
        let greedy = SamplingParams::GREEDY;
        let key = |digest: &str, ids: &[u32], max: u32, sampling| JournalKey::new(digest, ids, max, sampling);
        let base = key("m", &[1, 2], 8, &greedy);
        assert_eq!(base, key("m", &[1, 2], 8, &greedy));
        for other in [
            key("n", &[1, 2], 8, &greedy),
            key("m", &[2, 1], 8, &greedy),
            key("m", &[1, 2], 9, &greedy),
            key("m", &[1, 2], 8, &SamplingParams { temperature: 0.5, ..greedy }),
            key("m", &[1, 2], 8, &SamplingParams { seed: 1, ..greedy }),
            key("m", &[1, 2], 8, &SamplingParams { ignore_eos: true, ..greedy }),
        ] {
            assert_ne!(base, other);
        }
    }

    #[test]
    fn a_file_that_is_no_journal_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("journal.redb");
        std::fs::write(&path, b"not a database at all, but long enough to be looked at".repeat(40)).unwrap();
        let Err(error) = Journal::open(&path) else { panic!("opened it") };
        assert!(error.to_string().starts_with("cannot open the journal"), "{error}");
    }
}
