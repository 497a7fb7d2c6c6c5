//! Attention over pages of ragged batches against plain loops, and bit for bit against itself in other company.

mod world;

use self::world::{OnDevice, Seq, World};
use super::*;
use crate::gpu::HalfDtype::{Bf16, F16};
use crate::gpu::ops::attention_shared_bytes;
use crate::gpu::plan::{AttentionPlan, PlanLayout, PlanSize};

/// Decodes of many lengths, a prefill, a chunk behind a long prefix, a few rows to verify, a first token.
fn ragged() -> Vec<Seq> {
    vec![
        Seq::new(1, 299, 1),
        Seq::new(2, 16, 1),
        Seq::new(3, 0, 37),
        Seq::new(4, 63, 1),
        Seq::new(5, 125, 5),
        Seq::new(6, 0, 1),
        Seq::new(7, 130, 150),
        Seq::new(8, 127, 1),
        Seq::new(9, 128, 1),
    ]
}

/// Decodes behind a prefix that is longer than two parts for some, and longer than one for all.
fn family() -> Vec<Seq> {
    vec![
        Seq::new(1, 333, 1).sharing(1, 290),
        Seq::new(2, 40, 1),
        Seq::new(3, 260, 1).sharing(1, 150),
        Seq::new(4, 300, 3).sharing(1, 290),
        Seq::new(5, 0, 70).sharing(1, 64),
        Seq::new(6, 301, 1).sharing(1, 290),
        Seq::new(7, 135, 1).sharing(1, 130),
        Seq::new(8, 140, 1).sharing(2, 130),
        Seq::new(9, 140, 1).sharing(2, 130),
    ]
}

#[track_caller]
fn check(world: World, seqs: &[Seq]) {
    let expected = world.expected(seqs);
    let shared_bytes = attention_shared_bytes(world.head_dim, world.is_e4m3);
    for device in devices().into_iter().filter(|device| device.max_shared_bytes() >= shared_bytes) {
        let actual = world.run(&device, seqs);
        assert_close(&actual, &expected, tolerance(world.dtype), &format!("{world:?}"));
    }
}

/// Under one order.
fn run(world: World, seqs: &[Seq]) -> Vec<u32> {
    let device = device(2);
    world.run(&device, seqs).into_iter().map(f32::to_bits).collect()
}

/// Short, for planted mistakes: both sizes of tiles, parts and their merge, a window, all kinds of numbers.
#[test]
fn a_few_rows() {
    let seqs = [Seq::new(1, 200, 1), Seq::new(2, 100, 10), Seq::new(3, 0, 20)];
    check(World::PLAIN, &seqs);
    check(World { dtype: F16, is_e4m3: true, window: Some(70), ..World::PLAIN }, &seqs);
}

#[test]
fn ragged_batches() {
    let plain = World::PLAIN;
    let heads = |num_heads, num_kv_heads| World { num_heads, num_kv_heads, ..plain };
    for world in [
        World { dtype: F16, page_size: 64, ..heads(2, 2) },
        World { page_size: 4096, ..heads(4, 2) },
        World { dtype: F16, page_size: 32, window: Some(100), ..heads(3, 1) },
        World { batch_invariant: true, ..heads(4, 1) },
        World { is_e4m3: true, page_size: 128, ..heads(8, 1) },
        World { head_dim: 128, ..heads(4, 2) },
        World { dtype: F16, head_dim: 128, page_size: 256, window: Some(1), ..heads(4, 1) },
        World {
            dtype: F16,
            head_dim: 128,
            is_e4m3: true,
            window: Some(129),
            batch_invariant: true,
            ..heads(2, 1)
        },
        World { dtype: F16, head_dim: 256, ..heads(2, 1) },
        World { dtype: F16, head_dim: 256, is_e4m3: true, window: Some(64), ..heads(3, 1) },
        World { head_dim: 256, is_e4m3: true, ..heads(2, 1) },
        World { head_dim: 256, batch_invariant: true, ..heads(4, 1) },
    ] {
        check(world, &ragged());
    }
}

/// Heads, numbers, pages, windows and batches of all kinds together, as they come.
#[test]
fn random_batches() {
    let num_cases = if cfg!(feature = "cuda-tests") { 100 } else { 12 };
    for seed in 1..=num_cases {
        let (world, seqs) = world::any(seed);
        check(world, &seqs);
    }
}

/// Short, for planted mistakes: a tile that is not full, keys that end within a page. No more steps than stages, so that
/// a warp may run far ahead of others.
#[test]
fn a_few_rows_on_hopper() {
    let seqs = [Seq::new(1, 81, 130)];
    check(World { wide_tiles: true, num_heads: 16, num_kv_heads: 8, ..World::PLAIN }, &seqs);
}

#[test]
fn long_chunks_on_hopper() {
    let seqs = [Seq::new(1, 0, 150), Seq::new(2, 400, 1), Seq::new(3, 300, 129), Seq::new(4, 63, 65)];
    let hopper = World { wide_tiles: true, ..World::PLAIN };
    for world in [
        World { num_heads: 3, num_kv_heads: 1, window: Some(100), ..hopper },
        World { dtype: F16, page_size: 64, num_heads: 8, window: Some(1), ..hopper },
        World { dtype: F16, page_size: 256, head_dim: 128, ..hopper },
        World { page_size: 128, head_dim: 128, window: Some(140), num_kv_heads: 1, ..hopper },
    ] {
        check(world, &seqs);
    }
}

#[test]
fn heads_that_fill_more_than_a_tile() {
    let seqs = [Seq::new(1, 200, 1), Seq::new(2, 20, 2), Seq::new(3, 0, 5)];
    check(World { num_heads: 71, num_kv_heads: 1, ..World::PLAIN }, &seqs);
}

