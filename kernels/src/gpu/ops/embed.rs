//! Rows of the embedding, by ids that the host knows or that the step before has sampled; see `embed.cu`.

use super::{ROW_MULTIPLE, ROW_THREADS, launch};
use crate::gpu::device::{Address, Device, DeviceError, Kernel};
use crate::gpu::half_vec::{HalfVec, half_kernels};
use crate::gpu::memory::{DeviceSlice, DeviceVec};

const KERNELS: [Kernel; 2] = half_kernels!("embed", ROW_THREADS, 0);

pub(crate) struct Embed<'a> {
    pub(crate) num_rows: usize,
    /// Numbers of a row.
    pub(crate) size: usize,
    /// `[vocab, size]`
    pub(crate) table: &'a HalfVec,
    /// `[num_rows]`
    pub(crate) ids: DeviceSlice<'a, u32>,
    /// `[num_rows]`: where among `sampled` the id is, or -1 where it is in `ids`.
    pub(crate) from: DeviceSlice<'a, i32>,
    pub(crate) sampled: &'a DeviceVec<u32>,
    /// `[rows, size]`
    pub(crate) out: &'a DeviceVec<f32>,
    pub(crate) scale: f32,
}

#[derive(Clone, Copy)]
#[repr(C)]
struct Params {
    table: Address,
    ids: Address,
    from: Address,
    sampled: Address,
    out: Address,
    size: u32,
    scale: f32,
}

pub(crate) fn embed(device: &dyn Device, args: &Embed<'_>) -> Result<(), DeviceError> {
    assert!(args.size.is_multiple_of(ROW_MULTIPLE));
    assert!(args.ids.len() >= args.num_rows && args.from.len() >= args.num_rows);
    assert!(args.out.len() >= args.num_rows * args.size);
    let params = Params {
        table: args.table.address(),
        ids: args.ids.address(),
        from: args.from.address(),
        sampled: args.sampled.address(),
        out: args.out.address(),
        size: args.size as u32,
        scale: args.scale,
    };
    // SAFETY: the lengths were checked above; ids are below the vocabulary, as the batch was checked.
    unsafe { launch(device, &args.table.dtype().of(KERNELS), [args.num_rows as u32, 1, 1], &params) }
}
