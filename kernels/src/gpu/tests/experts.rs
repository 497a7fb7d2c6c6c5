//! Routing, the products of the experts and their mixture against plain loops, and that no row depends on others.

use super::*;
use crate::gpu::ops::{
    Combine, GroupedLinear, Route, SortRoutes, combine, grouped_linear, route, sort_routes,
};

/// Experts of a token and their weights, by expert, as `models/experts.rs` has it.
fn routes_of_token(scores: &[f32], num_chosen: usize, renormalize: bool) -> Vec<(u32, f32)> {
    let mut ranking: Vec<(f32, u32)> = scores.iter().copied().zip(0..).collect();
    ranking.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
    let weight = |score: f32| f64::from(score - ranking[0].0).exp();
    let summed = if renormalize { &ranking[..num_chosen] } else { &ranking[..] };
    let total: f64 = summed.iter().map(|&(score, _)| weight(score)).sum();
    let mut chosen: Vec<(u32, f32)> = ranking[..num_chosen]
        .iter()
        .map(|&(score, expert)| (expert, (weight(score) / total) as f32))
        .collect();
    chosen.sort_by_key(|&(expert, _)| expert);
    chosen
}

#[test]
fn the_highest_scores_win() {
    for (seed, (num_tokens, num_experts, num_chosen)) in
        [(1, 1, 1), (3, 4, 2), (9, 4, 4), (70, 60, 4), (33, 128, 8), (5, 512, 10)].into_iter().enumerate()
    {
        // Many ties, and zeros of both signs.
        let scores: Vec<f32> = random(seed as u64, num_tokens * num_experts)
            .into_iter()
            .map(|x| if seed % 2 == 0 { (x * 8.0).round() / 2.0 } else { x * 5.0 })
            .collect();
        for renormalize in [false, true] {
            let expected: Vec<Vec<(u32, f32)>> = scores
                .chunks(num_experts)
                .map(|scores| routes_of_token(scores, num_chosen, renormalize))
                .collect();
            for device in devices() {
                let experts = fresh(&device, num_tokens * num_chosen);
                let weights = fresh(&device, num_tokens * num_chosen);
                let args = Route {
                    num_tokens,
                    num_experts,
                    num_chosen,
                    renormalize,
                    scores: &put(&device, &scores),
                    experts: &experts,
                    weights: &weights,
                };
                route(&*device, &args).unwrap();
                let of = |i: usize| expected[i / num_chosen][i % num_chosen];
                let len = num_tokens * num_chosen;
                let chosen: Vec<u32> = experts.read().unwrap();
                assert_eq!(chosen, (0..len).map(|i| of(i).0).collect::<Vec<_>>());
                let shares: Vec<f32> = (0..len).map(|i| of(i).1).collect();
                assert_close(&weights.read().unwrap(), &shares, 1e-6, "weights");
                check_sorted(&device, &experts, &chosen, num_experts, num_chosen);
            }
        }
    }
}

#[track_caller]
fn check_sorted(
    device: &Arc<dyn Device>,
    experts: &DeviceVec<u32>,
    chosen: &[u32],
    num_experts: usize,
    num_chosen: usize,
) {
    let (indptr, rows) = (fresh(device, num_experts + 1), fresh(device, chosen.len()));
    let routes_of = fresh(device, chosen.len());
    let args = SortRoutes {
        num_tokens: chosen.len() / num_chosen,
        num_experts,
        num_chosen,
        experts,
        indptr: &indptr,
        rows: &rows,
        routes_of: &routes_of,
    };
    sort_routes(&**device, &args).unwrap();
    let (indptr, rows): (Vec<u32>, Vec<u32>) = (indptr.read().unwrap(), rows.read().unwrap());
    let routes_of: Vec<u32> = routes_of.read().unwrap();
    let mut sorted: Vec<usize> = (0..chosen.len()).collect();
    sorted.sort_by_key(|&i| chosen[i]);
    assert_eq!(rows, sorted.iter().map(|&i| (i / num_chosen) as u32).collect::<Vec<_>>());
    for (route, &i) in sorted.iter().enumerate() {
        assert_eq!(routes_of[i] as usize, route);
    }
    for (expert, &start) in (0u32..).zip(&indptr) {
        assert_eq!(start as usize, chosen.iter().filter(|&&other| other < expert).count());
    }
}

