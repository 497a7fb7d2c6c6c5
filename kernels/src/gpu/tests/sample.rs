//! What the device draws is what the CPU draws, in any batch and order of threads.

use super::*;
use crate::gpu::ops::{AllowedTokens, RowSampling, Sample, sample, sample_error};
use crate::sample::{SampleError, allow};
use crate::step::SamplingParams;

#[derive(Clone)]
struct Case {
    logits: Vec<f32>,
    allowed: Option<Vec<u32>>,
    params: SamplingParams,
    position: u32,
}

fn params(temperature: f32, top_k: u32, top_p: f32, seed: u64) -> SamplingParams {
    SamplingParams { temperature, top_p, top_k, seed, ..SamplingParams::GREEDY }
}

impl Case {
    fn new(logits: &[f32], params: SamplingParams) -> Self {
        Self { logits: logits.to_vec(), allowed: None, params, position: 17 }
    }

    /// As the CPU has it.
    fn expected(&self) -> Result<u32, SampleError> {
        let mut logits = self.logits.clone();
        if let Some(allowed) = &self.allowed {
            allow(&mut logits, allowed);
        }
        crate::sample::sample(&logits, &self.params, self.position)
    }
}

/// The rows lie in the batch in another order and with others between them.
fn draw(device: &Arc<dyn Device>, cases: &[Case]) -> Vec<Result<u32, SampleError>> {
    let (num_rows, vocab_size) = (cases.len(), cases[0].logits.len());
    let rows_of: Vec<u32> = (0..num_rows as u32).rev().map(|row| row * 2).collect();
    let mut logits = vec![f32::NAN; 2 * num_rows * vocab_size];
    let (mut masks, mut mask_of) = (vec![0; vocab_size.div_ceil(32)], Vec::new());
    for (case, row) in cases.iter().zip(&rows_of) {
        logits[*row as usize * vocab_size..][..vocab_size].copy_from_slice(&case.logits);
        mask_of.push(case.allowed.as_ref().map_or(-1, |_| (masks.len() / vocab_size.div_ceil(32)) as i32));
        masks.extend(case.allowed.iter().flatten());
    }
    let sampling: Vec<RowSampling> =
        cases.iter().map(|case| RowSampling::new(&case.params, case.position).unwrap()).collect();
    let (token_ids, errors) = (fresh(device, num_rows), fresh(device, num_rows));
    let has_masks = masks.len() > vocab_size.div_ceil(32);
    let (masks, mask_of) = (put(device, &masks), put(device, &mask_of));
    let sampling = put(device, &sampling);
    let args = Sample {
        num_rows,
        vocab_size,
        logits: &put(device, &logits),
        rows_of: Some(&put(device, &rows_of)),
        sampling: (&sampling).into(),
        allowed: has_masks.then_some(AllowedTokens { masks: &masks, mask_of: &mask_of }),
        token_ids: (&token_ids).into(),
        errors: (&errors).into(),
    };
    sample(&**device, &args).unwrap();
    let (token_ids, errors): (Vec<u32>, Vec<u32>) = (token_ids.read().unwrap(), errors.read().unwrap());
    token_ids.into_iter().zip(errors).map(|(id, error)| sample_error(error).map(|()| id)).collect()
}

#[track_caller]
fn check(cases: &[Case]) {
    let expected: Vec<_> = cases.iter().map(Case::expected).collect();
    for device in devices() {
        let drawn = draw(&device, cases);
        for (i, (drawn, expected)) in drawn.iter().zip(&expected).enumerate() {
            let Case { params, position, .. } = &cases[i];
            assert_eq!(drawn, expected, "row {i}: {params:?}, position {position}");
        }
    }
}

