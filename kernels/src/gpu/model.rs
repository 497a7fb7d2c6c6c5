//! A model on a GPU, behind [`Model`]: steps are started without waiting for the one before.
//!
//! Starting a step fills a block of inputs, queues its copy and the kernels, and the copy of what was sampled back to
//! the host; finishing it waits for that copy. Tokens of the step before that the host has not seen are read on the
//! device. Steps of decodes alone, without penalties, are recorded as graphs, one for each size, and queued by one call.
//!
//! Invariant: at most two steps are in flight, each with a block of the host of its own; the device does them in order,
//! so all other memory is there once.

mod buffers;
mod experts;
mod forward;
mod inputs;
mod memory;
mod penalties;
mod rope;
mod scores;

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use self::buffers::Buffers;
use self::forward::Head;
use self::inputs::{Inputs, Layout, StepShape};
use self::penalties::PenaltyInputs;
use self::rope::DeviceRope;
use super::device::{Device, DeviceError, Event, Graph};
use super::half_vec::HalfDtype;
use super::memory::{DeviceVec, PinnedVec};
use super::ops::{AttentionParts, RowSampling, attention_shared_bytes, sample_error};
use super::plan::{AttentionPlan, PlanOptions, PlanSize};
use super::weights::{GpuWeights, WeightDtype};
use crate::backend::AttentionShape;
use crate::gpu::{GpuError, KvDtype};
use crate::models::{ENGINE_VERSION, ModelError};
use crate::sample::SampleError;
use crate::step::{Model, ModelInfo, PageSwap, StepBatch, StepError, StepOutput};

pub use self::memory::KvMemory;

const MAX_STARTED: usize = 2;
/// Decodes that a graph may hold.
const MAX_GRAPH_ROWS: usize = 256;
/// Rows of the smallest tiles.
const MIN_TILE_ROWS: usize = 32;

/// The bounds of a model's steps, and its pages.
#[derive(Clone, Copy, Debug)]
pub struct GpuModelConfig {
    /// Tokens per page, a power of two from 16 on.
    pub page_size: u32,
    pub kv_memory: KvMemory,
    pub max_num_batched_tokens: u32,
    pub max_num_seqs: u32,
    /// Pages that preempted sequences may keep in pinned memory of the host.
    pub num_host_pages: u32,
}

pub struct GpuModel {
    info: ModelInfo,
    runner: Runner,
    inputs: Inputs,
    penalties: PenaltyInputs,
    /// What was sampled, for each block of inputs: ids, then error codes.
    results: [PinnedVec<u32>; 2],
    in_flight: VecDeque<Started>,
    /// Of the step started last: where each sequence's token is among the sampled ones.
    sampled_at: Vec<Option<u32>>,
    num_started: usize,
    plan: AttentionPlan,
    /// The largest plan.
    room: PlanSize,
    graphs: BTreeMap<GraphKey, DecodeGraph>,
}

/// What kernels work on.
struct Runner {
    device: Arc<dyn Device>,
    weights: Arc<GpuWeights>,
    page_size: usize,
    /// `[num_layers]`: `[pages, 2, num_kv_heads, page_size, stride]`
    kv: Vec<DeviceVec<u8>>,
    /// Of one layer.
    page_bytes: usize,
    /// `[num_host_pages, num_layers, page]`
    host_kv: PinnedVec<u8>,
    buffers: Buffers,
    shape: AttentionShape,
    parts: AttentionParts,
    rope: DeviceRope,
    window_rope: Option<DeviceRope>,
    /// `[max_num_seqs]`: ids, and error codes behind them. The next step may read the ids.
    sampled: DeviceVec<u32>,
    /// `[max_num_seqs]`: ids of the step before, where a step has penalties.
    sampled_before: DeviceVec<u32>,
}

struct Started {
    /// Which block of inputs and results.
    index: usize,
    event: Event,
    /// `[num_seqs]`: where each sequence's token is among the sampled ones.
    sampled_at: Vec<Option<u32>>,
}

/// What a graph is recorded for. Attention has blocks for as many tiles, of which those without work return at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct GraphKey {
    num_rows: usize,
    num_tiles: usize,
    num_merges: usize,
}