#[test]
fn sequences_that_share_pages() {
    for (page_size, window, is_e4m3, head_dim) in
        [(16, None, false, 64), (64, Some(150), false, 64), (16, Some(40), true, 128), (32, None, false, 256)]
    {
        check(World { page_size, window, is_e4m3, head_dim, ..World::PLAIN }, &family());
    }
    // More rows than a tile has.
    let many: Vec<Seq> = (1..50).map(|id| Seq::new(id, 256 + id as u32, 1).sharing(1, 256)).collect();
    check(World::PLAIN, &many);
}

/// Rows by sequence and position: bits that must not depend on anything else.
fn bits_of(world: World, batches: &[Vec<Seq>]) -> Vec<((u64, u32), Vec<u32>)> {
    let row_len = world.num_heads * world.head_dim;
    let mut rows: Vec<_> = batches
        .iter()
        .flat_map(|seqs| {
            let keys = seqs.iter().flat_map(|seq| (0..seq.num_rows).map(|row| (seq.id, seq.first + row)));
            keys.zip(run(world, seqs).chunks(row_len).map(<[u32]>::to_vec).collect::<Vec<_>>())
        })
        .collect();
    rows.sort();
    rows
}

#[test]
fn bits_do_not_depend_on_the_batch() {
    let together = |seqs: Vec<Seq>| vec![seqs];
    let alone = |seqs: Vec<Seq>| seqs.into_iter().map(|seq| vec![seq]).collect::<Vec<_>>();
    // Sequence by sequence, in chunks of different lengths, down to single rows.
    let chunked = |seqs: Vec<Seq>| {
        let chunks = |seq: Seq| {
            let lens = [1, 70, 3, 1, 1, 33, 200].into_iter().scan(0, |start, len| {
                let row = *start;
                *start += len;
                (row < seq.num_rows).then(|| Seq {
                    first: seq.first + row,
                    num_rows: len.min(seq.num_rows - row),
                    ..seq
                })
            });
            lens.map(|chunk| vec![chunk]).collect::<Vec<_>>()
        };
        seqs.into_iter().flat_map(chunks).collect::<Vec<_>>()
    };
    let reversed = |mut seqs: Vec<Seq>| {
        seqs.reverse();
        vec![seqs]
    };
    for (dtype, head_dim, is_e4m3, window, num_heads) in [
        (Bf16, 64, false, None, 3),
        (F16, 128, false, Some(90), 4),
        (Bf16, 64, true, Some(200), 2),
        (F16, 256, false, None, 4),
    ] {
        let num_kv_heads = 1;
        let world = World {
            batch_invariant: true,
            dtype,
            head_dim,
            is_e4m3,
            window,
            num_heads,
            num_kv_heads,
            ..World::PLAIN
        };
        for seqs in [ragged(), family()] {
            let expected = bits_of(world, &together(seqs.clone()));
            assert!(expected == bits_of(world, &alone(seqs.clone())), "alone: {world:?}");
            assert!(expected == bits_of(world, &chunked(seqs.clone())), "in chunks: {world:?}");
            let other = World { page_size: 128, seed: 9, ..world };
            assert!(expected == bits_of(other, &reversed(seqs.clone())), "other pages: {world:?}");
            let other = World { shares_pages: false, ..world };
            assert!(expected == bits_of(other, &together(seqs.clone())), "pages of their own: {world:?}");
            let other = World { share_prefixes: false, ..world };
            assert!(expected == bits_of(other, &together(seqs.clone())), "nothing shared: {world:?}");
            let other = World { spare_part_rows: 8, ..world };
            assert!(expected == bits_of(other, &together(seqs.clone())), "little room for parts: {world:?}");
        }
    }
}

#[test]
fn sharing_changes_no_bits_in_either_mode() {
    let with = run(World::PLAIN, &family());
    assert!(with == run(World { share_prefixes: false, ..World::PLAIN }, &family()));
}

/// Any plan that fits is taken by the same recorded graph.
#[test]
fn a_recorded_graph_takes_other_plans() {
    let world = World { head_dim: 64, ..World::PLAIN };
    let seqs = ragged();
    let expected = world.expected(&seqs);
    for device in devices() {
        let step = world.step(&seqs);
        let mut plan = AttentionPlan::new(world.options(step.batch.num_tokens()));
        plan.plan(&step.batch);
        let PlanSize { tiles, merges, tokens, pages, part_rows, .. } = plan.size();
        let layout = PlanLayout::new(PlanSize {
            tiles: tiles + 7,
            wide_tiles: 3,
            merges: merges + 5,
            tokens: tokens + 9,
            pages: pages + 20,
            part_rows: part_rows + 11,
        });
        let on_device = OnDevice::new(&device, &world, &step, layout);
        let mut words = vec![u32::MAX; layout.len];
        // What it is recorded with does nothing.
        words[..8].fill(0);
        let mut on_words = put(&device, &words);
        device.begin_graph().unwrap();
        on_device.attend(&device, None, &on_words);
        let graph = device.end_graph().unwrap();
        // SAFETY: all that the graph uses lives until the end of the test.
        unsafe { device.launch_graph(graph).unwrap() };
        assert!(on_device.out.read().unwrap().iter().all(|x| x.is_nan()), "rows of no tile were written");
        let len = plan.write(&step.batch, &layout, &mut words);
        on_words.write(0, &words[..len]).unwrap();
        // SAFETY: as above.
        unsafe { device.launch_graph(graph).unwrap() };
        let actual = on_device.out.read().unwrap();
        let (rows, beyond) = actual.split_at(expected.len());
        assert_close(rows, &expected, tolerance(world.dtype), "graph");
        assert!(beyond.iter().all(|x| x.is_nan()));
        device.drop_graph(graph);
    }
}
