use super::*;
use crate::infer::page_pool::fuzz::Random;

const NO_LIMITS: WindowLimits =
    WindowLimits { max_prompts: usize::MAX, max_bytes: u64::MAX, max_age: u64::MAX, min_shared: 0 };
/// Of the simulated engine: sequences that run, and those it is handed.
const NUM_SLOTS: usize = 8;
const TARGET: usize = 10;

fn prompt(tenant: u32, tail: u32, len: usize) -> Arc<[u32]> {
    [tenant, tail].into_iter().chain(std::iter::repeat_n(9, len - 2)).collect()
}

fn policy(weights: &[(&str, u32)]) -> TenantPolicy {
    let weights = weights.iter().map(|&(name, weight)| (name.to_owned(), weight)).collect();
    TenantPolicy { weights, ..TenantPolicy::default() }
}

#[test]
fn one_tenant_is_served_in_the_order_of_its_window() {
    let mut random = Random::new(1);
    let mut window = Window::new(2, NO_LIMITS);
    let mut fair = FairWindow::new(2, NO_LIMITS, TenantPolicy::default());
    let tenant = Arc::from("");
    for id in 0..2000 {
        let token_ids = prompt(random.below(5) as u32, random.below(9) as u32, random.between(2, 40));
        window.insert(Arc::clone(&token_ids), id);
        fair.insert(&tenant, token_ids.len() as u64, token_ids, id);
        while random.one_in(2) {
            let engine = random.below(2);
            assert_eq!(fair.next_for(engine, |_| true), window.next_for(engine));
            assert_eq!(fair.len(), window.len());
        }
    }
}

#[test]
fn tokens_are_shared_by_weight_whatever_the_size_of_prompts() {
    let mut random = Random::new(2);
    let names: [Arc<str>; 3] = ["a".into(), "b".into(), "c".into()];
    let mut fair = FairWindow::new(1, NO_LIMITS, policy(&[("b", 2), ("c", 5)]));
    for (index, name) in names.iter().enumerate() {
        for id in 0..4000 {
            let cost = random.between(2, [400, 20, 100][index]);
            fair.insert(name, cost as u64, prompt(index as u32, id, cost), (index, cost as u64));
        }
    }
    let mut served = [0; 3];
    while served.iter().sum::<u64>() < 150_000 {
        let ((index, cost), _) = fair.next_for(0, |_| true).unwrap();
        served[index] += cost;
        // Nobody is ever more than a quantum for each unit of weight away from its share.
        let shares = [served[0], served[1] / 2, served[2] / 5];
        let (least, most) = (shares.iter().min().unwrap(), shares.iter().max().unwrap());
        assert!(most - least <= 2 * 400, "{served:?}");
        if served[1] > 35_000 {
            break;
        }
    }
    assert!(served.iter().all(|&tokens| tokens > 15_000), "{served:?}");
}

#[test]
fn who_may_not_run_is_passed_over_and_keeps_its_turn() {
    let mut fair = FairWindow::new(1, NO_LIMITS, TenantPolicy::default());
    let (a, b): (Arc<str>, Arc<str>) = ("a".into(), "b".into());
    for id in 0..3 {
        fair.insert(&a, 10, prompt(0, id, 10), ("a", id));
        fair.insert(&b, 10, prompt(1, id, 10), ("b", id));
    }
    let mut next = |may_run: &[&str]| {
        fair.next_for(0, |tenant| may_run.contains(&tenant)).map(|((tenant, id), _)| format!("{tenant}{id}"))
    };
    assert_eq!(next(&[]), None);
    let order: Vec<_> =
        [&["b"][..], &["b"], &["a", "b"], &["a", "b"], &["b"], &["a", "b"]].map(&mut next).into();
    assert_eq!(
        order,
        [Some("b0"), Some("b1"), Some("a0"), Some("b2"), None, Some("a1")]
            .map(|name| name.map(str::to_owned))
    );
}

/// Which window the simulation asks.
enum Served {
    Fairly,
    /// All as one tenant.
    Together,
}

/// Arrival of a prompt: tick, tenant, tokens.
type Arrival = (u64, &'static str, usize);

fn arrivals(random: &mut Random, tenant: &'static str, every: u64, ticks: u64) -> Vec<Arrival> {
    // In bursts of four.
    let mut arrivals = Vec::new();
    for burst in 0..ticks / (4 * every) {
        let tick = burst * 4 * every + random.below(4 * every as usize) as u64;
        arrivals.extend([(); 4].map(|()| (tick, tenant, random.between(20, 90))));
    }
    arrivals
}

/// How long each prompt of the small tenant took from its arrival to its last token. Time is counted in tokens: each of
/// the running sequences gets one a tick.
fn waits_of_small(mut arrivals: Vec<Arrival>, served: &Served) -> Vec<u64> {
    arrivals.sort();
    let mut fair = FairWindow::new(1, NO_LIMITS, TenantPolicy::default());
    let (mut queue, mut running, mut waits) = (VecDeque::new(), Vec::new(), Vec::new());
    let num_small = arrivals.iter().filter(|arrival| arrival.1 == "small").count();
    let mut arrivals = arrivals.into_iter().enumerate().peekable();
    let mut tick = 0;
    while waits.len() < num_small {
        while let Some((id, arrival)) = arrivals.next_if(|(_, arrival)| arrival.0 <= tick) {
            let tenant = match served {
                Served::Fairly => arrival.1.into(),
                Served::Together => "".into(),
            };
            let token_ids = prompt(u32::from(arrival.1 == "small"), id as u32, arrival.2);
            fair.insert(&tenant, arrival.2 as u64, token_ids, arrival);
        }
        while queue.len() + running.len() < TARGET
            && let Some((arrival, _)) = fair.next_for(0, |_| true)
        {
            queue.push_back((arrival, arrival.2));
        }
        while running.len() < NUM_SLOTS
            && let Some(started) = queue.pop_front()
        {
            running.push(started);
        }
        tick += 1;
        running.iter_mut().for_each(|(_, remaining)| *remaining -= 1);
        for ((arrived, tenant, _), _) in running.extract_if(.., |(_, remaining)| *remaining == 0) {
            waits.extend((tenant == "small").then_some(tick - arrived));
        }
    }
    waits
}

fn p95(mut waits: Vec<u64>) -> u64 {
    waits.sort_unstable();
    waits[waits.len() * 95 / 100]
}

#[test]
fn a_burst_of_one_tenant_does_not_make_another_wait_twice_as_long() {
    for seed in 0..5 {
        let mut random = Random::new(seed);
        let small = arrivals(&mut random, "small", 100, 20_000);
        let large = arrivals(&mut random, "large", 1, 20_000);
        assert_eq!(large.len(), 100 * small.len());
        let both = [small.clone(), large].concat();
        let alone = p95(waits_of_small(small, &Served::Fairly));
        let shared = p95(waits_of_small(both.clone(), &Served::Fairly));
        println!("p95 of small: {alone} tokens alone, {shared} beside large");
        assert!(shared < 2 * alone, "{shared} tokens beside large, {alone} alone");
        let together = p95(waits_of_small(both, &Served::Together));
        assert!(together > 10 * alone, "without turns it would wait {together} tokens, {alone} alone");
    }
}
