//! Which experts each token goes to, and the tokens of each expert; see `route.cu`. Nothing of it goes to the
//! host.

use super::launch;
use crate::gpu::device::{Address, Device, DeviceError, Kernel};
use crate::gpu::memory::DeviceVec;

const BLOCK: u32 = 256;
const ROUTE: Kernel = Kernel { name: "route", source: "route", block: BLOCK, shared_bytes: 0 };
const SORT: Kernel =
    Kernel { name: "sort_routes", source: "route", block: BLOCK, shared_bytes: BLOCK / 32 * 2 * 4 };

/// A warp has a token, and a lane 16 of its experts.
const MAX_EXPERTS: usize = 512;
/// A lane has one of those that are chosen.
const MAX_CHOSEN: usize = 32;

pub(crate) struct Route<'a> {
    pub(crate) num_tokens: usize,
    pub(crate) num_experts: usize,
    /// Experts of a token.
    pub(crate) num_chosen: usize,
    /// Their weights are scaled to a sum of one.
    pub(crate) renormalize: bool,
    /// `[num_tokens, num_experts]`
    pub(crate) scores: &'a DeviceVec<f32>,
    /// `[num_tokens, num_chosen]`, written: ascending.
    pub(crate) experts: &'a DeviceVec<u32>,
    /// `[num_tokens, num_chosen]`, written
    pub(crate) weights: &'a DeviceVec<f32>,
}

#[derive(Clone, Copy)]
#[repr(C)]
struct RouteParams {
    scores: Address,
    experts: Address,
    weights: Address,
    num_tokens: u32,
    num_experts: u32,
    num_chosen: u32,
    renormalize: u32,
}

pub(crate) fn route(device: &dyn Device, args: &Route<'_>) -> Result<(), DeviceError> {
    let Route { num_tokens, num_experts, num_chosen, .. } = *args;
    assert!(num_experts <= MAX_EXPERTS, "{num_experts} experts");
    assert!((1..=num_experts.min(MAX_CHOSEN)).contains(&num_chosen), "{num_chosen} of {num_experts} experts");
    assert!(args.scores.len() >= num_tokens * num_experts);
    let len = num_tokens * num_chosen;
    assert!(args.experts.len() >= len && args.weights.len() >= len);
    let params = RouteParams {
        scores: args.scores.address(),
        experts: args.experts.address(),
        weights: args.weights.address(),
        num_tokens: num_tokens as u32,
        num_experts: num_experts as u32,
        num_chosen: num_chosen as u32,
        renormalize: u32::from(args.renormalize),
    };
    // SAFETY: the lengths were checked above.
    unsafe { launch(device, &ROUTE, [(num_tokens as u32).div_ceil(BLOCK / 32), 1, 1], &params) }
}

pub(crate) struct SortRoutes<'a> {
    pub(crate) num_tokens: usize,
    pub(crate) num_experts: usize,
    pub(crate) num_chosen: usize,
    /// `[num_tokens, num_chosen]`, each below `num_experts`
    pub(crate) experts: &'a DeviceVec<u32>,
    /// `[num_experts + 1]`, written: which routes are an expert's.
    pub(crate) indptr: &'a DeviceVec<u32>,
    /// `[num_tokens * num_chosen]`, written: the token of each route.
    pub(crate) rows: &'a DeviceVec<u32>,
    /// `[num_tokens, num_chosen]`, written: the routes of each token.
    pub(crate) routes_of: &'a DeviceVec<u32>,
}

#[derive(Clone, Copy)]
#[repr(C)]
struct SortParams {
    experts: Address,
    indptr: Address,
    rows: Address,
    routes_of: Address,
    num_routes: u32,
    num_experts: u32,
    num_chosen: u32,
}

pub(crate) fn sort_routes(device: &dyn Device, args: &SortRoutes<'_>) -> Result<(), DeviceError> {
    let num_routes = args.num_tokens * args.num_chosen;
    assert!(args.num_chosen > 0 && args.num_experts > 0);
    assert!(args.experts.len() >= num_routes && args.indptr.len() > args.num_experts);
    assert!(args.rows.len() >= num_routes && args.routes_of.len() >= num_routes);
    let params = SortParams {
        experts: args.experts.address(),
        indptr: args.indptr.address(),
        rows: args.rows.address(),
        routes_of: args.routes_of.address(),
        num_routes: num_routes as u32,
        num_experts: args.num_experts as u32,
        num_chosen: args.num_chosen as u32,
    };
    // SAFETY: the lengths were checked above.
    unsafe { launch(device, &SORT, [args.num_experts as u32, 1, 1], &params) }
}
