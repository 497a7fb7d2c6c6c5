//! Weights as bytes, packed once for the dot products.
//!
//! Outputs stand in panels of [`LANES`]; a panel holds four inputs of all its outputs side by side, which is the
//! order both vectors and tiles read. Bytes are unsigned, weight + 128, since the hardware multiplies unsigned by
//! signed; the 128 are taken off again with the sum of the other row's bytes.

use super::dots::QUAD_BYTES;
use super::isa::{Isa, Kernel, Lanes};
use super::packed::{PackedMatrix, Packing};
use super::quantize::{QuantizedRow, RowLayout, quantize_row, rotate};
use super::{LANES, OFFSET};

/// `[num_outputs, num_inputs]`
pub(crate) struct Matrix {
    pub(super) num_outputs: usize,
    pub(super) layout: RowLayout,
    stored: PackedMatrix,
}

impl Matrix {
    /// Quantizes and packs a matrix row by row, or finds it packed already.
    pub(super) fn new(
        isa: Isa,
        packing: &Packing,
        num_outputs: usize,
        num_inputs: usize,
        fill_row: &mut dyn FnMut(usize, &mut [f32]),
    ) -> Self {
        let layout = RowLayout::new(num_inputs);
        let num_panels = num_outputs.div_ceil(LANES);
        let panels_len = num_panels * layout.padded_len() * LANES;
        let scales_len = num_panels * layout.num_groups() * LANES;
        let stored = packing.matrix(panels_len, scales_len, |panels, scales| {
            let mut packer = Packer::new(&layout);
            for output in 0..num_outputs {
                fill_row(output, &mut packer.row);
                isa.run(Quantize { layout: &layout, packer: &mut packer });
                packer.pack(&layout, output, panels, scales);
            }
        });
        Self { num_outputs, layout, stored }
    }

    pub(super) fn num_panels(&self) -> usize {
        self.num_outputs.div_ceil(LANES)
    }

    /// Bytes between two panels.
    pub(super) fn panel_stride(&self) -> usize {
        self.layout.padded_len() * LANES
    }

    /// `[num_panels, padded_len / 4, LANES, 4]`
    pub(super) fn panels(&self) -> &[u8] {
        self.stored.panels()
    }

    /// `[num_panels, num_groups, LANES]`
    pub(super) fn scales(&self) -> &[f32] {
        self.stored.scales()
    }

    /// The numbers of one output.
    pub(super) fn row(&self, isa: Isa, output: usize, out: &mut [f32]) {
        isa.run(Unpack { matrix: self, output, out });
    }
}

/// Working memory of a row.
struct Packer {
    row: Vec<f32>,
    bytes: Vec<i8>,
    scales: Vec<f32>,
    sums: Vec<i32>,
}

impl Packer {
    fn new(layout: &RowLayout) -> Self {
        Self {
            row: vec![0.0; layout.len],
            bytes: vec![0; layout.padded_len()],
            scales: vec![0.0; layout.num_groups()],
            sums: vec![0; layout.num_groups()],
        }
    }

    fn pack(&self, layout: &RowLayout, output: usize, panels: &mut [u8], scales: &mut [f32]) {
        let (panel, lane) = (output / LANES, output % LANES);
        let panel_len = layout.padded_len() * LANES;
        let quads = panels[panel * panel_len..(panel + 1) * panel_len].chunks_exact_mut(QUAD_BYTES);
        for (quad, bytes) in quads.zip(self.bytes.as_chunks::<4>().0) {
            for (to, byte) in quad[4 * lane..4 * lane + 4].iter_mut().zip(bytes) {
                *to = (*byte as u8).wrapping_add(OFFSET as u8);
            }
        }
        for (group, scale) in self.scales.iter().enumerate() {
            scales[(panel * layout.num_groups() + group) * LANES + lane] = *scale;
        }
    }
}

struct Quantize<'a> {
    layout: &'a RowLayout,
    packer: &'a mut Packer,
}

impl Kernel for Quantize<'_> {
    #[inline(always)]
    fn run<V: Lanes>(self) {
        let Packer { row, bytes, scales, sums } = self.packer;
        quantize_row::<V>(self.layout, row, QuantizedRow { bytes, scales, sums });
    }
}

struct Unpack<'a> {
    matrix: &'a Matrix,
    output: usize,
    out: &'a mut [f32],
}

impl Kernel for Unpack<'_> {
    #[inline(always)]
    fn run<V: Lanes>(self) {
        let Self { matrix, output, out } = self;
        let (panel, lane) = (output / LANES, output % LANES);
        let layout = &matrix.layout;
        let quads = &matrix.panels()[panel * matrix.panel_stride()..][..matrix.panel_stride()];
        let scales = &matrix.scales()[panel * layout.num_groups() * LANES..];
        for (i, out) in out.iter_mut().enumerate() {
            let byte = i32::from(quads[i / 4 * QUAD_BYTES + 4 * lane + i % 4]) - OFFSET;
            *out = byte as f32 * scales[i / layout.group_len * LANES + lane];
        }
        rotate::<V>(layout.rotation, out);
    }
}
