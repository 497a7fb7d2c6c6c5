//! What a step must do at least: operations and bytes, counted from its batch, and the time that takes at the peaks.
//!
//! A step cannot be faster than its products at the peak of the matrix units, nor than reading the weights and each page
//! of keys and values once at the speed of a copy. Norms, activations, sampling and launches count nothing, and windows
//! take off operations but no bytes.

use serde::Serialize;
use tidemill_kernels::models::ModelConfig;
use tidemill_kernels::step::StepBatch;

/// Peaks of a device, measured.
#[derive(Clone, Copy, Debug, Serialize)]
pub(super) struct Ceilings {
    /// Of the 16-bit floats that the model computes in.
    pub(super) half_tflops: f64,
    /// Of the numbers that weights have: those, or e4m3.
    pub(super) weight_tflops: f64,
    /// Bytes read and bytes written together.
    pub(super) copy_gb_per_second: f64,
}

/// Sums over some steps.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Cost {
    pub(super) tokens: u64,
    pub(super) sampled: u64,
    /// Operations, two a product, with matrices that may be rounded.
    pub(super) layer_flops: f64,
    /// With the output head, which is not.
    pub(super) head_flops: f64,
    pub(super) attention_flops: f64,
    pub(super) weight_bytes: f64,
    pub(super) kv_bytes: f64,
}

/// The least time of some steps, and how much of it is of steps that computing bounds.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Least {
    pub(super) seconds: f64,
    pub(super) compute_seconds: f64,
}

impl Cost {
    pub(super) fn flops(&self) -> f64 {
        self.layer_flops + self.head_flops + self.attention_flops
    }

    pub(super) fn least(&self, ceilings: &Ceilings) -> Least {
        let compute = self.layer_flops / (ceilings.weight_tflops * 1e12)
            + (self.head_flops + self.attention_flops) / (ceilings.half_tflops * 1e12);
        let memory = (self.weight_bytes + self.kv_bytes) / (ceilings.copy_gb_per_second * 1e9);
        let bound_by_compute = compute > memory;
        Least { seconds: compute.max(memory), compute_seconds: if bound_by_compute { compute } else { 0.0 } }
    }
}

/// Counts the steps of one model.
#[derive(Debug)]
pub(super) struct Counter {
    /// Of a token with the matrices of all layers but the feed-forward part, and with one expert of it.
    attention_matrices: u64,
    expert_matrices: u64,
    experts_per_token: u64,
    head_products: u64,
    /// Of one position with all heads of a layer, keys and values together.
    attention_products: u64,
    /// Windows that layers have, with how many layers.
    windows: Vec<(Option<u32>, u64)>,
    /// Bytes of a weight of the layers; those of the head have two.
    weight_size: u64,
    kv_bytes_per_token: u64,
    page_size: u32,
    /// For each page, the step that has counted it last.
    counted: Vec<u64>,
    num_steps: u64,
}

impl Counter {
    pub(super) fn new(
        config: &ModelConfig,
        weight_size: u64,
        kv_bytes_per_token: u64,
        (page_size, num_pages): (u32, u32),
    ) -> Self {
        let (hidden, heads_len) =
            (u64::from(config.hidden_size), u64::from(config.num_heads) * u64::from(config.head_dim));
        let kv_len = u64::from(config.num_kv_heads) * u64::from(config.head_dim);
        let num_layers = u64::from(config.num_layers);
        let mut windows: Vec<(Option<u32>, u64)> = Vec::new();
        for window in &config.windows {
            match windows.iter_mut().find(|(known, _)| known == window) {
                Some((_, num_layers)) => *num_layers += 1,
                None => windows.push((*window, 1)),
            }
        }
        Self {
            attention_matrices: num_layers * hidden * (2 * heads_len + 2 * kv_len),
            expert_matrices: num_layers * hidden * 3 * u64::from(config.intermediate_size),
            experts_per_token: config.experts.map_or(1, |experts| experts.num_experts_per_token.into()),
            head_products: hidden * u64::from(config.vocab_size),
            attention_products: 2 * heads_len,
            windows,
            weight_size,
            kv_bytes_per_token,
            page_size,
            counted: vec![0; num_pages as usize],
            num_steps: 0,
        }
    }

