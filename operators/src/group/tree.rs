//! A radix tree over the token ids of the prompts that wait, and the place in it where each engine is served.
//!
//! An edge is a range of a prompt's own tokens, so the tree copies none. Inserting and taking cost the prompt's
//! length, never the size of the tree: order among children is kept as they change. An engine goes depth first:
//! to the nearest place where no other engine is, so that a prefix is computed by one engine, and its prompts
//! follow each other (BatchLLM; SGLang's longest-prefix order over a whole window).
//!
//! Invariant: every node but the root holds prompts or has two children, and its counts are those of its subtree.
//! Age and bounds are not here: see [`window`](super::window).

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

use crate::infer::sequence::SharedPrefix;

/// An answer weighs as much as so many prompt tokens. A guess: only the balance between engines depends on it.
const ANSWER_WORK: u64 = 64;
/// A prompt tells of so many prefixes that later ones share with it; those of more levels count as unshared.
const MAX_SHARED_PREFIXES: usize = 32;

const ROOT: NodeId = NodeId(0);

/// A node; it keeps its name as long as it holds prompts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct NodeId(u32);

/// The tree; see the module.
#[derive(Debug)]
pub struct Tree<V> {
    nodes: Vec<Option<Node<V>>>,
    free: Vec<NodeId>,
    /// `[num_engines]`
    cursors: Vec<NodeId>,
    num_inserted: u64,
}

/// The most work first, in buckets of powers of two, so that the batch holds prompts of like size; then the oldest.
type Place = (Reverse<u32>, u64, NodeId);

#[derive(Debug)]
struct Node<V> {
    /// The edge is `token_ids[start..end]`; `token_ids[..end]` is the prefix.
    token_ids: Arc<[u32]>,
    start: usize,
    end: usize,
    parent: NodeId,
    /// By first token of the edge.
    children: BTreeMap<u32, NodeId>,
    order: BTreeSet<Place>,
    /// Prompts that end here, oldest first.
    prompts: VecDeque<V>,
    /// Of the subtree.
    num_prompts: u32,
    /// Of the subtree: tokens on its edges, and the answers.
    work: u64,
    serial: u64,
    /// Engines that are served in this subtree.
    num_cursors: u32,
}

impl<V> Node<V> {
    fn place(&self, id: NodeId) -> Place {
        (Reverse(self.work.max(1).ilog2()), self.serial, id)
    }

    fn first_token(&self) -> u32 {
        self.token_ids[self.start]
    }

    fn edge_len(&self) -> u64 {
        (self.end - self.start) as u64
    }
}

impl<V> Tree<V> {
    pub fn new(num_engines: usize) -> Self {
        assert!(num_engines > 0);
        let mut tree =
            Self { nodes: Vec::new(), free: Vec::new(), cursors: vec![ROOT; num_engines], num_inserted: 0 };
        let root = tree.add_node(Arc::new([]), 0, 0, ROOT);
        assert_eq!(root, ROOT);
        tree
    }

    pub fn num_prompts(&self) -> usize {
        self.node(ROOT).num_prompts as usize
    }

    /// The prompts that end at a node.
    pub fn token_ids(&self, at: NodeId) -> &[u32] {
        let node = self.node(at);
        &node.token_ids[..node.end]
    }

    pub fn insert(&mut self, token_ids: &Arc<[u32]>, value: V) -> NodeId {
        self.num_inserted += 1;
        let mut at = ROOT;
        let mut num_new = 0;
        loop {
            let node = self.node(at);
            let Some(first) = token_ids.get(node.end) else { break };
            let Some(&child) = node.children.get(first) else {
                num_new = (token_ids.len() - node.end) as u64;
                at = self.add_child(at, token_ids);
                break;
            };
            let node = self.node(child);
            let edge = &node.token_ids[node.start..node.end];
            let shared = common_len(edge, &token_ids[node.start..]);
            at = if shared == edge.len() { child } else { self.split(child, node.start + shared) };
        }
        self.node_mut(at).prompts.push_back(value);
        self.count(at, |node| {
            node.num_prompts += 1;
            node.work += num_new + ANSWER_WORK;
        });
        at
    }

