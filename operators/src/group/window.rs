//! The prompts that wait, in the order in which they share most.
//!
//! Order: depth first over the radix tree of the token ids, so prompts with a common prefix are neighbours
//! and its pages are computed once and still cached for the last of them (BatchLLM and SGLang's
//! longest-prefix order, over the whole window instead of the queue's head). Prompts that share no more than
//! their siblings do follow by length bucket, so that a batch holds prompts of like size.
//!
//! Planning is by rounds: what arrives while a plan is being served is planned when it is used up. So no
//! prompt is overtaken for longer than one round.

use std::cmp::Reverse;
use std::collections::VecDeque;
use std::sync::Arc;

/// A prefix is worth keeping together only if it is longer than its parent's by this many tokens: less is
/// not a page.
const MIN_SHARED: usize = 16;

/// Prompts with a value each, planned in rounds.
#[derive(Debug)]
pub struct Window<V> {
    /// Arrived since the plan was made.
    arrived: Vec<(Arc<[u32]>, V)>,
    /// `[num_workers]`: the plan, cut into runs of about equal work.
    runs: Vec<VecDeque<(Arc<[u32]>, V)>>,
    len: usize,
}

impl<V> Window<V> {
    pub fn new(num_workers: usize) -> Self {
        assert!(num_workers > 0);
        Self { arrived: Vec::new(), runs: (0..num_workers).map(|_| VecDeque::new()).collect(), len: 0 }
    }

