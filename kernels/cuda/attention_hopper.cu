// The same as attention.cu for tiles of up to 128 rows of a prefill chunk, on sm_90a: TMA and wgmma.
//
// Shapes: see AttentionParams; keys and values of T, D 64 or 128. Pages divide 128 keys or are made of them.
// Grid: a block a tile and head of keys and values; 384 threads: two warpgroups of 64 rows, and one of which
// a warp copies. A step is 128 keys. The copying warp fills two stages of keys and two of values, each lane a
// page. A warpgroup keeps one product ahead: while it makes weights of the scores of this step, the tensor
// cores multiply the values of the step before and the other warpgroup's scores.
//
// FLOPs: 4 * D a row and key. Bytes of a step: 128 * 2 * D numbers for 128 rows, 128 FLOPs a byte out of the
// second level cache, which 132 multiprocessors at 3.3 TB/s allow 800 of: bound by the tensor cores, and, as
// exponentials come 16 a clock, at D 64 by these: 128 * 128 take 1024 clocks, as long as the products at 4096
// FLOPs a clock. At D 128 products take 2048. The class of FlashAttention-3, which reaches three quarters of
// the peak.
//
// SASS: HGMMA UTMALDG LDGSTS
#include "attention.cuh"
#include "hopper.cuh"

namespace {

constexpr int kKeys = 128, kStages = 2, kConsumers = 256, kThreads = kConsumers + 128;

template <class T>
struct AttentionHopperParams {
  TmaMap map;  // of `kv` as a matrix [page * 2 * kv head * slot, D]
  AttentionParams<T> a;
  uint32_t box_rows;  // min(page size, 128)
};

// D numbers a row as blocks of 64 columns, in the swizzle of 128 bytes.
constexpr int kBlock = kKeys * 128;

template <int D>
struct Stages {
  char *query, *keys, *values;
  uint64_t *keys_full, *keys_empty, *values_full, *values_empty;

