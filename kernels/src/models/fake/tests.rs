use super::*;
use crate::step::{HostPageId, PageCopy};

const GREEDY: Option<SamplingParams> = Some(SamplingParams::GREEDY);

fn model() -> FakeModel {
    FakeModel::new(FakeConfig { page_size: 4, num_pages: 8, ..FakeConfig::default() })
}

fn pages<const N: usize>(ids: [u32; N]) -> [PageId; N] {
    ids.map(PageId)
}

/// One sequence, one step.
fn step(model: &mut FakeModel, token_ids: &[u32], first: u32, pages: &[PageId]) -> u32 {
    let mut batch = StepBatch::default();
    batch.push(token_ids, first, pages, GREEDY);
    model.step(&batch).unwrap().token_ids[0].unwrap()
}

const TOKENS: [u32; 10] = [5, 6, 7, 8, 9, 10, 11, 12, 13, 14];

#[test]
fn answers_do_not_depend_on_chunks_pages_and_neighbors() {
    let expected = step(&mut model(), &TOKENS, 0, &pages([0, 1, 2]));
    for cut in 1..TOKENS.len() {
        let mut model = model();
        let table = pages([6, 1, 4]);
        step(&mut model, &TOKENS[..cut], 0, &table);
        let mut batch = StepBatch::default();
        batch.push(&[1, 2, 3], 0, &pages([3]), None);
        batch.push(&TOKENS[cut..], cut as u32, &table, GREEDY);
        batch.push(&[5, 6], 0, &pages([0]), GREEDY);
        let output = model.step(&batch).unwrap();
        assert_eq!(output.token_ids[0], None);
        assert_eq!(output.token_ids[1], Some(expected), "cut at {cut}");
        assert_eq!(model.num_faults(), 0);
        assert_eq!(model.num_tokens(), TOKENS.len() as u64 + 5);
    }
    let other = FakeModel::new(FakeConfig { page_size: 16, num_pages: 1, ..FakeConfig::default() });
    assert_eq!(step(&mut { other }, &TOKENS, 0, &pages([0])), expected);
}

#[test]
fn every_token_and_the_length_change_the_answer() {
    let vocab = FakeConfig { vocab_size: u32::MAX, eos_probability: 0.0, ..FakeConfig::default() };
    let answer = |token_ids: &[u32]| step(&mut FakeModel::new(vocab.clone()), token_ids, 0, &pages([0]));
    let expected = answer(&TOKENS);
    for i in 0..TOKENS.len() {
        let mut changed = TOKENS;
        changed[i] += 1;
        assert_ne!(answer(&changed), expected);
        assert_ne!(answer(&TOKENS[..i.max(1)]), expected);
    }
}

#[test]
fn shared_prefixes_are_sound() {
    let mut model = model();
    let expected = step(&mut model, &TOKENS, 0, &pages([0, 1, 2]));
    // Another sequence reuses the first two pages and computes the rest.
    assert_eq!(step(&mut model, &TOKENS[8..], 8, &pages([0, 1, 5])), expected);
    assert_eq!(model.num_faults(), 0);
}

#[test]
fn a_copied_prefix_is_sound() {
    let mut model = model();
    let expected = step(&mut model, &TOKENS, 0, &pages([0, 1, 2]));
    let copies = vec![PageCopy { from: PageId(2), to: PageId(6), len: 1 }];
    let mut batch = StepBatch { copies, ..StepBatch::default() };
    batch.push(&TOKENS[9..], 9, &pages([0, 1, 6]), GREEDY);
    assert_eq!(model.step(&batch).unwrap().token_ids, [Some(expected)]);
    assert_eq!(model.num_faults(), 0);
}

#[test]
fn a_swapped_page_is_sound() {
    let mut model = FakeModel::new(FakeConfig { num_host_pages: 2, ..model().config });
    let expected = step(&mut model, &TOKENS, 0, &pages([0, 1, 2]));
    let host = HostPageId(1);
    // Out, and overwritten in the same step.
    let swaps = vec![PageSwap::Out { page: PageId(1), host }];
    let mut batch = StepBatch { swaps, ..StepBatch::default() };
    batch.push(&[1, 2, 3, 4], 0, &pages([1]), None);
    model.step(&batch).unwrap();
    let swaps = vec![PageSwap::In { host, page: PageId(7) }];
    let mut batch = StepBatch { swaps, ..StepBatch::default() };
    batch.push(&TOKENS[9..], 9, &pages([0, 7, 2]), GREEDY);
    assert_eq!(model.step(&batch).unwrap().token_ids, [Some(expected)]);
    assert_eq!(model.num_faults(), 0);
}

