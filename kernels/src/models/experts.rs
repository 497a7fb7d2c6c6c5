//! A feed-forward part made of experts: a router picks a few for each row, their answers are mixed.
//!
//! Invariant: what a row gets depends on that row alone. Rows of one expert are computed together, which the ops
//! allow, and a row's answers are added in the order of the experts, whatever else the batch holds.

use crate::backend::Backend;
use crate::models::ExpertsConfig;
use crate::models::buffers::{Buffers, ExpertBuffers};
use crate::models::transformer::feed_forward;
use crate::models::weights::{Experts, Layers};

/// One row's use of one expert.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Route {
    expert: u32,
    row: u32,
    weight: f32,
}

/// `normed = sum over chosen experts of weight * expert(normed)`
pub(super) fn mix_experts<B: Backend>(weights: &Layers<B>, experts: &Experts<B>, buffers: &mut Buffers<B>) {
    let hidden_size = weights.config.hidden_size as usize;
    let intermediate_size = weights.config.intermediate_size as usize;
    let Buffers { normed, part, gate_up, gated, scratch, experts: routing, .. } = buffers;
    weights.backend.linear(scratch, normed, &experts.router, &mut routing.scores);
    route(&experts.config, routing);
    let ExpertBuffers { routes, gathered, answers, .. } = routing;
    part.fill(0.0);
    for routes in routes.chunk_by(|a, b| a.expert == b.expert) {
        let gathered = &mut gathered[..routes.len() * hidden_size];
        let answers = &mut answers[..gathered.len()];
        for (route, row) in routes.iter().zip(gathered.chunks_exact_mut(hidden_size)) {
            row.copy_from_slice(&normed[route.row as usize * hidden_size..][..hidden_size]);
        }
        let gate_up = &mut gate_up[..routes.len() * 2 * intermediate_size];
        let gated = &mut gated[..routes.len() * intermediate_size];
        let expert = &experts.experts[routes[0].expert as usize];
        feed_forward(weights, expert, scratch, gathered, gate_up, gated, answers);
        for (route, answer) in routes.iter().zip(answers.chunks_exact(hidden_size)) {
            let mixed = &mut part[route.row as usize * hidden_size..][..hidden_size];
            for (mixed, x) in mixed.iter_mut().zip(answer) {
                *mixed += route.weight * x;
            }
        }
    }
    std::mem::swap(normed, part);
}

/// Fills `routes` from `scores`, by expert and then by row: the highest scores of each row, the lower expert on ties.
fn route(config: &ExpertsConfig, buffers: &mut ExpertBuffers) {
    let ExpertBuffers { scores, ranking, routes, .. } = buffers;
    routes.clear();
    for (row, scores) in scores.chunks_exact(config.num_experts as usize).enumerate() {
        ranking.clear();
        ranking.extend(scores.iter().copied().zip(0..));
        ranking.sort_unstable_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
        let highest = ranking[0].0;
        let weight = |score: f32| f64::from(score - highest).exp();
        let chosen = &ranking[..config.num_experts_per_token as usize];
        // The order of the sum is fixed, since the ranking is.
        let summed = if config.renormalize { chosen } else { ranking.as_slice() };
        let total: f64 = summed.iter().map(|&(score, _)| weight(score)).sum();
        routes.extend(chosen.iter().map(|&(score, expert)| Route {
            expert,
            row: row as u32,
            weight: (weight(score) / total) as f32,
        }));
    }
    routes.sort_unstable_by_key(|route| (route.expert, route.row));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(renormalize: bool, scores: &[f32], expected: &[(u32, u32, f32)]) {
        let config = ExpertsConfig { num_experts: 4, num_experts_per_token: 2, renormalize };
        let mut buffers = ExpertBuffers { scores: scores.to_vec(), ..ExpertBuffers::default() };
        route(&config, &mut buffers);
        let route = |&(expert, row, weight)| Route { expert, row, weight };
        assert_eq!(buffers.routes, expected.iter().map(route).collect::<Vec<_>>());
    }

    #[test]
    fn the_highest_scores_win() {
        check(true, &[0.0, 5.0, 5.0, 1.0], &[(1, 0, 0.5), (2, 0, 0.5)]);
        check(false, &[1.0; 4], &[(0, 0, 0.25), (1, 0, 0.25)]);
        check(
            true,
            &[9.0, 9.0, 1.0, 1.0, -9.0, 0.0, 0.0, -9.0],
            &[(0, 0, 0.5), (1, 0, 0.5), (1, 1, 0.5), (2, 1, 0.5)],
        );
    }
}
