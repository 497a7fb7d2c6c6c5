//! Random workloads on [`Scheduler`] with a naive KV cache: each slot remembers which prefix was written to it.
//!
//! What a sequence reads must be its own prefix, so a page that is freed, shared or written at a wrong time shows.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use tidemill_kernels::step::{HostPageId, SamplingParams};

use super::super::page_pool::fuzz::Random;
use super::super::sequence::{SequenceId, SequenceRequest};
use super::tests::learn_short;
use super::*;

const EOS: u32 = 0;

struct Case {
    random: Random,
    scheduler: Scheduler,
    has_priorities: bool,
    /// So many steps are started at once.
    max_started: usize,
    /// Steps that are not finished, the oldest first.
    started: VecDeque<StepBatch>,
    /// What the last finished step has sampled.
    sampled: Vec<Option<u32>>,
    /// `[num_pages * page_size]`: the prefix that ends in this slot.
    slots: Vec<u64>,
    /// `[num_host_pages * page_size]`
    host_slots: Vec<u64>,
    submitted: Vec<SequenceRequest>,
    /// Ids in the order of their first step.
    served: Vec<u64>,
    finished: BTreeSet<SequenceId>,
    aborted: BTreeSet<SequenceId>,
    /// Of them, those that a planned step was computing.
    num_aborted_in_step: usize,
}

fn extend_prefix(prefix: u64, token_id: u32) -> u64 {
    (prefix ^ u64::from(token_id + 1)).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29)
}

impl Case {
    fn new(seed: u64) -> Self {
        let mut random = Random::new(seed);
        let page_size = 1 << random.below(4);
        let num_pages = random.between(2, 40);
        let config = EngineConfig {
            max_num_seqs: random.between(1, 8),
            max_num_batched_tokens: random.between(1, 40),
            enable_prefix_cache: !random.one_in(3),
        };
        let copies_pages = random.one_in(2);
        let max_started = random.between(1, MAX_PLANNED);
        println!("{config:?}, {num_pages} pages of {page_size}, {max_started} steps at once");
        let num_host_pages = *random.pick(&[0, 1, 4, 40]);
        let mut scheduler = Scheduler::new(config, num_pages as u32, page_size as u32, copies_pages)
            .with_host_pages(num_host_pages as u32);
        if !random.one_in(4) {
            learn_short(&mut scheduler);
        }
        let has_priorities = random.one_in(2);
        Self {
            random,
            has_priorities,
            max_started,
            started: VecDeque::new(),
            sampled: Vec::new(),
            scheduler,
            slots: vec![0; num_pages * page_size],
            host_slots: vec![0; num_host_pages * page_size],
            submitted: Vec::new(),
            served: Vec::new(),
            finished: BTreeSet::new(),
            aborted: BTreeSet::new(),
            num_aborted_in_step: 0,
        }
    }

    /// Most prompts continue the beginning of an earlier one.
    fn submit(&mut self) {
        let max_len = self.slots.len().min(60);
        let mut token_ids = Vec::new();
        if !self.submitted.is_empty() && !self.random.one_in(4) {
            let earlier = &self.random.pick(&self.submitted).token_ids;
            token_ids.extend_from_slice(&earlier[..self.random.between(0, earlier.len())]);
        }
        let prompt_len = self.random.between(1, max_len - 1);
        token_ids.resize_with(prompt_len, || self.random.between(1, 3) as u32);
        let max_tokens = self.random.between(1, max_len - prompt_len) as u32;
        let id = SequenceId(self.submitted.len() as u64);
        let presence_penalty = *self.random.pick(&[0.0, 0.0, 1.0]);
        let sampling = SamplingParams { presence_penalty, ..SamplingParams::GREEDY };
        let request = SequenceRequest::new(id, token_ids.into(), max_tokens, sampling);
        let priority = if self.has_priorities { *self.random.pick(&Priority::ALL) } else { Priority::Low };
        let request = SequenceRequest { priority, ..request };
        self.scheduler.submit(&request);
        self.submitted.push(request);
    }

    /// Gives up any sequence, whether it waits, runs, is being computed, or is gone already.
    fn abort(&mut self) {
        let id = self.random.pick(&self.submitted).id;
        let is_open = !self.finished.contains(&id) && !self.aborted.contains(&id);
        let is_running = self.scheduler.running.iter().any(|sequence| sequence.id == id);
        assert_eq!(self.scheduler.abort(id), is_open, "{id:?}");
        self.num_aborted_in_step += usize::from(is_open && is_running && self.scheduler.num_planned > 0);
        self.aborted.extend(is_open.then_some(id));
        if self.scheduler.num_planned == 0 {
            self.check_pages();
        }
    }