fn mixed_cases(vocab_size: usize, num_rows: usize) -> Vec<Case> {
    const TEMPERATURES: [f32; 6] = [1.0, 0.0, 0.6, 1e-4, 3.0, 1e3];
    const TOP_KS: [u32; 7] = [0, 0, 50, 1, 2, 3000, 1 << 30];
    const TOP_PS: [f32; 5] = [1.0, 0.9, 0.5, 1e-9, 0.999];
    const MIN_PS: [f32; 4] = [0.0, 0.0, 0.05, 1.0];
    const SPREADS: [f32; 3] = [8.0, 1.0, 25.0];
    let case = |i: usize| {
        let mut logits = random(i as u64 + 1, vocab_size);
        for (id, logit) in logits.iter_mut().enumerate() {
            *logit *= SPREADS[i % SPREADS.len()];
            if (id + i).is_multiple_of(5) {
                *logit = (*logit * 4.0).round() / 4.0;
            }
            if (id * 7 + i).is_multiple_of(11) && vocab_size > 1 {
                *logit = f32::NEG_INFINITY;
            }
        }
        let params = SamplingParams {
            temperature: TEMPERATURES[i % TEMPERATURES.len()],
            top_k: TOP_KS[i % TOP_KS.len()],
            top_p: TOP_PS[i % TOP_PS.len()],
            min_p: MIN_PS[i / 3 % MIN_PS.len()],
            seed: i as u64 * 77,
            ..SamplingParams::GREEDY
        };
        Case { position: i as u32 * 13, ..Case::new(&logits, params) }
    };
    (0..num_rows).map(case).collect()
}

#[test]
fn draws_what_the_cpu_draws() {
    for (vocab_size, num_rows) in [(1, 3), (2, 10), (31, 20), (1003, 40), (5001, 40)] {
        check(&mixed_cases(vocab_size, num_rows));
    }
}

#[test]
fn a_large_vocabulary_is_drawn_from() {
    let cases = mixed_cases(151_937, 8);
    let expected: Vec<_> = cases.iter().map(Case::expected).collect();
    assert_eq!(draw(&device(4), &cases), expected);
}

#[test]
fn ties_go_by_id() {
    let equal = vec![-0.25; 6000];
    let two_values: Vec<f32> = (0..6000).map(|id| if id % 3 == 0 { 2.0 } else { 1.0 }).collect();
    let zeros: Vec<f32> = (0..6000).map(|id| if id % 2 == 0 { -0.0 } else { 0.0 }).collect();
    // Hardly apart, so in one bin, and far below one that outweighs them.
    let mut close: Vec<f32> = (0..6000u32).map(|id| f32::from_bits(0x3f80_0000 + id * 7 % 1000)).collect();
    close[777] = 20.0;
    let mut cases = Vec::new();
    for (i, logits) in [&equal, &two_values, &zeros, &close].into_iter().enumerate() {
        for (j, (top_k, top_p)) in
            [(0, 1.0), (0, 0.5), (2500, 1.0), (2500, 0.7), (4000, 1.0)].into_iter().enumerate()
        {
            let seed = (i * 10 + j) as u64;
            cases.push(Case::new(logits, params(1.0, top_k, top_p, seed)));
            cases.push(Case::new(logits, params(1e4, top_k, top_p, seed)));
        }
        cases.push(Case::new(logits, SamplingParams::GREEDY));
    }
    check(&cases);
}

#[test]
fn extremes_are_drawn_from() {
    let wide = [f32::MAX, -f32::MAX, 0.0, 3e38, -3e38, f32::NEG_INFINITY, 1e-45, -1e-45];
    let tiny = [0.0, 1e-45, 2e-45, 3e-45, -1e-45, f32::MIN_POSITIVE];
    let mut cases = Vec::new();
    for (seed, temperature) in [1e-45, 1e-38, 1e-30, 1.0, 1e30, 3e38, f32::MAX].into_iter().enumerate() {
        for position in 0..3 {
            let case = Case::new(&wide, params(temperature, 0, 1.0, seed as u64));
            cases.push(Case { position, ..case });
        }
    }
    check(&cases);
    let cases = [1e-44, 1e-38, 1e-30, 1.0];
    check(&cases.map(|temperature| Case::new(&tiny, params(temperature, 4, 0.9, 1))));
}

#[test]
fn draws_follow_the_probabilities() {
    const NUM_DRAWS: usize = 3000;
    let logits: Vec<f32> = random(5, 24).into_iter().map(|x| 2.0 * x).collect();
    let cases: Vec<Case> = (0..NUM_DRAWS as u32)
        .map(|position| Case { position, ..Case::new(&logits, params(0.8, 0, 1.0, 3)) })
        .collect();
    let drawn = draw(&device(0), &cases);
    let mut counts = [0.0; 24];
    for (drawn, case) in drawn.iter().zip(&cases) {
        counts[(*drawn).unwrap() as usize] += 1.0;
        assert_eq!(*drawn, case.expected());
    }
    let weights: Vec<f64> = logits.iter().map(|&logit| (f64::from(logit) / 0.8).exp()).collect();
    let total: f64 = weights.iter().sum();
    let chi_square: f64 = counts
        .iter()
        .zip(&weights)
        .map(|(count, weight)| {
            let expected = weight / total * NUM_DRAWS as f64;
            (count - expected) * (count - expected) / expected
        })
        .sum();
    // Of 23 degrees of freedom: above 49.7 once in a thousand seeds.
    assert!(chi_square < 49.7, "{chi_square}: {counts:?}");
}

