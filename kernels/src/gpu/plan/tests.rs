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
    plan.tiles().iter().map(tile).collect()
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
    assert_eq!(plan.merges(), [Merge { token: 0, shared: none, own: Parts { first: 0, stride: 4, len: 3 } }]);
    assert_eq!(
        plan.size(),
        PlanSize { tiles: 8, wide_tiles: 0, merges: 1, tokens: 71, pages: 7, part_rows: 12 }
    );
}

#[test]
fn long_chunks_end_where_their_last_row_does() {
    let batch = batch(&[(100, 300, &[0, 1, 2, 3, 4, 5, 6])]);
    let plan = planned(PlanOptions { batch_invariant: true, ..OPTIONS }, &batch);
    let ends: Vec<_> = plan.tiles().iter().map(|tile| (tile.k1, tile.min_position, tile.split)).collect();
    assert_eq!(ends[..2], [(400, 388, 128), (388, 372, 128)]);
    assert_eq!(ends[17..], [(132, 116, 128), (116, 100, 0)]);
    // A place for what each row has merged so far.
    assert_eq!(plan.size().part_rows, 18 * 64 - 16);
    let plan = planned(PlanOptions { wide_tiles: true, ..OPTIONS }, &batch);
    assert!(plan.tiles().is_empty());
    assert_eq!(plan.wide_tiles().len(), 1200usize.div_ceil(WIDE_ROWS));
    assert_eq!(plan.wide_tiles()[0].k1, 400);
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
        plan.merges(),
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
            let lens: Vec<_> = plan.tiles().iter().map(|tile| tile.k1 - tile.k0).collect();
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