    /// Starts what may be started, and finishes one step.
    fn step(&mut self) {
        while self.started.len() < self.max_started {
            let (step, was_planned) = (self.started.len(), self.scheduler.num_planned > self.started.len());
            if !self.scheduler.plan(step) {
                break;
            }
            let mut batch = StepBatch::default();
            self.scheduler.fill(step, &mut batch);
            assert!(batch.num_seqs() <= self.scheduler.config.max_num_seqs);
            assert!(batch.num_tokens() <= self.scheduler.config.max_num_batched_tokens);
            assert!(batch.num_tokens() > 0);
            assert!(step > 0 || !batch.is_ahead(), "nothing runs before the first step");
            if !was_planned {
                self.check_plan(step, &batch);
            }
            self.check_behind(&batch);
            self.started.push_back(batch);
        }
        let mut batch = self.started.pop_front().expect("there is work");
        self.resolve(&mut batch);
        self.write(&batch);
        self.check_reads(&batch);
        let token_ids =
            batch.sampling.iter().map(|wanted| wanted.map(|_| self.random.below(12).min(3) as u32));
        self.sampled = token_ids.collect();
        if self.random.one_in(10) {
            // The model has failed: what was started behind writes anything, and all steps are started again.
            for mut batch in std::mem::take(&mut self.started) {
                self.resolve(&mut batch);
                self.spoil(&batch);
            }
            self.scheduler.fail();
            return;
        }
        let output = StepOutput { token_ids: self.sampled.clone() };
        for finished in self.scheduler.commit(&output, &[EOS]) {
            assert!(self.finished.insert(finished.id), "{:?} finished twice", finished.id);
            assert!(!self.aborted.contains(&finished.id), "{:?} was given up", finished.id);
            let request = &self.submitted[finished.id.0 as usize];
            let len = finished.token_ids.len();
            match finished.reason {
                super::super::sequence::FinishReason::Stop => assert!(len < request.max_tokens as usize),
                super::super::sequence::FinishReason::Length => assert_eq!(len, request.max_tokens as usize),
            }
            assert_eq!(finished.prompt_len as usize, request.token_ids.len());
            assert!(finished.computed_len + finished.reused_len >= finished.prompt_len);
        }
        self.check_pages();
    }

    /// What a step writes, the step before does not read: it may fail and be started again.
    fn check_behind(&self, batch: &StepBatch) {
        let Some(before) = self.started.back() else { return };
        let page_size = self.scheduler.page_size;
        let beginning =
            |page: PageId, len: u32| page.0 as usize * page_size..page.0 as usize * page_size + len as usize;
        let mut read: BTreeSet<usize> =
            before.copies.iter().flat_map(|copy| beginning(copy.from, copy.len)).collect();
        let mut written: BTreeSet<usize> =
            batch.copies.iter().flat_map(|copy| beginning(copy.to, copy.len)).collect();
        for swap in &batch.swaps {
            let PageSwap::In { page, .. } = *swap else { panic!("swapped out behind a step that runs") };
            written.extend(beginning(page, page_size as u32));
        }
        for seq in 0..before.num_seqs() {
            let last = before.positions[before.rows(seq).end - 1] as usize;
            read.extend((0..=last).map(|position| self.slot(before.pages(seq), position)));
        }
        for seq in 0..batch.num_seqs() {
            let slot = |row: usize| self.slot(batch.pages(seq), batch.positions[row] as usize);
            written.extend(batch.rows(seq).map(slot));
        }
        assert!(read.is_disjoint(&written), "a step overwrites what the step before reads");
    }

    /// Fills in the tokens that were not known when the step was started.
    fn resolve(&self, batch: &mut StepBatch) {
        for seq in 0..batch.num_seqs() {
            let Some(sampled_by) = batch.sampled_by[seq] else { continue };
            let row = batch.rows(seq).start;
            batch.token_ids[row] = self.sampled[sampled_by as usize].expect("it was sampled");
        }
    }

