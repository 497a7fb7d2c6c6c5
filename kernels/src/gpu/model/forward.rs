//! Queues the kernels of a step: all layers, then the output head and the samples.
//!
//! Nothing here waits for the device or looks at what it computed, so the same calls can be recorded as a graph.

use super::Runner;
use super::buffers::MAX_HEAD_ROWS;
use super::inputs::{DeviceInputs, Layout};
use super::penalties::DevicePenalties;
use crate::gpu::device::DeviceError;
use crate::gpu::memory::DeviceSlice;
use crate::gpu::ops::{
    AttentionArgs, CopyKv, Embed, Gated, KvDtype, LinearOut, Matrix, PagedKv, Penalties, RmsNorm, Rows,
    RowsOut, Sample, StoreKv, attention, copy_kv, embed, gated, gather, linear, penalties, quantize,
    rms_norm, sample, store_kv,
};
use crate::gpu::weights::{GpuFeedForward, GpuLayer};

/// Which rows meet the output head, and what is wanted of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Head {
    /// All rows, in their order.
    All,
    /// Those of the inputs.
    Listed,
}

impl Runner {
    /// Everything of a step.
    pub(super) fn forward(
        &self,
        layout: &Layout,
        inputs: &DeviceInputs<'_>,
        head: Head,
        penalties: Option<&DevicePenalties<'_>>,
    ) -> Result<(), DeviceError> {
        if penalties.is_some() {
            // Samples of the first rows are written before the penalties of the last.
            let (from, to) = (&self.sampled, &self.sampled_before);
            let num_bytes = to.len() * size_of::<u32>();
            // SAFETY: both have so many ids.
            unsafe { self.device.copy(to.address(), from.address(), num_bytes)? };
        }
        self.layers(layout, inputs)?;
        let num_heads = layout.shape.num_heads;
        for first in (0..num_heads).step_by(MAX_HEAD_ROWS) {
            let num_rows = MAX_HEAD_ROWS.min(num_heads - first);
            self.head(inputs, head, first, num_rows)?;
            if let Some(penalties) = penalties {
                self.penalize(penalties, first, num_rows)?;
            }
            self.sample(inputs, first, num_rows)?;
        }
        Ok(())
    }

    /// All layers; leaves the rows behind the last norm in `last`.
    pub(super) fn layers(&self, layout: &Layout, inputs: &DeviceInputs<'_>) -> Result<(), DeviceError> {
        let num_rows = layout.shape.num_rows;
        let Self { device, weights, buffers, .. } = self;
        let config = &weights.config;
        self.copy_pages(layout, inputs)?;
        let hidden_size = config.hidden_size as usize;
        let scale = if weights.scaled_embedding { (hidden_size as f32).sqrt() } else { 1.0 };
        let args = Embed {
            num_rows,
            size: hidden_size,
            table: weights.embedding.half(),
            ids: inputs.ids,
            from: inputs.from,
            sampled: &self.sampled,
            out: &buffers.hidden,
            scale,
        };
        embed(&**device, &args)?;
        // Each norm adds what the part before it left, behind the norm of that part where the family has one.
        let mut norm_args = RmsNorm {
            num_rows,
            residual: &buffers.hidden,
            delta: None,
            weight: &weights.output_norm,
            post_norm: None,
            out: buffers.normed.out(),
            epsilon: config.rms_norm_epsilon,
        };
        for (index, layer) in weights.layers.iter().enumerate() {
            rms_norm(&**device, &RmsNorm { weight: &layer.attention_norm, ..norm_args })?;
            self.attention_part(index, layer, layout, inputs)?;
            norm_args.delta = Some(&buffers.part);
            norm_args.post_norm = layer.post_attention_norm.as_ref();
            rms_norm(&**device, &RmsNorm { weight: &layer.feed_forward_norm, ..norm_args })?;
            self.feed_forward_part(layer, num_rows)?;
            norm_args.post_norm = layer.post_feed_forward_norm.as_ref();
        }
        rms_norm(&**device, &RmsNorm { out: RowsOut::Half(&buffers.last), ..norm_args })
    }

    fn copy_pages(&self, layout: &Layout, inputs: &DeviceInputs<'_>) -> Result<(), DeviceError> {
        let num_copies = layout.shape.num_copies;
        if num_copies == 0 {
            return Ok(());
        }
        let weights = &self.weights;
        for kv in &self.kv {
            let args = CopyKv {
                num_copies,
                copies: inputs.copies,
                kv,
                num_kv_heads: weights.config.num_kv_heads as usize,
                page_size: self.page_size,
                slot_bytes: weights.stride * weights.options.kv_dtype.size_bytes(),
            };
            copy_kv(&*self.device, &args)?;
        }
        Ok(())
    }

