//! Whole tiny models of every family through the emulated kernels, against the f32 reference and against themselves
//! under other schedules.

use std::collections::VecDeque;
use std::sync::Arc;

use super::*;
use crate::gpu::device::GemmInput;
use crate::gpu::model::{GpuModel, GpuModelConfig, KvMemory};
use crate::gpu::{DeviceError, Gpu, GpuError, GpuOptions, GpuWeights, KvDtype, WeightDtype};
use crate::models::{Checkpoint, KvConfig, ModelConfig, ModelError, ModelWeights, NumericPath, Transformer};
use crate::sample::{penalize, sample};
use crate::step::{Model, PageId, SamplingParams, StepBatch, TokenUse};

const FAMILIES: [&str; 6] = ["llama3", "mistral", "qwen2", "qwen3", "qwen3_moe", "gemma3"];
/// Relative to the largest logit: activations of some layers rounded to 8 bits of mantissa, to 11 or to 4.
const MODEL_BF16_TOLERANCE: f32 = 0.04;
const MODEL_F16_TOLERANCE: f32 = 0.005;
const MODEL_E4M3_TOLERANCE: f32 = 0.25;

fn checkpoint(family: &str) -> Checkpoint {
    let tiny = sources().join("tests/reference/tiny");
    Checkpoint::open(&tiny.join(family)).unwrap()
}

fn model(device: &Arc<dyn Device>, family: &str, options: GpuOptions, page_size: u32) -> GpuModel {
    let gpu = Gpu { device: Arc::clone(device) };
    let weights = GpuWeights::load(&gpu, &checkpoint(family), options).unwrap();
    let config = GpuModelConfig {
        page_size,
        kv_memory: KvMemory::Pages(1024 / page_size),
        max_num_batched_tokens: 256,
        max_num_seqs: 8,
        num_host_pages: 4,
    };
    GpuModel::new(weights, config, family, "abc").unwrap()
}

fn reference(family: &str) -> Transformer {
    let weights = ModelWeights::load(&checkpoint(family), NumericPath::Reference).unwrap();
    Transformer::new(weights, KvConfig { page_size: 16, num_pages: 64 }, 2, family, "abc").unwrap()
}

/// Prompts of these lengths.
fn prompts(lens: &[usize]) -> Vec<Vec<u32>> {
    let tokens = |(seed, &len): (u64, &usize)| {
        random(seed, len).iter().map(|x| ((x + 1.0) * 100.0) as u32 + 2).collect()
    };
    (1..).zip(lens).map(tokens).collect()
}

/// Pages of sequence `seq`, in no order.
fn pages(seq: usize, page_size: u32) -> Vec<PageId> {
    let num = 128 / page_size;
    (0..num).map(|i| PageId(seq as u32 * num + (i * 5 + 3) % num)).collect()
}

#[test]
fn logits_are_those_of_the_reference() {
    for family in FAMILIES {
        let prompts = prompts(&[3, 70, 33]);
        let mut batch = StepBatch::default();
        for (seq, prompt) in prompts.iter().enumerate() {
            batch.push(prompt, 0, &pages(seq, 16), Some(SamplingParams::GREEDY));
        }
        let expected = reference(family).logits(&batch);
        let device = device(0);
        for deterministic in [false, true] {
            let options = GpuOptions { deterministic, ..GpuOptions::default() };
            let actual = model(&device, family, options, 16).logits(&batch).unwrap();
            assert_close(&actual, &expected, MODEL_BF16_TOLERANCE, family);
        }
        if family != "gemma3" {
            let options = GpuOptions { dtype: Some(HalfDtype::F16), ..GpuOptions::default() };
            let actual = model(&device, family, options, 16).logits(&batch).unwrap();
            assert_close(&actual, &expected, MODEL_F16_TOLERANCE, &format!("{family} in f16"));
        }
        if family == "qwen3_moe" || !device.can_multiply(GemmInput::E4m3) {
            continue;
        }
        let options =
            GpuOptions { weight_dtype: WeightDtype::E4m3, kv_dtype: KvDtype::E4m3, ..GpuOptions::default() };
        let actual = model(&device, family, options, 16).logits(&batch).unwrap();
        assert_close(&actual, &expected, MODEL_E4M3_TOLERANCE, &format!("{family} in e4m3"));
    }
}

