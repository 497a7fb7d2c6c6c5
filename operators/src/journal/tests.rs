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
    assert!(journal.is_empty());
    journal.put(&[(key(1), &answer("one")), (key(2), &answer("two"))]).unwrap();
    drop(journal);
    let journal = Journal::open(&path).unwrap();
    assert_eq!(get(&journal, key(2)), Some(answer("two")));
    assert_eq!(get(&journal, key(3)), None);
    assert_eq!(journal.len(), 2);
    journal.put(&[(key(3), &answer("three"))]).unwrap();
    assert_eq!(get(&journal, key(1)), Some(answer("one")), "numbers go on after reopening");
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
    assert!(journal.is_empty());
}

#[test]
fn damaged_values_are_read_as_far_as_they_go() {
    let key = |n| JournalKey::new("model", &[n], 8, &SamplingParams::GREEDY);
    let (one, two) = (answer("one"), answer("two"));
    let bytes = encode(&[(key(1), &one), (key(2), &two)]);
    let first = entry(&bytes, 0).unwrap().1.end;
    for len in 0..bytes.len() {
        let mut index = Index::default();
        index.add(4, &bytes[..len], false);
        assert_eq!(index.answers.len(), usize::from(len >= first));
        assert_eq!(index.next_batch, 5);
    }
}

#[test]
fn a_key_depends_on_everything_that_decides_the_answer() {
    let greedy = SamplingParams::GREEDY;
    let key = |digest: &str, ids: &[u32], max: u32, sampling: &SamplingParams| {
        JournalKey::new(digest, ids, max, sampling)
    };
    let base = key("m", &[1, 2], 8, &greedy);
    assert_eq!(base, key("m", &[1, 2], 8, &greedy));
    for other in [
        key("n", &[1, 2], 8, &greedy),
        key("m", &[2, 1], 8, &greedy),
        key("m", &[1, 2], 9, &greedy),
        key("m", &[1, 2], 8, &SamplingParams { temperature: 0.5, ..greedy }),
        key("m", &[1, 2], 8, &SamplingParams { seed: 1, ..greedy }),
        key("m", &[1, 2], 8, &SamplingParams { ignore_eos: true, ..greedy }),
        key("m", &[1, 2], 8, &SamplingParams { min_p: 0.1, ..greedy }),
        key("m", &[1, 2], 8, &SamplingParams { repetition_penalty: 1.5, ..greedy }),
        key("m", &[1, 2], 8, &SamplingParams { presence_penalty: 0.5, ..greedy }),
        key("m", &[1, 2], 8, &SamplingParams { frequency_penalty: 0.5, ..greedy }),
    ] {
        assert_ne!(base, other);
    }
    let presence = key("m", &[1, 2], 8, &SamplingParams { presence_penalty: 0.5, ..greedy });
    let frequency = key("m", &[1, 2], 8, &SamplingParams { frequency_penalty: 0.5, ..greedy });
    assert_ne!(presence, frequency);
}

/// Runs that were begun by an earlier version are continued.
#[test]
fn a_key_stays_what_it_was() {
    let sampling =
        SamplingParams { temperature: 0.5, top_p: 0.9, top_k: 3, seed: 7, ..SamplingParams::GREEDY };
    let mut bytes = Vec::new();
    bytes.extend_from_slice(&1u32.to_le_bytes());
    bytes.extend_from_slice(&1u64.to_le_bytes());
    bytes.extend_from_slice(b"m");
    bytes.extend_from_slice(&8u32.to_le_bytes());
    bytes.extend_from_slice(&0.5f32.to_le_bytes());
    bytes.extend_from_slice(&0.9f32.to_le_bytes());
    bytes.extend_from_slice(&3u32.to_le_bytes());
    bytes.extend_from_slice(&7u64.to_le_bytes());
    bytes.push(0);
    bytes.extend_from_slice(&[1, 0, 0, 0, 2, 0, 0, 0]);
    assert_eq!(JournalKey::new("m", &[1, 2], 8, &sampling).0, *blake3::hash(&bytes).as_bytes());
}

#[test]
fn a_file_that_is_no_journal_is_an_error() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("journal.redb");
    std::fs::write(&path, b"not a database at all, but long enough to be looked at".repeat(40)).unwrap();
    let Err(error) = Journal::open(&path) else { panic!("opened it") };
    assert!(error.to_string().starts_with("cannot open the journal"), "{error}");
}
