//! Log-probabilities against a softmax in f64, and the order of the most likely tokens against a sort.

use super::*;
use crate::gpu::ops::{LogProbs, TopLogProbs, log_probs};

fn log_softmax(logits: &[f32]) -> Vec<f32> {
    let highest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let total: f64 = logits.iter().map(|&x| f64::from(x - highest).exp()).sum();
    logits.iter().map(|&x| (f64::from(x) - f64::from(highest) - total.ln()) as f32).collect()
}

/// Of ids in order, with room for more.
fn most_likely(logits: &[f32], num_top: usize) -> Vec<u32> {
    let mut ids: Vec<u32> = (0..logits.len() as u32).collect();
    ids.sort_by(|&a, &b| logits[b as usize].total_cmp(&logits[a as usize]).then(a.cmp(&b)));
    ids.retain(|&id| logits[id as usize] > f32::NEG_INFINITY);
    ids.resize(num_top.max(ids.len()), u32::MAX);
    ids.truncate(num_top);
    ids
}

#[track_caller]
fn check(rows: &[Vec<f32>], num_top: usize) {
    let (num_rows, vocab_size) = (rows.len(), rows[0].len());
    let rows_of: Vec<u32> = (0..num_rows as u32).rev().collect();
    let logits: Vec<f32> = rows.iter().rev().flatten().copied().collect();
    // Row `i` asks for `i` tokens and the last one.
    let mut indptr = vec![0u32];
    let mut token_ids = Vec::new();
    for row in 0..num_rows {
        token_ids.extend((0..row).map(|i| (i * 37 % vocab_size) as u32).chain([vocab_size as u32 - 1]));
        indptr.push(token_ids.len() as u32);
    }
    let expected: Vec<Vec<f32>> = rows.iter().map(|row| log_softmax(row)).collect();
    for device in devices() {
        let (ids, log_probs_of_top) =
            (fresh(&device, num_rows * num_top), fresh(&device, num_rows * num_top));
        let out = fresh(&device, token_ids.len());
        let args = LogProbs {
            num_rows,
            vocab_size,
            logits: &put(&device, &logits),
            rows_of: Some(&put(&device, &rows_of)),
            indptr: Some(&put(&device, &indptr)),
            token_ids: &put(&device, &token_ids),
            log_probs: &out,
            top: Some(TopLogProbs { num_top, ids: &ids, log_probs: &log_probs_of_top }),
        };
        log_probs(&*device, &args).unwrap();
        let (out, ids, top) = (out.read().unwrap(), ids.read().unwrap(), log_probs_of_top.read().unwrap());
        for (row, expected) in expected.iter().enumerate() {
            let asked = indptr[row] as usize..indptr[row + 1] as usize;
            for i in asked {
                same(out[i], expected[token_ids[i] as usize]);
            }
            let ids: &[u32] = &ids[row * num_top..][..num_top];
            assert_eq!(ids, most_likely(&rows[row], num_top), "row {row}");
            for (&id, &log_prob) in ids.iter().zip(&top[row * num_top..]) {
                same(log_prob, expected.get(id as usize).copied().unwrap_or(f32::NEG_INFINITY));
            }
        }
    }
}

#[track_caller]
fn same(actual: f32, expected: f32) {
    let close = (actual - expected).abs() <= 2e-6 * expected.abs().max(1.0);
    assert!(close || actual == expected, "{actual} and {expected}");
}

#[test]
fn are_those_of_a_softmax() {
    for vocab_size in [1, 2, 31, 1003, 5001] {
        let mut rows: Vec<Vec<f32>> = (1..5)
            .map(|seed| random(seed, vocab_size).into_iter().map(|x| x * 10.0 * seed as f32).collect())
            .collect();
        rows.push(vec![3.5; vocab_size]);
        rows.push((0..vocab_size).map(|id| if id == 0 { 80.0 } else { -(id as f32) }).collect());
        let mut masked = vec![f32::NEG_INFINITY; vocab_size];
        masked[vocab_size / 2] = -5.0;
        rows.push(masked);
        check(&rows, 20);
        check(&rows, 1);
    }
}

#[test]
fn a_token_a_row_and_bad_rows() {
    let nan = f32::NAN;
    let logits = [0.0, 0.0, nan, 0.0, f32::NEG_INFINITY, f32::NEG_INFINITY, 0.0, f32::INFINITY, 0.0, 0.0];
    for device in devices() {
        let out = fresh(&device, 5);
        let (ids, top) = (fresh(&device, 5), fresh(&device, 5));
        let args = LogProbs {
            num_rows: 5,
            vocab_size: 2,
            logits: &put(&device, &logits),
            rows_of: None,
            indptr: None,
            token_ids: &put(&device, &[1u32, 1, 1, 1, 2]),
            log_probs: &out,
            top: Some(TopLogProbs { num_top: 1, ids: &ids, log_probs: &top }),
        };
        log_probs(&*device, &args).unwrap();
        let (out, top) = (out.read().unwrap(), top.read().unwrap());
        same(out[0], -std::f32::consts::LN_2);
        assert!(out[1..].iter().all(|x| x.is_nan()), "{out:?}");
        assert_eq!(ids.read().unwrap(), [0, u32::MAX, u32::MAX, u32::MAX, 0]);
        assert!(top[1..4].iter().all(|x| x.is_nan()) && top[4] == top[0], "{top:?}");
    }
}
