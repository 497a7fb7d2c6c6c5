//! A radix tree over full KV pages, so that prompts with a common prefix compute it once.
//!
//! After RadixAttention (SGLang), with one page an edge: an edge is labelled with the page's token ids themselves, so
//! a hit is exact and not a matter of hashes. A node is named by the page it holds. `num_users` counts the running
//! sequences whose page table goes through a node; a user of a node uses all its ancestors too, so nodes without
//! users form whole subtrees and can be given up leaf by leaf.
//!
//! What no later prompt needs goes first. Needed pages are pinned: they yield only when nothing else is left. Within
//! both, the least recently used goes first. Prompts come depth first, so for needed pages that is the one whose next
//! use is farthest away (Belady); all pages save the same number of tokens. A pin is an order and not a lock, so it
//! keeps nobody from running.
//!
//! Invariant: the cache holds exactly the pages which the pool says it holds, each in one node, and no two nodes have
//! the same token ids behind the same parent. Pages that are still being filled never get here.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Bound::{Excluded, Included, Unbounded};
use std::sync::Arc;

use tidemill_kernels::step::PageId;

use super::page_pool::PagePool;
use crate::group::tree::common_len;

/// The tree; see the module.
#[derive(Debug)]
pub struct PrefixCache {
    page_size: usize,
    /// Indexed by page.
    nodes: Vec<Option<Node>>,
    roots: Edges,
    /// Nodes without users and without children, in the order they are given up.
    idle_leaves: BTreeSet<Worth>,
    num_nodes: usize,
    /// Nodes without users.
    num_idle: usize,
    /// Advances with every release, so that ages do not depend on time.
    clock: u64,
}

type Edges = BTreeMap<Arc<[u32]>, PageId>;

/// Whether later prompts need it, when it was last used, and its name.
type Worth = (bool, u64, PageId);

#[derive(Debug)]
struct Node {
    token_ids: Arc<[u32]>,
    parent: Option<PageId>,
    children: Edges,
    num_users: u32,
    last_used: u64,
    /// Later prompts that need it, as the prompt with this serial number knew.
    num_later: (u64, u32),
}

impl Node {
    fn worth(&self, page: PageId) -> Worth {
        (self.num_later.1 > 0, self.last_used, page)
    }
}

impl PrefixCache {
    pub fn new(num_pages: u32, page_size: u32) -> Self {
        assert!(page_size > 0);
        Self {
            page_size: page_size as usize,
            nodes: (0..num_pages).map(|_| None).collect(),
            roots: Edges::new(),
            idle_leaves: BTreeSet::new(),
            num_nodes: 0,
            num_idle: 0,
            clock: 0,
        }
    }

    /// The pages of the longest cached prefix of `token_ids`, from the root down. They stay only while locked.
    pub fn lookup(&self, token_ids: &[u32]) -> Vec<PageId> {
        let mut path = Vec::new();
        let mut edges = &self.roots;
        for page_token_ids in token_ids.chunks_exact(self.page_size) {
            let Some(&page) = edges.get(page_token_ids) else { break };
            path.push(page);
            edges = &self.node(page).children;
        }
        path
    }

    /// Behind the pages of a path, the page that begins with the most of `token_ids`, and how many it has.
    pub fn lookup_partial(&self, parent: Option<PageId>, token_ids: &[u32]) -> Option<(PageId, usize)> {
        let edges = self.edges(parent);
        // Those with the longest common beginning are next to it in the order.
        let before = edges.range::<[u32], _>((Unbounded, Excluded(token_ids))).next_back();
        let after = edges.range::<[u32], _>((Included(token_ids), Unbounded)).next();
        let nearest = before.into_iter().chain(after);
        let (page, len) =
            nearest.map(|(edge, &page)| (page, common_len(edge, token_ids))).max_by_key(|&(_, len)| len)?;
        (len > 0).then_some((page, len))
    }

    /// Of the pages in `path`, how many could be given up now.
    pub fn num_idle_in(&self, path: &[PageId]) -> usize {
        path.iter().filter(|&&page| self.node(page).num_users == 0).count()
    }

    /// Adds a user to every page of `path`, which must start at the root.
    pub fn lock(&mut self, path: &[PageId]) {
        self.check_path(path);
        for &page in path {
            self.add_user(page);
        }
    }

    /// Takes back what [`lock`](Self::lock) and [`insert`](Self::insert) added.
    pub fn unlock(&mut self, path: &[PageId]) {
        self.check_path(path);
        self.clock += 1;
        path.iter().for_each(|&page| self.remove_user(page));
    }

    /// Adds a user to one page, so that it can be copied. The pages before it must be in use.
    pub fn lock_page(&mut self, page: PageId) {
        let parent = self.node(page).parent;
        assert!(parent.is_none_or(|parent| self.node(parent).num_users > 0), "a path with a gap");
        self.add_user(page);
    }

