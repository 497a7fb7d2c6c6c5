//! What is drawn, how often, and what cannot be.

use super::*;

fn params(temperature: f32, top_k: u32, top_p: f32, seed: u64) -> SamplingParams {
    SamplingParams { temperature, top_p, top_k, seed, ..SamplingParams::GREEDY }
}

/// How often each of four tokens is drawn over many positions.
fn histogram(logits: &[f32; 4], params: &SamplingParams) -> [u32; 4] {
    let mut counts = [0; 4];
    for position in 0..10_000 {
        counts[sample(logits, params, position).unwrap() as usize] += 1;
    }
    counts
}

#[test]
fn greedy_takes_the_lowest_id_on_ties() {
    assert_eq!(sample(&[1.0, 3.0, 3.0, 2.0], &SamplingParams::GREEDY, 5), Ok(1));
    assert_eq!(sample(&[-0.0, 0.0], &SamplingParams::GREEDY, 5), Ok(0));
    assert_eq!(sample(&[f32::NEG_INFINITY, -3.0], &SamplingParams::GREEDY, 5), Ok(1));
}

#[test]
fn draws_follow_the_probabilities() {
    let logits = [0.1f32.ln(), 0.2f32.ln(), 0.3f32.ln(), 0.4f32.ln()];
    for seed in 0..3 {
        let counts = histogram(&logits, &params(1.0, 0, 1.0, seed));
        for (count, expected) in counts.iter().zip([1000i32, 2000, 3000, 4000]) {
            assert!((*count as i32 - expected).abs() < 200, "seed {seed}: {counts:?}");
        }
    }
}

#[test]
fn top_k_and_top_p_cut_the_tail() {
    let logits = [0.1f32.ln(), 0.2f32.ln(), 0.3f32.ln(), 0.4f32.ln()];
    let counts = histogram(&logits, &params(1.0, 2, 1.0, 1));
    assert!(counts[0] == 0 && counts[1] == 0 && counts[2] > 3500 && counts[3] > 5000, "{counts:?}");
    let counts = histogram(&logits, &params(1.0, 0, 0.65, 1));
    assert!(counts[0] == 0 && counts[1] == 0 && counts[2] > 3500 && counts[3] > 5000, "{counts:?}");
    assert_eq!(histogram(&logits, &params(1.0, 1, 1.0, 1)), [0, 0, 0, 10_000]);
    assert_eq!(histogram(&logits, &params(1e-30, 0, 1.0, 1)), [0, 0, 0, 10_000]);
}

#[test]
fn a_draw_depends_on_seed_and_position_only() {
    let logits: Vec<f32> = (0..1000).map(|i| (i as f32 * 0.7).sin()).collect();
    let draw = |seed, position| sample(&logits, &params(0.8, 50, 0.95, seed), position).unwrap();
    assert_eq!(draw(7, 100), draw(7, 100));
    let by_position: Vec<u32> = (0..20).map(|position| draw(7, position)).collect();
    let by_seed: Vec<u32> = (0..20).map(|seed| draw(seed, 7)).collect();
    assert!(by_position.iter().any(|&id| id != by_position[0]));
    assert!(by_seed.iter().any(|&id| id != by_seed[0]));
}

#[test]
fn blocks_and_margins_change_nothing() {
    // The best logit is in a late block, ties are in two of them, and most of the tail is out of the margin.
    let mut logits: Vec<f32> = (0..1000).map(|i| -(i % 97) as f32).collect();
    (logits[700], logits[900]) = (5.0, 5.0);
    assert_eq!(sample(&logits, &SamplingParams::GREEDY, 0), Ok(700));
    let hot: Vec<u32> = (0..500).map(|i| sample(&logits, &params(1e6, 0, 1.0, 1), i).unwrap()).collect();
    assert!(hot.iter().any(|&id| id < 128) && hot.iter().any(|&id| id > 900), "all are as likely");
    let cold: Vec<u32> = (0..100).map(|i| sample(&logits, &params(0.1, 0, 1.0, 1), i).unwrap()).collect();
    assert!(cold.iter().all(|id| [700, 900].contains(id)) && cold.contains(&700) && cold.contains(&900));
}

