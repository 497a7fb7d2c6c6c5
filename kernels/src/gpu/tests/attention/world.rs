//! Sequences with known queries, keys and values, laid out in pages for a step, and what attention makes of them.
//!
//! A number is a function of its sequence and position, so a row is the same wherever it stands in whatever batch.

use super::super::*;
use crate::backend::AttentionShape;
use crate::gpu::e4m3;
use crate::gpu::ops::{AttentionArgs, AttentionParts, PagedKv, attention};
use crate::gpu::plan::{AttentionPlan, PlanLayout, PlanOptions, PlanSize};
use crate::step::{PageId, StepBatch};

/// Rows of a sequence in a step.
#[derive(Clone, Copy, Debug)]
pub(super) struct Seq {
    pub(super) id: u64,
    pub(super) first: u32,
    pub(super) num_rows: u32,
    /// So many of its first tokens are those of all sequences of family `family`.
    pub(super) num_shared: u32,
    pub(super) family: u64,
}

impl Seq {
    pub(super) fn new(id: u64, first: u32, num_rows: u32) -> Self {
        Self { id, first, num_rows, num_shared: 0, family: 0 }
    }

    pub(super) fn sharing(self, family: u64, num_shared: u32) -> Self {
        Self { family, num_shared, ..self }
    }

    fn end(&self) -> u32 {
        self.first + self.num_rows
    }

    /// Who the token at a position belongs to.
    fn owner(&self, position: u32) -> u64 {
        if position < self.num_shared { 1_000_000 + self.family } else { self.id }
    }
}

#[derive(Clone, Copy, Debug)]
pub(super) struct World {
    pub(super) num_heads: usize,
    pub(super) num_kv_heads: usize,
    pub(super) head_dim: usize,
    pub(super) page_size: usize,
    pub(super) window: Option<u32>,
    pub(super) dtype: HalfDtype,
    /// Keys and values.
    pub(super) is_e4m3: bool,
    pub(super) batch_invariant: bool,
    pub(super) wide_tiles: bool,
    pub(super) share_prefixes: bool,
    /// Whether sequences of a family use the same pages where they can.
    pub(super) shares_pages: bool,
    pub(super) split_len: u32,
    /// More rows of partial results than one a row.
    pub(super) spare_part_rows: usize,
    /// Chooses the pages.
    pub(super) seed: u64,
}

impl World {
    pub(super) const PLAIN: Self = Self {
        num_heads: 4,
        num_kv_heads: 2,
        head_dim: 64,
        page_size: 16,
        window: None,
        dtype: HalfDtype::Bf16,
        is_e4m3: false,
        batch_invariant: false,
        wide_tiles: false,
        share_prefixes: true,
        shares_pages: true,
        split_len: 128,
        spare_part_rows: 1 << 12,
        seed: 1,
    };

    pub(super) fn options(&self, num_tokens: usize) -> PlanOptions {
        let group_len = self.num_heads / self.num_kv_heads;
        PlanOptions {
            page_size: self.page_size,
            group_len,
            head_dim: self.head_dim,
            batch_invariant: self.batch_invariant,
            wide_tiles: self.wide_tiles,
            share_prefixes: self.share_prefixes,
            split_len: self.split_len,
            max_part_rows: num_tokens * group_len + self.spare_part_rows,
        }
    }

    fn shape(&self, num_pages: usize) -> AttentionShape {
        AttentionShape {
            num_heads: self.num_heads,
            num_kv_heads: self.num_kv_heads,
            head_dim: self.head_dim,
            page_size: self.page_size,
            num_pages,
            scale: 2.0 / (self.head_dim as f32).sqrt(),
        }
    }

    /// As the device holds them: numbers of a head of the token of `owner` at `position`.
    fn numbers(&self, kind: u64, owner: u64, position: u32, head: usize) -> Vec<f32> {
        let seed = ((owner * 5 + kind) * 100_003 + u64::from(position)) * 101 + head as u64 + 1;
        let values: Vec<f32> = random(seed, self.head_dim).iter().map(|x| x * 2.0).collect();
        if self.is_e4m3 && kind > 0 {
            values.into_iter().map(|x| e4m3::to_f32(e4m3::from_f32(x))).collect()
        } else {
            rounded(self.dtype, values)
        }
    }

