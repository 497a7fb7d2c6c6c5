// Which experts a token goes to and with what weight, then the tokens of each expert: a counting sort without
// atomics, so that an expert's tokens come in their order.
//
// Shapes: scores f32 [tokens, num_experts]. `route` writes experts u32 and weights f32 [tokens, num_chosen],
// experts of a token ascending: the highest scores, the lower expert on ties, as `models/experts.rs` has it.
// `sort_routes` writes indptr u32 [num_experts + 1], rows u32 [routes], the token of each route, by expert
// and then by token, and routes_of u32 [tokens, num_chosen], where each of a token's experts lies in that
// list.
//
// Grid: route has a warp a token, sort_routes a block an expert, which walks all experts of all tokens twice.
// Bytes: 4 a score; 8 a route and expert, from L2. Both are bound by latency.
#include "types.cuh"

namespace {

constexpr int kThreads = 256;
constexpr int kMaxEach = 16;  // experts a lane

struct RouteParams {
  const float* scores;
  uint32_t* experts;
  float* weights;
  uint32_t num_tokens, num_experts, num_chosen, renormalize;
};

struct SortRoutesParams {
  const uint32_t* experts;
  uint32_t *indptr, *rows, *routes_of;
  uint32_t num_routes, num_experts, num_chosen;
};

// Larger for higher scores, and for lower experts on ties; never zero.
__device__ __forceinline__ uint64_t rank_of(float score, uint32_t expert) {
  const uint32_t bits = __float_as_uint(score);
  return (uint64_t)(bits & 0x80000000u ? ~bits : bits | 0x80000000u) << 16 | (0xffff - expert);
}
__device__ __forceinline__ uint32_t expert_of(uint64_t rank) {
  return 0xffff - (uint32_t)(rank & 0xffff);
}

}  // namespace

extern "C" __global__ void __launch_bounds__(kThreads) route(const __grid_constant__ RouteParams p) {
  const uint32_t lane = threadIdx.x % 32, token = blockIdx.x * (kThreads / 32) + threadIdx.x / 32;
  if (token >= p.num_tokens)
    return;
  const float* scores = p.scores + (size_t)token * p.num_experts;
  uint64_t ranks[kMaxEach];
#pragma unroll
  for (int i = 0; i < kMaxEach; i++) {
    const uint32_t expert = lane + i * 32;
    ranks[i] = expert < p.num_experts ? rank_of(scores[expert], expert) : 0;
  }
  // Lane i keeps the i-th highest.
  uint64_t mine = 0, last = ~0ull;
  for (uint32_t chosen = 0; chosen < p.num_chosen; chosen++) {
    uint64_t best = 0;
#pragma unroll
    for (int i = 0; i < kMaxEach; i++)
      if (ranks[i] < last && ranks[i] > best)
        best = ranks[i];
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2)
      best = max(best, __shfl_xor_sync(~0u, best, offset));
    last = best;
    if (lane == chosen)
      mine = best;
  }
  const uint32_t expert = expert_of(mine);
  const bool is_chosen = lane < p.num_chosen;
  const float score = is_chosen ? scores[expert] : 0;
  const float highest = __shfl_sync(~0u, score, 0);
  const float weight = expf(score - highest);
  float total = 0;
  uint32_t place = 0;
  for (uint32_t i = 0; i < p.num_chosen; i++) {
    total += __shfl_sync(~0u, weight, i);
    place += __shfl_sync(~0u, expert, i) < expert;
  }
  if (!p.renormalize) {
    total = 0;
    for (uint32_t other = lane; other < p.num_experts; other += 32)
      total += expf(scores[other] - highest);
    total = warp_sum(total);
  }
  if (is_chosen) {
    p.experts[(size_t)token * p.num_chosen + place] = expert;
    p.weights[(size_t)token * p.num_chosen + place] = weight / total;
  }
}
EMU_KERNEL(route)

extern "C" __global__ void __launch_bounds__(kThreads)
    sort_routes(const __grid_constant__ SortRoutesParams p) {
  DYN_SHARED(uint32_t, counts);  // [warps, 2]: routes of lower experts, and of this one
  constexpr uint32_t kWarps = kThreads / 32;
  const uint32_t expert = blockIdx.x, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  // Each warp has a piece of the routes, all of its lanes the same number of turns.
  const uint32_t turns = (p.num_routes + kThreads - 1) / kThreads;
  const uint32_t begin = warp * turns * 32;
  uint32_t lower = 0, own = 0;
  for (uint32_t turn = 0; turn < turns; turn++) {
    const uint32_t i = begin + turn * 32 + lane;
    const uint32_t other = i < p.num_routes ? p.experts[i] : ~0u;
    lower += __popc(__ballot_sync(~0u, other < expert));
    own += __popc(__ballot_sync(~0u, other == expert));
  }
  if (lane == 0) {
    counts[warp * 2] = lower;
    counts[warp * 2 + 1] = own;
  }
  __syncthreads();
  uint32_t first = 0, before = 0, all = 0;
  for (uint32_t i = 0; i < kWarps; i++) {
    first += counts[i * 2];
    before += i < warp ? counts[i * 2 + 1] : 0;
    all += counts[i * 2 + 1];
  }
  if (threadIdx.x == 0) {
    p.indptr[expert] = first;
    if (expert == p.num_experts - 1)
      p.indptr[p.num_experts] = first + all;
  }
  uint32_t place = first + before;
  for (uint32_t turn = 0; turn < turns; turn++) {
    const uint32_t i = begin + turn * 32 + lane;
    const bool is_own = i < p.num_routes && p.experts[i] == expert;
    const uint32_t owners = __ballot_sync(~0u, is_own);
    if (is_own) {
      const uint32_t mine = place + __popc(owners & ((1u << lane) - 1));
      p.rows[mine] = i / p.num_chosen;
      p.routes_of[i] = mine;
    }
    place += __popc(owners);
  }
}
EMU_KERNEL(sort_routes)
