//! The prompts that wait, and which of them an engine gets next.
//!
//! The order is that of the [`tree`](super::tree): by shared prefix, whatever the length of the queue and however
//! prompts arrive. The tree is bounded in prompts and bytes; what is more waits outside in order of arrival, bounded
//! by the source's credit. Age counts prompts that have left since: one that has seen `max_age` of them leave is
//! served next, and the engine goes on from there, so that small groups do not starve beside large ones.
//!
//! Invariant: a prompt that is in the tree leaves before `max_age + max_prompts` others have.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use super::tree::{NodeId, Tree};
use crate::infer::sequence::SharedPrefix;

/// The bounds of a window.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WindowLimits {
    pub max_prompts: usize,
    /// Of token ids.
    pub max_bytes: u64,
    /// Counted in prompts that leave. Below `max_prompts` it would cut groups that all arrived together.
    pub max_age: u64,
}

impl WindowLimits {
    /// Prompts that arrive together are all served by then; those that are passed over wait two windows.
    pub fn new(max_prompts: usize, max_bytes: u64) -> Self {
        Self { max_prompts, max_bytes, max_age: 2 * max_prompts as u64 }
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
            None => self.tree.next_for(engine)?,
        };
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
