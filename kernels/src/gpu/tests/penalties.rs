//! Penalties have the bits of the CPU's, and touch only what was used.

use super::*;
use crate::gpu::ops::{Penalties, RowPenalties, penalties};
use crate::sample::penalize;
use crate::step::{SamplingParams, TokenUse};

#[test]
fn takes_down_what_was_used() {
    let vocab_size = 1003;
    let rows_of = [3u32, 0, 2];
    let logits: Vec<f32> = random(1, 4 * vocab_size).into_iter().map(|x| 10.0 * x).collect();
    let of = |repetition_penalty, presence_penalty, frequency_penalty| SamplingParams {
        repetition_penalty,
        presence_penalty,
        frequency_penalty,
        ..SamplingParams::GREEDY
    };
    let params = [of(1.3, 0.7, 0.11), SamplingParams::GREEDY, of(0.8, -0.2, 1.9)];
    // The first row's newest token is in its list, the last one's is not; the middle one has none.
    let newest = [Some(26u32), None, Some(500)];
    let uses: [Vec<TokenUse>; 3] = [
        (0..700).map(|i| TokenUse { token_id: i + i / 3, num_in_answer: i % 4 }).collect(),
        vec![TokenUse { token_id: 5, num_in_answer: 3 }],
        vec![
            TokenUse { token_id: 0, num_in_answer: 0 },
            TokenUse { token_id: 77, num_in_answer: 1_000_000 },
            TokenUse { token_id: 1002, num_in_answer: 1 },
        ],
    ];
    let mut expected = logits.clone();
    let mut indptr = vec![0u32];
    for (row, uses) in uses.iter().enumerate() {
        let mut with_newest = uses.clone();
        newest[row].into_iter().for_each(|token_id| TokenUse::count(&mut with_newest, token_id));
        let logits = &mut expected[rows_of[row] as usize * vocab_size..][..vocab_size];
        penalize(logits, &params[row], &with_newest);
        indptr.push(indptr.last().unwrap() + uses.len() as u32);
    }
    assert_ne!(expected, logits);
    for device in devices() {
        let logits = put(&device, &logits);
        let rows = put(&device, &params.map(|params| RowPenalties::from(&params)));
        let (indptr, uses) = (put(&device, &indptr), put(&device, &uses.concat()));
        let (newest_from, sampled) = (put(&device, &[2, -1, 0]), put(&device, &[500u32, 7, 26]));
        let args = Penalties {
            num_rows: 3,
            vocab_size,
            logits: &logits,
            rows_of: Some(&put(&device, &rows_of)),
            penalties: (&rows).into(),
            indptr: (&indptr).into(),
            uses: (&uses).into(),
            newest_from: (&newest_from).into(),
            sampled: &sampled,
        };
        penalties(&*device, &args).unwrap();
        assert_eq!(logits.read().unwrap(), expected);
    }
}

#[test]
fn ids_beyond_the_vocabulary_are_passed_over() {
    let params = SamplingParams { presence_penalty: 1.0, ..SamplingParams::GREEDY };
    let uses = [1u32, 3, u32::MAX].map(|token_id| TokenUse { token_id, num_in_answer: 1 });
    for device in devices() {
        let logits = put(&device, &[4.0f32; 6]);
        let rows = put(&device, &[RowPenalties::from(&params)]);
        let (indptr, uses) = (put(&device, &[0u32, 3]), put(&device, &uses));
        let (newest_from, sampled) = (put(&device, &[1]), put(&device, &[0u32, 4]));
        let args = Penalties {
            num_rows: 1,
            vocab_size: 3,
            logits: &logits,
            rows_of: None,
            penalties: (&rows).into(),
            indptr: (&indptr).into(),
            uses: (&uses).into(),
            newest_from: (&newest_from).into(),
            sampled: &sampled,
        };
        penalties(&*device, &args).unwrap();
        assert_eq!(logits.read().unwrap(), [4.0, 3.0, 4.0, 4.0, 4.0, 4.0]);
    }
}