/// Long chunks take the kernel for Hopper there, and the other one elsewhere.
#[test]
fn a_long_prompt_has_the_reference_s_logits_on_every_kind_of_device() {
    let prompt = &prompts(&[250])[0];
    let mut batch = StepBatch::default();
    let pages: Vec<PageId> = (0..16).map(|i| PageId(i * 7 % 16)).collect();
    batch.push(prompt, 0, &pages, Some(SamplingParams::GREEDY));
    for family in ["qwen3", "mistral"] {
        let expected = reference(family).logits(&batch);
        for device in [EmulatedDevice::new(0), EmulatedDevice::new(0).before_hopper()] {
            let actual = model(&device.shared(), family, GpuOptions::default(), 16).logits(&batch).unwrap();
            assert_close(&actual, &expected, MODEL_BF16_TOLERANCE, family);
        }
    }
}

/// How the work is cut into steps.
struct Schedule {
    order: i32,
    chunk_len: usize,
    page_size: u32,
    /// All prompts in one batch, or one after the other.
    together: bool,
    /// Decodes are started before the step before them is finished.
    ahead: bool,
}

/// Answers of `num_tokens` tokens each.
fn answers(
    family: &str,
    prompts: &[Vec<u32>],
    num_tokens: usize,
    sampling: SamplingParams,
    schedule: &Schedule,
) -> Vec<Vec<u32>> {
    let device = device(schedule.order);
    let options = GpuOptions { deterministic: true, ..GpuOptions::default() };
    let mut model = model(&device, family, options, schedule.page_size);
    let groups: Vec<Vec<usize>> = match schedule.together {
        true => vec![(0..prompts.len()).collect()],
        false => (0..prompts.len()).map(|seq| vec![seq]).collect(),
    };
    let mut answers = vec![Vec::new(); prompts.len()];
    for group in groups {
        let mut done = vec![0; prompts.len()];
        // Prompts in chunks, until each has its first token.
        while group.iter().any(|&seq| done[seq] < prompts[seq].len()) {
            let mut batch = StepBatch::default();
            let mut seqs = Vec::new();
            for &seq in &group {
                let chunk =
                    &prompts[seq][done[seq]..(done[seq] + schedule.chunk_len).min(prompts[seq].len())];
                if !chunk.is_empty() {
                    let is_last = done[seq] + chunk.len() == prompts[seq].len();
                    batch.push(
                        chunk,
                        done[seq] as u32,
                        &pages(seq, schedule.page_size),
                        is_last.then_some(sampling),
                    );
                    done[seq] += chunk.len();
                    seqs.push(seq);
                }
            }
            let output = model.step(&batch).unwrap();
            for (seq, token) in seqs.iter().zip(output.token_ids) {
                answers[*seq].extend(token);
            }
        }
        decode(&mut model, &group, prompts, num_tokens, sampling, schedule, &mut answers);
    }
    answers
}

fn decode(
    model: &mut GpuModel,
    group: &[usize],
    prompts: &[Vec<u32>],
    num_tokens: usize,
    sampling: SamplingParams,
    schedule: &Schedule,
    answers: &mut [Vec<u32>],
) {
    let mut in_flight = 0;
    for token in 1..num_tokens {
        let mut batch = StepBatch::default();
        for (index, &seq) in group.iter().enumerate() {
            let position = (prompts[seq].len() + token - 1) as u32;
            let pages = pages(seq, schedule.page_size);
            if in_flight > 0 {
                batch.push_ahead(index as u32, position, &pages, Some(sampling));
            } else {
                batch.push(&[*answers[seq].last().unwrap()], position, &pages, Some(sampling));
            }
        }
        model.start(&batch).unwrap();
        in_flight += 1;
        if !schedule.ahead || in_flight == 2 {
            take(model, group, answers);
            in_flight -= 1;
        }
    }
    for _ in 0..in_flight {
        take(model, group, answers);
    }
}

fn take(model: &mut GpuModel, group: &[usize], answers: &mut [Vec<u32>]) {
    let output = model.finish().unwrap();
    for (&seq, token) in group.iter().zip(output.token_ids) {
        answers[seq].push(token.unwrap());
    }
}

#[test]
fn answers_do_not_depend_on_the_schedule() {
    let base = Schedule { order: 0, chunk_len: 256, page_size: 16, together: true, ahead: false };
    for (family, sampling) in [
        ("qwen3", SamplingParams::GREEDY),
        ("gemma3", SamplingParams { temperature: 0.8, top_p: 0.9, seed: 3, ..SamplingParams::GREEDY }),
    ] {
        let prompts = prompts(&[5, 61, 17]);
        let expected = answers(family, &prompts, 6, sampling, &base);
        for schedule in [
            Schedule { chunk_len: 7, page_size: 32, ..base },
            Schedule { order: 3, ahead: true, ..base },
            Schedule { together: false, ahead: true, ..base },
        ] {
            assert_eq!(answers(family, &prompts, 6, sampling, &schedule), expected, "{family}");
        }
    }
}

