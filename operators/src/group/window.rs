//! The prompts that wait, and which of them an engine gets next.
//!
//! The order is that of the [`tree`](super::tree): by shared prefix, whatever the length of the queue and however
//! prompts arrive. The tree is bounded in prompts and bytes; what is more waits outside in order of arrival, bounded
//! by the source's credit. Age counts prompts that have left since: one that has seen `max_age` of them leave is
//! served next, and the engine goes on from there, so that small groups do not starve beside large ones.
//!
//! A stream is written in its order, so who is served early there only waits longer to be written, and holds what came
//! with it. Its prompts leave in order of arrival, but for a prefix of some length that an engine has just computed.
//!
//! Invariant: a prompt that is in the tree leaves before `max_age + max_prompts` others have.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use super::tree::{NodeId, Tree, common_len};
use crate::infer::sequence::SharedPrefix;

/// What a prefix must save, in tokens, to be worth waiting for.
const MIN_SHARED: usize = 16;

/// The bounds of a window.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WindowLimits {
    pub max_prompts: usize,
    /// Of token ids.
    pub max_bytes: u64,
    /// Counted in prompts that leave. Below `max_prompts` it would cut groups that all arrived together.
    pub max_age: u64,
    /// The oldest prompt is next, unless another shares so many more tokens with the one before it; 0 leaves the order
    /// to the tree alone.
    pub min_shared: usize,
}

impl WindowLimits {
    /// Prompts that arrive together are all served by then; those that are passed over wait two windows.
    pub fn new(max_prompts: usize, max_bytes: u64) -> Self {
        Self { max_prompts, max_bytes, max_age: 2 * max_prompts as u64, min_shared: 0 }
    }

    /// For a stream: prompts are overtaken for a worthwhile prefix only.
    pub fn of_stream(self) -> Self {
        Self { min_shared: MIN_SHARED, ..self }
    }
}

/// Prompts with a value each; see the module.
#[derive(Debug)]
pub struct Window<V> {
    limits: WindowLimits,
    tree: Tree<Entry<V>>,
    /// By arrival: where it is, and how many had left when it came.
    ages: BTreeMap<u64, (NodeId, u64)>,
    outside: VecDeque<(Arc<[u32]>, V)>,
    /// The last prompt of each engine, for streams.
    last: Vec<Arc<[u32]>>,
    bytes: u64,
    num_arrived: u64,
    num_left: u64,
}

#[derive(Debug)]
struct Entry<V> {
    arrival: u64,
    bytes: u64,
    value: V,
}

impl<V> Window<V> {
    pub fn new(num_engines: usize, limits: WindowLimits) -> Self {
        assert!(limits.max_prompts > 0 && limits.max_bytes > 0);
        Self {
            limits,
            tree: Tree::new(num_engines),
            ages: BTreeMap::new(),
            outside: VecDeque::new(),
            last: vec![Arc::default(); num_engines],
            bytes: 0,
            num_arrived: 0,
            num_left: 0,
        }
    }

    pub fn len(&self) -> usize {
        self.tree.num_prompts() + self.outside.len()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub fn insert(&mut self, token_ids: Arc<[u32]>, value: V) {
        self.outside.push_back((token_ids, value));
        self.fill();
    }

    /// The next prompt for an engine, with what it shares with prompts that come later. `None` if none waits, or if
    /// others had better serve those that do.
    pub fn next_for(&mut self, engine: usize) -> Option<(V, Vec<SharedPrefix>)> {
        let at = match self.overdue() {
            Some(node) => {
                self.tree.move_to(engine, node);
                node
            }
            None => {
                let nearest = self.tree.next_for(engine)?;
                let first = self.first_for(engine, nearest);
                first.inspect(|&node| self.tree.move_to(engine, node)).unwrap_or(nearest)
            }
        };
        if self.limits.min_shared > 0 {
            self.last[engine] = self.tree.token_ids(at).into();
        }
        let (entry, shared) = self.tree.take(at);
        self.ages.remove(&entry.arrival);
        self.bytes -= entry.bytes;
        self.num_left += 1;
        self.fill();
        Some((entry.value, shared))
    }

    fn overdue(&self) -> Option<NodeId> {
        let (_, &(node, num_left)) = self.ages.first_key_value()?;
        (self.num_left - num_left >= self.limits.max_age).then_some(node)
    }

    /// Of a stream the oldest prompt, unless `nearest` or another engine saves more by what was served last.
    fn first_for(&self, engine: usize, nearest: NodeId) -> Option<NodeId> {
        let min_shared = self.limits.min_shared;
        let (_, &(oldest, _)) = self.ages.first_key_value()?;
        if min_shared == 0 || oldest == nearest {
            return None;
        }
        let shared = |engine: usize, node: NodeId| common_len(&self.last[engine], self.tree.token_ids(node));
        let saved = shared(engine, oldest);
        let is_others = |other: usize| other != engine && shared(other, oldest) >= saved + min_shared;
        let is_next = shared(engine, nearest) < saved + min_shared && !(0..self.last.len()).any(is_others);
        is_next.then_some(oldest)
    }

    /// Lets in what the bounds allow; one prompt always.
    fn fill(&mut self) {
        while let Some((token_ids, _)) = self.outside.front() {
            let bytes = size_of_val::<[u32]>(token_ids) as u64;
            let is_full = self.tree.num_prompts() >= self.limits.max_prompts
                || self.bytes.saturating_add(bytes) > self.limits.max_bytes;
            if is_full && self.tree.num_prompts() > 0 {
                return;
            }
            let (token_ids, value) = self.outside.pop_front().expect("it was just looked at");
            let arrival = self.num_arrived;
            let node = self.tree.insert(&token_ids, Entry { arrival, bytes, value });
            self.ages.insert(arrival, (node, self.num_left));
            self.bytes += bytes;
            self.num_arrived += 1;
        }
    }
}

#[cfg(test)]
mod tests;