    /// Decodes come before prefills, which are served in order: only the last one served may be cut.
    fn check_plan(&mut self, step: usize, batch: &StepBatch) {
        let scheduler = &self.scheduler;
        let in_all = scheduler.running.iter().filter(|sequence| sequence.goes_on(step));
        let uncomputed_len = |sequence: &Sequence| sequence.uncomputed_len(step);
        let is_cut = |one: &&Sequence| (1..uncomputed_len(one)).contains(&one.chunk_lens[step]);
        assert!(in_all.clone().filter(is_cut).count() <= 1, "two prompts are cut in one step");
        let is_left_out = |one: &Sequence| uncomputed_len(one) == 1 && one.chunk_lens[step] == 0;
        if in_all.clone().any(is_left_out) && !scheduler.needs_commit {
            assert_eq!(batch.num_tokens(), scheduler.config.max_num_batched_tokens, "a decode was left out");
        }
        // Whom the step leaves out while lower priorities are served has nothing to compute, or no room.
        let is_served = |sequence: &&Sequence| sequence.chunk_lens[step] > 0;
        let lowest = in_all.clone().filter(is_served).map(|sequence| sequence.priority).max();
        let mut left_out = in_all.clone().filter(|one| !is_served(one));
        assert!(scheduler.needs_commit || left_out.all(|sequence| Some(sequence.priority) >= lowest));
        assert!(self.scheduler.running.is_sorted_by_key(|sequence| sequence.priority));
        for sequence in &self.scheduler.running {
            if !self.served.contains(&sequence.id.0) {
                self.served.push(sequence.id.0);
            }
        }
    }

    fn slot(&self, pages: &[PageId], position: usize) -> usize {
        let page_size = self.scheduler.page_size;
        pages[position / page_size].0 as usize * page_size + position % page_size
    }

    fn swap_and_copy(&mut self, batch: &StepBatch) {
        let page_size = self.scheduler.page_size;
        for swap in &batch.swaps {
            let (PageSwap::Out { page, host } | PageSwap::In { host, page }) = *swap;
            let in_cache = &mut self.slots[page.0 as usize * page_size..][..page_size];
            let in_host = &mut self.host_slots[host.0 as usize * page_size..][..page_size];
            match swap {
                PageSwap::Out { .. } => in_host.copy_from_slice(in_cache),
                PageSwap::In { .. } => in_cache.copy_from_slice(in_host),
            }
        }
        for copy in &batch.copies {
            let from = copy.from.0 as usize * page_size;
            self.slots.copy_within(from..from + copy.len as usize, copy.to.0 as usize * page_size);
        }
    }

    /// Runs a step behind one that has failed.
    fn spoil(&mut self, batch: &StepBatch) {
        self.swap_and_copy(batch);
        for seq in 0..batch.num_seqs() {
            for row in batch.rows(seq) {
                let slot = self.slot(batch.pages(seq), batch.positions[row] as usize);
                self.slots[slot] = 0;
            }
        }
    }

    /// Runs the oldest planned step.
    fn write(&mut self, batch: &StepBatch) {
        self.swap_and_copy(batch);
        let mut written = BTreeSet::new();
        let in_step = self.scheduler.running.iter().filter(|sequence| sequence.chunk_lens[0] > 0);
        for (seq, sequence) in in_step.enumerate() {
            let rows = batch.rows(seq);
            let first = batch.positions[rows.start] as usize;
            let mut prefix =
                sequence.token_ids[..first].iter().fold(1, |prefix, &id| extend_prefix(prefix, id));
            for row in rows {
                prefix = extend_prefix(prefix, batch.token_ids[row]);
                let slot = self.slot(batch.pages(seq), batch.positions[row] as usize);
                assert!(written.insert(slot), "slot {slot} is written twice in one step");
                self.slots[slot] = prefix;
            }
        }
    }

    fn check_reads(&self, batch: &StepBatch) {
        let in_step = self.scheduler.running.iter().filter(|sequence| sequence.chunk_lens[0] > 0);
        for (seq, sequence) in in_step.enumerate() {
            let mut prefix = 1;
            for (position, &id) in sequence.token_ids[..sequence.chunk(0).end].iter().enumerate() {
                prefix = extend_prefix(prefix, id);
                let slot = self.slot(batch.pages(seq), position);
                assert_eq!(self.slots[slot], prefix, "{:?} reads foreign tokens at {position}", sequence.id);
            }
        }
    }

