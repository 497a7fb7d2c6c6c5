//! A record that is to be written.

use super::assignment::Partition;

/// The most that a header, a key and the framing of the protocol add to a record, apart from their bytes.
const OVERHEAD_BYTES: usize = 96;

/// A record that was refused so often is not tried again.
const MAX_REFUSED: u8 = 4;

/// Which of the two topics of an output.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    Results,
    Errors,
}

/// Headers in order; a name may occur twice.
pub type Headers = Vec<(String, Option<Vec<u8>>)>;

/// A record before it is sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OutRecord {
    pub target: Target,
    pub key: Option<Vec<u8>>,
    pub value: Option<Vec<u8>>,
    pub headers: Headers,
    /// `None`: the partitioner decides by the key.
    pub partition: Option<i32>,
    /// Milliseconds since 1970; `None`: now.
    pub timestamp: Option<i64>,
    /// Where it is from.
    pub input: u32,
    pub row: u64,
    /// How often a topic did not take it.
    pub num_refused: u8,
}

impl OutRecord {
    /// What the broker's limit is compared with; never less than what the record takes in a batch of its own.
    pub fn num_bytes(&self) -> usize {
        let len = |bytes: &Option<Vec<u8>>| bytes.as_ref().map_or(0, Vec::len);
        let headers = self.headers.iter().map(|(name, value)| name.len() + len(value) + 8).sum::<usize>();
        OVERHEAD_BYTES + len(&self.key) + len(&self.value) + headers
    }

    /// Makes it a record of the errors topic, since a topic does not take it: `reason` says why. What is longer than
    /// `limit` is cut: first the value, then all that is not ours, at last everything but where it is from.
    pub fn refuse(&mut self, kind: &str, reason: String, limit: usize, origin: &str) {
        let text = |text: String| Some(text.into_bytes());
        if self.target == Target::Results {
            // A record that came from an errors topic has such headers already.
            self.headers.retain(|(name, _)| !name.starts_with(header::PREFIX));
            self.target = Target::Errors;
            self.partition = None;
            self.headers.push((header::KIND.to_owned(), text(kind.to_owned())));
            self.headers.push((header::MESSAGE.to_owned(), text(reason)));
            match Partition::parse(origin).filter(|partition| !partition.topic.contains('/')) {
                Some(Partition { topic, number }) => self.headers.extend([
                    (header::ORIGIN.to_owned(), text(topic.to_string())),
                    (header::ORIGIN_PARTITION.to_owned(), text(number.to_string())),
                ]),
                None => self.headers.push((header::ORIGIN.to_owned(), text(origin.to_owned()))),
            }
            self.headers.push((header::ORIGIN_OFFSET.to_owned(), text(self.row.to_string())));
        }
        self.num_refused = self.num_refused.saturating_add(1);
        if self.num_bytes() > limit && !self.headers.iter().any(|(name, _)| name == header::TRUNCATED) {
            self.headers.push((header::TRUNCATED.to_owned(), text("true".to_owned())));
        }
        let rest = self.num_bytes() - self.value.as_ref().map_or(0, Vec::len);
        match self.num_refused {
            0 | 1 if rest <= limit => {}
            0..=2 => {
                self.key = None;
                self.headers.retain(|(name, value)| {
                    name.starts_with(header::PREFIX) && value.as_ref().is_none_or(|value| value.len() <= 256)
                });
            }
            _ => {
                self.key = None;
                let kept = [header::ORIGIN, header::ORIGIN_PARTITION, header::ORIGIN_OFFSET];
                self.headers.retain(|(name, value)| {
                    kept.contains(&name.as_str()) && value.as_ref().is_none_or(|value| value.len() <= 256)
                });
            }
        }
        let rest = self.num_bytes() - self.value.as_ref().map_or(0, Vec::len);
        if let Some(value) = &mut self.value {
            value.truncate(limit.saturating_sub(rest));
        }
    }