    /// The pages of each sequence, and how many there are.
    fn pages(&self, seqs: &[Seq]) -> (Vec<Vec<PageId>>, usize) {
        let mut shared: Vec<(u64, usize, u32)> = Vec::new();
        let mut num_pages = 0u32;
        let mut tables: Vec<Vec<u32>> = Vec::new();
        for seq in seqs {
            let num_shared = seq.num_shared as usize / self.page_size;
            let table = (0..(seq.end() as usize).div_ceil(self.page_size) + 1).map(|index| {
                let is_shared = self.shares_pages && index < num_shared;
                let known =
                    shared.iter().find(|entry| is_shared && (entry.0, entry.1) == (seq.family, index));
                let page = known.map_or(num_pages, |entry| entry.2);
                if known.is_none() {
                    num_pages += 1;
                }
                if is_shared && known.is_none() {
                    shared.push((seq.family, index, page));
                }
                page
            });
            tables.push(table.collect());
        }
        let mut order: Vec<u32> = (0..num_pages).collect();
        let keys = random(self.seed, order.len());
        order.sort_by(|&a, &b| keys[a as usize].total_cmp(&keys[b as usize]));
        let table = |table: Vec<u32>| table.into_iter().map(|page| PageId(order[page as usize])).collect();
        (tables.into_iter().map(table).collect(), order.len())
    }

    /// The batch, its pages with NaN in every slot that nobody wrote, and its queries.
    pub(super) fn step(&self, seqs: &[Seq]) -> Step {
        let (tables, num_pages) = self.pages(seqs);
        let shape = self.shape(num_pages);
        let mut batch = StepBatch::default();
        let mut kv = vec![f32::NAN; shape.num_slots() * 2 * shape.kv_len()];
        let mut query = Vec::new();
        for (seq, table) in seqs.iter().zip(&tables) {
            batch.push(&vec![0; seq.num_rows as usize], seq.first, table, None);
            for position in 0..seq.end() {
                let page = table[position as usize / self.page_size].0 as usize;
                for (kind, head) in
                    (0..2).flat_map(|kind| (0..self.num_kv_heads).map(move |head| (kind, head)))
                {
                    let row = (page * 2 + kind) * self.num_kv_heads + head;
                    let slot = row * self.page_size + position as usize % self.page_size;
                    let numbers = self.numbers(kind as u64 + 1, seq.owner(position), position, head);
                    kv[slot * self.head_dim..][..self.head_dim].copy_from_slice(&numbers);
                }
            }
            for position in seq.first..seq.end() {
                let head = |head| self.numbers(0, seq.id, position, head);
                query.extend((0..self.num_heads).flat_map(head));
            }
        }
        Step { shape, batch, kv, query }
    }

    /// `[rows, heads, head_dim]` by plain loops.
    pub(super) fn expected(&self, seqs: &[Seq]) -> Vec<f32> {
        let mut out = Vec::new();
        for seq in seqs {
            let head_of = |kind, head: usize| -> Vec<Vec<f32>> {
                let numbers = |position| self.numbers(kind, seq.owner(position), position, head);
                (0..seq.end()).map(numbers).collect()
            };
            let all = |kind| -> Vec<_> { (0..self.num_kv_heads).map(|head| head_of(kind, head)).collect() };
            let (keys, values) = (all(1), all(2));
            for position in seq.first..seq.end() {
                for head in 0..self.num_heads {
                    let kv_head = head * self.num_kv_heads / self.num_heads;
                    let query = self.numbers(0, seq.id, position, head);
                    let low = self.window.map_or(0, |window| (position + 1).saturating_sub(window));
                    let range = low as usize..position as usize + 1;
                    out.extend(self.attend(&query, &keys[kv_head][range.clone()], &values[kv_head][range]));
                }
            }
        }
        out
    }

    fn attend(&self, query: &[f32], keys: &[Vec<f32>], values: &[Vec<f32>]) -> Vec<f32> {
        let dot = |key: &Vec<f32>| key.iter().zip(query).map(|(x, y)| x * y).sum::<f32>();
        let scores: Vec<f32> = keys.iter().map(|key| dot(key) * self.shape(0).scale).collect();
        let max = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let weights: Vec<f32> = scores.iter().map(|score| (score - max).exp()).collect();
        let total: f32 = weights.iter().sum();
        let mut out = vec![0.0; self.head_dim];
        for (weight, value) in weights.iter().zip(values) {
            for (out, value) in out.iter_mut().zip(value) {
                *out += weight / total * value;
            }
        }
        out
    }