    /// Each page has one holder, or as many users as page tables.
    fn check_pages(&self) {
        let mut num_users = BTreeMap::new();
        let mut own = BTreeSet::new();
        for sequence in &self.scheduler.running {
            let (shared, rest) = sequence.pages.split_at(sequence.num_shared_pages);
            shared.iter().for_each(|&page| *num_users.entry(page).or_insert(0) += 1);
            let locked = sequence.copy.filter(|copy| copy.is_cached).map(|copy| copy.page);
            locked.into_iter().for_each(|page| *num_users.entry(page).or_insert(0) += 1);
            let is_planned = sequence.chunk_lens[0] > 0;
            assert!(sequence.copy.is_none() || is_planned, "a copy outlives its step");
            for &page in rest {
                assert!(own.insert(page), "page {page} belongs to two sequences");
                assert_eq!(self.scheduler.pool.holder(page), PageHolder::Sequence);
            }
        }
        let mut hosts: Vec<_> = self.scheduler.host.free.clone();
        for sequence in &self.scheduler.running {
            assert!(sequence.swapped.is_none(), "it runs and is swapped out");
            assert!(sequence.swap_ins.is_empty() || sequence.chunk_lens[0] > 0, "a swap outlives its step");
            hosts.extend(sequence.swap_ins.iter().map(|swap| swap.0));
        }
        for sequence in &self.scheduler.waiting {
            hosts.extend(sequence.swapped.iter().flat_map(|swapped| swapped.pages.iter().copied()));
            assert!(sequence.pages.is_empty() && sequence.computed_len == 0);
        }
        hosts.sort_unstable();
        let num_host_pages = self.host_slots.len() / self.scheduler.page_size;
        assert!(hosts.into_iter().eq((0..num_host_pages as u32).map(HostPageId)), "host pages are lost");
        let scheduler = &self.scheduler;
        scheduler.cache.check(&scheduler.pool, &num_users);
        let num_held = own.len() + scheduler.replaced_pages.len() + scheduler.cache.num_pages();
        assert_eq!(num_held + scheduler.pool.num_free(), scheduler.pool.num_pages());
    }

    /// Nobody is overtaken by equals but while waiting for a shared prefix, and then by few.
    fn check_order(&self) {
        let priority = |id: u64| self.submitted[id as usize].priority;
        for (place, &id) in self.served.iter().enumerate() {
            let is_overtaken = |&&other: &&u64| other < id && priority(other) == priority(id);
            let num_overtaken = self.served[place..].iter().filter(is_overtaken).count();
            let limit = if self.scheduler.config.enable_prefix_cache { MAX_LOOKAHEAD } else { 0 };
            assert!(num_overtaken <= limit, "sequence {id} has overtaken {num_overtaken}");
        }
    }

    fn has_work(&self) -> bool {
        self.scheduler.has_work()
    }

    fn run(&mut self) {
        let num_sequences = self.random.between(1, 40);
        let aborts = self.random.one_in(2);
        let mut num_steps = 0;
        while self.finished.len() + self.aborted.len() < num_sequences || self.has_work() {
            while self.submitted.len() < num_sequences && !self.random.one_in(3) {
                self.submit();
            }
            let patience = if self.scheduler.num_planned > 0 { 2 } else { 8 };
            if aborts && !self.submitted.is_empty() && self.random.one_in(patience) {
                self.abort();
            }
            if self.has_work() {
                self.step();
                num_steps += 1;
            }
            assert!(num_steps < 50_000, "the scheduler makes no progress");
        }
        assert_eq!(self.scheduler.num_available_pages(), self.scheduler.num_pages());
        self.check_order();
    }
}

#[test]
fn every_sequence_reads_its_own_prefix_and_finishes() {
    let mut total = Counters::default();
    let mut num_aborted_in_step = 0;
    for seed in 0..600 {
        let mut case = Case::new(seed);
        case.run();
        let counters = case.scheduler.counters();
        assert_eq!(
            counters.prompt_tokens + counters.recomputed_tokens,
            counters.computed_tokens + counters.reused_tokens + counters.aborted_tokens
        );
        assert_eq!(counters.finished, case.finished.len() as u64);
        assert_eq!(counters.aborted, case.aborted.len() as u64);
        num_aborted_in_step += case.num_aborted_in_step;
        total.aborted += counters.aborted;
        total.preemptions += counters.preemptions;
        total.reused_tokens += counters.reused_tokens;
        total.recomputed_tokens += counters.recomputed_tokens;
        total.swapped_out_pages += counters.swapped_out_pages;
        total.swapped_in_pages += counters.swapped_in_pages;
    }
    println!("{total:?}");
    assert!(total.preemptions > 100, "too few preemptions to show anything");
    assert!(total.aborted > 100 && num_aborted_in_step > 20, "too few are given up to show anything");
    assert!(total.swapped_in_pages > 100, "too few swaps to show anything");
    assert!(total.recomputed_tokens > 100, "too few are computed again to show anything");
    assert!(total.reused_tokens > 1000, "too little reuse to show anything");
}