#[test]
fn greedy_answers_are_those_of_the_reference() {
    let schedule = Schedule { order: 0, chunk_len: 256, page_size: 16, together: true, ahead: true };
    let prompts = prompts(&[4, 40]);
    let actual = answers("llama3", &prompts, 5, SamplingParams::GREEDY, &schedule);
    let mut model = reference("llama3");
    for (seq, (prompt, actual)) in prompts.iter().zip(&actual).enumerate() {
        // The reference follows the answer; each of its tokens is as good as the best one, but for rounding.
        let mut tokens = prompt.clone();
        for &token in actual {
            let mut batch = StepBatch::default();
            batch.push(&tokens, 0, &pages(seq, 16), Some(SamplingParams::GREEDY));
            let logits = model.logits(&batch);
            let best = logits.iter().copied().fold(f32::MIN, f32::max);
            let scale = logits.iter().fold(0.0f32, |max, x| max.max(x.abs()));
            assert!(best - logits[token as usize] <= MODEL_BF16_TOLERANCE * scale, "token {token} of {seq}");
            tokens.push(token);
        }
    }
}

/// Sequences with parameters of their own, of which each begins a step after the one before.
struct Requests {
    prompts: Vec<Vec<u32>>,
    sampling: Vec<SamplingParams>,
    num_tokens: usize,
}

impl Requests {
    /// Every other one has penalties. The prompts become longer, so the list of what they use grows.
    fn new(sampling: SamplingParams) -> Self {
        let prompts = prompts(&[4, 4, 30, 9, 110, 100]);
        let is_plain = |seq: usize| seq % 2 == 1;
        let sampling = (0..prompts.len())
            .map(|seq| if is_plain(seq) { SamplingParams::GREEDY } else { sampling })
            .collect();
        Self { prompts, sampling, num_tokens: 6 }
    }

    fn uses(&self, seq: usize, answer: &[u32]) -> Vec<TokenUse> {
        let mut ids = [&self.prompts[seq], answer].concat();
        ids.sort_unstable();
        ids.dedup();
        let times = |token_id| answer.iter().filter(|&&id| id == token_id).count() as u32;
        ids.into_iter().map(|token_id| TokenUse { token_id, num_in_answer: times(token_id) }).collect()
    }

    /// The next step, and for which sequences it is, when so many tokens of each answer are being computed.
    fn batch(
        &self,
        answers: &[Vec<u32>],
        num_started: &[usize],
        before: &[usize],
    ) -> (StepBatch, Vec<usize>) {
        let (mut batch, mut seqs) = (StepBatch::default(), Vec::new());
        for (seq, answer) in answers.iter().enumerate() {
            let is_due = num_started[..seq].iter().all(|&num| num > 0);
            let (num_known, params) = (answer.len(), self.sampling[seq]);
            if !is_due || num_started[seq] == self.num_tokens {
                continue;
            }
            let position = (self.prompts[seq].len() + num_started[seq]) as u32 - 1;
            match num_started[seq] {
                0 => batch.push(&self.prompts[seq], 0, &pages(seq, 16), Some(params)),
                num if num == num_known => {
                    batch.push(&answer[num - 1..], position, &pages(seq, 16), Some(params));
                }
                _ => {
                    let sampled_by = before.iter().position(|&other| other == seq).unwrap();
                    batch.push_ahead(sampled_by as u32, position, &pages(seq, 16), Some(params));
                }
            }
            if params.has_penalties() {
                batch.push_uses(&self.uses(seq, answer));
            }
            seqs.push(seq);
        }
        (batch, seqs)
    }

    /// All answers, with up to so many steps at once; `look` sees the model and each step that runs alone.
    fn run(
        &self,
        model: &mut GpuModel,
        max_started: usize,
        mut look: impl FnMut(&mut GpuModel, &StepBatch, &[Option<u32>]),
    ) -> Vec<Vec<u32>> {
        let mut answers = vec![Vec::new(); self.prompts.len()];
        let mut num_started = vec![0; self.prompts.len()];
        let mut started: VecDeque<(StepBatch, Vec<usize>)> = VecDeque::new();
        while answers.iter().any(|answer| answer.len() < self.num_tokens) {
            while started.len() < max_started {
                let before = started.back().map_or(&[][..], |(_, seqs)| seqs);
                let (batch, seqs) = self.batch(&answers, &num_started, before);
                if seqs.is_empty() {
                    break;
                }
                model.start(&batch).unwrap();
                seqs.iter().for_each(|&seq| num_started[seq] += 1);
                started.push_back((batch, seqs));
            }
            let (batch, seqs) = started.pop_front().unwrap();
            let token_ids = model.finish().unwrap().token_ids;
            for (&seq, token) in seqs.iter().zip(&token_ids) {
                answers[seq].push(token.unwrap());
            }
            if max_started == 1 {
                look(model, &batch, &token_ids);
            }
        }
        answers
    }
}

