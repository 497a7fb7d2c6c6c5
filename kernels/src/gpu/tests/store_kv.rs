//! What happens to heads between their matrix and attention, and copies from page to page.

use super::*;
use crate::backend::{AttentionShape, Backend, RopeTable};
use crate::gpu::e4m3;
use crate::gpu::ops::{CopyKv, KvDtype, StoreKv, copy_kv, store_kv};
use crate::reference::Reference;

const PAGE_SIZE: usize = 16;
const NUM_PAGES: usize = 3;
const NUM_POSITIONS: usize = 600;

struct Case {
    num_heads: usize,
    num_kv_heads: usize,
    head_dim: usize,
    stride: usize,
    has_bias: bool,
    has_norms: bool,
}

/// What stands at each head of each row, `stride` apart, the rest zeros.
fn spread(values: &[f32], head_dim: usize, stride: usize) -> Vec<f32> {
    let pad = |head: &[f32]| [head, &vec![0.0; stride - head_dim]].concat();
    values.chunks(head_dim).flat_map(pad).collect()
}

fn check(seed: u64, dtype: HalfDtype, case: &Case) {
    let Case { num_heads, num_kv_heads, head_dim, stride, .. } = *case;
    let shape = AttentionShape {
        num_heads,
        num_kv_heads,
        head_dim,
        page_size: PAGE_SIZE,
        num_pages: NUM_PAGES,
        scale: 1.0,
    };
    let positions = [5u32, 599, 0, 77];
    let slots = [17i32, 2, -1, 47];
    let table = RopeTable::new(RopeTable::frequencies(head_dim, 1e4), NUM_POSITIONS);
    let rope: Vec<f32> =
        (0..NUM_POSITIONS as u32).flat_map(|p| [table.row(p).0, table.row(p).1].concat()).collect();
    let qkv = rounded(dtype, random(seed, positions.len() * shape.qkv_len()));
    let bias = random(seed + 1, shape.qkv_len());
    let norms = [random(seed + 2, head_dim), random(seed + 3, head_dim)];
    let mut expected = qkv.clone();
    if case.has_bias {
        Reference.add_bias(&bias, &mut expected);
    }
    if case.has_norms {
        Reference.head_norm(&norms[0], 1e-6, &shape, 0..num_heads, &mut expected);
        Reference.head_norm(&norms[1], 1e-6, &shape, num_heads..num_heads + num_kv_heads, &mut expected);
    }
    Reference.rope(&table, &shape, &positions, &mut expected);
    let expected = spread(&expected, head_dim, stride);
    let row_len = (num_heads + 2 * num_kv_heads) * stride;
    for device in devices() {
        for kv_dtype in [KvDtype::Half, KvDtype::E4m3] {
            let queries = fresh_half(&device, dtype, positions.len() * num_heads * stride);
            let kv_len = NUM_PAGES * 2 * num_kv_heads * PAGE_SIZE * stride;
            let kv = fresh(&device, kv_len * kv_dtype.size_bytes());
            let bias = put(&device, &spread(&bias, head_dim, stride));
            let norms = [put(&device, &norms[0]), put(&device, &norms[1])];
            let (positions_there, slots_there) = (put(&device, &positions), put(&device, &slots));
            let args = StoreKv {
                num_rows: positions.len(),
                num_heads,
                num_kv_heads,
                head_dim,
                stride,
                page_size: PAGE_SIZE,
                qkv: &put_half(&device, dtype, &spread(&qkv, head_dim, stride)),
                bias: case.has_bias.then_some(&bias),
                norms: case.has_norms.then_some([&norms[0], &norms[1]]),
                rope: &put(&device, &rope),
                positions: (&positions_there).into(),
                slots: (&slots_there).into(),
                queries: &queries,
                kv: &kv,
                kv_dtype,
                epsilon: 1e-6,
            };
            store_kv(&*device, &args).unwrap();
            let bytes = kv.read().unwrap();
            let (numbers, kv_tolerance): (Vec<f32>, _) = match kv_dtype {
                KvDtype::Half => (
                    bytes.as_chunks::<2>().0.iter().map(|&x| dtype.to_f32(u16::from_le_bytes(x))).collect(),
                    tolerance(dtype),
                ),
                KvDtype::E4m3 => (bytes.iter().map(|&x| e4m3::to_f32(x)).collect(), E4M3_TOLERANCE),
            };
            let mut written = 0;
            for (row, &slot) in slots.iter().enumerate() {
                let row = &expected[row * row_len..(row + 1) * row_len];
                if slot < 0 {
                    continue;
                }
                let (page, offset) = (slot as usize / PAGE_SIZE, slot as usize % PAGE_SIZE);
                for head in 0..2 * num_kv_heads {
                    let expected = &row[(num_heads + head) * stride..][..stride];
                    let at = ((page * 2 * num_kv_heads + head) * PAGE_SIZE + offset) * stride;
                    assert_close(&numbers[at..at + stride], expected, kv_tolerance, "keys and values");
                    written += stride;
                }
            }
            assert_eq!(
                numbers.iter().filter(|x| !x.is_nan()).count(),
                written,
                "slots of others were written"
            );
            let expected: Vec<f32> =
                expected.chunks(row_len).flat_map(|row| &row[..num_heads * stride]).copied().collect();
            assert_close(&queries.read().unwrap(), &expected, tolerance(dtype), "queries");
        }
    }
}

#[test]
fn heads_are_finished_and_stored() {
    let case =
        Case { num_heads: 4, num_kv_heads: 2, head_dim: 64, stride: 64, has_bias: false, has_norms: false };
    use HalfDtype::{Bf16, F16};
    check(1, Bf16, &case);
    check(2, F16, &Case { has_bias: true, ..case });
    check(3, F16, &Case { has_norms: true, num_kv_heads: 1, head_dim: 32, ..case });
    check(
        4,
        Bf16,
        &Case { has_norms: true, head_dim: 256, stride: 256, num_heads: 3, num_kv_heads: 3, ..case },
    );
    check(5, Bf16, &Case { has_bias: true, has_norms: true, head_dim: 16, ..case });
    check(6, F16, &Case { head_dim: 128, stride: 128, num_heads: 7, num_kv_heads: 1, ..case });
}

#[test]
fn page_beginnings_are_copied() {
    let (num_kv_heads, slot_bytes) = (2, 32);
    let page_bytes = 2 * num_kv_heads * PAGE_SIZE * slot_bytes;
    let before: Vec<u8> = (0..4 * page_bytes).map(|i| (i * 7 % 251) as u8).collect();
    let copies = [[3u32, 0, 5], [1, 2, 15]];
    let mut expected = before.clone();
    for [from, to, len] in copies {
        for head in 0..2 * num_kv_heads {
            let at = |page: u32| page as usize * page_bytes + head * PAGE_SIZE * slot_bytes;
            let len = len as usize * slot_bytes;
            expected.copy_within(at(from)..at(from) + len, at(to));
        }
    }
    for device in devices() {
        let kv = put(&device, &before);
        let copies = put(&device, copies.as_flattened());
        let args = CopyKv {
            num_copies: 2,
            copies: (&copies).into(),
            kv: &kv,
            num_kv_heads,
            page_size: PAGE_SIZE,
            slot_bytes,
        };
        copy_kv(&*device, &args).unwrap();
        assert!(kv.read().unwrap() == expected);
    }
}