    pub(super) fn count(&mut self, batch: &StepBatch) -> Cost {
        self.num_steps += 1;
        let tokens = batch.num_tokens() as u64;
        let sampled = batch.sampling.iter().flatten().count() as u64;
        let mut kv_tokens = tokens;
        let mut seen = 0;
        for seq in 0..batch.num_seqs() {
            let rows = batch.rows(seq);
            let (first, len) = (u64::from(batch.positions[rows.start]), rows.len() as u64);
            seen += self.seen(first, len);
            let mut left = (first + len) as u32;
            for page in batch.pages(seq) {
                let counted = &mut self.counted[page.0 as usize];
                if *counted != self.num_steps {
                    *counted = self.num_steps;
                    kv_tokens += u64::from(left.min(self.page_size));
                }
                left = left.saturating_sub(self.page_size);
            }
        }
        // Tokens may all meet the same experts.
        let products = self.attention_matrices + self.experts_per_token * self.expert_matrices;
        let head_bytes = if sampled > 0 { 2 * self.head_products } else { 0 };
        Cost {
            tokens,
            sampled,
            layer_flops: (2 * products * tokens) as f64,
            head_flops: (2 * self.head_products * sampled) as f64,
            attention_flops: (2 * self.attention_products * seen) as f64,
            weight_bytes: (products * self.weight_size + head_bytes) as f64,
            kv_bytes: (kv_tokens * self.kv_bytes_per_token) as f64,
        }
    }

    /// Positions that rows `first..first + len` of a sequence look at, in all layers.
    fn seen(&self, first: u64, len: u64) -> u64 {
        let up_to = |end: u64| end * (end + 1) / 2;
        let all = up_to(first + len) - up_to(first);
        let within = |window: u64| {
            // Rows before the window is full see all before them, those behind it the window.
            let full = (first + len).saturating_sub(first.max(window));
            let growing = first.max(window.min(first + len));
            up_to(growing) - up_to(first) + full * window
        };
        self.windows
            .iter()
            .map(|&(window, num_layers)| num_layers * window.map_or(all, |window| within(window.into())))
            .sum()
    }
}

#[cfg(test)]
mod tests {
    use tidemill_kernels::step::{PageId, SamplingParams};

    use super::super::shapes::Shape;
    use super::*;

    #[test]
    fn positions_are_counted_as_one_by_one() {
        let mut config = Shape::SmolLm2_135m.config();
        config.windows = vec![None, Some(5), Some(5), Some(100)];
        let counter = Counter::new(&config, 2, 1, (16, 1));
        for (first, len) in [(0, 1), (0, 7), (3, 1), (3, 4), (4, 9), (5, 3), (90, 30), (200, 2)] {
            let one = |window: u64| (first..first + len).map(|row| (row + 1).min(window)).sum::<u64>();
            assert_eq!(counter.seen(first, len), one(u64::MAX) + 2 * one(5) + one(100), "{first}, {len}");
        }
    }

    #[test]
    fn a_shared_page_is_read_once_and_the_slower_side_bounds() {
        let config = Shape::SmolLm2_135m.config();
        let mut counter = Counter::new(&config, 1, 10, (16, 8));
        let mut batch = StepBatch::default();
        // 17 tokens before each, a page of 16 in common.
        for own in [1, 2] {
            batch.push(&[7], 17, &[PageId(0), PageId(own)], Some(SamplingParams::GREEDY));
        }
        let layers = 30 * 576 * (2 * 576 + 2 * 192 + 3 * 1536);
        for _ in 0..2 {
            let cost = counter.count(&batch);
            assert_eq!(cost.kv_bytes, f64::from(10 * (16 + 2 + 2 + 2)));
            assert_eq!(cost.layer_flops, f64::from(2 * 2 * layers));
            assert_eq!(cost.weight_bytes, f64::from(layers + 2 * 576 * 49_152));
            assert_eq!(cost.attention_flops, f64::from(2 * 30 * 2 * 18 * 2 * 576));
            let slow = Ceilings { half_tflops: 1e-3, weight_tflops: 1e-3, copy_gb_per_second: 1e6 };
            let least = cost.least(&slow);
            assert!(
                (least.seconds - cost.flops() / 1e9).abs() < 1e-9 && least.compute_seconds == least.seconds
            );
            let fast = Ceilings { half_tflops: 1e6, weight_tflops: 1e6, copy_gb_per_second: 1.0 };
            let least = cost.least(&fast);
            let bytes = cost.weight_bytes + cost.kv_bytes;
            assert!((least.seconds - bytes / 1e9).abs() < 1e-9 && least.compute_seconds == 0.0);
        }
    }
}