/// Decodes of one size. The first such step runs as it is, so that all there is to load is loaded.
enum DecodeGraph {
    Seen,
    Recorded(Graph),
    Refused,
}

impl GpuModel {
    /// `weights_digest` identifies the weights; with the numeric path it becomes the digest of the model.
    pub fn new(
        weights: Arc<GpuWeights>,
        config: GpuModelConfig,
        name: &str,
        weights_digest: &str,
    ) -> Result<Self, ModelError> {
        let device = Arc::clone(&weights.device);
        let (max_rows, max_seqs) = (config.max_num_batched_tokens as usize, config.max_num_seqs as usize);
        let page_size = memory::check_page_size(config.page_size)?;
        let model = &weights.config;
        let (head_dim, max_position) = (model.head_dim as usize, model.max_position as usize);
        let num_layers = model.num_layers as usize;
        let heads_len = 2 * model.num_kv_heads as usize * weights.stride;
        let page_bytes = page_size * heads_len * weights.options.kv_dtype.size_bytes();
        check_shared_memory(&weights)?;
        let shape = attention_shape(&weights, &config);
        let options = PlanOptions::of_steps(&*device, &shape, weights.options, [max_rows, max_seqs]);
        let window_rope = || DeviceRope::new(&device, head_dim, max_position);
        let mut runner = Runner {
            buffers: Buffers::new(&weights, max_rows, max_seqs)?,
            rope: DeviceRope::new(&device, head_dim, max_position)?,
            window_rope: weights.window_rope.as_ref().map(|_| window_rope()).transpose()?,
            sampled: DeviceVec::from_slice(&device, &vec![0; 2 * max_seqs])?,
            sampled_before: DeviceVec::new(&device, max_seqs)?,
            kv: Vec::new(),
            page_bytes,
            host_kv: PinnedVec::new(&device, config.num_host_pages as usize * num_layers * page_bytes)?,
            parts: AttentionParts::new(&device, &shape, options.max_part_rows)?,
            shape,
            page_size,
            device: Arc::clone(&device),
            weights: Arc::clone(&weights),
        };
        let room = largest_plan(&options, &weights, page_size, max_rows, max_seqs);
        let max_shape = StepShape { num_rows: max_rows, num_heads: max_seqs, num_copies: max_seqs, room };
        let inputs = Inputs::new(&device, max_shape)?;
        let results = || PinnedVec::new(&device, 2 * max_seqs);
        let results = [results()?, results()?];
        let num_pages = memory::num_pages(&weights, &config)?;
        runner.shape.num_pages = num_pages as usize;
        for _ in 0..num_layers {
            runner.kv.push(DeviceVec::new(&device, num_pages as usize * page_bytes)?);
        }
        let info = ModelInfo {
            name: name.to_owned(),
            digest: format!("{weights_digest}-{}-v{ENGINE_VERSION}", path_name(&weights)),
            vocab_size: model.vocab_size,
            max_position: model.max_position,
            eos_token_ids: model.eos_token_ids.clone(),
            page_size: config.page_size,
            num_pages,
        };
        Ok(Self {
            info,
            runner,
            inputs,
            penalties: PenaltyInputs::new(&device)?,
            results,
            in_flight: VecDeque::new(),
            sampled_at: Vec::new(),
            num_started: 0,
            plan: AttentionPlan::new(options),
            room,
            graphs: BTreeMap::new(),
        })
    }

    fn max_num_seqs(&self) -> usize {
        self.runner.sampled.len() / 2
    }

    /// The graph for so many decodes as they are planned, where one may be recorded.
    fn graph_for(&self, num_rows: usize) -> Option<GraphKey> {
        let rows = bucket_of(num_rows);
        let PlanSize { tiles, merges, wide_tiles, .. } = self.plan.size();
        let fits =
            rows <= MAX_GRAPH_ROWS.min(self.max_num_seqs()).min(self.runner.max_rows()) && wide_tiles == 0;
        let num_tiles = tiles.next_power_of_two().min(self.room.tiles);
        fits.then_some(GraphKey { num_rows: rows, num_tiles, num_merges: if merges > 0 { rows } else { 0 } })
    }

