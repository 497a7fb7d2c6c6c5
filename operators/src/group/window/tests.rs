use super::*;
use crate::group::distinct::distinct_tokens;
use crate::infer::page_pool::fuzz::Random;

const NO_LIMITS: WindowLimits =
    WindowLimits { max_prompts: usize::MAX, max_bytes: u64::MAX, max_age: u64::MAX, min_shared: 0 };

fn prompt(parts: &[(u32, usize)]) -> Arc<[u32]> {
    parts.iter().flat_map(|&(token, len)| std::iter::repeat_n(token, len)).collect()
}

fn drain<V>(window: &mut Window<V>) -> Vec<V> {
    std::iter::from_fn(|| window.next_for(0)).map(|(value, _)| value).collect()
}

#[test]
fn prompts_of_one_prefix_follow_each_other_and_long_ones_come_first() {
    let mut window = Window::new(1, NO_LIMITS);
    for (index, parts) in [
        [(1, 32), (5, 20)],
        [(2, 32), (5, 20)],
        [(1, 32), (6, 700)],
        [(2, 32), (4, 100)],
        [(1, 32), (7, 200)],
    ]
    .iter()
    .enumerate()
    {
        window.insert(prompt(parts), index);
    }
    assert_eq!(drain(&mut window), [2, 4, 0, 3, 1]);
}

#[test]
fn what_arrives_later_joins_the_prefix_that_is_served() {
    let mut window = Window::new(1, NO_LIMITS);
    for token in 0..4 {
        window.insert(prompt(&[(100 + token % 2, 50), (token, 5)]), token);
    }
    let (first, shared) = window.next_for(0).unwrap();
    assert_eq!(first, 0);
    assert_eq!(shared, [SharedPrefix { len: 50, num_later: 1 }]);
    window.insert(prompt(&[(100, 50), (9, 5)]), 9);
    assert_eq!(drain(&mut window), [2, 9, 1, 3]);
}

#[test]
fn a_stream_keeps_its_order_but_for_a_long_prefix() {
    let mut window = Window::new(1, NO_LIMITS.of_stream());
    // A prefix of all, one of two, and a short one of two others.
    let tails =
        [[(1, 5), (5, 40)], [(2, 25), (6, 9)], [(3, 60), (7, 2)], [(2, 25), (8, 90)], [(1, 5), (9, 9)]];
    for (index, [shared, own]) in tails.into_iter().enumerate() {
        window.insert(prompt(&[(100, 300), shared, own]), index);
    }
    assert_eq!(drain(&mut window), [0, 1, 3, 2, 4]);
    // The first one's prefix is another engine's: it is left to that one.
    let mut window = Window::new(2, NO_LIMITS.of_stream());
    window.insert(prompt(&[(1, 200), (2, 5)]), 0);
    assert_eq!(window.next_for(1).map(|(index, _)| index), Some(0));
    for (index, parts) in [[(1, 200), (3, 5)], [(4, 900), (5, 5)]].iter().enumerate() {
        window.insert(prompt(parts), index + 1);
    }
    assert_eq!(window.next_for(0).map(|(index, _)| index), Some(2));
    assert_eq!(window.next_for(1).map(|(index, _)| index), Some(1));
}

#[test]
fn engines_go_apart_and_join_where_it_pays() {
    let mut window = Window::new(2, NO_LIMITS);
    for token in 0..8 {
        window.insert(prompt(&[(token / 4, 100), (100 + token, 50)]), token);
    }
    let served: Vec<(usize, u32)> =
        (0..8).map(|turn| (turn % 2, window.next_for(turn % 2).unwrap().0)).collect();
    assert!(served.iter().all(|&(engine, token)| token / 4 == engine as u32), "{served:?}");
    // One prefix for both: worth computing twice only while there is much behind it.
    for (num_prompts, helps) in [(2, false), (40, true)] {
        let mut window = Window::new(2, NO_LIMITS);
        for token in 0..num_prompts {
            window.insert(prompt(&[(7, 300), (100 + token, 20)]), token);
        }
        assert!(window.next_for(0).is_some());
        assert_eq!(window.next_for(1).is_some(), helps, "{num_prompts} prompts");
        assert!(window.next_for(0).is_some());
    }
}

#[test]
fn bounds_hold_and_one_prompt_always_fits() {
    let limits = WindowLimits { max_prompts: 3, max_bytes: 4 * 100, max_age: 6, min_shared: 0 };
    let mut window = Window::new(1, limits);
    for len in [40, 40, 40, 10, 10, 10, 200, 1] {
        window.insert(prompt(&[(len, len as usize)]), len);
        assert!(window.tree.num_prompts() <= 3 && window.bytes <= 400);
    }
    assert_eq!((window.len(), window.tree.num_prompts()), (8, 2));
    assert_eq!(drain(&mut window).len(), 8);
    assert!(window.ages.is_empty() && window.bytes == 0);
}

/// One large group that never ends, and a small one: without the bound the small one would never be served.
#[test]
fn nobody_waits_longer_than_the_bound() {
    for seed in 0..30 {
        let mut random = Random::new(seed);
        let limits = WindowLimits::new(random.between(4, 40), u64::MAX);
        let num_engines = random.between(1, 3);
        let mut window = Window::new(num_engines, limits);
        let (mut num_inserted, mut num_left) = (0_u64, 0_u64);
        let bound = limits.max_age + limits.max_prompts as u64;
        while num_left < 1000 {
            while window.len() < limits.max_prompts {
                let group = if random.one_in(20) { random.between(1, 9) as u32 } else { 0 };
                let tail = num_inserted as u32 % 7;
                window.insert(prompt(&[(group, 64), (tail, 5)]), num_left);
                num_inserted += 1;
            }
            if let Some((left_before, _)) = window.next_for(random.below(num_engines)) {
                assert!(
                    num_left - left_before <= bound,
                    "a prompt was passed over {}",
                    num_left - left_before
                );
                num_left += 1;
            }
        }
    }
}

#[test]
fn the_order_of_a_window_computes_each_prefix_once() {
    let mut random = Random::new(1);
    let prompts: Vec<Arc<[u32]>> =
        (0..500).map(|index| prompt(&[(1, 30), (random.below(20) as u32, 40), (1000 + index, 20)])).collect();
    let mut window = Window::new(1, NO_LIMITS);
    prompts.iter().for_each(|prompt| window.insert(Arc::clone(prompt), Arc::clone(prompt)));
    let order = drain(&mut window);
    let shared: usize = order.windows(2).map(|pair| super::super::tree::common_len(&pair[0], &pair[1])).sum();
    let total: usize = order.iter().map(|ids| ids.len()).sum();
    assert_eq!((total - shared) as u64, distinct_tokens(&prompts), "as if with a cache of one prompt");
}

#[test]
fn a_chain_of_nested_prefixes_needs_no_recursion() {
    let mut window = Window::new(2, NO_LIMITS);
    (1..2000).for_each(|len| window.insert(prompt(&[(1, len)]), len));
    assert_eq!(drain(&mut window), (1..2000).collect::<Vec<_>>());
}