    /// Takes back what [`lock_page`](Self::lock_page) added.
    pub fn unlock_page(&mut self, page: PageId) {
        self.clock += 1;
        self.remove_user(page);
    }

    /// How many sequences use a page.
    pub fn num_users(&self, page: PageId) -> u32 {
        self.node(page).num_users
    }

    /// Notes how many later prompts need a page, as a prompt with this serial number knows; the latest one knows best.
    pub fn set_num_later(&mut self, page: PageId, serial: u64, num_later: u32) {
        let node = self.node_mut(page);
        if serial < node.num_later.0 {
            return;
        }
        let before = node.worth(page);
        node.num_later = (serial, num_later);
        if self.idle_leaves.remove(&before) {
            self.add_if_idle_leaf(page);
        }
    }

    /// Takes over a page that a sequence has filled, behind the pages which that sequence uses already, and makes the
    /// sequence its user. Where the cache has the same tokens at the same place, `page` stays the caller's and the older
    /// page is returned: the sequence goes on with that one.
    pub fn insert(
        &mut self,
        parent: Option<PageId>,
        token_ids: &[u32],
        page: PageId,
        pool: &mut PagePool,
    ) -> PageId {
        assert_eq!(token_ids.len(), self.page_size, "only full pages are cached");
        assert!(
            parent.is_none_or(|page| self.node(page).num_users > 0),
            "the parent of page {page} is not in use"
        );
        if let Some(&present) = self.edges(parent).get(token_ids) {
            assert_ne!(present, page);
            self.add_user(present);
            return present;
        }
        pool.share(page);
        let token_ids: Arc<[u32]> = token_ids.into();
        self.edges_mut(parent).insert(Arc::clone(&token_ids), page);
        let (children, last_used, num_later) = (Edges::new(), self.clock, (0, 0));
        let node = Node { token_ids, parent, children, num_users: 1, last_used, num_later };
        let previous = self.nodes[page.0 as usize].replace(node);
        assert!(previous.is_none(), "page {page} is in two nodes");
        self.num_nodes += 1;
        page
    }

    /// Frees the page of least worth that has neither users nor children; false when there is none.
    pub fn evict(&mut self, pool: &mut PagePool) -> bool {
        let Some((_, _, page)) = self.idle_leaves.pop_first() else {
            assert_eq!(self.num_idle, 0, "idle pages without an idle leaf");
            return false;
        };
        let node = self.nodes[page.0 as usize].take().expect("an idle leaf is a node");
        assert_eq!(node.num_users, 0);
        assert!(node.children.is_empty());
        let removed = self.edges_mut(node.parent).remove(&node.token_ids);
        assert_eq!(removed, Some(page));
        self.num_nodes -= 1;
        self.num_idle -= 1;
        if let Some(parent) = node.parent {
            self.add_if_idle_leaf(parent);
        }
        pool.evict(page);
        true
    }

    pub fn num_pages(&self) -> usize {
        self.num_nodes
    }

    /// Pages without users: so many can be given up.
    pub fn num_idle(&self) -> usize {
        self.num_idle
    }

    fn add_user(&mut self, page: PageId) {
        let node = self.node_mut(page);
        node.num_users += 1;
        if node.num_users == 1 {
            let worth = node.worth(page);
            self.num_idle -= 1;
            self.idle_leaves.remove(&worth);
        }
    }

    fn remove_user(&mut self, page: PageId) {
        let clock = self.clock;
        let node = self.node_mut(page);
        assert!(node.num_users > 0, "page {page} is unlocked without a user");
        node.num_users -= 1;
        if node.num_users == 0 {
            node.last_used = clock;
            self.num_idle += 1;
            self.add_if_idle_leaf(page);
        }
    }

    fn add_if_idle_leaf(&mut self, page: PageId) {
        let node = self.node(page);
        if node.num_users == 0 && node.children.is_empty() {
            let worth = node.worth(page);
            self.idle_leaves.insert(worth);
        }
    }

    #[track_caller]
    fn check_path(&self, path: &[PageId]) {
        let mut parent = None;
        for &page in path {
            assert_eq!(self.node(page).parent, parent, "pages are not a path from the root");
            parent = Some(page);
        }
    }

    fn edges(&self, parent: Option<PageId>) -> &Edges {
        parent.map_or(&self.roots, |page| &self.node(page).children)
    }

    fn edges_mut(&mut self, parent: Option<PageId>) -> &mut Edges {
        match parent {
            Some(page) => &mut self.node_mut(page).children,
            None => &mut self.roots,
        }
    }

    #[track_caller]
    fn node(&self, page: PageId) -> &Node {
        self.nodes[page.0 as usize].as_ref().expect("the page is in the cache")
    }

    #[track_caller]
    fn node_mut(&mut self, page: PageId) -> &mut Node {
        self.nodes[page.0 as usize].as_mut().expect("the page is in the cache")
    }
}

#[cfg(test)]
mod fuzz;
