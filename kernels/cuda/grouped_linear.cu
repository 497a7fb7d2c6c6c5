// Matrix products with the weights of each route's expert: out[route] = weight[expert] x[row of the route].
//
// Shapes: x T [rows, k], weight T [num_experts, n, k], out T [routes, n], bf16 or f16; routes of expert e are
// those from indptr[e] to indptr[e + 1], all on the device; rows_of u32 [routes], or null where route i reads
// row i. k is a multiple of 8.
//
// Grid: (n / 64 rounded up, the most tiles of 64 routes that there can be), the same for any routing; blocks
// beyond the tiles end at once. A tile is of one expert, and each number sums over k in one order, so a
// route's answer depends on nothing else.
//
// Bytes: an expert's weights once for each 64 of its routes, and a row of x for each 64 columns. Few routes
// are bound by the bytes of the weights; many by mma.sync, which does not reach the peak of Hopper's tensor
// cores.
//
// SASS: HMMA LDSM LDGSTS
#include "ptx.cuh"

namespace {

constexpr int kThreads = 128;  // 2 x 2 warps of 32 x 32
constexpr int kTile = 64;      // routes, columns and numbers of k
constexpr int kStages = 3;

template <class T>
struct GroupedLinearParams {
  const T *x, *weight;
  T* out;
  const uint32_t *indptr, *rows_of;
  uint32_t num_experts, n, k;
};

// Rows of 128 bytes, whose pieces of 16 are swizzled by the row.
template <class T>
struct Stage {
  T x[kTile * kTile], weight[kTile * kTile];
};

// Which expert's routes a block has, from `first` on; no expert is ~0.
struct Tile {
  uint32_t expert, first;
};

// As much as blocks have unasked.
template <class T>
union Shared {
  Stage<T> stages[kStages];
  struct {
    Tile tile;
    uint32_t parts[kThreads / 32];
  };
};

template <class T>
__device__ __forceinline__ T* piece(T* tile, uint32_t row, uint32_t column) {
  return tile + row * kTile + ((column ^ (row & 7)) * 8);
}

// Counts the tiles of all experts before this block's; the same in every thread.
template <class T>
__device__ Tile find_tile(const GroupedLinearParams<T>& p, Shared<T>& shared) {
  const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  uint32_t tiles_before = 0;
  if (threadIdx.x == 0)
    shared.tile.expert = ~0u;
  for (uint32_t start = 0; start < p.num_experts; start += kThreads) {
    const uint32_t expert = start + threadIdx.x;
    const bool is_expert = expert < p.num_experts;
    const uint32_t begin = is_expert ? p.indptr[expert] : 0, end = is_expert ? p.indptr[expert + 1] : 0;
    const uint32_t tiles = (end - begin + kTile - 1) / kTile;
    uint32_t through = tiles;
#pragma unroll
    for (int offset = 1; offset < 32; offset *= 2) {
      const uint32_t others = __shfl_sync(~0u, through, lane - offset);
      through += lane >= offset ? others : 0;
    }
    __syncthreads();  // the parts before are read
    if (lane == 31)
      shared.parts[warp] = through;
    __syncthreads();
    for (uint32_t i = 0; i < kThreads / 32; i++) {
      through += i < warp ? shared.parts[i] : 0;
    }
    const uint32_t low = tiles_before + through - tiles;
    if (blockIdx.y >= low && blockIdx.y < low + tiles)
      shared.tile = {expert, begin + (blockIdx.y - low) * kTile};
    for (uint32_t i = 0; i < kThreads / 32; i++)
      tiles_before += shared.parts[i];
  }
  __syncthreads();
  const Tile tile = shared.tile;
  __syncthreads();  // it is read, its place is a stage's
  return tile;
}

template <class T>
__device__ __forceinline__ void grouped_linear(const GroupedLinearParams<T>& p) {
  DYN_SHARED(Shared<T>, shared);
  const Tile tile = find_tile(p, *shared);
  if (tile.expert == ~0u)
    return;
  const uint32_t first = tile.first, end = p.indptr[tile.expert + 1];
  const uint32_t first_column = blockIdx.x * kTile;
  const T* weight = p.weight + (size_t)tile.expert * p.n * p.k;
  // A thread copies the same piece of 16 bytes of every 16th row.
  const uint32_t column = threadIdx.x % 8;
  const T* x_rows[4];
  const T* weight_rows[4];
  bool has_x[4], has_weight[4];
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const uint32_t row = threadIdx.x / 8 + i * 16;
    has_x[i] = first + row < end;
    has_weight[i] = first_column + row < p.n;
    const uint32_t route = has_x[i] ? first + row : first;
    x_rows[i] = p.x + (size_t)(p.rows_of ? p.rows_of[route] : route) * p.k + column * 8;
    weight_rows[i] = weight + (size_t)(has_weight[i] ? first_column + row : 0) * p.k + column * 8;
  }
  const uint32_t steps = (p.k + kTile - 1) / kTile;
  auto load = [&](uint32_t step) {
    if (step < steps) {
      Stage<T>& stage = shared->stages[step % kStages];
      const bool has_k = step * kTile + column * 8 < p.k;
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const uint32_t row = threadIdx.x / 8 + i * 16;
        cp_async16(piece(stage.x, row, column), x_rows[i] + step * kTile, has_x[i] && has_k);
        cp_async16(piece(stage.weight, row, column), weight_rows[i] + step * kTile, has_weight[i] && has_k);
      }
    }
    cp_async_commit();
  };
  const uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const uint32_t warp_row = warp / 2 * 32, warp_column = warp % 2 * 32;
  float sums[2][4][4] = {};
  for (uint32_t step = 0; step < kStages - 1; step++)
    load(step);
  for (uint32_t step = 0; step < steps; step++) {
    cp_async_wait<kStages - 2>();
    __syncthreads();  // this step is loaded by all, and the one before is read by all
    load(step + kStages - 1);
    Stage<T>& stage = shared->stages[step % kStages];
#pragma unroll
    for (uint32_t k = 0; k < kTile / 16; k++) {
      uint32_t a[2][4], b[2][4];
#pragma unroll
      for (int i = 0; i < 2; i++) {
        ldmatrix_x4<false>(a[i], piece(stage.x, warp_row + i * 16 + lane % 16, k * 2 + lane / 16));
        ldmatrix_x4<false>(
            b[i], piece(stage.weight, warp_column + i * 16 + lane / 16 * 8 + lane % 8, k * 2 + lane / 8 % 2));
      }
#pragma unroll
      for (int i = 0; i < 2; i++)
#pragma unroll
        for (int j = 0; j < 4; j++)
          mma<T>(sums[i][j], a[i], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
    }
  }
  cp_async_wait<0>();
#pragma unroll
  for (int i = 0; i < 2; i++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const uint32_t route = first + warp_row + i * 16 + half * 8 + lane / 4;
      if (route >= end)
        continue;
#pragma unroll
      for (int j = 0; j < 4; j++) {
        const uint32_t n = first_column + warp_column + j * 8 + lane % 4 * 2;
        T* out = p.out + (size_t)route * p.n + n;
        if (n < p.n)
          out[0] = from_float<T>(sums[i][j][half * 2]);
        if (n + 1 < p.n)
          out[1] = from_float<T>(sums[i][j][half * 2 + 1]);
      }
    }
}

}  // namespace

KERNELS(grouped_linear, GroupedLinearParams, kThreads)