    /// `part = attention(normed)`
    fn attention_part(
        &self,
        index: usize,
        layer: &GpuLayer,
        layout: &Layout,
        inputs: &DeviceInputs<'_>,
    ) -> Result<(), DeviceError> {
        let Self { device, weights, buffers, .. } = self;
        let config = &weights.config;
        let num_rows = layout.shape.num_rows;
        let (num_heads, num_kv_heads) = (config.num_heads as usize, config.num_kv_heads as usize);
        let window = config.windows[index];
        self.linear(num_rows, buffers.normed.rows(), &layer.qkv, LinearOut::Half(&buffers.qkv))?;
        let args = StoreKv {
            num_rows,
            num_heads,
            num_kv_heads,
            head_dim: config.head_dim as usize,
            stride: weights.stride,
            page_size: self.page_size,
            qkv: &buffers.qkv,
            bias: layer.qkv_bias.as_ref(),
            norms: layer.head_norms.as_ref().map(|[q, k]| [q, k]),
            rope: self.rope_table(window),
            positions: inputs.positions,
            slots: inputs.slots,
            queries: &buffers.queries,
            kv: &self.kv[index],
            kv_dtype: weights.options.kv_dtype,
            epsilon: config.rms_norm_epsilon,
        };
        store_kv(&**device, &args)?;
        let args = AttentionArgs {
            shape: &self.shape,
            window,
            layout: &layout.plan_layout,
            plan: inputs.plan,
            positions: inputs.positions,
            query: &buffers.queries,
            kv: self.paged_kv(index),
            parts: &self.parts,
            out: &buffers.attended,
        };
        attention(&**device, &args)?;
        let out = LinearOut::Half(&buffers.part);
        match &buffers.rounded {
            Some((rounded, scale)) => {
                let size = num_heads * weights.stride;
                quantize(&**device, num_rows, size, &buffers.attended, rounded, scale)?;
                self.linear(num_rows, Rows::E4m3(rounded, scale), &layer.attention_output, out)
            }
            None => self.linear(num_rows, Rows::Half(&buffers.attended), &layer.attention_output, out),
        }
    }

    fn paged_kv(&self, index: usize) -> PagedKv<'_> {
        let kv = &self.kv[index];
        match self.weights.options.kv_dtype {
            KvDtype::Half => {
                PagedKv::Half(DeviceSlice::of_bytes(kv, 0, kv.len() / KvDtype::Half.size_bytes()))
            }
            KvDtype::E4m3 => PagedKv::E4m3(kv.into()),
        }
    }

    /// `part = feed_forward(normed)`
    fn feed_forward_part(&self, layer: &GpuLayer, num_rows: usize) -> Result<(), DeviceError> {
        let buffers = &self.buffers;
        match &layer.feed_forward {
            GpuFeedForward::Dense { gate_up, down } => {
                let out = LinearOut::Half(&buffers.gate_up);
                self.linear(num_rows, buffers.normed.rows(), gate_up, out)?;
                self.gate(num_rows)?;
                self.linear(num_rows, buffers.gated.rows(), down, LinearOut::Half(&buffers.part))
            }
            GpuFeedForward::Experts(experts) => self.mix_experts(experts, num_rows),
        }
    }

    /// `gated = activation(gates) * ups`
    pub(super) fn gate(&self, num_rows: usize) -> Result<(), DeviceError> {
        let Self { device, weights, buffers, .. } = self;
        let args = Gated {
            activation: weights.activation,
            num_rows,
            size: weights.config.intermediate_size as usize,
            gate_up: &buffers.gate_up,
            out: buffers.gated.out(),
        };
        gated(&**device, &args)
    }

    /// Logits of rows `first..first + num_rows` of those that meet the head.
    pub(super) fn head(
        &self,
        inputs: &DeviceInputs<'_>,
        head: Head,
        first: usize,
        num_rows: usize,
    ) -> Result<(), DeviceError> {
        let Self { device, weights, buffers, .. } = self;
        let rows = match head {
            Head::All if first == 0 => Rows::Half(&buffers.last),
            _ => {
                let rows = inputs.head_rows.part(first, num_rows);
                let size = weights.config.hidden_size as usize;
                gather(&**device, num_rows, size, &buffers.last, rows, &buffers.head)?;
                Rows::Half(&buffers.head)
            }
        };
        self.linear(num_rows, rows, weights.output(), LinearOut::F32(&buffers.logits))
    }

    /// Takes down the logits of rows `first..first + num_rows` of those that met the head.
    fn penalize(
        &self,
        of_step: &DevicePenalties<'_>,
        first: usize,
        num_rows: usize,
    ) -> Result<(), DeviceError> {
        let args = Penalties {
            num_rows,
            vocab_size: self.weights.config.vocab_size as usize,
            logits: &self.buffers.logits,
            rows_of: None,
            penalties: of_step.penalties.part(first, num_rows),
            indptr: of_step.indptr.part(first, num_rows + 1),
            uses: of_step.uses,
            newest_from: of_step.newest_from.part(first, num_rows),
            sampled: &self.sampled_before,
        };
        penalties(&*self.device, &args)
    }

    /// Tokens of rows `first..first + num_rows` of those that met the head.
    fn sample(&self, inputs: &DeviceInputs<'_>, first: usize, num_rows: usize) -> Result<(), DeviceError> {
        let max_seqs = self.sampled.len() / 2;
        let args = Sample {
            num_rows,
            vocab_size: self.weights.config.vocab_size as usize,
            logits: &self.buffers.logits,
            rows_of: None,
            allowed: None,
            sampling: inputs.sampling.part(first, num_rows),
            token_ids: DeviceSlice::from(&self.sampled).part(first, num_rows),
            errors: DeviceSlice::from(&self.sampled).part(max_seqs + first, num_rows),
        };
        sample(&*self.device, &args)
    }

    pub(super) fn linear(
        &self,
        num_rows: usize,
        x: Rows<'_>,
        matrix: &Matrix,
        out: LinearOut<'_>,
    ) -> Result<(), DeviceError> {
        linear(&*self.device, num_rows, x, matrix, out, self.weights.options.deterministic)
    }
}