/// An expert a route, by expert.
fn products(
    (device, dtype): (&Arc<dyn Device>, HalfDtype),
    (n, k): (usize, usize),
    (x, weight): (&[f32], &[f32]),
    indptr: &[u32],
    rows_of: Option<&[u32]>,
) -> Vec<f32> {
    let num_routes = *indptr.last().unwrap() as usize;
    let rows_of = rows_of.map(|rows| put(device, rows));
    let out = fresh_half(device, dtype, num_routes * n);
    let args = GroupedLinear {
        num_routes,
        num_experts: indptr.len() - 1,
        n,
        k,
        x: &put_half(device, dtype, x),
        weight: &put_half(device, dtype, weight),
        indptr: &put(device, indptr),
        rows_of: rows_of.as_ref(),
        out: &out,
    };
    grouped_linear(&**device, &args).unwrap();
    out.read().unwrap()
}

#[test]
fn every_route_is_multiplied_by_its_expert() {
    // Routes of each expert: none, few, exactly a tile, more than one, and more experts than a block has threads.
    let many: Vec<u32> = (0..150).map(|i| u32::from(i % 3 == 0) * 2).collect();
    for (seed, (counts, n, k)) in
        [(vec![3], 8, 8), (vec![0, 5, 64, 0, 130, 1], 72, 136), (vec![0, 0, 65, 2], 131, 192), (many, 24, 64)]
            .into_iter()
            .enumerate()
    {
        let (seed, num_experts) = (seed as u64, counts.len());
        let mut indptr = vec![0u32];
        indptr.extend(counts.iter().scan(0, |sum, count| {
            *sum += count;
            Some(*sum)
        }));
        let num_routes = *indptr.last().unwrap() as usize;
        let num_rows = num_routes.div_ceil(2);
        let rows_of: Vec<u32> = (0..num_routes).map(|route| (route * 7 % num_rows) as u32).collect();
        let dtype = HALF_DTYPES[seed as usize % 2];
        let x = rounded(dtype, random(seed, num_routes * k));
        let weight = rounded(dtype, random(seed + 50, num_experts * n * k));
        let expected = |rows_of: Option<&[u32]>| {
            let mut out = Vec::new();
            for (route, expert) in
                (0..num_experts).flat_map(|e| vec![e; counts[e] as usize]).enumerate().collect::<Vec<_>>()
            {
                let x = &x[rows_of.map_or(route, |rows| rows[route] as usize) * k..][..k];
                let weight = &weight[expert * n * k..][..n * k];
                out.extend(weight.chunks(k).map(|w| w.iter().zip(x).map(|(w, x)| w * x).sum::<f32>()));
            }
            out
        };
        for rows_of in [None, Some(&rows_of[..])] {
            let expected = expected(rows_of);
            for device in devices() {
                let out = products((&device, dtype), (n, k), (&x, &weight), &indptr, rows_of);
                assert_close(&out, &expected, tolerance(dtype), "products");
            }
        }
    }
}

#[test]
fn a_product_does_not_depend_on_the_batch() {
    let (n, k) = (72, 264);
    let (x, weight) = (random(1, 200 * k), random(2, 3 * n * k));
    let device = (&device(3), HalfDtype::F16);
    let together = products(device, (n, k), (&x, &weight), &[0, 10, 140, 200], None);
    // Route 77 is of expert 1, in its second tile; alone, it is the only one.
    let alone = products(device, (n, k), (&x, &weight), &[0, 0, 1, 1], Some(&[77]));
    assert_eq!(alone, together[77 * n..][..n]);
}

#[test]
fn answers_are_mixed_in_the_order_of_the_experts() {
    let shapes = [(1, 1, 8), (5, 2, 1032), (9, 8, 64)];
    let cases = HALF_DTYPES.into_iter().flat_map(|dtype| shapes.map(|shape| (dtype, shape)));
    for (dtype, (num_tokens, num_chosen, size)) in cases {
        let num_routes = num_tokens * num_chosen;
        let answers = rounded(dtype, random(3, num_routes * size));
        let weights = random(4, num_routes);
        let routes_of: Vec<u32> = (0..num_routes).map(|i| ((i * 7 + 1) % num_routes) as u32).collect();
        let mut expected = vec![0.0; num_tokens * size];
        for (i, &route) in routes_of.iter().enumerate() {
            let mixed = &mut expected[i / num_chosen * size..][..size];
            for (mixed, x) in mixed.iter_mut().zip(&answers[route as usize * size..]) {
                *mixed = weights[i].mul_add(*x, *mixed);
            }
        }
        for device in devices() {
            let out = fresh_half(&device, dtype, num_tokens * size);
            let args = Combine {
                num_tokens,
                num_chosen,
                size,
                answers: &put_half(&device, dtype, &answers),
                weights: &put(&device, &weights),
                routes_of: &put(&device, &routes_of),
                out: &out,
            };
            combine(&*device, &args).unwrap();
            assert_eq!(out.read().unwrap(), rounded(dtype, expected.clone()));
        }
    }
}
