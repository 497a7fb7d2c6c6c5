//! A record that is to be written.

/// The most that a header, a key and the framing of the protocol add to a record, apart from their bytes.
const OVERHEAD_BYTES: usize = 96;

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
}

impl OutRecord {
    /// What the broker's limit is compared with; never less than what the record takes in a batch of its own.
    pub fn num_bytes(&self) -> usize {
        let len = |bytes: &Option<Vec<u8>>| bytes.as_ref().map_or(0, Vec::len);
        let headers = self.headers.iter().map(|(name, value)| name.len() + len(value) + 8).sum::<usize>();
        OVERHEAD_BYTES + len(&self.key) + len(&self.value) + headers
    }

    /// Makes it a record of the errors topic that fits `limit`, after a topic has refused it. The second time, what
    /// is not ours goes too.
    pub fn refuse(&mut self, limit: usize, origin: &str) {
        if self.headers.iter().any(|(name, _)| name == header::TRUNCATED) {
            self.key = None;
            self.headers.retain(|(name, value)| {
                name.starts_with(header::PREFIX) && value.as_ref().is_none_or(|value| value.len() <= 256)
            });
            self.value = None;
            return;
        }
        let num_bytes = self.num_bytes();
        let text = |text: String| Some(text.into_bytes());
        if self.target == Target::Results {
            let message = format!("the result takes {num_bytes} bytes, the topic's limit is {limit}");
            self.target = Target::Errors;
            self.headers.extend([
                (header::KIND.to_owned(), text("too_large".to_owned())),
                (header::MESSAGE.to_owned(), text(message)),
                (header::ORIGIN.to_owned(), text(origin.to_owned())),
                (header::ORIGIN_OFFSET.to_owned(), text(self.row.to_string())),
            ]);
        }
        self.headers.push((header::TRUNCATED.to_owned(), text("true".to_owned())));
        let rest = self.num_bytes() - self.value.as_ref().map_or(0, Vec::len);
        if let Some(value) = &mut self.value {
            value.truncate(limit.saturating_sub(rest));
        }
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
