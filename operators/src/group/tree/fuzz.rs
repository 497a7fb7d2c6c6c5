//! Random calls on [`Tree`], compared with a flat list of prompts.

use super::*;
use crate::infer::page_pool::fuzz::Random;

impl<V> Tree<V> {
    /// Asserts the module's invariant.
    fn check(&self) {
        let mut num_nodes = 0;
        let mut below = vec![ROOT];
        while let Some(id) = below.pop() {
            num_nodes += 1;
            let node = self.node(id);
            let children: Vec<NodeId> = node.children.values().copied().collect();
            assert_eq!(node.order.len(), children.len());
            let (mut num_prompts, mut work) = (node.prompts.len() as u32, node.edge_len());
            work += ANSWER_WORK * node.prompts.len() as u64;
            let mut num_cursors = self.cursors.iter().filter(|&&cursor| cursor == id).count() as u32;
            for &child in &children {
                let lower = self.node(child);
                assert_eq!((lower.parent, lower.start), (id, node.end));
                assert_eq!(lower.token_ids[..node.end], node.token_ids[..node.end]);
                assert!(node.order.contains(&lower.place(child)));
                num_prompts += lower.num_prompts;
                work += lower.work;
                num_cursors += lower.num_cursors;
            }
            assert_eq!((node.num_prompts, node.work), (num_prompts, work));
            if id != ROOT {
                assert_eq!(node.num_cursors, num_cursors);
                assert!(!node.prompts.is_empty() || children.len() > 1, "a node without a purpose");
            }
            below.extend(children);
        }
        assert_eq!(num_nodes + self.free.len(), self.nodes.len());
    }
}

fn check_shared(waiting: &[(usize, Arc<[u32]>)], token_ids: &[u32], shared: &[SharedPrefix]) {
    let num_with =
        |len: usize| waiting.iter().filter(|(_, other)| other.starts_with(&token_ids[..len])).count();
    let mut last = SharedPrefix { len: 0, num_later: u32::MAX };
    for &prefix in shared {
        assert!(prefix.len > last.len && prefix.num_later < last.num_later);
        assert_eq!(num_with(prefix.len as usize), prefix.num_later as usize);
        last = prefix;
    }
    let all_len = last.len as usize;
    assert!(all_len == token_ids.len() || num_with(all_len + 1) == 0, "a longer prefix is shared");
}

fn case(seed: u64) {
    let mut random = Random::new(seed);
    let num_engines = random.between(1, 4);
    let mut tree = Tree::new(num_engines);
    let mut waiting: Vec<(usize, Arc<[u32]>)> = Vec::new();
    let (num_tokens, max_len) = (random.between(1, 3), random.between(1, 12));
    for index in 0..200 {
        if random.one_in(2) || waiting.is_empty() {
            let len = random.between(1, max_len);
            let token_ids: Arc<[u32]> = (0..len).map(|_| random.below(num_tokens) as u32).collect();
            tree.insert(&token_ids, index);
            waiting.push((index, token_ids));
        } else {
            let first = random.below(num_engines);
            let mut engines = (0..num_engines).map(|index| (first + index) % num_engines);
            let (engine, node) = engines
                .find_map(|engine| Some((engine, tree.next_for(engine)?)))
                .expect("what waits is for one of the engines");
            let (index, shared) = tree.take(node);
            let place = waiting.iter().position(|(other, _)| *other == index).expect("each leaves once");
            let (_, token_ids) = waiting.remove(place);
            let others = waiting.iter().filter(|(_, other)| *other == token_ids);
            assert!(others.clone().all(|(other, _)| *other > index), "equal prompts leave in order");
            check_shared(&waiting, &token_ids, &shared);
            if random.one_in(8) && !waiting.is_empty() {
                let far = tree.next_for((engine + 1) % num_engines);
                far.into_iter().for_each(|node| tree.move_to(engine, node));
            }
        }
        tree.check();
        assert_eq!(tree.num_prompts(), waiting.len());
    }
}

#[test]
fn agrees_with_a_list() {
    (0..200).for_each(case);
}
