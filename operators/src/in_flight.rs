//! How many tokens are read and not yet written, so that the source can be held back by what engines can take.
//!
//! They are known once prompts are rendered, so the source lets in few epochs of which nothing is known yet, and is woken
//! when it is. A prompt counts until it is answered, so a document counts for one step at a time; what leaves in another way
//! (found in the journal, canceled) counts until the source says that its epoch is written.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};

use timely::scheduling::SyncActivator;

use crate::Epoch;

/// Tokens of prompts and the answers they may get, by open epoch. Those of which nothing is known are missing.
#[derive(Default)]
pub struct TokensInFlight {
    open: Mutex<BTreeMap<Epoch, u64>>,
    total: AtomicU64,
    peak: AtomicU64,
    source: OnceLock<SyncActivator>,
}

impl TokensInFlight {
    /// Wakes the source when more is known.
    pub fn wake(&self, source: SyncActivator) {
        self.source.set(source).expect("a pipeline has one source");
    }

    /// The epoch must be open.
    pub fn add(&self, epoch: Epoch, tokens: u64) {
        *self.open.lock().unwrap_or_else(PoisonError::into_inner).entry(epoch).or_insert(0) += tokens;
        let total = self.total.fetch_add(tokens, Ordering::AcqRel) + tokens;
        self.peak.fetch_max(total, Ordering::AcqRel);
        self.wake_source();
    }

    /// Prompts of open epochs are done, for which so many tokens were added.
    pub fn finish(&self, finished: &BTreeMap<Epoch, u64>) {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        for (epoch, tokens) in finished {
            *open.get_mut(epoch).expect("the epoch is open and has prompts") -= tokens;
        }
        drop(open);
        self.total.fetch_sub(finished.values().sum(), Ordering::AcqRel);
        self.wake_source();
    }

    fn wake_source(&self) {
        if let Some(source) = self.source.get() {
            // Fails only when the worker is gone, and then nobody needs waking.
            let _ = source.activate();
        }
    }

    /// The epoch is closed.
    pub fn remove(&self, epoch: Epoch) {
        let tokens = self.open.lock().unwrap_or_else(PoisonError::into_inner).remove(&epoch);
        self.total.fetch_sub(tokens.unwrap_or(0), Ordering::AcqRel);
    }

    /// Open epochs of which something is known.
    pub fn num_known(&self) -> usize {
        self.open.lock().unwrap_or_else(PoisonError::into_inner).len()
    }

    pub fn total(&self) -> u64 {
        self.total.load(Ordering::Acquire)
    }

    /// Most that ever were at once.
    pub fn peak(&self) -> u64 {
        self.peak.load(Ordering::Acquire)
    }
}

impl fmt::Debug for TokensInFlight {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TokensInFlight").field("total", &self.total).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_epoch_counts_until_it_is_removed() {
        let tokens = TokensInFlight::default();
        tokens.add(3, 10);
        tokens.add(4, 7);
        tokens.add(3, 1);
        tokens.finish(&BTreeMap::from([(4, 5)]));
        assert_eq!(tokens.total(), 13);
        assert_eq!(tokens.num_known(), 2);
        tokens.remove(3);
        tokens.remove(9);
        assert_eq!((tokens.total(), tokens.peak()), (2, 18));
        tokens.remove(4);
        assert_eq!(tokens.total(), 0);
    }
}