    /// Writes the inputs of a step that is planned; returns how many words of the plan are used.
    fn fill(&mut self, batch: &StepBatch, layout: &Layout, index: usize) -> Result<usize, StepError> {
        let last = batch.positions.iter().copied().max().unwrap_or(0) as usize;
        let Runner { rope, window_rope, weights, page_size, .. } = &mut self.runner;
        rope.fill(&weights.rope, last)?;
        if let (Some(rope), Some(source)) = (window_rope, &weights.window_rope) {
            rope.fill(source, last)?;
        }
        let host = self.inputs.host(index, layout);
        let plan_len = self.plan.write(batch, &layout.plan_layout, host.plan);
        let num_rows = batch.num_tokens();
        host.ids[..num_rows].copy_from_slice(&batch.token_ids);
        host.positions[..num_rows].copy_from_slice(&batch.positions);
        host.from[..num_rows].fill(-1);
        for seq in 0..batch.num_seqs() {
            let pages = batch.pages(seq);
            let rows = batch.rows(seq);
            for (slot, &position) in host.slots[rows.clone()].iter_mut().zip(&batch.positions[rows.clone()]) {
                let position = position as usize;
                *slot = (pages[position / *page_size].0 as usize * *page_size + position % *page_size) as i32;
            }
            if let Some(seq_before) = batch.sampled_by[seq] {
                let at = self.sampled_at[seq_before as usize].expect("the step before samples for it");
                host.from[rows.start] = at as i32;
            }
        }
        // Padding is computed like others, stored nowhere and looked at by nobody.
        host.ids[num_rows..].fill(0);
        host.positions[num_rows..].fill(0);
        host.from[num_rows..].fill(-1);
        host.slots[num_rows..].fill(-1);
        for (copy, out) in batch.copies.iter().zip(host.copies.as_chunks_mut::<3>().0) {
            *out = [copy.from.0, copy.to.0, copy.len];
        }
        let wanted =
            batch.sampling.iter().enumerate().filter_map(|(seq, params)| Some((seq, params.as_ref()?)));
        let mut heads = 0;
        for (seq, params) in wanted.take(host.head_rows.len()) {
            let row = batch.rows(seq).end - 1;
            host.head_rows[heads] = row as u32;
            host.sampling[heads] = RowSampling::new(params, batch.positions[row] + 1)
                .map_err(|error| sampling_failed(seq, error))?;
            heads += 1;
        }
        host.head_rows[heads..].fill(0);
        host.sampling[heads..].fill(RowSampling::SKIP);
        Ok(plan_len)
    }

    /// Queues everything of a step, by a graph where it is made of decodes alone.
    fn queue(&mut self, batch: &StepBatch, index: usize) -> Result<Started, StepError> {
        self.plan.plan(batch);
        let num_heads = batch.sampling.iter().flatten().count();
        let num_rows = batch.num_tokens();
        let is_decode = num_rows == batch.num_seqs() && num_heads == num_rows && batch.copies.is_empty();
        let penalties = self.penalties.upload(batch, &self.sampled_at, index)?;
        let graph = if is_decode && penalties.is_none() { self.graph_for(num_rows) } else { None };
        let room = self.plan.size();
        let shape = match graph {
            Some(key) => StepShape {
                num_rows: key.num_rows,
                num_heads: key.num_rows,
                num_copies: 0,
                room: PlanSize {
                    tiles: key.num_tiles,
                    wide_tiles: 0,
                    merges: key.num_merges,
                    tokens: key.num_rows,
                    ..self.room
                },
            },
            None => StepShape { num_rows, num_heads, num_copies: batch.copies.len(), room },
        };
        let layout = Layout::new(shape);
        let plan_len = self.fill(batch, &layout, index)?;
        self.inputs.upload(index, &layout, plan_len)?;
        batch.swaps.iter().try_for_each(|swap| self.runner.swap(swap))?;
        let inputs = self.inputs.there(&layout);
        let head = if is_decode { Head::All } else { Head::Listed };
        let penalties = penalties.map(|layout| self.penalties.there(&layout));
        let forward = || self.runner.forward(&layout, &inputs, head, penalties.as_ref());
        match graph.map(|key| (key, self.graphs.get(&key))) {
            None => forward()?,
            Some((key, None)) => {
                forward()?;
                self.graphs.insert(key, DecodeGraph::Seen);
            }
            Some((key, Some(DecodeGraph::Seen))) => {
                match self.runner.record(forward) {
                    Ok(graph) => {
                        self.graphs.insert(key, DecodeGraph::Recorded(graph));
                        // SAFETY: what it was recorded with is this model's, and stays as long as the graph.
                        unsafe { self.runner.device.launch_graph(graph)? };
                    }
                    // Without room for a graph, say, steps go on as they did before it.
                    Err(error) => {
                        tracing::warn!(%error, rows = key.num_rows, "decodes are not recorded as a graph");
                        self.graphs.insert(key, DecodeGraph::Refused);
                        forward()?;
                    }
                }
            }
            Some((_, Some(DecodeGraph::Refused))) => forward()?,
            // SAFETY: as above.
            Some((_, Some(DecodeGraph::Recorded(graph)))) => unsafe {
                self.runner.device.launch_graph(*graph)?
            },
        }
        let runner = &self.runner;
        let results = &self.results[index];
        let to = results.pointer(0, runner.sampled.len()).cast();
        // SAFETY: both have room for ids and codes of all sequences, and the host's stays until the event.
        unsafe { runner.device.download(to, runner.sampled.address(), results.len() * size_of::<u32>())? };
        let mut heads = 0..;
        let sampled_at = batch.sampling.iter().map(|params| params.and_then(|_| heads.next())).collect();
        Ok(Started { index, event: runner.device.record()?, sampled_at })
    }
}