#[test]
fn penalties_are_those_of_the_cpu() {
    // Most of them rewards: a tiny model never says a word twice by itself.
    let greedy = SamplingParams {
        repetition_penalty: 0.6,
        presence_penalty: 0.1,
        frequency_penalty: -0.4,
        ..SamplingParams::GREEDY
    };
    let drawn = SamplingParams { temperature: 0.7, min_p: 0.2, seed: 5, ..greedy };
    let without = SamplingParams { temperature: 0.7, min_p: 0.2, seed: 5, ..SamplingParams::GREEDY };
    let new = |order| {
        let device = device(order);
        model(&device, "qwen3", GpuOptions { deterministic: true, ..GpuOptions::default() }, 16)
    };
    for (sampling, without) in [(greedy, SamplingParams::GREEDY), (drawn, without)] {
        let requests = Requests::new(sampling);
        let expected = requests.run(&mut new(0), 1, |model, batch, token_ids| {
            let vocab_size = model.info().vocab_size as usize;
            let mut logits = model.logits(batch).unwrap();
            for (seq, (row, token)) in logits.chunks_exact_mut(vocab_size).zip(token_ids).enumerate() {
                let params = batch.sampling[seq].unwrap();
                penalize(row, &params, batch.uses(seq));
                let position = batch.positions[batch.rows(seq).end - 1] + 1;
                assert_eq!(*token, Some(sample(row, &params, position).unwrap()));
            }
        });
        assert_eq!(requests.run(&mut new(3), 2, |_, _, _| ()), expected);
        let without = Requests::new(without).run(&mut new(0), 2, |_, _, _| ());
        assert_eq!(without[1], expected[1]);
        assert!((0..6).step_by(2).all(|seq| without[seq] != expected[seq]), "{without:?}, {expected:?}");
    }
}

#[test]
fn penalized_answers_are_those_of_the_reference() {
    let sampling = SamplingParams {
        repetition_penalty: 0.7,
        presence_penalty: 0.1,
        frequency_penalty: -0.3,
        ..SamplingParams::GREEDY
    };
    let requests = Requests::new(sampling);
    let device = device(0);
    let answers = requests.run(&mut model(&device, "llama3", GpuOptions::default(), 16), 2, |_, _, _| ());
    let mut reference = reference("llama3");
    for (seq, answer) in answers.iter().enumerate() {
        for (len, &token) in answer.iter().enumerate() {
            let tokens = [&requests.prompts[seq], &answer[..len]].concat();
            let mut batch = StepBatch::default();
            batch.push(&tokens, 0, &pages(0, 16), Some(SamplingParams::GREEDY));
            let mut logits = reference.logits(&batch);
            let scale = logits.iter().fold(0.0f32, |max, x| max.max(x.abs()));
            let params = requests.sampling[seq];
            if params.has_penalties() {
                penalize(&mut logits, &params, &requests.uses(seq, &answer[..len]));
            }
            let best = logits.iter().copied().fold(f32::MIN, f32::max);
            // What is divided has its rounding divided too.
            let tolerance = MODEL_BF16_TOLERANCE * scale / params.repetition_penalty;
            assert!(best - logits[token as usize] <= tolerance, "token {len} of {seq}");
        }
    }
}

#[test]
fn log_probabilities_are_those_of_the_reference() {
    let prompts = prompts(&[3, 70, 1, 33]);
    let mut batch = StepBatch::default();
    for (seq, prompt) in prompts.iter().enumerate() {
        batch.push(prompt, 0, &pages(seq, 16), None);
    }
    for family in FAMILIES {
        let expected = reference(family).log_probabilities(&batch);
        assert_eq!(expected.len(), 2 + 69 + 32);
        let device = device(0);
        let mut model = model(&device, family, GpuOptions::default(), 16);
        let actual = model.log_probabilities(&batch).unwrap();
        // Measured by how far they are from each other.
        let mean = expected.iter().sum::<f64>() / expected.len() as f64;
        let errors = actual.iter().zip(&expected).map(|(actual, expected)| actual - expected);
        let spread = expected.iter().fold(0.0f64, |max, x| max.max((x - mean).abs()));
        let num_far =
            errors.clone().filter(|error| error.abs() > f64::from(MODEL_BF16_TOLERANCE) * spread).count();
        // Where two experts are all but equal, rounding chooses the other one.
        assert!(num_far <= usize::from(family == "qwen3_moe"), "{num_far} of {family}");
        let mean_error = errors.sum::<f64>() / expected.len() as f64;
        assert!(mean_error.abs() < 0.005, "{mean_error} of {family}");
        // Keys and values are there afterwards, also of a batch in which no token has one before it.
        let mut alone = StepBatch::default();
        alone.push(&prompts[2], 0, &pages(5, 16), None);
        assert!(model.log_probabilities(&alone).unwrap().is_empty());
    }
}

