//! Biases, norms and rotation of heads, and keys and values to their slots; see `store_kv.cu`.

use super::launch;
use crate::gpu::device::{Address, Device, DeviceError, Kernel};
use crate::gpu::half_vec::{HalfVec, half_kernels};
use crate::gpu::memory::{DeviceSlice, DeviceVec};

const WARPS: u32 = 8;
const KERNELS: [Kernel; 2] = half_kernels!("store_kv", WARPS * 32, 0);

/// Numbers of the KV cache.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum KvDtype {
    /// As activations.
    #[default]
    Half,
    /// As they are, without a scale; beyond 448 they are cut.
    E4m3,
}

impl KvDtype {
    pub(crate) fn size_bytes(self) -> usize {
        match self {
            Self::Half => 2,
            Self::E4m3 => 1,
        }
    }
}

pub(crate) struct StoreKv<'a> {
    pub(crate) num_rows: usize,
    pub(crate) num_heads: usize,
    pub(crate) num_kv_heads: usize,
    pub(crate) head_dim: usize,
    /// Numbers from one head to the next: the head dimension of the attention kernel.
    pub(crate) stride: usize,
    pub(crate) page_size: usize,
    /// `[num_rows, num_heads + 2 * num_kv_heads, stride]`
    pub(crate) qkv: &'a HalfVec,
    /// `[num_heads + 2 * num_kv_heads, stride]`
    pub(crate) bias: Option<&'a DeviceVec<f32>>,
    /// `[head_dim]` each, of queries and keys.
    pub(crate) norms: Option<[&'a DeviceVec<f32>; 2]>,
    /// `[positions, 2, head_dim / 2]`: cosines, then sines.
    pub(crate) rope: &'a DeviceVec<f32>,
    /// `[num_rows]`
    pub(crate) positions: DeviceSlice<'a, u32>,
    /// `[num_rows]`, -1 for rows of padding.
    pub(crate) slots: DeviceSlice<'a, i32>,
    /// `[num_rows, num_heads, stride]`
    pub(crate) queries: &'a HalfVec,
    /// `[pages, 2, num_kv_heads, page_size, stride]`
    pub(crate) kv: &'a DeviceVec<u8>,
    pub(crate) kv_dtype: KvDtype,
    pub(crate) epsilon: f32,
}

#[derive(Clone, Copy)]
#[repr(C)]
struct Params {
    qkv: Address,
    bias: Address,
    q_norm: Address,
    k_norm: Address,
    rope: Address,
    positions: Address,
    slots: Address,
    queries: Address,
    kv: Address,
    num_rows: u32,
    num_heads: u32,
    num_kv_heads: u32,
    head_dim: u32,
    stride: u32,
    page_size: u32,
    epsilon: f32,
    kv_is_e4m3: u32,
}

pub(crate) fn store_kv(device: &dyn Device, args: &StoreKv<'_>) -> Result<(), DeviceError> {
    let num_all = args.num_heads + 2 * args.num_kv_heads;
    assert!(args.head_dim.is_multiple_of(4) && args.stride.is_multiple_of(2) && args.head_dim <= args.stride);
    assert!(args.qkv.len() >= args.num_rows * num_all * args.stride);
    assert!(args.bias.is_none_or(|bias| bias.len() == num_all * args.stride));
    assert!(args.norms.is_none_or(|norms| norms.iter().all(|norm| norm.len() == args.head_dim)));
    assert!(args.positions.len() >= args.num_rows && args.slots.len() >= args.num_rows);
    assert!(args.queries.len() >= args.num_rows * args.num_heads * args.stride);
    let dtype = args.qkv.dtype();
    assert_eq!(args.queries.dtype(), dtype);
    let [q_norm, k_norm] = args.norms.map_or([Address::NULL; 2], |norms| norms.map(|norm| norm.address()));
    let params = Params {
        qkv: args.qkv.address(),
        bias: Address::of(args.bias),
        q_norm,
        k_norm,
        rope: args.rope.address(),
        positions: args.positions.address(),
        slots: args.slots.address(),
        queries: args.queries.address(),
        kv: args.kv.address(),
        num_rows: args.num_rows as u32,
        num_heads: args.num_heads as u32,
        num_kv_heads: args.num_kv_heads as u32,
        head_dim: args.head_dim as u32,
        stride: args.stride as u32,
        page_size: args.page_size as u32,
        epsilon: args.epsilon,
        kv_is_e4m3: u32::from(args.kv_dtype == KvDtype::E4m3),
    };
    let blocks = (args.num_rows * num_all).div_ceil(WARPS as usize);
    // SAFETY: the lengths were checked above; positions are below those of the table and slots within the cache, as
    // the batch was checked.
    unsafe { launch(device, &dtype.of(KERNELS), [blocks as u32, 1, 1], &params) }
}