impl Model for GpuModel {
    fn info(&self) -> &ModelInfo {
        &self.info
    }

    fn max_started(&self) -> usize {
        MAX_STARTED
    }

    fn copies_pages(&self) -> bool {
        true
    }

    fn num_host_pages(&self) -> u32 {
        self.runner.num_host_pages() as u32
    }

    fn start(&mut self, batch: &StepBatch) -> Result<(), StepError> {
        batch.check(&self.info);
        assert!(self.in_flight.len() < MAX_STARTED, "too many steps are in flight");
        assert!(batch.num_tokens() <= self.runner.max_rows() && batch.num_seqs() <= self.max_num_seqs());
        let index = self.num_started % MAX_STARTED;
        let started = self.queue(batch, index).inspect_err(|_| self.runner.drain())?;
        self.sampled_at.clone_from(&started.sampled_at);
        self.in_flight.push_back(started);
        self.num_started += 1;
        Ok(())
    }

    fn finish(&mut self) -> Result<StepOutput, StepError> {
        let Started { index, event, sampled_at } = self.in_flight.pop_front().expect("a step was started");
        self.runner.device.wait(event)?;
        let (ids, codes) = self.results[index].as_slice().split_at(self.max_num_seqs());
        let mut token_ids = Vec::with_capacity(sampled_at.len());
        for (seq, at) in sampled_at.iter().enumerate() {
            let Some(at) = at.map(|at| at as usize) else {
                token_ids.push(None);
                continue;
            };
            sample_error(codes[at]).map_err(|error| sampling_failed(seq, error))?;
            token_ids.push(Some(ids[at]));
        }
        Ok(StepOutput { token_ids })
    }
}

impl Drop for GpuModel {
    fn drop(&mut self) {
        // Nobody waits for the answers any more.
        self.runner.drain();
        for graph in self.graphs.values() {
            if let DecodeGraph::Recorded(graph) = graph {
                self.runner.device.drop_graph(*graph);
            }
        }
    }
}

impl Runner {
    /// Tokens of the largest step.
    fn max_rows(&self) -> usize {
        self.buffers.hidden.len() / self.weights.config.hidden_size as usize
    }

    fn num_host_pages(&self) -> usize {
        self.host_kv.len() / (self.kv.len() * self.page_bytes)
    }

