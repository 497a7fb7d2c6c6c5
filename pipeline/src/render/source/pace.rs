//! How many rows a batch of a stream should have, by how fast documents are written.

use std::time::Duration;

/// A batch of a stream is what is written in this time, as far as the source has so much: large enough to cost little
/// for each row, and small enough to be committed soon however slow the model is.
const BATCH_TIME: Duration = Duration::from_millis(20);
/// A slow pipeline's batches have so many rows, so that prefixes meet.
const MIN_BATCH_ROWS: usize = 64;

/// How fast documents are written, looked at from time to time.
#[derive(Debug)]
pub(super) struct Pace {
    since: Duration,
    done_before: u64,
    batch_rows: usize,
}

impl Pace {
    /// Between two looks.
    const INTERVAL: Duration = Duration::from_millis(50);

    pub(super) fn new(now: Duration) -> Self {
        Self { since: now, done_before: 0, batch_rows: MIN_BATCH_ROWS }
    }

    /// How many rows a batch should have when so many documents are done by now.
    pub(super) fn batch_rows(&mut self, now: Duration, done: u64) -> usize {
        let passed = now.saturating_sub(self.since);
        if passed >= Self::INTERVAL {
            let rate = done.saturating_sub(self.done_before) as f64 / passed.as_secs_f64();
            self.batch_rows = ((rate * BATCH_TIME.as_secs_f64()) as usize).max(MIN_BATCH_ROWS);
            (self.since, self.done_before) = (now, done);
        }
        self.batch_rows
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn batches_grow_with_the_speed_and_shrink_with_it() {
        let at = Duration::from_millis;
        let mut pace = Pace::new(at(1000));
        assert_eq!(pace.batch_rows(at(1010), 500), MIN_BATCH_ROWS, "too early to tell");
        assert_eq!(pace.batch_rows(at(1100), 5000), 1000, "50,000 a second");
        assert_eq!(pace.batch_rows(at(1120), 5000), 1000);
        assert_eq!(pace.batch_rows(at(1300), 5002), MIN_BATCH_ROWS);
    }
}