#[test]
fn grammars_are_kept_to() {
    let logits: Vec<f32> = random(9, 1003).into_iter().map(|x| 5.0 * x).collect();
    let bit = |ids: &[usize]| {
        let mut words = vec![0; 1003usize.div_ceil(32)];
        for id in ids {
            words[id / 32] |= 1 << (id % 32);
        }
        Some(words)
    };
    let mut bad = logits.clone();
    (bad[0], bad[500], bad[501]) = (f32::NAN, f32::INFINITY, f32::NEG_INFINITY);
    let mut cases = Vec::new();
    for (seed, temperature) in [0.0, 1.0, 0.3].into_iter().enumerate() {
        let case = Case::new(&logits, params(temperature, 0, 0.95, seed as u64));
        for ids in [&[1002][..], &[0], &[31, 32, 63], &(100..900).collect::<Vec<_>>(), &[]] {
            cases.push(Case { allowed: bit(ids), ..case.clone() });
        }
        let bad = Case { logits: bad.clone(), ..case.clone() };
        // What is not allowed is not looked at.
        cases.push(Case { allowed: bit(&[7, 8, 501]), ..bad.clone() });
        cases.push(Case { allowed: bit(&[501]), ..bad.clone() });
        cases.push(Case { allowed: bit(&[7, 500]), ..bad.clone() });
        cases.push(case);
    }
    assert_eq!(cases[0].expected(), Ok(1002));
    assert_eq!(cases[4].expected(), Err(SampleError::NoCandidate));
    assert_eq!(cases[7].expected(), Err(SampleError::NotFinite { token_id: 500 }));
    check(&cases);
}

#[test]
fn bad_rows_leave_others_alone() {
    let good: Vec<f32> = random(2, 300);
    let with = |changes: &[(usize, f32)]| {
        let mut logits = good.clone();
        for &(id, value) in changes {
            logits[id] = value;
        }
        logits
    };
    let rows = [
        good.clone(),
        with(&[(299, f32::NAN)]),
        with(&[(0, f32::INFINITY)]),
        with(&[(250, f32::NAN), (130, -f32::NAN), (131, f32::INFINITY)]),
        vec![f32::NEG_INFINITY; 300],
        vec![f32::NAN; 300],
        good.clone(),
    ];
    let cases: Vec<Case> = rows
        .iter()
        .flat_map(|row| [Case::new(row, SamplingParams::GREEDY), Case::new(row, params(1.0, 0, 0.9, 5))])
        .collect();
    assert_eq!(cases[6].expected(), Err(SampleError::NotFinite { token_id: 130 }));
    assert_eq!(cases[9].expected(), Err(SampleError::NoCandidate));
    check(&cases);
}

#[test]
fn a_draw_does_not_depend_on_the_batch() {
    let device = device(2);
    let cases = mixed_cases(2501, 12);
    let together = draw(&device, &cases);
    let reversed: Vec<Case> = cases.iter().rev().cloned().collect();
    assert!(draw(&device, &reversed).iter().rev().eq(&together));
    for (case, together) in cases.iter().zip(&together) {
        assert_eq!(draw(&device, std::slice::from_ref(case)), [*together]);
    }
}

#[test]
fn rows_are_skipped() {
    let greedy = RowSampling::new(&SamplingParams::GREEDY, 0).unwrap();
    for device in devices() {
        let (token_ids, errors) = (put(&device, &[7, 8, 9]), put(&device, &[5, 6, 7]));
        let sampling = put(&device, &[greedy, RowSampling::SKIP, greedy]);
        let args = Sample {
            num_rows: 3,
            vocab_size: 2,
            logits: &put(&device, &[0.0, 1.0, 1.0, 0.0, 0.0, 1.0]),
            rows_of: None,
            sampling: (&sampling).into(),
            allowed: None,
            token_ids: (&token_ids).into(),
            errors: (&errors).into(),
        };
        sample(&*device, &args).unwrap();
        assert_eq!(token_ids.read().unwrap(), [1, 8, 1]);
        assert_eq!(errors.read().unwrap(), [0, 6, 0]);
    }
}