    /// It was made as small as it can be, and a topic did not take it even so.
    pub fn is_hopeless(&self) -> bool {
        self.num_refused >= MAX_REFUSED
    }
}

/// Names of the headers of an errors topic, which tell what became of the record and where it is from.
pub mod header {
    /// Of every name below.
    pub const PREFIX: &str = "tidemill.";
    /// The value is cut, since the whole was too large.
    pub const TRUNCATED: &str = "tidemill.error.truncated";
    pub const KIND: &str = "tidemill.error.kind";
    pub const MESSAGE: &str = "tidemill.error.message";
    pub const STEP: &str = "tidemill.error.step";
    pub const PIPELINE: &str = "tidemill.pipeline";
    /// A topic or a file.
    pub const ORIGIN: &str = "tidemill.origin";
    pub const ORIGIN_PARTITION: &str = "tidemill.origin.partition";
    /// An offset or a row.
    pub const ORIGIN_OFFSET: &str = "tidemill.origin.offset";
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(headers: &[(&str, usize)], key: usize, value: usize) -> OutRecord {
        OutRecord {
            target: Target::Results,
            key: Some(vec![b'k'; key]),
            value: Some(vec![b'v'; value]),
            headers: headers.iter().map(|&(name, len)| (name.to_owned(), Some(vec![b'h'; len]))).collect(),
            partition: Some(3),
            timestamp: None,
            input: 0,
            row: 42,
            num_refused: 0,
        }
    }

    fn header<'a>(record: &'a OutRecord, name: &str) -> Vec<&'a str> {
        let found = record.headers.iter().filter(|(found, _)| found == name);
        found.map(|(_, value)| std::str::from_utf8(value.as_deref().unwrap()).unwrap()).collect()
    }

    #[test]
    fn what_is_refused_goes_to_the_errors_and_fits() {
        // Small, with a large value, a large key, a large header, and with headers of another errors topic.
        for (headers, key, value) in [
            (&[("trace", 10)][..], 5, 100),
            (&[], 5, 9000),
            (&[("trace", 10)], 5000, 10),
            (&[("huge", 5000)], 5, 10),
            (&[(header::TRUNCATED, 4), (header::KIND, 9), (header::MESSAGE, 3000)], 5, 3000),
        ] {
            let mut refused = record(headers, key, value);
            refused.refuse("too_large", "the result is too large".to_owned(), 2000, "news-items-7");
            assert_eq!((refused.target, refused.partition), (Target::Errors, None));
            assert!(refused.num_bytes() <= 2000, "{} bytes", refused.num_bytes());
            let expected = [
                (header::KIND, "too_large"),
                (header::ORIGIN, "news-items"),
                (header::ORIGIN_PARTITION, "7"),
                (header::ORIGIN_OFFSET, "42"),
            ];
            for (name, value) in expected {
                assert_eq!(header(&refused, name), [value], "{name} is there once");
            }
            let is_cut = refused.value.as_ref().map_or(0, Vec::len) < value || refused.key.is_none();
            assert_eq!(header(&refused, header::TRUNCATED).len(), usize::from(is_cut));
        }
    }

    #[test]
    fn it_becomes_smaller_until_it_is_hopeless() {
        let mut refused = record(&[("trace", 300), ("tidemill.custom", 200)], 100, 5000);
        let mut sizes = Vec::new();
        let mut limit = 1200;
        while !refused.is_hopeless() {
            refused.refuse("too_large", "too large".to_owned(), limit, "data/articles-2024.parquet");
            sizes.push(refused.num_bytes());
            limit /= 2;
        }
        assert!(sizes.is_sorted_by(|a, b| a > b || (a == b && *a < 400)), "{sizes:?}");
        assert_eq!(header(&refused, header::ORIGIN), ["data/articles-2024.parquet"]);
        assert_eq!(header(&refused, header::ORIGIN_OFFSET), ["42"]);
        assert_eq!(refused.key, None);
    }
}