    /// Where the next prompt for an engine is, nearest to its last one. `None` if there is none, or if the engines
    /// that are at the rest would gain less by help than it costs to compute their prefixes once more.
    pub fn next_for(&mut self, engine: usize) -> Option<NodeId> {
        let own = self.lift(engine);
        let found = own.iter().find_map(|&at| self.unvisited(at)).or_else(|| self.join_others(&own));
        self.place_cursor(engine, found.unwrap_or(own[0]));
        found
    }

    /// Lets an engine go on at a node.
    pub fn move_to(&mut self, engine: usize, node: NodeId) {
        self.lift(engine);
        self.place_cursor(engine, node);
    }

    /// Takes the oldest prompt of a node, with the prefixes that it shares with others here: longer ones with fewer.
    pub fn take(&mut self, at: NodeId) -> (V, Vec<SharedPrefix>) {
        let value = self.node_mut(at).prompts.pop_front().expect("the node holds a prompt");
        self.count(at, |node| {
            node.num_prompts -= 1;
            node.work -= ANSWER_WORK;
        });
        let mut shared: Vec<SharedPrefix> = Vec::new();
        for id in self.path(at) {
            let node = self.node(id);
            let is_new = shared.last().is_none_or(|longer| longer.num_later < node.num_prompts);
            if id != ROOT && node.num_prompts > 0 && is_new {
                shared.push(SharedPrefix { len: node.end as u32, num_later: node.num_prompts });
            }
        }
        shared.reverse();
        shared.truncate(MAX_SHARED_PREFIXES);
        self.prune(at);
        (value, shared)
    }

    /// A place at or below a node where no engine is, if the node has one.
    fn unvisited(&self, at: NodeId) -> Option<NodeId> {
        let node = self.node(at);
        if !node.prompts.is_empty() {
            return Some(at);
        }
        // No more children are passed over than there are engines.
        let mut at = node.order.iter().find(|place| self.node(place.2).num_cursors == 0)?.2;
        while self.node(at).prompts.is_empty() {
            at = self.node(at).order.first().expect("a node without prompts has children").2;
        }
        Some(at)
    }

    /// Everything is in the hands of other engines. Goes down where half of the work is more than the prefix,
    /// as this engine, which has what is on the path `own`, would have to compute that again.
    fn join_others(&self, own: &[NodeId]) -> Option<NodeId> {
        let mut own = own.iter().rev().peekable();
        let (mut at, mut known_len) = (ROOT, 0);
        loop {
            if own.next_if_eq(&&at).is_some() {
                known_len = self.node(at).end;
            }
            at = self.node(at).order.iter().map(|place| place.2).find(|&child| {
                let node = self.node(child);
                let cost = if own.peek() == Some(&&child) { 0 } else { node.end - known_len };
                node.work / 2 > cost as u64
            })?;
            if let Some(found) = self.unvisited(at) {
                return Some(found);
            }
        }
    }

    /// Takes an engine's cursor out of the counts; returns the path up from where it was.
    fn lift(&mut self, engine: usize) -> Vec<NodeId> {
        let path = self.path(self.cursors[engine]);
        path.iter().for_each(|&id| self.node_mut(id).num_cursors -= u32::from(id != ROOT));
        path
    }

    fn place_cursor(&mut self, engine: usize, at: NodeId) {
        self.cursors[engine] = at;
        for id in self.path(at) {
            self.node_mut(id).num_cursors += u32::from(id != ROOT);
        }
    }

    /// From a node up to the root.
    fn path(&self, mut at: NodeId) -> Vec<NodeId> {
        let mut path = vec![at];
        while at != ROOT {
            at = self.node(at).parent;
            path.push(at);
        }
        path
    }

    /// Changes the counts of a node and of all above it, and their places among their siblings.
    fn count(&mut self, at: NodeId, change: impl Fn(&mut Node<V>)) {
        let mut id = at;
        loop {
            let node = self.node_mut(id);
            let before = node.place(id);
            change(node);
            let (after, parent) = (node.place(id), node.parent);
            if id == ROOT {
                return;
            }
            if before != after {
                let order = &mut self.node_mut(parent).order;
                order.remove(&before);
                order.insert(after);
            }
            id = parent;
        }
    }

