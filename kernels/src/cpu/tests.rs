//! Every op against the reference op on random shapes, on every instruction set of this CPU; and the sets, tiles,
//! threads, chunks and pages against each other, bit for bit.

use super::*;
use crate::reference::Reference;
use crate::step::{PageId, SamplingParams};
use crate::team::Team;

/// Relative to the largest number: f32 sums in another order.
const F32_TOLERANCE: f32 = 2e-5;
/// Rows and weights, or queries, keys, weights and values, rounded to bytes.
const INT8_TOLERANCE: f32 = 2e-2;

/// Numbers between -1 and 1, the same for a seed.
fn random(seed: u64, len: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    };
    std::iter::repeat_with(next).take(len).collect()
}

#[track_caller]
fn assert_close(actual: &[f32], expected: &[f32], tolerance: f32, what: &str) {
    assert_eq!(actual.len(), expected.len());
    let scale = expected.iter().fold(1e-6f32, |max, value| max.max(value.abs()));
    for (i, (actual, expected)) in actual.iter().zip(expected).enumerate() {
        assert!((actual - expected).abs() <= tolerance * scale, "{what}: {actual} and {expected} at {i}");
    }
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

fn backends() -> Vec<Cpu> {
    Isa::available().into_iter().map(|isa| Cpu { isa, packing: Packing::in_memory() }).collect()
}

/// Compares an op on all backends with the reference; `run` returns the result of an op.
fn check_op(what: &str, tolerance: f32, reference: Vec<f32>, run: impl Fn(&Cpu) -> Vec<f32>) {
    let mut first = None;
    for cpu in backends() {
        let actual = run(&cpu);
        assert_close(&actual, &reference, tolerance, &format!("{what} on {:?}", cpu.isa));
        let expected = first.get_or_insert_with(|| bits(&actual)).clone();
        assert!(bits(&actual) == expected, "{what}: {:?} gives other bits than portable code", cpu.isa);
    }
}

fn matrix<B: Backend>(backend: &B, weights: &[f32], num_inputs: usize) -> B::Matrix {
    backend.matrix(weights.len() / num_inputs, num_inputs, &mut |row, out| {
        out.copy_from_slice(&weights[row * num_inputs..(row + 1) * num_inputs]);
    })
}

fn linear<B: Backend>(backend: &B, x: &[f32], weights: &[f32], num_inputs: usize) -> Vec<f32> {
    let mut out = vec![f32::NAN; x.len() / num_inputs * (weights.len() / num_inputs)];
    backend.linear(&mut B::Scratch::default(), x, &matrix(backend, weights, num_inputs), &mut out);
    out
}

#[test]
fn linear_equals_the_reference() {
    for (seed, (num_rows, num_inputs, num_outputs)) in [
        (1, 1, 1),
        (1, 64, 48),
        (2, 33, 17),
        (3, 576, 100),
        (5, 7, 64),
        (13, 40, 31),
        (40, 640, 130),
        (29, 100, 130),
        (200, 32, 80),
    ]
    .into_iter()
    .enumerate()
    {
        let x = random(seed as u64, num_rows * num_inputs);
        let weights = random(seed as u64 + 100, num_outputs * num_inputs);
        let what = format!("linear {num_rows} x {num_inputs} x {num_outputs}");
        check_op(&what, INT8_TOLERANCE, linear(&Reference, &x, &weights, num_inputs), |cpu| {
            linear(cpu, &x, &weights, num_inputs)
        });
    }
}

#[test]
fn linear_rows_do_not_depend_on_their_number_or_on_threads() {
    let (num_inputs, num_outputs, num_rows) = (50, 70, 120);
    let x = random(1, num_rows * num_inputs);
    let weights = random(2, num_outputs * num_inputs);
    for cpu in backends() {
        let all = linear(&cpu, &x, &weights, num_inputs);
        for len in [1, 2, 3, 4, 5, 6, 7, 11, 12, 13, 97] {
            let some = linear(&cpu, &x[..len * num_inputs], &weights, num_inputs);
            assert_eq!(bits(&some), bits(&all[..len * num_outputs]), "{len} rows on {:?}", cpu.isa);
        }
        for num_threads in [1, 2, 3] {
            let mut team = Team::new(num_threads).unwrap();
            assert_eq!(bits(&team.install(|| linear(&cpu, &x, &weights, num_inputs))), bits(&all));
        }
    }
}

#[test]
fn embed_equals_the_reference() {
    let table = random(1, 40 * 24);
    let run = |out: &mut Vec<f32>| out.resize(4 * 24, f32::NAN);
    let mut expected = Vec::new();
    run(&mut expected);
    Reference.embed(&matrix(&Reference, &table, 24), &[0, 39, 16, 15], &mut expected);
    check_op("embed", INT8_TOLERANCE, expected, |cpu| {
        let mut out = vec![f32::NAN; 4 * 24];
        cpu.embed(&matrix(cpu, &table, 24), &[0, 39, 16, 15], &mut out);
        out
    });
}

#[test]
fn rms_norm_equals_the_reference() {
    for (num_rows, len) in [(1, 1), (3, 33), (2, 576), (200, 100)] {
        let (x, weight) = (random(1, num_rows * len), random(2, len));
        let mut expected = vec![0.0; x.len()];
        Reference.rms_norm(&x, &weight, 1e-5, &mut expected);
        check_op("rms_norm", F32_TOLERANCE, expected, |cpu| {
            let mut out = vec![f32::NAN; x.len()];
            cpu.rms_norm(&x, &weight, 1e-5, &mut out);
            out
        });
    }
}

#[test]
fn silu_mul_equals_the_reference() {
    for (num_rows, len) in [(1, 1), (3, 33), (100, 200)] {
        let gate_up: Vec<f32> = random(1, num_rows * 2 * len).iter().map(|x| x * 30.0).collect();
        let mut expected = vec![0.0; num_rows * len];
        Reference.silu_mul(len, &gate_up, &mut expected);
        check_op("silu_mul", F32_TOLERANCE, expected, |cpu| {
            let mut out = vec![f32::NAN; num_rows * len];
            cpu.silu_mul(len, &gate_up, &mut out);
            out
        });
    }
}

#[test]
fn gelu_mul_equals_the_reference() {
    for (num_rows, len) in [(1, 1), (3, 33), (100, 200)] {
        let gate_up: Vec<f32> = random(1, num_rows * 2 * len).iter().map(|x| x * 12.0).collect();
        let mut expected = vec![0.0; num_rows * len];
        Reference.gelu_mul(len, &gate_up, &mut expected);
        check_op("gelu_mul", F32_TOLERANCE, expected, |cpu| {
            let mut out = vec![f32::NAN; num_rows * len];
            cpu.gelu_mul(len, &gate_up, &mut out);
            out
        });
    }
}

#[test]
fn add_bias_equals_the_reference() {
    for (num_rows, len) in [(1, 1), (3, 33), (200, 100)] {
        let (x, bias) = (random(1, num_rows * len), random(2, len));
        let mut expected = x.clone();
        Reference.add_bias(&bias, &mut expected);
        check_op("add_bias", 0.0, expected, |cpu| {
            let mut out = x.clone();
            cpu.add_bias(&bias, &mut out);
            out
        });
    }
}

#[test]
fn head_norm_equals_the_reference() {
    let shape = shape(16);
    let weight = random(2, shape.head_dim);
    for (num_rows, heads) in [(1, 0..6), (200, 0..6), (3, 6..8)] {
        let qkv = random(1, num_rows * shape.qkv_len());
        let mut expected = qkv.clone();
        Reference.head_norm(&weight, 1e-5, &shape, heads.clone(), &mut expected);
        check_op("head_norm", F32_TOLERANCE, expected, |cpu| {
            let mut out = qkv.clone();
            cpu.head_norm(&weight, 1e-5, &shape, heads.clone(), &mut out);
            out
        });
    }
}

#[test]
fn add_equals_the_reference() {
    let (x, y) = (random(1, 20_001), random(2, 20_001));
    let mut expected = x.clone();
    Reference.add(&mut expected, &y);
    check_op("add", 0.0, expected, |cpu| {
        let mut out = x.clone();
        cpu.add(&mut out, &y);
        out
    });
}

fn shape(page_size: usize) -> AttentionShape {
    AttentionShape {
        num_heads: 6,
        num_kv_heads: 2,
        head_dim: 64,
        page_size,
        num_pages: 4096 / page_size,
        scale: 0.125,
    }
}

#[test]
fn rope_equals_the_reference() {
    let shape = shape(16);
    let table = RopeTable::new(RopeTable::frequencies(shape.head_dim, 10_000.0), 600);
    let positions: Vec<u32> = (500..600).collect();
    let qkv = random(1, positions.len() * shape.qkv_len());
    let mut expected = qkv.clone();
    Reference.rope(&table, &shape, &positions, &mut expected);
    check_op("rope", F32_TOLERANCE, expected, |cpu| {
        let mut out = qkv.clone();
        cpu.rope(&table, &shape, &positions, &mut out);
        out
    });
}

/// The queries, keys and values of some sequences, attended chunk by chunk; returns `[num_tokens, q_len]` by sequence.
fn attend<B: Backend>(
    backend: &B,
    page_size: usize,
    window: Option<u32>,
    seq_lens: &[usize],
    chunk_len: usize,
) -> Vec<f32> {
    let shape = shape(page_size);
    let mut cache = backend.kv_cache(&shape);
    let mut scratch = B::Scratch::default();
    let qkv: Vec<Vec<f32>> =
        seq_lens.iter().enumerate().map(|(seq, len)| random(seq as u64, len * shape.qkv_len())).collect();
    let mut outs = vec![Vec::new(); seq_lens.len()];
    for start in (0..seq_lens.iter().copied().max().unwrap_or(0)).step_by(chunk_len) {
        let mut batch = StepBatch::default();
        let mut batch_qkv = Vec::new();
        let active: Vec<usize> = (0..seq_lens.len()).filter(|&seq| seq_lens[seq] > start).collect();
        for &seq in &active {
            let end = seq_lens[seq].min(start + chunk_len);
            // Pages of the sequences are interleaved and go backward.
            let num_pages = end.div_ceil(page_size);
            let page = |i| PageId((shape.num_pages - 1 - i * seq_lens.len() - seq) as u32);
            let pages: Vec<PageId> = (0..num_pages).map(page).collect();
            batch.push(&vec![0; end - start], start as u32, &pages, Some(SamplingParams::GREEDY));
            batch_qkv.extend_from_slice(&qkv[seq][start * shape.qkv_len()..end * shape.qkv_len()]);
        }
        let mut out = vec![f32::NAN; batch.num_tokens() * shape.q_len()];
        backend.store_kv(&shape, &batch, &batch_qkv, &mut cache);
        backend.attention(&mut scratch, &shape, window, &batch, &batch_qkv, &cache, &mut out);
        for (index, &seq) in active.iter().enumerate() {
            let rows = batch.rows(index);
            outs[seq].extend_from_slice(&out[rows.start * shape.q_len()..rows.end * shape.q_len()]);
        }
    }
    outs.concat()
}

const WINDOWS: [Option<u32>; 5] = [None, Some(1), Some(20), Some(64), Some(129)];

#[test]
fn attention_equals_the_reference() {
    for seq_lens in [&[1][..], &[17, 1, 64, 65], &[130, 3], &[300]] {
        for window in WINDOWS {
            let expected = attend(&Reference, 16, window, seq_lens, 1000);
            check_op(&format!("attention {seq_lens:?} {window:?}"), INT8_TOLERANCE, expected, |cpu| {
                attend(cpu, 16, window, seq_lens, 1000)
            });
        }
    }
}

#[test]
fn attention_does_not_depend_on_chunks_and_pages() {
    let seq_lens = [150, 33, 64, 1, 200];
    for (cpu, window) in backends().iter().flat_map(|cpu| WINDOWS.map(|window| (cpu, window))) {
        let expected = bits(&attend(cpu, 16, window, &seq_lens, 1000));
        for (page_size, chunk_len) in [(16, 1), (16, 7), (32, 64), (64, 50), (128, 33), (16, 16)] {
            let actual = bits(&attend(cpu, page_size, window, &seq_lens, chunk_len));
            let what = format!("pages of {page_size}, chunks of {chunk_len}, {window:?} on {:?}", cpu.isa);
            assert!(actual == expected, "{what}");
        }
    }
}