    pub fn len(&self) -> usize {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    pub fn insert(&mut self, token_ids: Arc<[u32]>, value: V) {
        self.arrived.push((token_ids, value));
        self.len += 1;
    }

    /// The next prompt for a worker: of its own run, else the far end of the longest other run.
    pub fn next_for(&mut self, worker: usize) -> Option<V> {
        if self.runs.iter().all(VecDeque::is_empty) {
            self.plan();
        }
        let (_, value) = match self.runs[worker].pop_front() {
            Some(own) => own,
            None => self.runs.iter_mut().max_by_key(|run| run.len())?.pop_back()?,
        };
        self.len -= 1;
        Some(value)
    }

    fn plan(&mut self) {
        let mut prompts: Vec<Option<(Arc<[u32]>, V)>> = self.arrived.drain(..).map(Some).collect();
        let token_ids: Vec<Arc<[u32]>> =
            prompts.iter().flatten().map(|(token_ids, _)| Arc::clone(token_ids)).collect();
        let order = depth_first(&token_ids);
        let total: usize = token_ids.iter().map(|ids| ids.len()).sum();
        let share = total.div_ceil(self.runs.len()).max(1);
        let mut before = 0;
        for index in order {
            let run = (before / share).min(self.runs.len() - 1);
            before += token_ids[index].len();
            let prompt = prompts[index].take().expect("an order names each prompt once");
            self.runs[run].push_back(prompt);
        }
    }
}

/// Indices of `prompts` in the window's order.
pub fn depth_first(prompts: &[Arc<[u32]>]) -> Vec<usize> {
    let mut sorted: Vec<usize> = (0..prompts.len()).collect();
    // Stable, so that equal prompts keep the order they arrived in.
    sorted.sort_by(|&a, &b| prompts[a].cmp(&prompts[b]));
    // shared[i]: tokens that sorted[i] and sorted[i + 1] have in common.
    let shared: Vec<usize> =
        sorted.windows(2).map(|pair| common_len(&prompts[pair[0]], &prompts[pair[1]])).collect();
    let mut order = Vec::with_capacity(prompts.len());
    // Ranges of `sorted` still to be placed, with the prefix length their members are known to share.
    let mut stack = vec![(0, sorted.len(), 0)];
    while let Some((first, end, depth)) = stack.pop() {
        let groups = children(&shared, first, end, depth);
        let mut leaves: Vec<usize> = Vec::new();
        let mut deeper = Vec::new();
        for (from, to) in groups {
            match to - from {
                1 => leaves.push(sorted[from]),
                _ => {
                    let least = shared[from..to - 1].iter().copied().min().expect("two members or more");
                    deeper.push((from, to, least));
                }
            }
        }
        // Members without a subtree of their own, the long ones first: they start the batch's prefill.
        leaves.sort_by_key(|&index| Reverse(bucket(prompts[index].len())));
        order.extend(leaves);
        stack.extend(deeper.into_iter().rev());
    }
    order
}

/// Cuts a range that shares `depth` tokens into groups that share at least a page more.
fn children(shared: &[usize], first: usize, end: usize, depth: usize) -> Vec<(usize, usize)> {
    let mut groups = Vec::new();
    let mut from = first;
    for to in first + 1..=end {
        if to == end || shared[to - 1] < depth + MIN_SHARED {
            groups.push((from, to));
            from = to;
        }
    }
    groups
}

fn bucket(len: usize) -> u32 {
    len.max(1).ilog2()
}

fn common_len(a: &[u32], b: &[u32]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}

/// Tokens in the radix tree of all prompts: what must be computed if every prefix is computed once.
pub fn distinct_tokens(prompts: &[Arc<[u32]>]) -> u64 {
    let mut sorted: Vec<&Arc<[u32]>> = prompts.iter().collect();
    sorted.sort();
    let shared: usize = sorted.windows(2).map(|pair| common_len(pair[0], pair[1])).sum();
    (prompts.iter().map(|ids| ids.len()).sum::<usize>() - shared) as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    fn prompt(parts: &[(u32, usize)]) -> Arc<[u32]> {
        parts.iter().flat_map(|&(token, len)| std::iter::repeat_n(token, len)).collect()
    }

    #[test]
    fn prompts_of_one_prefix_are_neighbors_and_siblings_go_by_length() {
        let prompts = [
            prompt(&[(1, 32), (5, 20)]),
            prompt(&[(2, 32), (5, 20)]),
            prompt(&[(1, 32), (6, 200)]),
            prompt(&[(2, 32), (4, 300)]),
            prompt(&[(1, 32), (7, 100)]),
        ];
        assert_eq!(depth_first(&prompts), [2, 4, 0, 3, 1]);
        assert_eq!(distinct_tokens(&prompts), 32 + 20 + 200 + 100 + 32 + 20 + 300);
    }

    #[test]
    fn every_prompt_leaves_once_whoever_asks() {
        let mut state = 7_u64;
        let mut draw = |n: u64| {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 33) % n
        };
        for case in 0..200 {
            let num_workers = 1 + draw(4) as usize;
            let mut window = Window::new(num_workers);
            let mut seen = Vec::new();
            let total = draw(60) as usize;
            let mut inserted = 0;
            while seen.len() < total {
                if inserted < total && draw(2) == 0 {
                    let parts: Vec<(u32, usize)> =
                        (0..=draw(3)).map(|_| (draw(3) as u32, 1 + draw(40) as usize)).collect();
                    window.insert(prompt(&parts), inserted);
                    inserted += 1;
                } else if let Some(value) = window.next_for(draw(num_workers as u64) as usize) {
                    seen.push(value);
                }
                assert_eq!(window.len(), inserted - seen.len(), "case {case}");
            }
            seen.sort_unstable();
            assert_eq!(seen, (0..total).collect::<Vec<_>>(), "case {case}");
        }
    }

    #[test]
    fn a_plan_is_cut_into_runs_of_like_work() {
        let mut window = Window::new(2);
        for token in 0..100 {
            window.insert(prompt(&[(9, 32), (token, 64)]), token);
        }
        window.plan();
        assert_eq!(window.runs.iter().map(VecDeque::len).collect::<Vec<_>>(), [50, 50]);
    }

    #[test]
    fn a_chain_of_nested_prefixes_needs_no_recursion() {
        let prompts: Vec<Arc<[u32]>> = (1..2000).map(|len| prompt(&[(1, len)])).collect();
        assert_eq!(depth_first(&prompts).len(), prompts.len());
        assert_eq!(distinct_tokens(&prompts), 1999);
    }
}
