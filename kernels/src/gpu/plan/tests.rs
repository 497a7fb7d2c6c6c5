use super::*;

const OPTIONS: PlanOptions = PlanOptions {
    page_size: 64,
    group_len: 4,
    head_dim: 128,
    batch_invariant: false,
    wide_tiles: false,
    share_prefixes: true,
    split_len: 128,
    max_part_rows: 1 << 16,
};

/// First position, rows and pages of each sequence.
fn batch(seqs: &[(u32, usize, &[u32])]) -> StepBatch {
    let mut batch = StepBatch::default();
    for &(first, num_rows, pages) in seqs {
        let pages: Vec<PageId> = pages.iter().copied().map(PageId).collect();
        batch.push(&vec![0; num_rows], first, &pages, None);
    }
    batch
}

fn planned(options: PlanOptions, batch: &StepBatch) -> AttentionPlan {
    let mut plan = AttentionPlan::new(options);
    plan.plan(batch);
    plan
}

/// Rows and keys of tiles, with the first part row.
fn tiles(plan: &AttentionPlan) -> Vec<(Range<u32>, Range<u32>, Option<u32>)> {
    let tile = |tile: &Tile| (tile.row0..tile.row0 + tile.num_rows, tile.k0..tile.k1, tile.part);
    plan.tiles.iter().map(tile).collect()
}

#[test]
fn decodes_are_cut_along_their_keys_and_chunks_along_their_rows() {
    let batch = batch(&[(299, 1, &[0, 1, 2, 3, 4]), (10, 70, &[5, 6])]);
    let plan = planned(OPTIONS, &batch);
    assert_eq!(
        tiles(&plan),
        [
            (280..284, 0..128, Some(0)),
            (280..284, 128..256, Some(4)),
            (256..280, 0..80, None),
            (192..256, 0..74, None),
            (128..192, 0..58, None),
            (280..284, 256..300, Some(8)),
            (64..128, 0..42, None),
            (0..64, 0..26, None),
        ]
    );
    let none = Parts { first: 0, stride: 4, len: 0 };
    assert_eq!(plan.merges, [Merge { token: 0, shared: none, own: Parts { first: 0, stride: 4, len: 3 } }]);
    assert_eq!(
        plan.size(),
        PlanSize { tiles: 8, wide_tiles: 0, merges: 1, tokens: 71, pages: 7, part_rows: 12 }
    );
}

#[test]
fn long_chunks_end_where_their_last_row_does() {
    let batch = batch(&[(100, 300, &[0, 1, 2, 3, 4, 5, 6])]);
    let plan = planned(PlanOptions { batch_invariant: true, ..OPTIONS }, &batch);
    let ends: Vec<_> = plan.tiles.iter().map(|tile| (tile.k1, tile.min_position, tile.split)).collect();
    assert_eq!(ends[..2], [(400, 388, 128), (388, 372, 128)]);
    assert_eq!(ends[17..], [(132, 116, 128), (116, 100, 0)]);
    // A place for what each row has merged so far.
    assert_eq!(plan.size().part_rows, 18 * 64 - 16);
    let plan = planned(PlanOptions { wide_tiles: true, ..OPTIONS }, &batch);
    assert!(plan.tiles.is_empty());
    assert_eq!(plan.wide_tiles.len(), 1200usize.div_ceil(WIDE_ROWS));
    assert_eq!(plan.wide_tiles[0].k1, 400);
}

