//! The engine over a model on a GPU: with `deterministic: true` answers are the same however the work is cut, with steps
//! started ahead, prefixes shared, pages evicted, and sequences preempted and kept in the host's memory meanwhile.
//! Without a GPU the kernels run on the CPU, on a tiny model; with one, the real model is held to the same.

use std::path::Path;
use std::sync::Arc;

use anyhow::Result;
use tidemill_kernels::gpu::{Gpu, GpuModel, GpuModelConfig, GpuOptions, GpuWeights, KvMemory};
use tidemill_kernels::models::Checkpoint;
use tidemill_kernels::step::SamplingParams;
use tidemill_operators::infer::engine::{Engine, EngineConfig, EngineStats};
use tidemill_operators::infer::sequence::{SequenceId, SequenceRequest};
use tidemill_tests::gpu::on_gpu;
use tidemill_tests::workspace;

const MAX_TOKENS: u32 = 20;
const PREFIX_LEN: u32 = 37;

#[derive(Clone, Copy)]
struct Setting {
    name: &'static str,
    max_num_seqs: u32,
    max_num_batched_tokens: u32,
    enable_prefix_cache: bool,
    page_size: u32,
    num_pages: u32,
    num_host_pages: u32,
    reverse: bool,
    /// The engine has seen short answers only, so it admits more than it can hold.
    learns_short: bool,
}

const BASE: Setting = Setting {
    name: "base",
    max_num_seqs: 8,
    max_num_batched_tokens: 512,
    enable_prefix_cache: true,
    page_size: 16,
    num_pages: 256,
    num_host_pages: 0,
    reverse: false,
    learns_short: false,
};

/// Some with a common beginning, greedy, drawn and penalized.
fn requests() -> Vec<(Arc<[u32]>, SamplingParams)> {
    let token = |i: u32| 3 + (i * 7919 + i * i * 31) % 250;
    let drawn = SamplingParams { temperature: 0.9, top_p: 0.95, seed: 11, ..SamplingParams::GREEDY };
    let penalized = SamplingParams {
        repetition_penalty: 1.2,
        presence_penalty: 0.1,
        frequency_penalty: 0.3,
        min_p: 0.05,
        ..drawn
    };
    (0..7u32)
        .map(|seq| {
            let shared = if seq < 4 { 0 } else { 1000 * seq };
            let prefix = (0..PREFIX_LEN).map(|i| token(shared + i));
            let own = (0..3 + 9 * seq).map(|i| token(100 * (seq + 1) + i));
            let sampling = [SamplingParams::GREEDY, drawn, penalized][seq as usize % 3];
            (prefix.chain(own).collect(), SamplingParams { ignore_eos: true, ..sampling })
        })
        .collect()
}

fn answers(weights: &Arc<GpuWeights>, setting: &Setting) -> Result<(Vec<Vec<u32>>, EngineStats)> {
    let config = GpuModelConfig {
        page_size: setting.page_size,
        kv_memory: KvMemory::Pages(setting.num_pages),
        max_num_batched_tokens: setting.max_num_batched_tokens,
        max_num_seqs: setting.max_num_seqs,
        num_host_pages: setting.num_host_pages,
    };
    let model = GpuModel::new(Arc::clone(weights), config, "model", "test")?;
    let config = EngineConfig {
        max_num_seqs: setting.max_num_seqs as usize,
        max_num_batched_tokens: setting.max_num_batched_tokens as usize,
        enable_prefix_cache: setting.enable_prefix_cache,
    };
    let mut engine = Engine::new(Box::new(model), config);
    let requests = requests();
    if setting.learns_short {
        for id in 0..64 {
            let prompt = Arc::from(&requests[0].0[..2]);
            engine.submit(SequenceRequest::new(SequenceId(id), prompt, 1, SamplingParams::GREEDY))?;
        }
        while engine.has_work() {
            engine.step()?;
        }
    }
    let mut order: Vec<usize> = (0..requests.len()).collect();
    if setting.reverse {
        order.reverse();
    }
    let mut answers = vec![Vec::new(); requests.len()];
    for index in order {
        let (token_ids, sampling) = requests[index].clone();
        engine.submit(SequenceRequest::new(SequenceId(index as u64), token_ids, MAX_TOKENS, sampling))?;
    }
    while engine.has_work() {
        for finished in engine.step()? {
            answers[finished.id.0 as usize] = finished.token_ids;
        }
    }
    Ok((answers, engine.stats()))
}

fn check(path: &Path) -> Result<()> {
    let options = GpuOptions { deterministic: true, ..GpuOptions::default() };
    let weights = GpuWeights::load(&Gpu::open(0)?, &Checkpoint::open(path)?, options)?;
    let (base, stats) = answers(&weights, &BASE)?;
    assert!(base.iter().all(|answer| answer.len() == MAX_TOKENS as usize));
    assert!(stats.reused_tokens > 0, "prefixes are shared");
    let few_pages = Setting { num_pages: 20, learns_short: true, ..BASE };
    let settings = [
        Setting { name: "one sequence at a time", max_num_seqs: 1, ..BASE },
        Setting {
            name: "chunks of 9 tokens, no cache",
            max_num_batched_tokens: 9,
            enable_prefix_cache: false,
            ..BASE
        },
        Setting { name: "large pages, reverse order", page_size: 64, num_pages: 64, reverse: true, ..BASE },
        Setting { name: "few pages: eviction and preemption", ..few_pages },
        Setting { name: "few pages, and some of the host's", num_host_pages: 16, ..few_pages },
    ];
    for setting in &settings {
        let (answers, stats) = answers(&weights, setting)?;
        assert_eq!(answers, base, "{}", setting.name);
        if setting.learns_short {
            assert!(stats.preemptions > 0, "{}: nothing was preempted: {stats:?}", setting.name);
            let is_swapped = stats.swapped_out_pages > 0 && stats.swapped_in_pages > 0;
            assert_eq!(is_swapped, setting.num_host_pages > 0, "{}: {stats:?}", setting.name);
        }
    }
    Ok(())
}

#[test]
fn answers_do_not_depend_on_how_the_work_is_cut() -> Result<()> {
    on_gpu("answers_do_not_depend_on_how_the_work_is_cut", || {
        check(&workspace().join("tests/reference/tiny/qwen3"))
    })
}

#[cfg(feature = "cuda-tests")]
#[test]
fn real_model_answers_do_not_depend_on_it_either() -> Result<()> {
    check(&tidemill_tests::default_model())
}
