//! Causal attention over paged keys and values; see `attention.cu`, `attention_merge.cu` and the plan.

use std::sync::Arc;

use super::launch;
use crate::backend::AttentionShape;
use crate::gpu::device::{Address, Device, DeviceError, Kernel, TmaMap, TmaShape};
use crate::gpu::half_vec::{HalfDtype, HalfVec, half_kernels};
use crate::gpu::memory::{DeviceSlice, DeviceVec};
use crate::gpu::plan::PlanLayout;

const MERGE: [Kernel; 2] = half_kernels!("attention_merge", 128, 0);
/// Heads that a block of it merges.
const MERGE_HEADS: usize = 4;

/// Keys of a step of the kernel for Hopper.
const HOPPER_KEYS: usize = 128;

/// Keys and values of a layer, `[page][2][kv head][slot][head_dim]`.
#[derive(Clone, Copy, Debug)]
pub(crate) enum PagedKv<'a> {
    /// Of the queries' kind.
    Half(DeviceSlice<'a, u16>),
    /// With a scale of one.
    E4m3(DeviceSlice<'a, u8>),
}

/// Partial results, for as many rows as plans may have.
#[derive(Debug)]
pub(crate) struct AttentionParts {
    /// `[part rows, kv heads, head_dim]`
    out: DeviceVec<f32>,
    /// `[part rows, kv heads]`
    lse: DeviceVec<f32>,
}

impl AttentionParts {
    pub(crate) fn new(
        device: &Arc<dyn Device>,
        shape: &AttentionShape,
        part_rows: usize,
    ) -> Result<Self, DeviceError> {
        let len = part_rows * shape.num_kv_heads;
        Ok(Self { out: DeviceVec::new(device, len * shape.head_dim)?, lse: DeviceVec::new(device, len)? })
    }
}

pub(crate) struct AttentionArgs<'a> {
    pub(crate) shape: &'a AttentionShape,
    /// Keys that a row sees, its own included.
    pub(crate) window: Option<u32>,
    pub(crate) layout: &'a PlanLayout,
    /// The words of the plan.
    pub(crate) plan: DeviceSlice<'a, u32>,
    /// `[tokens]`
    pub(crate) positions: DeviceSlice<'a, u32>,
    /// `[tokens, num_heads, head_dim]`, rotated
    pub(crate) query: &'a HalfVec,
    pub(crate) kv: PagedKv<'a>,
    pub(crate) parts: &'a AttentionParts,
    /// `[tokens, num_heads, head_dim]`
    pub(crate) out: &'a HalfVec,
}

#[derive(Clone, Copy)]
#[repr(C)]
struct Params {
    query: Address,
    kv: Address,
    out: Address,
    part_out: Address,
    part_lse: Address,
    positions: Address,
    num_tiles: Address,
    tiles: Address,
    tokens: Address,
    pages: Address,
    num_kv_heads: u32,
    group_len: u32,
    page_shift: u32,
    window: u32,
    scale_log2: f32,
}

#[derive(Clone, Copy)]
#[repr(C)]
struct HopperParams {
    map: TmaMap,
    params: Params,
    box_rows: u32,
}

#[derive(Clone, Copy)]
#[repr(C)]
struct MergeParams {
    out: Address,
    part_out: Address,
    part_lse: Address,
    num_merges: Address,
    merges: Address,
    num_kv_heads: u32,
    group_len: u32,
    dim: u32,
}

pub(crate) fn attention(device: &dyn Device, args: &AttentionArgs<'_>) -> Result<(), DeviceError> {
    check(args);
    let AttentionArgs { shape, layout, plan, .. } = *args;
    let params = Params {
        query: args.query.address(),
        kv: match args.kv {
            PagedKv::Half(kv) => kv.address(),
            PagedKv::E4m3(kv) => kv.address(),
        },
        out: args.out.address(),
        part_out: args.parts.out.address(),
        part_lse: args.parts.lse.address(),
        positions: args.positions.address(),
        num_tiles: plan.at(PlanLayout::NUM_TILES),
        tiles: plan.at(layout.tiles),
        tokens: plan.at(layout.tokens),
        pages: plan.at(layout.pages),
        num_kv_heads: shape.num_kv_heads as u32,
        group_len: shape.group_len() as u32,
        page_shift: shape.page_size.ilog2(),
        window: args.window.unwrap_or(0),
        scale_log2: shape.scale * std::f32::consts::LOG2_E,
    };
    let (heads, dtype) = (shape.num_kv_heads, args.query.dtype());
    if layout.room.tiles > 0 {
        let grid = [(layout.room.tiles * heads) as u32, 1, 1];
        // SAFETY: the lengths were checked; the plan is of this batch and its pages are of the cache.
        unsafe { launch(device, &kernel(dtype, shape.head_dim, args.kv), grid, &params)? };
    }
    if layout.room.wide_tiles > 0 {
        let kernel = hopper_kernel(device, dtype, shape.head_dim, args.kv);
        let box_rows = shape.page_size.min(HOPPER_KEYS) as u32;
        let params = HopperParams {
            map: device.tma_map(&TmaShape {
                base: params.kv,
                rows: (shape.num_slots() * 2 * shape.num_kv_heads) as u64,
                columns: shape.head_dim as u64,
                row_bytes: (shape.head_dim * size_of::<u16>()) as u64,
                box_rows,
            })?,
            params: Params {
                num_tiles: plan.at(PlanLayout::NUM_WIDE_TILES),
                tiles: plan.at(layout.wide_tiles),
                ..params
            },
            box_rows,
        };
        // SAFETY: as above.
        unsafe { launch(device, &kernel, [(layout.room.wide_tiles * heads) as u32, 1, 1], &params)? };
    }
    if layout.room.merges > 0 {
        let params = MergeParams {
            out: params.out,
            part_out: params.part_out,
            part_lse: params.part_lse,
            num_merges: plan.at(PlanLayout::NUM_MERGES),
            merges: plan.at(layout.merges),
            num_kv_heads: params.num_kv_heads,
            group_len: params.group_len,
            dim: shape.head_dim as u32,
        };
        let grid = [layout.room.merges as u32, shape.num_heads.div_ceil(MERGE_HEADS) as u32, 1];
        // SAFETY: as above.
        unsafe { launch(device, &dtype.of(MERGE), grid, &params)? };
    }
    Ok(())
}