    /// Queues the copies of a page of all layers between device and host.
    fn swap(&self, swap: &PageSwap) -> Result<(), DeviceError> {
        let (PageSwap::Out { page, host } | PageSwap::In { host, page }) = *swap;
        assert!(
            (host.0 as usize) < self.num_host_pages(),
            "host page {} of {}",
            host.0,
            self.num_host_pages()
        );
        for (layer, kv) in self.kv.iter().enumerate() {
            let there = kv.at(page.0 as usize * self.page_bytes);
            let first = (host.0 as usize * self.kv.len() + layer) * self.page_bytes;
            let here = self.host_kv.pointer(first, self.page_bytes);
            // SAFETY: both are whole pages, as checked here and with the batch; only such copies, in the order of the
            // queue, touch the host's.
            unsafe {
                match swap {
                    PageSwap::Out { .. } => {
                        self.device.download(here, there, self.page_bytes)?;
                    }
                    PageSwap::In { .. } => self.device.upload(there, here, self.page_bytes)?,
                }
            }
        }
        Ok(())
    }

    /// The angles of a layer.
    fn rope_table(&self, window: Option<u32>) -> &DeviceVec<f32> {
        let rope = self.window_rope.as_ref().filter(|_| window.is_some()).unwrap_or(&self.rope);
        &rope.table
    }

    /// Waits until the device is done with the host's memory, whatever became of it.
    fn drain(&self) {
        let _ = self.device.record().and_then(|event| self.device.wait(event));
    }

    /// Records what is queued; a failure ends the recording.
    fn record(&self, queue: impl FnOnce() -> Result<(), DeviceError>) -> Result<Graph, DeviceError> {
        self.device.begin_graph()?;
        let queued = queue();
        let graph = self.device.end_graph();
        match (queued, graph) {
            (Ok(()), graph) => graph,
            (Err(error), Ok(graph)) => {
                self.device.drop_graph(graph);
                Err(error)
            }
            (Err(error), Err(_)) => Err(error),
        }
    }
}

fn sampling_failed(seq: usize, error: SampleError) -> StepError {
    StepError { message: format!("sequence {seq} of the batch: {error}") }
}

impl From<DeviceError> for StepError {
    fn from(error: DeviceError) -> Self {
        Self { message: error.to_string() }
    }
}

/// Rows of the graph for so many decodes.
fn bucket_of(num_rows: usize) -> usize {
    match num_rows {
        0..=8 => num_rows.next_power_of_two(),
        _ => num_rows.next_multiple_of(8),
    }
}

/// A few devices have less than the largest kernel takes.
fn check_shared_memory(weights: &GpuWeights) -> Result<(), GpuError> {
    let head_dim = weights.stride;
    let wanted = attention_shared_bytes(head_dim, weights.options.kv_dtype == KvDtype::E4m3);
    let most = weights.device.max_shared_bytes();
    if wanted > most { Err(GpuError::SharedMemory { head_dim, wanted, most }) } else { Ok(()) }
}

fn attention_shape(weights: &GpuWeights, config: &GpuModelConfig) -> AttentionShape {
    let model = &weights.config;
    AttentionShape {
        num_heads: model.num_heads as usize,
        num_kv_heads: model.num_kv_heads as usize,
        head_dim: weights.stride,
        page_size: config.page_size as usize,
        num_pages: 0,
        scale: model.attention_scale,
    }
}

/// What no plan exceeds.
fn largest_plan(
    options: &PlanOptions,
    weights: &GpuWeights,
    page_size: usize,
    max_rows: usize,
    max_seqs: usize,
) -> PlanSize {
    // A tile has rows of partial results of its own, or whole rows of a sequence.
    let whole = max_rows * options.group_len / MIN_TILE_ROWS + max_seqs;
    PlanSize {
        tiles: options.max_part_rows + whole,
        wide_tiles: whole,
        merges: max_rows,
        tokens: max_rows,
        pages: max_seqs * (weights.config.max_position as usize).div_ceil(page_size),
        part_rows: options.max_part_rows,
    }
}

/// Names the numbers that answers depend on.
fn path_name(weights: &GpuWeights) -> String {
    let options = &weights.options;
    let weight = match (options.weight_dtype, weights.dtype) {
        (WeightDtype::E4m3, HalfDtype::F16) => "f16-fp8",
        _ => weights.number_name(),
    };
    let kv = match options.kv_dtype {
        KvDtype::Half => "",
        KvDtype::E4m3 => "-kv-fp8",
    };
    let deterministic = if options.deterministic { "-deterministic" } else { "" };
    format!("cuda-{weight}{kv}{deterministic}")
}