    /// Plans and attends, with no more room than the plan takes.
    pub(super) fn run(&self, device: &Arc<dyn Device>, seqs: &[Seq]) -> Vec<f32> {
        let step = self.step(seqs);
        let mut plan = AttentionPlan::new(self.options(step.batch.num_tokens()));
        plan.plan(&step.batch);
        let layout = PlanLayout::new(plan.size());
        let on_device = OnDevice::new(device, self, &step, layout);
        let mut words = vec![u32::MAX; layout.len];
        plan.write(&step.batch, &layout, &mut words);
        on_device.attend(device, self.window, &put(device, &words));
        on_device.out.read().unwrap()
    }
}

/// Of a seed: any world, and any sequences in it.
pub(super) fn any(seed: u64) -> (World, Vec<Seq>) {
    let mut numbers = random(seed, 200).into_iter();
    // Below `end`.
    let mut below = |end: u32| ((numbers.next().expect("enough") + 1.0) / 2.0 * end as f32) as u32;
    let num_kv_heads = 1 + below(3) as usize;
    let head_dim = [64, 64, 128, 256][below(4) as usize];
    let (is_e4m3, batch_invariant) = (below(3) == 0, below(3) == 0);
    let world = World {
        num_heads: num_kv_heads * (1 + below(5) as usize),
        num_kv_heads,
        head_dim,
        page_size: 16 << below(5),
        window: (below(3) == 0).then(|| 1 + below(200)),
        dtype: HALF_DTYPES[below(2) as usize],
        is_e4m3,
        batch_invariant,
        wide_tiles: below(2) == 0 && !is_e4m3 && !batch_invariant && head_dim <= 128,
        share_prefixes: below(4) > 0,
        shares_pages: below(4) > 0,
        split_len: 128 << below(2),
        spare_part_rows: if below(4) == 0 { 8 } else { 1 << 12 },
        seed,
    };
    let seqs = (1..=u64::from(1 + below(7))).map(|id| {
        let num_rows = if below(2) == 0 { 1 } else { 1 + below(100) };
        let seq = Seq::new(id, below(300), num_rows);
        let family = u64::from(below(3));
        if family == 0 { seq } else { seq.sharing(family, below(seq.end())) }
    });
    (world, seqs.collect())
}

pub(super) struct Step {
    pub(super) shape: AttentionShape,
    pub(super) batch: StepBatch,
    kv: Vec<f32>,
    query: Vec<f32>,
}

enum Kv {
    Half(HalfVec),
    E4m3(DeviceVec<u8>),
}

/// Operands of a step.
pub(super) struct OnDevice {
    shape: AttentionShape,
    layout: PlanLayout,
    positions: DeviceVec<u32>,
    query: HalfVec,
    kv: Kv,
    parts: AttentionParts,
    pub(super) out: HalfVec,
}

impl OnDevice {
    /// With room for the layout; tokens beyond the step's are NaN.
    pub(super) fn new(device: &Arc<dyn Device>, world: &World, step: &Step, layout: PlanLayout) -> Self {
        let PlanSize { tokens, part_rows, .. } = layout.room;
        let mut query = step.query.clone();
        query.resize(tokens * step.shape.q_len(), f32::NAN);
        let mut positions = step.batch.positions.clone();
        positions.resize(tokens, u32::MAX);
        let kv = if world.is_e4m3 {
            let bytes: Vec<u8> = step.kv.iter().map(|&x| e4m3::from_f32(x)).collect();
            Kv::E4m3(put(device, &bytes))
        } else {
            Kv::Half(put_half(device, world.dtype, &step.kv))
        };
        Self {
            shape: step.shape,
            layout,
            positions: put(device, &positions),
            out: fresh_half(device, world.dtype, query.len()),
            query: put_half(device, world.dtype, &query),
            kv,
            parts: AttentionParts::new(device, &step.shape, part_rows).unwrap(),
        }
    }

    pub(super) fn attend(&self, device: &Arc<dyn Device>, window: Option<u32>, plan: &DeviceVec<u32>) {
        let args = AttentionArgs {
            shape: &self.shape,
            window,
            layout: &self.layout,
            plan: plan.into(),
            positions: (&self.positions).into(),
            query: &self.query,
            kv: match &self.kv {
                Kv::Half(kv) => PagedKv::Half(kv.bits()),
                Kv::E4m3(kv) => PagedKv::E4m3(kv.into()),
            },
            parts: &self.parts,
            out: &self.out,
        };
        attention(&**device, &args).unwrap();
    }
}
