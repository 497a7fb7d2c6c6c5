//! Chooses the next token from a row of logits.
//!
//! Invariant: the choice is a function of the logits, the parameters and the position alone. The random number of a
//! draw is computed from `(seed, position)`, there is no generator with a state, so neither the batch nor a restart
//! can change a draw. What a grammar allows and how often a token was used comes in as a list: neither is found out here.
//! The kernels of GPUs (`cuda/sample.cu`, `cuda/penalties.cu`) give what these functions give.

use std::cell::RefCell;

use crate::step::{SamplingParams, TokenUse};

/// The logits or the parameters cannot be sampled from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SampleError {
    #[error("the logits of token id {token_id} are not finite")]
    NotFinite { token_id: u32 },
    #[error("there are no logits to sample from")]
    Empty,
    #[error("no token is left to sample from")]
    NoCandidate,
    #[error("the temperature is not a number of at least zero")]
    Temperature,
    #[error("top_p is not above zero and at most one")]
    TopP,
    #[error("min_p is not between zero and one")]
    MinP,
    #[error("the penalties are not finite, or that of repetition is not above zero")]
    Penalties,
}

/// Logits looked at as one: a block without a candidate costs a comparison.
const BLOCK_LEN: usize = 128;

/// Tokens less likely than the best one by this factor, as its logarithm, are no candidates: all of a vocabulary of
/// 2^20 together weigh less than 2^-24, which an f32 does not tell from nothing.
const MAX_LOG_RATIO: f32 = 31.0;

thread_local! {
    /// Kept between draws, so that a draw allocates nothing.
    static CANDIDATES: RefCell<Candidates> = RefCell::default();
}

/// What a draw is made from.
#[derive(Default)]
struct Candidates {
    list: Vec<Candidate>,
    weights: Vec<f64>,
}

/// How a token is chosen, checked.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Choice {
    Greedy,
    /// Draws among the tokens whose logit is at most `margin` below the highest one.
    Draw {
        margin: f32,
    },
}

impl Choice {
    pub(crate) fn of(params: &SamplingParams) -> Result<Self, SampleError> {
        let penalties = [params.repetition_penalty, params.presence_penalty, params.frequency_penalty];
        if !(penalties.iter().all(|penalty| penalty.is_finite()) && params.repetition_penalty > 0.0) {
            return Err(SampleError::Penalties);
        }
        if !(params.temperature >= 0.0 && params.temperature.is_finite()) {
            return Err(SampleError::Temperature);
        }
        if params.temperature == 0.0 || params.top_k == 1 {
            return Ok(Self::Greedy);
        }
        if !(params.top_p > 0.0 && params.top_p <= 1.0) {
            return Err(SampleError::TopP);
        }
        if !(0.0..=1.0).contains(&params.min_p) {
            return Err(SampleError::MinP);
        }
        // The share of the highest logit is one, so `min_p` is a distance from it.
        let log_ratio = (-params.min_p.ln()).clamp(0.0, MAX_LOG_RATIO);
        Ok(Self::Draw { margin: log_ratio * params.temperature })
    }
}

/// Takes the logits of tokens that were used before down, each token of the list once; none is in it twice.
pub fn penalize(logits: &mut [f32], params: &SamplingParams, uses: &[TokenUse]) {
    for token in uses {
        let logit = &mut logits[token.token_id as usize];
        let repeated = if *logit > 0.0 {
            *logit / params.repetition_penalty
        } else {
            *logit * params.repetition_penalty
        };
        let times = token.num_in_answer as f32;
        let present = if token.num_in_answer > 0 { params.presence_penalty } else { 0.0 };
        *logit = (-params.frequency_penalty).mul_add(times, repeated) - present;
    }
}

/// Leaves only tokens whose bit is set: token `i` has bit `i % 32` of word `i / 32`.
pub fn allow(logits: &mut [f32], allowed: &[u32]) {
    for (logits, word) in logits.chunks_mut(32).zip(allowed) {
        for (bit, logit) in logits.iter_mut().enumerate() {
            if word >> bit & 1 == 0 {
                *logit = f32::NEG_INFINITY;
            }
        }
    }
}