#[test]
fn a_common_prefix_is_read_once() {
    let batch =
        batch(&[(290, 1, &[7, 8, 9, 1, 2]), (50, 1, &[3]), (260, 2, &[7, 8, 9, 4, 5]), (140, 1, &[7, 8, 6])]);
    let plan = planned(OPTIONS, &batch);
    // By pages: the second, the last, the first, the third. The last three share one part.
    assert_eq!(
        tiles(&plan),
        [
            (4..20, 0..128, Some(0)),
            (8..12, 128..256, Some(20)),
            (12..20, 128..256, Some(28)),
            (0..4, 0..51, None),
            (8..12, 256..291, Some(24)),
            (4..8, 128..141, Some(16)),
            (12..20, 256..262, Some(36)),
        ]
    );
    let merge = |token, shared, own, stride, len| Merge {
        token,
        shared: Parts { first: shared, stride: 16, len: 1 },
        own: Parts { first: own, stride, len },
    };
    assert_eq!(
        plan.merges,
        [merge(4, 0, 16, 4, 1), merge(0, 4, 20, 4, 2), merge(2, 8, 28, 8, 2), merge(3, 12, 32, 8, 2)]
    );
}

#[test]
fn what_does_not_fit_is_not_cut() {
    let batch = batch(&[(299, 1, &[0, 1, 2, 3, 4]), (299, 1, &[5, 6, 7, 8, 9])]);
    for (max_part_rows, expected) in
        [(8, vec![300, 300]), (16, vec![300, 128, 128, 44]), (24, vec![128, 128, 128, 128, 44, 44])]
    {
        for batch_invariant in [false, true] {
            let plan = planned(PlanOptions { max_part_rows, batch_invariant, ..OPTIONS }, &batch);
            let lens: Vec<_> = plan.tiles.iter().map(|tile| tile.k1 - tile.k0).collect();
            assert_eq!(lens, expected);
            assert!(plan.size().part_rows <= max_part_rows);
        }
    }
}

#[test]
fn words_lie_where_the_layout_says() {
    let batch = batch(&[(299, 1, &[10, 11, 12, 13, 14]), (0, 1, &[15])]);
    let plan = planned(OPTIONS, &batch);
    let size = plan.size();
    let layout = PlanLayout::new(PlanSize { tiles: size.tiles + 2, merges: 4, pages: 10, ..size });
    let mut words = vec![9; layout.len];
    assert_eq!(plan.write(&batch, &layout, &mut words), layout.pages + 6);
    assert_eq!(words[..4], [4, 0, 1, 0]);
    assert_eq!(words[layout.tiles..][..8], [0, 4, 0, 128, 0, 0, 299, 0]);
    assert_eq!(words[layout.tiles + 24..][..8], [4, 4, 0, 1, u32::MAX, 5, 0, 0]);
    assert_eq!(words[layout.merges..][..8], [0, 0, 4, 0, 0, 4, 3, 0]);
    assert_eq!(words[layout.tokens..][..2], [0, 1]);
    assert_eq!(words[layout.pages..], [10, 11, 12, 13, 14, 15, 9, 9, 9, 9]);
}

/// The parts of rows in the order in which they were met: row of the partial results to token, head and first key.
type PartRows = std::collections::BTreeMap<u32, (u32, usize, u32)>;

/// Tiles of a plan against the keys that each row is to see. Returns, for each token and head, the ranges that end in
/// the tile.
fn rows_of_tiles(
    plan: &AttentionPlan,
    batch: &StepBatch,
    parts: &mut PartRows,
) -> Vec<((u32, usize), Range<u32>)> {
    let PlanOptions { page_size, group_len, split_len, .. } = plan.options;
    let mut whole = Vec::new();
    let seq_of = |token: u32| {
        (0..batch.num_seqs())
            .find(|&seq| batch.rows(seq).contains(&(token as usize)))
            .expect("a row of the batch")
    };
    for tile in plan.tiles.iter().chain(&plan.wide_tiles) {
        let positions = (0..tile.num_rows).map(|row| {
            let packed = (tile.row0 + row) as usize;
            let token = plan.tokens[packed / group_len];
            let seq = seq_of(token);
            let position = batch.positions[token as usize];
            let end = tile.k1.min(position + 1);
            for key in (tile.k0..end).step_by(page_size) {
                let page = batch.kv_page_indices[tile.pages as usize + key as usize / page_size];
                assert_eq!(page, batch.pages(seq)[key as usize / page_size], "a page of another sequence");
            }
            let row = (token, packed % group_len);
            if let Some(part) = tile.part {
                let before = parts.insert(part + row_of(tile, packed), (row.0, row.1, tile.k0));
                assert!(before.is_none(), "two rows of results in one place");
            }
            match tile.part {
                Some(_) if tile.split == 0 => {
                    assert!(tile.k0.is_multiple_of(split_len) && tile.k1 - tile.k0 <= split_len);
                    assert!(tile.k1 - tile.k0 == split_len || position < tile.k1 || tile.k1 % split_len != 0);
                }
                _ => whole.push((row, tile.k0..end)),
            }
            position
        });
        assert!(positions.min() >= Some(tile.min_position));
    }
    whole
}

