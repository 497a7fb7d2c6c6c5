//! Random calls on [`PrefixCache`], compared with a flat map from whole prefixes to pages.

use super::super::page_pool::PageHolder;
use super::super::page_pool::fuzz::Random;
use super::*;

impl PrefixCache {
    /// Asserts the module's invariant, and that `num_users` says how often each page is used.
    pub(in crate::infer) fn check(&self, pool: &PagePool, num_users: &BTreeMap<PageId, u32>) {
        let (mut num_nodes, mut num_idle) = (0, 0);
        for (index, node) in self.nodes.iter().enumerate() {
            let page = PageId(index as u32);
            assert_eq!(node.is_some(), pool.holder(page) == PageHolder::PrefixCache, "page {page}");
            let Some(node) = node else { continue };
            num_nodes += 1;
            num_idle += usize::from(node.num_users == 0);
            assert_eq!(node.num_users, num_users.get(&page).copied().unwrap_or(0), "users of page {page}");
            assert_eq!(self.edges(node.parent).get(&node.token_ids), Some(&page));
            let parent_users = node.parent.map_or(u32::MAX, |parent| self.node(parent).num_users);
            assert!(node.num_users <= parent_users, "page {page} has more users than its parent");
            let is_idle_leaf = node.num_users == 0 && node.children.is_empty();
            assert_eq!(self.idle_leaves.contains(&node.worth(page)), is_idle_leaf, "page {page}");
        }
        assert_eq!((num_nodes, num_idle), (self.num_pages(), self.num_idle()));
    }
}

/// Every cached prefix as a whole, with its page, its users, when it last lost one, and who needs it later.
type Naive = BTreeMap<Vec<u32>, (PageId, u32, u64, u32)>;

/// A sequence using pages: the tokens it goes through, and its page table.
struct User {
    token_ids: Vec<u32>,
    pages: Vec<PageId>,
}

struct Case {
    random: Random,
    page_size: usize,
    pool: PagePool,
    cache: PrefixCache,
    naive: Naive,
    users: Vec<User>,
    clock: u64,
}

impl Case {
    fn new(seed: u64) -> Self {
        let mut random = Random::new(seed);
        let num_pages = random.between(1, 24) as u32;
        let page_size = random.between(1, 3);
        Self {
            random,
            page_size,
            pool: PagePool::new(num_pages),
            cache: PrefixCache::new(num_pages, page_size as u32),
            naive: Naive::new(),
            users: Vec::new(),
            clock: 0,
        }
    }

    /// Few different tokens, so that prefixes meet often.
    fn token_ids(&mut self, len: usize) -> Vec<u32> {
        (0..len).map(|_| self.random.below(2) as u32).collect()
    }

    fn admit(&mut self) {
        let len = self.random.between(0, 5 * self.page_size);
        let token_ids = self.token_ids(len);
        let pages = self.cache.lookup(&token_ids);
        let naive_len = (1..=len / self.page_size)
            .take_while(|num_pages| self.naive.contains_key(&token_ids[..num_pages * self.page_size]))
            .count();
        assert_eq!(pages.len(), naive_len);
        self.check_partial(&token_ids, &pages);
        let (mut num_idle, end) = (0, naive_len * self.page_size);
        for (index, &page) in pages.iter().enumerate() {
            let entry = self.naive.get_mut(&token_ids[..(index + 1) * self.page_size]).expect("looked up");
            assert_eq!(entry.0, page);
            num_idle += usize::from(entry.1 == 0);
            entry.1 += 1;
        }
        assert_eq!(self.cache.num_idle_in(&pages), num_idle);
        self.cache.lock(&pages);
        self.users.push(User { token_ids: token_ids[..end].to_vec(), pages });
    }

    /// The longest beginning of a page behind the path.
    fn check_partial(&self, token_ids: &[u32], path: &[PageId]) {
        let (prefix, rest) = token_ids.split_at(path.len() * self.page_size);
        let children = self
            .naive
            .keys()
            .filter(|other| other.len() == prefix.len() + self.page_size && other.starts_with(prefix));
        let longest = children.map(|other| common_len(&other[prefix.len()..], rest)).max().unwrap_or(0);
        let found = self.cache.lookup_partial(path.last().copied(), rest);
        assert_eq!(found.map_or(0, |(_, len)| len), longest);
        if let Some((page, len)) = found {
            assert_eq!(self.cache.node(page).token_ids[..len], rest[..len]);
            assert_eq!(self.cache.node(page).parent, path.last().copied());
        }
    }

    fn pin(&mut self, serial: u64) {
        let index = self.random.below(self.naive.len().max(1));
        let num_later = self.random.below(3) as u32;
        if let Some(entry) = self.naive.values_mut().nth(index) {
            entry.3 = num_later;
            self.cache.set_num_later(entry.0, serial, num_later);
            self.cache.set_num_later(entry.0, serial - 1, 7);
        }
    }

    fn extend(&mut self) {
        if self.users.is_empty() || (self.pool.num_free() == 0 && !self.evict()) {
            return;
        }
        let index = self.random.below(self.users.len());
        let new = self.token_ids(self.page_size);
        let user = &mut self.users[index];
        let page = self.pool.take().expect("one is free");
        let parent = user.pages.last().copied();
        let kept = self.cache.insert(parent, &new, page, &mut self.pool);
        if kept != page {
            self.pool.give_back(page);
        }
        user.token_ids.extend_from_slice(&new);
        user.pages.push(kept);
        let entry = self.naive.entry(user.token_ids.clone()).or_insert((page, 0, 0, 0));
        assert_eq!(entry.0, kept);
        entry.1 += 1;
    }

    fn release(&mut self) {
        if self.users.is_empty() {
            return;
        }
        let index = self.random.below(self.users.len());
        let user = self.users.swap_remove(index);
        self.cache.unlock(&user.pages);
        self.clock += 1;
        for num_pages in 1..=user.pages.len() {
            let entry = self.naive.get_mut(&user.token_ids[..num_pages * self.page_size]).expect("in use");
            entry.1 -= 1;
            entry.2 = self.clock;
        }
    }

    /// The oldest prefix goes which nobody uses and no longer prefix continues.
    fn evict(&mut self) -> bool {
        let is_leaf = |prefix: &[u32]| {
            self.naive.keys().all(|other| other.len() <= prefix.len() || !other.starts_with(prefix))
        };
        let oldest = self
            .naive
            .iter()
            .filter(|(prefix, entry)| entry.1 == 0 && is_leaf(prefix))
            .min_by_key(|(_, entry)| (entry.3 > 0, entry.2, entry.0))
            .map(|(prefix, entry)| (prefix.clone(), entry.0));
        assert_eq!(self.cache.evict(&mut self.pool), oldest.is_some());
        let Some((prefix, page)) = oldest else { return false };
        assert_eq!(self.pool.holder(page), PageHolder::Free, "page {page} was not the oldest");
        self.naive.remove(&prefix);
        true
    }

    fn check(&self) {
        let num_users = self.naive.values().map(|entry| (entry.0, entry.1)).collect();
        self.cache.check(&self.pool, &num_users);
        assert_eq!(self.cache.num_pages(), self.naive.len());
    }
}

#[test]
fn agrees_with_a_map_of_prefixes() {
    for seed in 0..150 {
        let mut case = Case::new(seed);
        for serial in 1..150 {
            match case.random.below(9) {
                0 | 1 => case.admit(),
                2..=4 => case.extend(),
                5 | 6 => case.release(),
                7 => case.pin(serial),
                _ => _ = case.evict(),
            }
            case.check();
        }
    }
}