/// Chooses the token at `position`, walking the vocabulary once. The logits are [penalized](penalize) before.
pub fn sample(logits: &[f32], params: &SamplingParams, position: u32) -> Result<u32, SampleError> {
    let Choice::Draw { margin } = Choice::of(params)? else {
        return Ok(walk(logits, None, |_| {})?.id);
    };
    CANDIDATES.with_borrow_mut(|Candidates { list, weights }| {
        list.clear();
        let best = walk(logits, Some(margin), |candidate| list.push(candidate))?;
        // The best one was found after some of the list.
        list.retain(|candidate| candidate.logit >= best.logit - margin);
        let top_k = params.top_k as usize;
        if top_k > 0 && top_k < list.len() {
            list.select_nth_unstable_by(top_k - 1, Candidate::order);
            list.truncate(top_k);
        }
        // Draws walk the list from the most likely on, so the order must not depend on the selection above.
        list.sort_unstable_by(Candidate::order);
        weights.clear();
        let weight = |logit: f32| f64::from((logit - best.logit) / params.temperature).exp();
        weights.extend(list.iter().map(|candidate| weight(candidate.logit)));
        Ok(list[draw(weights, params.top_p, uniform(params.seed, position))].id)
    })
}

/// Finds the highest logit, the lowest id on ties, and shows every logit that is within `margin` of the highest one
/// so far. Negative infinity is a legal logit, but not for every token.
fn walk(
    logits: &[f32],
    margin: Option<f32>,
    mut show: impl FnMut(Candidate),
) -> Result<Candidate, SampleError> {
    let mut best: Option<Candidate> = None;
    for (block, values) in (0u32..).zip(logits.chunks(BLOCK_LEN)) {
        // Written without early exits, so that it becomes vector instructions.
        let (mut max, mut is_bad) = (f32::NEG_INFINITY, false);
        for &value in values {
            max = if value > max { value } else { max };
            is_bad |= value.is_nan() | (value == f32::INFINITY);
        }
        let with_id = || (block * BLOCK_LEN as u32..).zip(values).map(|(id, &logit)| Candidate { id, logit });
        if is_bad {
            let bad = with_id().find(|c| c.logit.is_nan() || c.logit == f32::INFINITY).map_or(0, |c| c.id);
            return Err(SampleError::NotFinite { token_id: bad });
        }
        if max > best.map_or(f32::NEG_INFINITY, |best| best.logit) {
            best = with_id().find(|candidate| candidate.logit == max);
        }
        if let (Some(best), Some(margin)) = (best, margin)
            && max >= best.logit - margin
        {
            with_id().filter(|candidate| candidate.logit >= best.logit - margin).for_each(&mut show);
        }
    }
    best.ok_or(if logits.is_empty() { SampleError::Empty } else { SampleError::NoCandidate })
}

/// Cuts the weights where their share reaches `top_p`, then finds the weight that `uniform` falls on.
fn draw(weights: &[f64], top_p: f32, uniform: f64) -> usize {
    let total: f64 = weights.iter().sum();
    let mut kept = weights.len();
    let mut kept_sum = 0.0;
    for (i, weight) in weights.iter().enumerate() {
        kept_sum += weight;
        if kept_sum >= f64::from(top_p) * total {
            kept = i + 1;
            break;
        }
    }
    let target = uniform * kept_sum;
    let mut sum = 0.0;
    for (i, weight) in weights[..kept].iter().enumerate() {
        sum += weight;
        if target < sum {
            return i;
        }
    }
    // Rounding may leave the target at the very end: then it is the last one with any weight.
    weights[..kept].iter().rposition(|&weight| weight > 0.0).expect("the first weight is one")
}

/// A number in [0, 1) with 53 random bits, from two rounds of SplitMix64.
fn uniform(seed: u64, position: u32) -> f64 {
    let bits = split_mix(split_mix(seed) ^ u64::from(position));
    (bits >> 11) as f64 / (1u64 << 53) as f64
}

fn split_mix(seed: u64) -> u64 {
    let mut z = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[derive(Clone, Copy)]
struct Candidate {
    id: u32,
    logit: f32,
}

impl Candidate {
    /// Most likely first; the lower id on ties, so that the order is total.
    fn order(a: &Self, b: &Self) -> std::cmp::Ordering {
        b.logit.total_cmp(&a.logit).then(a.id.cmp(&b.id))
    }
}

#[cfg(test)]
mod tests;