fn check(args: &AttentionArgs<'_>) {
    let AttentionArgs { shape, layout, .. } = *args;
    let num_tokens = layout.room.tokens;
    assert!(shape.num_heads.is_multiple_of(shape.num_kv_heads) && shape.scale > 0.0);
    assert!(shape.page_size.is_power_of_two() && shape.page_size >= 16);
    assert!(args.plan.len() >= layout.len && args.positions.len() >= num_tokens);
    assert_eq!(args.query.dtype(), args.out.dtype());
    assert!(args.query.len() >= num_tokens * shape.q_len() && args.out.len() >= num_tokens * shape.q_len());
    let part_rows = layout.room.part_rows * shape.num_kv_heads;
    assert!(args.parts.lse.len() >= part_rows && args.parts.out.len() >= part_rows * shape.head_dim);
    let kv_len = shape.num_slots() * 2 * shape.kv_len();
    assert!(match args.kv {
        PagedKv::Half(kv) => kv.len() >= kv_len,
        PagedKv::E4m3(kv) => kv.len() >= kv_len,
    });
}

/// See `attention_hopper.cu` for what lies in shared memory.
fn hopper_kernel(device: &dyn Device, dtype: HalfDtype, head_dim: usize, kv: PagedKv<'_>) -> Kernel {
    assert!(device.is_hopper(), "wide tiles are planned for Hopper only");
    let name: &str = match (head_dim, kv) {
        (64, PagedKv::Half(_)) => dtype.of(["attention_hopper_64_bf16", "attention_hopper_64_f16"]),
        (128, PagedKv::Half(_)) => dtype.of(["attention_hopper_128_bf16", "attention_hopper_128_f16"]),
        _ => panic!("no kernel for wide tiles, heads of {head_dim}, {kv:?}"),
    };
    let shared_bytes = (5 * HOPPER_KEYS * head_dim * 2 + 8 * 8) as u32;
    Kernel { name, source: "attention_hopper", block: 384, shared_bytes }
}

/// Shared memory of a block, where keys and values are e4m3 or not; see `attention.cu` for what lies in it.
pub(crate) fn attention_shared_bytes(head_dim: usize, is_e4m3: bool) -> u32 {
    let keys = if head_dim == 256 { 32 } else { 64 };
    let stages = 2 * 2 * keys * head_dim * 2;
    let raw = if is_e4m3 { 2 * keys * head_dim } else { 0 };
    let query = match head_dim {
        256 => 32 * 256 * 2 + 32 * (32 + 8) * 4,
        _ => 64 * head_dim * 2,
    };
    (stages + raw + query) as u32
}

fn kernel(dtype: HalfDtype, head_dim: usize, kv: PagedKv<'_>) -> Kernel {
    let (names, is_e4m3) = match (head_dim, kv) {
        (64, PagedKv::Half(_)) => (["attention_64_bf16", "attention_64_f16"], false),
        (128, PagedKv::Half(_)) => (["attention_128_bf16", "attention_128_f16"], false),
        (256, PagedKv::Half(_)) => (["attention_256_bf16", "attention_256_f16"], false),
        (64, PagedKv::E4m3(_)) => (["attention_64_e4m3_bf16", "attention_64_e4m3_f16"], true),
        (128, PagedKv::E4m3(_)) => (["attention_128_e4m3_bf16", "attention_128_e4m3_f16"], true),
        (256, PagedKv::E4m3(_)) => (["attention_256_e4m3_bf16", "attention_256_e4m3_f16"], true),
        _ => panic!("no kernel for heads of {head_dim}"),
    };
    let shared_bytes = attention_shared_bytes(head_dim, is_e4m3);
    Kernel { name: dtype.of(names), source: "attention", block: 128, shared_bytes }
}
