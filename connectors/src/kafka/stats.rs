//! What the clients of one pipeline have done, for whoever looks at it from another thread.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::assignment::Partition;

/// A partition that is read.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PartitionStats {
    /// The next offset to read.
    pub position: Option<i64>,
    /// The group's committed offset.
    pub committed: Option<i64>,
    /// The next offset to fetch, records of transactions themselves counted, when nothing fetched waits to be read.
    pub fetched: Option<i64>,
    /// How often the client has told of the partition since it was last paused.
    pub num_reports: u32,
    /// Where the partition ends, as far as committed records go.
    pub end: Option<i64>,
}

impl PartitionStats {
    /// Records that are not committed by the group yet.
    pub fn lag(&self) -> Option<i64> {
        Some((self.end? - self.committed.or(self.position)?).max(0))
    }
}

/// Totals and the present state.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct KafkaSnapshot {
    pub partitions: BTreeMap<Partition, PartitionStats>,
    /// There are topics to read; which partitions of them may not be known yet.
    pub reads_topics: bool,
    /// Partitions are held back since nobody takes more.
    pub is_paused: bool,
    pub num_rebalances: u64,
    pub records_read: u64,
    pub records_written: u64,
    pub transactions_committed: u64,
    pub transactions_aborted: u64,
    /// Producers that were replaced since the broker had fenced them.
    pub producers_fenced: u64,
    /// The batches of lost partitions that were thrown away.
    pub epochs_canceled: u64,
    /// How many of them there were when reading had ended.
    pub canceled_at_end: Option<u64>,
}

/// Shared by the clients.
#[derive(Clone, Debug, Default)]
pub struct KafkaStats {
    inner: Arc<Mutex<KafkaSnapshot>>,
}

impl PartitionStats {
    /// Whether all before `end` was fetched and read. The client's first report after a pause may be from before it.
    pub(super) fn has_reached(&self, end: i64) -> bool {
        self.num_reports >= 2 && self.fetched.is_some_and(|fetched| fetched >= end)
    }
}

impl KafkaSnapshot {
    /// Whether batches were thrown away when nobody read any more, so that they were not read again either.
    pub fn is_cut_short(&self) -> bool {
        self.canceled_at_end.is_some_and(|before| self.epochs_canceled > before)
    }
}

impl KafkaStats {
    pub fn snapshot(&self) -> KafkaSnapshot {
        self.lock().clone()
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, KafkaSnapshot> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_canceled_while_reading_is_read_again_and_what_is_canceled_later_is_not() {
        let mut snapshot = KafkaSnapshot { epochs_canceled: 3, ..KafkaSnapshot::default() };
        assert!(!snapshot.is_cut_short());
        snapshot.canceled_at_end = Some(3);
        assert!(!snapshot.is_cut_short());
        snapshot.epochs_canceled = 4;
        assert!(snapshot.is_cut_short());
    }
}