fn row_of(tile: &Tile, packed: usize) -> u32 {
    packed as u32 - tile.row0
}

fn random_batch(random: &mut impl FnMut(u32) -> u32, page_size: usize) -> StepBatch {
    let mut batch = StepBatch::default();
    let mut next_page = 100;
    for _ in 0..1 + random(12) {
        let first = random(900);
        let num_rows = if random(3) > 0 { 1 } else { 1 + random(200) };
        let num_pages = (first + num_rows) as usize / page_size + 1;
        let num_shared = (random(600) / page_size as u32 * random(2)).min(first / page_size as u32);
        let table = (0..num_pages as u32).map(|page| {
            next_page += 1;
            PageId(if page < num_shared { page } else { next_page })
        });
        let pages: Vec<_> = table.collect();
        batch.push(&vec![0; num_rows as usize], first, &pages, None);
    }
    batch
}

/// Random batches: every row sees every key up to its own once, in order, on its own pages.
#[test]
fn every_row_sees_its_keys_once() {
    let mut state = 7u64;
    let mut random = |below: u32| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as u32 % below
    };
    for round in 0..300 {
        let page_size = 16usize << random(5);
        let batch = random_batch(&mut random, page_size);
        let group_len = 1 + random(9) as usize;
        let num_rows = batch.num_tokens() * group_len;
        let batch_invariant = random(2) == 0;
        let options = PlanOptions {
            page_size,
            group_len,
            head_dim: if random(4) == 0 { 256 } else { 64 },
            batch_invariant,
            wide_tiles: !batch_invariant && random(2) == 0,
            share_prefixes: random(3) > 0,
            split_len: 64 << random(3),
            max_part_rows: num_rows + random(2000) as usize,
        };
        let plan = planned(options, &batch);
        let mut parts = PartRows::new();
        let whole = rows_of_tiles(&plan, &batch, &mut parts);
        assert!(parts.keys().next_back().is_none_or(|&last| (last as usize) < plan.size().part_rows));
        assert!(plan.size().part_rows <= options.max_part_rows);
        for token in 0..batch.num_tokens() as u32 {
            let end = batch.positions[token as usize] + 1;
            let merges: Vec<_> = plan.merges.iter().filter(|merge| merge.token == token).collect();
            for head in 0..group_len {
                let ends: Vec<_> =
                    whole.iter().filter(|(row, _)| *row == (token, head)).map(|(_, keys)| keys).collect();
                if let [merge] = merges[..] {
                    assert!(ends.is_empty(), "a row is written twice");
                    let rows = |parts: Parts| (0..parts.len).map(move |i| parts.first + i * parts.stride);
                    let firsts: Vec<_> = rows(merge.shared)
                        .chain(rows(merge.own))
                        .map(|row| parts[&(row + head as u32)])
                        .map(|(of_token, of_head, k0)| {
                            assert_eq!((of_token, of_head), (token, head), "round {round}");
                            k0
                        })
                        .collect();
                    let expected: Vec<_> = (0..firsts.len() as u32).map(|i| i * options.split_len).collect();
                    assert_eq!(firsts, expected);
                    assert!(firsts.len() as u32 * options.split_len >= end);
                } else {
                    assert!(merges.is_empty() && ends == [&(0..end)], "round {round}: {ends:?} of {end}");
                }
            }
        }
    }
}