#[test]
fn memory_bounds_the_pages_and_too_little_says_what_fits() {
    let device = EmulatedDevice::new(0).with_memory(96 << 20).shared();
    let gpu = Gpu { device: Arc::clone(&device) };
    let weights = GpuWeights::load(&gpu, &checkpoint("llama3"), GpuOptions::default()).unwrap();
    let config = |kv_memory| GpuModelConfig {
        page_size: 16,
        kv_memory,
        max_num_batched_tokens: 64,
        max_num_seqs: 4,
        num_host_pages: 0,
    };
    let new = |kv_memory| GpuModel::new(Arc::clone(&weights), config(kv_memory), "tiny", "abc");
    let half = new(KvMemory::Utilization { share: 0.5, max_pages: u32::MAX }).unwrap();
    let page_bytes = weights.kv_bytes_per_token() * 16;
    let pages_bytes = u64::from(half.info().num_pages) * page_bytes;
    assert!(pages_bytes > 30 << 20 && pages_bytes < 48 << 20, "{pages_bytes} bytes of pages");
    drop(half);
    let few = new(KvMemory::Utilization { share: 0.9, max_pages: 7 }).unwrap();
    assert_eq!(few.info().num_pages, 7);
    drop(few);
    let error = new(KvMemory::Pages(1 << 20)).err().unwrap().to_string();
    assert!(error.contains("1048576 KV pages of 16384 bytes do not fit"), "{error}");
}

/// Before the weights are there, or before they are used.
#[test]
fn what_a_device_cannot_do_is_refused_at_load() {
    let gpu = Gpu { device: EmulatedDevice::new(0).before_hopper().shared() };
    let rounded = GpuOptions { weight_dtype: WeightDtype::E4m3, ..GpuOptions::default() };
    let error = GpuWeights::load(&gpu, &checkpoint("llama3"), rounded).unwrap_err();
    assert!(matches!(error, ModelError::Gpu(GpuError::NoE4m3)), "{error}");
    let config = GpuModelConfig {
        page_size: 16,
        kv_memory: KvMemory::Pages(8),
        max_num_batched_tokens: 64,
        max_num_seqs: 4,
        num_host_pages: 0,
    };
    let with_kv = |kv_dtype| {
        let shape = ModelConfig { head_dim: 256, ..checkpoint("llama3").config().unwrap() };
        let options = GpuOptions { kv_dtype, ..GpuOptions::default() };
        GpuModel::new(GpuWeights::random(&gpu, shape, options).unwrap(), config, "wide", "abc").map(|_| ())
    };
    with_kv(KvDtype::Half).unwrap();
    let error = with_kv(KvDtype::E4m3).unwrap_err().to_string();
    assert!(error.contains("heads of 256 needs 103424 bytes of shared memory"), "{error}");
}

/// Gemma's activations would be infinite.
#[test]
fn a_family_that_needs_the_range_is_not_computed_in_f16() {
    let gpu = Gpu { device: EmulatedDevice::new(0).shared() };
    let options = GpuOptions { dtype: Some(HalfDtype::F16), ..GpuOptions::default() };
    let error = GpuWeights::load(&gpu, &checkpoint("gemma3"), options).unwrap_err();
    assert!(matches!(error, ModelError::Gpu(GpuError::NeedsRange)), "{error}");
}

/// Nothing is copied then: the whole is wanted at once.
#[test]
fn weights_that_do_not_fit_are_refused_at_once() {
    let gpu = Gpu { device: EmulatedDevice::new(0).with_memory(1 << 12).shared() };
    for family in FAMILIES {
        let error = GpuWeights::load(&gpu, &checkpoint(family), GpuOptions::default()).unwrap_err();
        let ModelError::Gpu(GpuError::Device(DeviceError::OutOfMemory { wanted, free, total })) = error
        else {
            panic!("{family}: {error}");
        };
        assert!(wanted > 10_000, "{family}: {wanted}");
        assert_eq!((free, total), (1 << 12, 1 << 12), "{family}");
    }
}
