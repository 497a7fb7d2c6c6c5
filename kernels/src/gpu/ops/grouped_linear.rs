//! Matrix products with the weights of each route's expert; see `grouped_linear.cu`.

use super::launch;
use crate::gpu::device::{Address, Device, DeviceError, Kernel};
use crate::gpu::half_vec::{HalfVec, half_kernels};
use crate::gpu::memory::DeviceVec;

const KERNELS: [Kernel; 2] = half_kernels!("grouped_linear", 128, 49152);

/// Routes and columns of a block.
const TILE: usize = 64;

pub(crate) struct GroupedLinear<'a> {
    pub(crate) num_routes: usize,
    pub(crate) num_experts: usize,
    pub(crate) n: usize,
    pub(crate) k: usize,
    /// `[rows, k]`
    pub(crate) x: &'a HalfVec,
    /// `[num_experts, n, k]`
    pub(crate) weight: &'a HalfVec,
    /// `[num_experts + 1]`, the last is `num_routes`
    pub(crate) indptr: &'a DeviceVec<u32>,
    /// `[num_routes]`: which row of `x` a route reads; its own if absent.
    pub(crate) rows_of: Option<&'a DeviceVec<u32>>,
    /// `[num_routes, n]`, written
    pub(crate) out: &'a HalfVec,
}

#[derive(Clone, Copy)]
#[repr(C)]
struct Params {
    x: Address,
    weight: Address,
    out: Address,
    indptr: Address,
    rows_of: Address,
    num_experts: u32,
    n: u32,
    k: u32,
}

pub(crate) fn grouped_linear(device: &dyn Device, args: &GroupedLinear<'_>) -> Result<(), DeviceError> {
    let GroupedLinear { num_routes, num_experts, n, k, .. } = *args;
    assert_eq!(k % 8, 0, "rows of {k} numbers are not aligned to 16 bytes");
    let dtype = args.x.dtype();
    assert!(args.weight.dtype() == dtype && args.out.dtype() == dtype);
    assert!(args.rows_of.map_or(args.x.len() >= num_routes * k, |rows| rows.len() >= num_routes));
    assert!(args.weight.len() >= num_experts * n * k && args.out.len() >= num_routes * n);
    assert!(args.indptr.len() > num_experts);
    let params = Params {
        x: args.x.address(),
        weight: args.weight.address(),
        out: args.out.address(),
        indptr: args.indptr.address(),
        rows_of: Address::of(args.rows_of),
        num_experts: num_experts as u32,
        n: n as u32,
        k: k as u32,
    };
    // Each expert that has routes begins a tile of its own.
    let num_tiles = num_routes / TILE + num_routes.min(num_experts);
    let grid = [n.div_ceil(TILE) as u32, num_tiles as u32, 1];
    // SAFETY: the lengths were checked above; `indptr` and `rows_of` are those of the batch.
    unsafe { launch(device, &dtype.of(KERNELS), grid, &params) }
}