#[test]
fn what_cannot_be_sampled_is_an_error() {
    for bad in [f32::NAN, f32::INFINITY] {
        assert_eq!(
            sample(&[0.0, bad], &SamplingParams::GREEDY, 0),
            Err(SampleError::NotFinite { token_id: 1 })
        );
    }
    assert_eq!(sample(&[], &SamplingParams::GREEDY, 0), Err(SampleError::Empty));
    let none = [f32::NEG_INFINITY; 2];
    assert_eq!(sample(&none, &SamplingParams::GREEDY, 0), Err(SampleError::NoCandidate));
    assert_eq!(sample(&none, &params(1.0, 0, 1.0, 0), 0), Err(SampleError::NoCandidate));
    assert_eq!(sample(&[0.0], &params(f32::NAN, 0, 1.0, 0), 0), Err(SampleError::Temperature));
    assert_eq!(sample(&[0.0], &params(f32::INFINITY, 0, 1.0, 0), 0), Err(SampleError::Temperature));
    assert_eq!(sample(&[0.0], &params(-1.0, 0, 1.0, 0), 0), Err(SampleError::Temperature));
    assert_eq!(sample(&[0.0], &params(1.0, 0, 0.0, 0), 0), Err(SampleError::TopP));
    for min_p in [-0.1, 1.1, f32::NAN] {
        let params = SamplingParams { min_p, ..params(1.0, 0, 1.0, 0) };
        assert_eq!(sample(&[0.0], &params, 0), Err(SampleError::MinP));
    }
    for repetition_penalty in [0.0, -1.0, f32::NAN, f32::INFINITY] {
        let params = SamplingParams { repetition_penalty, ..SamplingParams::GREEDY };
        assert_eq!(sample(&[0.0], &params, 0), Err(SampleError::Penalties));
    }
    let params = SamplingParams { presence_penalty: f32::NAN, ..SamplingParams::GREEDY };
    assert_eq!(sample(&[0.0], &params, 0), Err(SampleError::Penalties));
    let params = SamplingParams { frequency_penalty: f32::INFINITY, ..SamplingParams::GREEDY };
    assert_eq!(sample(&[0.0], &params, 0), Err(SampleError::Penalties));
}

#[test]
fn min_p_cuts_by_the_share_of_the_best() {
    let logits = [0.1f32.ln(), 0.2f32.ln(), 0.3f32.ln(), 0.4f32.ln()];
    let drawn = |temperature, min_p| {
        let mut drawn = [false; 4];
        for position in 0..2000 {
            let params = SamplingParams { min_p, ..params(temperature, 0, 1.0, 3) };
            let id = sample(&logits, &params, position).unwrap();
            drawn[id as usize] = true;
        }
        drawn
    };
    assert_eq!(drawn(1.0, 0.0), [true; 4]);
    assert_eq!(drawn(1.0, 0.3), [false, true, true, true]);
    assert_eq!(drawn(1.0, 0.7), [false, false, true, true]);
    // Shares of the best are 1/16, 1/4, 9/16 and 1 at half the temperature.
    assert_eq!(drawn(0.5, 0.3), [false, false, true, true]);
    assert_eq!(drawn(1.0, 1.0), [false, false, false, true]);
    let ties = [2.0, 1.0, 2.0];
    let only_best = SamplingParams { min_p: 1.0, ..params(1.0, 0, 1.0, 1) };
    let tied: Vec<u32> = (0..100).map(|i| sample(&ties, &only_best, i).unwrap()).collect();
    assert!(tied.contains(&0) && tied.contains(&2) && !tied.contains(&1));
}

#[test]
fn tokens_that_were_used_are_taken_down() {
    let params = SamplingParams {
        repetition_penalty: 2.0,
        presence_penalty: 0.5,
        frequency_penalty: 0.25,
        ..SamplingParams::GREEDY
    };
    let of = |token_id, num_in_answer| TokenUse { token_id, num_in_answer };
    let mut logits = [4.0, -4.0, 4.0, -4.0, 4.0, f32::NEG_INFINITY];
    let before = logits;
    let uses = [of(0, 0), of(1, 0), of(2, 1), of(3, 3), of(5, 2)];
    penalize(&mut logits, &params, &uses);
    assert_eq!(logits, [2.0, -8.0, 1.25, -9.25, 4.0, f32::NEG_INFINITY]);
    logits = before;
    penalize(&mut logits, &SamplingParams::GREEDY, &uses);
    assert_eq!(logits, before);
}

#[test]
fn only_allowed_tokens_are_left() {
    let mut logits = vec![1.0; 70];
    allow(&mut logits, &[1 << 31, 0, 1 << 5 | 1 << 6]);
    let left: Vec<usize> = (0..70).filter(|&id| logits[id] == 1.0).collect();
    assert_eq!(left, [31, 69]);
    let greedy = sample(&logits, &SamplingParams::GREEDY, 0);
    assert_eq!(greedy, Ok(31));
    allow(&mut logits, &[0; 3]);
    assert_eq!(sample(&logits, &SamplingParams::GREEDY, 0), Err(SampleError::NoCandidate));
}