  __device__ explicit Stages(char* shared) {
    constexpr int kBytes = kKeys * D * 2;
    query = shared;
    keys = query + kBytes;
    values = keys + kStages * kBytes;
    keys_full = (uint64_t*)(values + kStages * kBytes);
    keys_empty = keys_full + kStages;
    values_full = keys_empty + kStages;
    values_empty = values_full + kStages;
  }
};

// Copies keys or values of a step, each lane a page or the part of one.
template <int D, class T>
__device__ __forceinline__ void copy_step(const AttentionHopperParams<T>& p, const AttentionTile& t,
                                          uint32_t head, uint32_t is_value, int k, char* to, uint64_t* full) {
  const uint32_t lane = threadIdx.x % 32, left = min(t.k1 - k, kKeys);
  const uint32_t boxes = (left + p.box_rows - 1) / p.box_rows;
  if (lane == 0)
    mbar_arrive(full, boxes * p.box_rows * D * 2);
  __syncwarp();
  if (lane >= boxes)
    return;
  const uint32_t position = k + lane * p.box_rows;
  uint32_t index = position >> p.a.page_shift;
  if (PLANTED(wrong_page))
    index -= index > 0;
  const uint32_t page = p.a.pages[t.pages + index];
  const uint32_t row = (((page * 2 + is_value) * p.a.num_kv_heads + head) << p.a.page_shift) +
                       (position & ((1u << p.a.page_shift) - 1));
#pragma unroll
  for (int block = 0; block < D / 64; block++)
    tma_load_2d(to + block * kBlock + lane * p.box_rows * 128, &p.map, full, block * 64, row);
}

template <int D, class T>
__device__ __forceinline__ void copy_all(const AttentionHopperParams<T>& p, const AttentionTile& t,
                                         uint32_t head, const Stages<D>& stages, int k) {
  for (int i = 0; k < t.k1; k += kKeys, i++) {
    const int s = i % kStages, parity = i / kStages % 2 ^ 1;
    mbar_wait(stages.keys_empty + s, parity);
    copy_step<D>(p, t, head, 0, k, stages.keys + s * kKeys * D * 2, stages.keys_full + s);
    mbar_wait(stages.values_empty + s, parity);
    copy_step<D>(p, t, head, 1, k, stages.values + s * kKeys * D * 2, stages.values_full + s);
  }
}

// This warp has read a stage.
__device__ __forceinline__ void release(uint64_t* empty) {
  __syncwarp();
  if (threadIdx.x % 32 == 0)
    mbar_arrive(empty);
}

// Begins scores = query * keys.
template <int D, class T>
__device__ __forceinline__ void begin_scores(float (&c)[kKeys / 8][4], const char* query, const char* keys) {
  wgmma_hold(c);
  wgmma_fence();
#pragma unroll
  for (int d = 0; d < D / 16; d++)
    wgmma_64x128<T>(c, smem_desc(query + d / 4 * kBlock + d % 4 * 32, 16, 1024),
                    smem_desc(keys + d / 4 * kBlock + d % 4 * 32, 16, 1024), d > 0);
  wgmma_commit();
}

// Begins o += weights * values.
template <int D, class T>
__device__ __forceinline__ void begin_values(float (&o)[D / 8][4], uint32_t (&weights)[kKeys / 16][4],
                                             const char* values) {
  wgmma_hold(o);
  wgmma_hold(weights);
  wgmma_fence();
#pragma unroll
  for (int n = 0; n < kKeys / 16; n++)
    wgmma_add<T>(o, weights[n], smem_desc(values + n * 2048, kBlock, 1024));
  wgmma_commit();
}

template <class T>
__device__ __forceinline__ void pack_weights(uint32_t (&weights)[kKeys / 16][4],
                                             const float (&c)[kKeys / 8][4]) {
#pragma unroll
  for (int n = 0; n < kKeys / 16; n++)
#pragma unroll
    for (int i = 0; i < 4; i++)
      weights[n][i] = pack<T>(c[2 * n + i / 2][i % 2 * 2], c[2 * n + i / 2][i % 2 * 2 + 1]);
}

// Rows of values behind the end may be anything, also NaN; their weights are zero. Both warpgroups do this.
template <int D>
__device__ __forceinline__ void clear_behind(char* values, int first, uint32_t group) {
  for (uint32_t i = threadIdx.x % 128; i < (kKeys - first) * (D / 8); i += 128) {
    const uint32_t row = first + i / (D / 8), chunk = i % (D / 8);
    *(uint4*)(values + chunk / 8 * kBlock + row * 128 + chunk % 8 * 16) = make_uint4(0, 0, 0, 0);
  }
  fence_async_shared();
  named_barrier(1 + group, 128);
}

template <int D, class T>
__device__ __forceinline__ void attend(const AttentionParams<T>& p, const AttentionTile& t, uint32_t head,
                                       const Stages<D>& stages, int k) {
  const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = warp / 4;
  for (uint32_t i = threadIdx.x % 128; i < 64 * (D / 8); i += 128) {
    const uint32_t row = group * 64 + i / (D / 8), chunk = i % (D / 8);
    const AttentionRow from = attention_row(p, t, head, row, D);
    cp_async16(stages.query + chunk / 8 * kBlock + row * 128 + (chunk % 8 ^ (row & 7)) * 16,
               p.query + from.out + chunk * 8, from.ok);
  }
  cp_async_commit();
  AttentionRow rows[2];
#pragma unroll
  for (int r = 0; r < 2; r++)
    rows[r] = attention_row(p, t, head, warp * 16 + lane / 4 + r * 8, D);
  cp_async_wait<0>();
  fence_async_shared();
  named_barrier(1 + group, 128);  // the queries of this warpgroup are here

  const char* query = stages.query + group * 64 * 128;
  float o[D / 8][4] = {}, c[kKeys / 8][4];
  float max[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0}, keep[2];
  uint32_t weights[kKeys / 16][4];
  mbar_wait(stages.keys_full, 0);
  begin_scores<D, T>(c, query, stages.keys);
  wgmma_wait<0>();
  wgmma_hold(c);
  release(stages.keys_empty);
  weigh_scores<kKeys>(c, rows, k, p.scale_log2, max, sum, keep);
  pack_weights<T>(weights, c);
  int i = 1;
  for (k += kKeys; k < t.k1; k += kKeys, i++) {
    const int s = i % kStages, before = (i - 1) % kStages;
    mbar_wait(stages.keys_full + s, i / kStages % 2);
    begin_scores<D, T>(c, query, stages.keys + s * kKeys * D * 2);
    mbar_wait(stages.values_full + before, (i - 1) / kStages % 2);
    begin_values<D, T>(o, weights, stages.values + before * kKeys * D * 2);
    wgmma_wait<1>();
    wgmma_hold(c);
    release(stages.keys_empty + s);
    weigh_scores<kKeys>(c, rows, k, p.scale_log2, max, sum, keep);
    // Long done, and so until the values are released: without a branch here ptxas waits for the products
    // before it makes weights.
    mbar_wait(stages.values_full + before, (i - 1) / kStages % 2);
    wgmma_wait<0>();
    wgmma_hold(o);
    wgmma_hold(weights);
    wgmma_hold(c);
    release(stages.values_empty + before);
#pragma unroll
    for (int n = 0; n < D / 8; n++)
#pragma unroll
      for (int j = 0; j < 4; j++)
        o[n][j] *= keep[j / 2];
    pack_weights<T>(weights, c);
  }
  const int last = (i - 1) % kStages;
  mbar_wait(stages.values_full + last, (i - 1) / kStages % 2);
  if (k > t.k1)
    clear_behind<D>(stages.values + last * kKeys * D * 2, t.k1 - (k - kKeys), group);
  begin_values<D, T>(o, weights, stages.values + last * kKeys * D * 2);
  wgmma_wait<0>();
  wgmma_hold(o);
#pragma unroll
  for (int r = 0; r < 2; r++) {
    sum[r] += __shfl_xor_sync(~0u, sum[r], 1);
    sum[r] += __shfl_xor_sync(~0u, sum[r], 2);
    if (!rows[r].ok)
      continue;
    const float inverse = reciprocal(sum[r]);
    T* out = p.out + rows[r].out + lane % 4 * 2;
#pragma unroll
    for (int n = 0; n < D / 8; n++)
      *(uint32_t*)(out + n * 8) = pack<T>(o[n][r * 2] * inverse, o[n][r * 2 + 1] * inverse);
  }
}

template <int D, class T>
__device__ __forceinline__ void attention(const AttentionHopperParams<T>& p) {
  DYN_SHARED(char, shared);
  const uint32_t tile = blockIdx.x / p.a.num_kv_heads, head = blockIdx.x % p.a.num_kv_heads;
  if (tile >= *p.a.num_tiles)
    return;
  const AttentionTile t = p.a.tiles[tile];
  const Stages<D> stages(shared);
  if (threadIdx.x == 0)
    for (int s = 0; s < kStages; s++) {
      mbar_init(stages.keys_full + s, 1);
      mbar_init(stages.values_full + s, 1);
      mbar_init(stages.keys_empty + s, kConsumers / 32);
      mbar_init(stages.values_empty + s, kConsumers / 32);
    }
  __syncthreads();  // the barriers of the stages are there
  const int k = first_key(p.a, t, kKeys);
  if (threadIdx.x >= kConsumers) {
    give_registers<24>();
    if (threadIdx.x < kConsumers + 32)
      copy_all<D>(p, t, head, stages, k);
  } else {
    take_registers<240>();
    attend<D>(p.a, t, head, stages, k);
  }
}

}  // namespace

// Nothing but sm_90a can run it; other builds may have it all the same.
#if !defined(__CUDACC__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define ATTEND(D) attention<D>(p)
#else
#define ATTEND(D)
#endif

#define ATTENTION(D, T)                                                                \
  extern "C" __global__ void __launch_bounds__(kThreads, 1)                            \
      attention_hopper_##D##_##T(const __grid_constant__ AttentionHopperParams<T> p) { \
    ATTEND(D);                                                                         \
  }                                                                                    \
  EMU_KERNEL(attention_hopper_##D##_##T)

ATTENTION(64, bf16)
ATTENTION(128, bf16)
ATTENTION(64, f16)
ATTENTION(128, f16)