#[test]
fn a_step_takes_the_token_of_the_step_before() {
    let mut model = model();
    let table = pages([0, 1, 2]);
    let first = step(&mut model, &TOKENS, 0, &table);
    let second = step(&mut model, &[first], 10, &table);

    let mut ahead = FakeModel::new(FakeConfig { runs_ahead: true, ..model.config.clone() });
    assert_eq!((model.max_started(), ahead.max_started()), (1, 2));
    let mut batch = StepBatch::default();
    batch.push(&[1, 2, 3], 0, &pages([4]), None);
    batch.push(&TOKENS, 0, &table, GREEDY);
    ahead.start(&batch).unwrap();
    batch.clear();
    batch.push_ahead(1, 10, &table, GREEDY);
    ahead.start(&batch).unwrap();
    assert_eq!(ahead.finish().unwrap().token_ids, [None, Some(first)]);
    assert_eq!(ahead.finish().unwrap().token_ids, [Some(second)]);
    assert_eq!(ahead.num_faults(), 0);
}

#[test]
fn paging_faults_change_the_answer() {
    let vocab = FakeConfig { vocab_size: u32::MAX, page_size: 4, num_pages: 8, ..FakeConfig::default() };
    let fresh = || FakeModel::new(FakeConfig { eos_probability: 0.0, ..vocab.clone() });
    let expected = step(&mut fresh(), &TOKENS, 0, &pages([0, 1, 2]));
    let check = |what: &str, mut model: FakeModel, table: &[PageId]| {
        let answer = step(&mut model, &TOKENS[8..], 8, table);
        assert_ne!(answer, expected, "{what}");
        assert!(model.num_faults() > 0, "{what}");
    };
    let computed = || {
        let mut model = fresh();
        step(&mut model, &TOKENS[..8], 0, &pages([0, 1]));
        model
    };
    check("a page never written", computed(), &pages([0, 7, 2]));
    check("pages swapped", computed(), &pages([1, 0, 2]));

    let mut model = computed();
    step(&mut model, &[1, 2, 3], 0, &pages([1]));
    check("a page overwritten by another sequence", model, &pages([0, 1, 2]));

    // The same tokens at the same positions, but computed after another beginning.
    let mut model = computed();
    step(&mut model, &[1, 2, 3, 4], 0, &pages([3]));
    step(&mut model, &TOKENS[4..8], 4, &pages([3, 1]));
    check("a page with another history", model, &pages([0, 1, 2]));
}

#[test]
fn sampled_answers_depend_on_the_parameters_and_end_sometimes() {
    let config = FakeConfig { eos_probability: 0.25, ..FakeConfig::default() };
    let mut model = FakeModel::new(config);
    let (mut num_eos, mut differ) = (0, 0);
    for seed in 0..1000 {
        let params = SamplingParams { temperature: 0.7, seed, ..SamplingParams::GREEDY };
        let mut batch = StepBatch::default();
        batch.push(&TOKENS, 0, &pages([0]), Some(params));
        batch.push(&TOKENS, 0, &pages([1]), Some(SamplingParams { seed: seed + 1, ..params }));
        let output = model.step(&batch).unwrap();
        num_eos += u32::from(output.token_ids[0] == Some(0));
        differ += u32::from(output.token_ids[0] != output.token_ids[1]);
    }
    assert!((200..300).contains(&num_eos), "{num_eos} of 1000 end");
    assert!(differ > 800, "{differ} of 1000 differ");
}

#[test]
fn a_wrong_list_of_uses_changes_the_answer() {
    let sampling = SamplingParams { frequency_penalty: 0.5, ..SamplingParams::GREEDY };
    let answer = |sampling, uses: &[(u32, u32)]| {
        let mut batch = StepBatch::default();
        batch.push(&TOKENS, 0, &pages([0]), Some(sampling));
        let uses: Vec<TokenUse> =
            uses.iter().map(|&(token_id, num_in_answer)| TokenUse { token_id, num_in_answer }).collect();
        batch.push_uses(&uses);
        FakeModel::new(FakeConfig { eos_probability: 0.0, ..FakeConfig::default() }).step(&batch).unwrap()
    };
    let right = answer(sampling, &[(3, 1), (5, 2)]);
    assert_eq!(right, answer(sampling, &[(3, 1), (5, 2)]));
    for wrong in [&[][..], &[(3, 1)], &[(3, 1), (5, 1)], &[(3, 1), (6, 2)]] {
        assert_ne!(right, answer(sampling, wrong), "{wrong:?}");
    }
    let other = SamplingParams { frequency_penalty: 0.25, ..sampling };
    assert_ne!(right, answer(other, &[(3, 1), (5, 2)]));
    assert_ne!(answer(sampling, &[]), answer(SamplingParams::GREEDY, &[]));
}
