//! A token's answer from those of its experts; see `combine.cu`.

use super::launch;
use crate::gpu::device::{Address, Device, DeviceError, Kernel};
use crate::gpu::half_vec::{HalfVec, half_kernels};
use crate::gpu::memory::DeviceVec;

const KERNELS: [Kernel; 2] = half_kernels!("combine", 128, 0);

pub(crate) struct Combine<'a> {
    pub(crate) num_tokens: usize,
    pub(crate) num_chosen: usize,
    pub(crate) size: usize,
    /// `[num_tokens * num_chosen, size]`
    pub(crate) answers: &'a HalfVec,
    /// `[num_tokens, num_chosen]`, as `route` wrote them.
    pub(crate) weights: &'a DeviceVec<f32>,
    /// `[num_tokens, num_chosen]`, as `sort_routes` wrote them.
    pub(crate) routes_of: &'a DeviceVec<u32>,
    /// `[num_tokens, size]`, written
    pub(crate) out: &'a HalfVec,
}

#[derive(Clone, Copy)]
#[repr(C)]
struct Params {
    answers: Address,
    weights: Address,
    routes_of: Address,
    out: Address,
    size: u32,
    num_chosen: u32,
}

pub(crate) fn combine(device: &dyn Device, args: &Combine<'_>) -> Result<(), DeviceError> {
    let Combine { num_tokens, num_chosen, size, .. } = *args;
    assert_eq!(size % 8, 0, "rows of {size} numbers are not aligned to 16 bytes");
    assert_eq!(args.answers.dtype(), args.out.dtype());
    let num_routes = num_tokens * num_chosen;
    assert!(args.answers.len() >= num_routes * size);
    assert!(args.weights.len() >= num_routes && args.routes_of.len() >= num_routes);
    assert!(args.out.len() >= num_tokens * size);
    let params = Params {
        answers: args.answers.address(),
        weights: args.weights.address(),
        routes_of: args.routes_of.address(),
        out: args.out.address(),
        size: size as u32,
        num_chosen: num_chosen as u32,
    };
    // SAFETY: the lengths were checked above; `routes_of` are those of the batch.
    unsafe { launch(device, &args.out.dtype().of(KERNELS), [num_tokens as u32, 1, 1], &params) }
}