    fn add_node(&mut self, token_ids: Arc<[u32]>, start: usize, end: usize, parent: NodeId) -> NodeId {
        let node = Node {
            token_ids,
            start,
            end,
            parent,
            children: BTreeMap::new(),
            order: BTreeSet::new(),
            prompts: VecDeque::new(),
            num_prompts: 0,
            work: 0,
            serial: self.num_inserted,
            num_cursors: 0,
        };
        if let Some(id) = self.free.pop() {
            self.nodes[id.0 as usize] = Some(node);
            return id;
        }
        self.nodes.push(Some(node));
        NodeId(self.nodes.len() as u32 - 1)
    }

    fn add_child(&mut self, parent: NodeId, token_ids: &Arc<[u32]>) -> NodeId {
        let start = self.node(parent).end;
        let id = self.add_node(Arc::clone(token_ids), start, token_ids.len(), parent);
        self.attach(id);
        id
    }

    /// Puts a node between another and its parent, where its prefix has `end` tokens.
    fn split(&mut self, lower: NodeId, end: usize) -> NodeId {
        self.detach(lower);
        let node = self.node(lower);
        let (token_ids, start, parent) = (Arc::clone(&node.token_ids), node.start, node.parent);
        let upper = self.add_node(token_ids, start, end, parent);
        let node = self.node_mut(lower);
        let (num_prompts, work, serial, num_cursors) =
            (node.num_prompts, node.work, node.serial, node.num_cursors);
        node.start = end;
        node.parent = upper;
        node.work -= (end - start) as u64;
        self.attach(lower);
        let node = self.node_mut(upper);
        (node.num_prompts, node.work, node.serial, node.num_cursors) =
            (num_prompts, work, serial, num_cursors);
        self.attach(upper);
        upper
    }

    /// Removes a node that holds nothing, or joins it with its only child; then its parent in the same way.
    fn prune(&mut self, at: NodeId) {
        let node = self.node(at);
        if at == ROOT || !node.prompts.is_empty() || node.children.len() > 1 {
            return;
        }
        let (parent, start, edge_len) = (node.parent, node.start, node.edge_len());
        let child = node.children.values().next().copied();
        if child.is_none() {
            self.count(at, |node| node.work -= edge_len);
        }
        self.detach(at);
        // An engine that was here goes on with what is left here.
        let mut num_here = 0;
        for cursor in self.cursors.iter_mut().filter(|cursor| **cursor == at) {
            *cursor = child.unwrap_or(parent);
            num_here += 1;
        }
        if let Some(child) = child {
            self.detach(child);
            let node = self.node_mut(child);
            node.start = start;
            node.parent = parent;
            node.work += edge_len;
            node.num_cursors += num_here;
            self.attach(child);
        }
        self.nodes[at.0 as usize] = None;
        self.free.push(at);
        self.prune(parent);
    }

    /// Makes a node known to its parent.
    fn attach(&mut self, id: NodeId) {
        let node = self.node(id);
        let (first, place, parent) = (node.first_token(), node.place(id), node.parent);
        let parent = self.node_mut(parent);
        let before = parent.children.insert(first, id);
        assert!(before.is_none(), "two edges begin alike");
        parent.order.insert(place);
    }

    fn detach(&mut self, id: NodeId) {
        let node = self.node(id);
        let (first, place, parent) = (node.first_token(), node.place(id), node.parent);
        let parent = self.node_mut(parent);
        let (child, was_ordered) = (parent.children.remove(&first), parent.order.remove(&place));
        assert_eq!(child, Some(id));
        assert!(was_ordered, "a node is not in its place");
    }

    fn node(&self, id: NodeId) -> &Node<V> {
        self.nodes[id.0 as usize].as_ref().expect("the node is in the tree")
    }

    fn node_mut(&mut self, id: NodeId) -> &mut Node<V> {
        self.nodes[id.0 as usize].as_mut().expect("the node is in the tree")
    }
}

pub(crate) fn common_len(a: &[u32], b: &[u32]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}

#[cfg(test)]
mod fuzz;
