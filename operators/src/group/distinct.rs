//! How many tokens must be computed if every prefix is computed once: the measure of all reuse.
//!
//! That is the number of different prefixes of all prompts. [`distinct_tokens`] counts them exactly and holds all
//! prompts; [`DistinctTokens`] estimates the number for a stream of any length, within half a percent, in constant
//! memory (HyperLogLog with Ertl's estimator, arXiv 1702.01284). Neither knows what an engine computes.

use std::sync::Arc;

use super::tree::common_len;

/// Two to this power registers: the standard error is 1.04 divided by the root of their number, 0.2 %.
const PRECISION: u32 = 18;
/// Bits of a hash that are left to rank.
const RANK_BITS: u32 = 64 - PRECISION;

/// Tokens in the radix tree of all prompts.
pub fn distinct_tokens(prompts: &[Arc<[u32]>]) -> u64 {
    let mut sorted: Vec<&Arc<[u32]>> = prompts.iter().collect();
    sorted.sort();
    let shared: usize = sorted.windows(2).map(|pair| common_len(pair[0], pair[1])).sum();
    (prompts.iter().map(|ids| ids.len()).sum::<usize>() - shared) as u64
}

/// An estimate of [`distinct_tokens`] that forgets the prompts.
#[derive(Debug)]
pub struct DistinctTokens {
    /// `[1 << PRECISION]`: the highest rank seen; a hash has rank r with chance 2⁻ʳ.
    registers: Vec<u8>,
    /// How many registers have each rank.
    num_ranked: Vec<u64>,
}

impl Default for DistinctTokens {
    fn default() -> Self {
        let mut num_ranked = vec![0; RANK_BITS as usize + 2];
        num_ranked[0] = 1 << PRECISION;
        Self { registers: vec![0; 1 << PRECISION], num_ranked }
    }
}

impl DistinctTokens {
    /// Counts all prefixes of a prompt.
    pub fn insert(&mut self, token_ids: &[u32]) {
        let mut prefix = 0_u64;
        for &token_id in token_ids {
            prefix = (prefix ^ u64::from(token_id)).wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            prefix ^= prefix >> 29;
            let hash = (prefix ^ (prefix >> 32)).wrapping_mul(0xd6e8_feb8_6659_fd93);
            let rank = ((hash << PRECISION).leading_zeros().min(RANK_BITS) + 1) as u8;
            let register = &mut self.registers[(hash >> RANK_BITS) as usize];
            if rank > *register {
                self.num_ranked[*register as usize] -= 1;
                self.num_ranked[rank as usize] += 1;
                *register = rank;
            }
        }
    }

    pub fn estimate(&self) -> u64 {
        let num_registers = f64::from(1 << PRECISION);
        let share = |rank: usize| self.num_ranked[rank] as f64 / num_registers;
        let last = RANK_BITS as usize;
        let mut sum = num_registers * tau(1.0 - share(last + 1));
        for rank in (1..=last).rev() {
            sum = 0.5 * (sum + self.num_ranked[rank] as f64);
        }
        sum += num_registers * sigma(share(0));
        (num_registers * num_registers / (2.0 * std::f64::consts::LN_2 * sum)).round() as u64
    }
}

/// Corrects for registers without a hash; infinite if that is all of them.
fn sigma(x: f64) -> f64 {
    if x >= 1.0 {
        return f64::INFINITY;
    }
    let (mut x, mut y, mut sum) = (x, 1.0, x);
    loop {
        x *= x;
        let before = sum;
        sum += x * y;
        y += y;
        if sum <= before {
            return sum;
        }
    }
}

/// Corrects for registers that are full.
fn tau(x: f64) -> f64 {
    if x <= 0.0 || x >= 1.0 {
        return 0.0;
    }
    let (mut x, mut y, mut sum) = (x, 1.0, 1.0 - x);
    loop {
        x = x.sqrt();
        let before = sum;
        y *= 0.5;
        sum -= (1.0 - x) * (1.0 - x) * y;
        if sum >= before {
            return sum / 3.0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_estimate_is_near_the_exact_count_at_any_size() {
        for num_prompts in [0, 1, 30, 1000, 20_000] {
            let prompt = |index: u32| -> Arc<[u32]> {
                (0..100).map(|at| if at < 40 { index % 50 } else { index * 100 + at }).collect()
            };
            let prompts: Vec<Arc<[u32]>> = (0..num_prompts).map(prompt).collect();
            let mut estimated = DistinctTokens::default();
            prompts.iter().for_each(|prompt| estimated.insert(prompt));
            prompts.iter().for_each(|prompt| estimated.insert(prompt));
            let (exact, estimate) = (distinct_tokens(&prompts) as f64, estimated.estimate() as f64);
            assert!((estimate - exact).abs() <= 0.005 * exact + 0.5, "{estimate} for {exact}");
        }
    }
}
