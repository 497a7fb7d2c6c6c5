// Causal attention of a ragged batch over paged keys and values: prefill chunks and decodes in one launch,
// from a work list that is the same for all layers.
//
//   out[row] = sum over k of softmax(scale * query[row] . key[k]) * value[k],  low(row) <= k <= position(row)
//
// Shapes: see AttentionParams; keys and values of T or e4m3, D 64, 128 or 256. Grid: a block a tile and head
// of keys and values, capacity * kv heads; 128 threads. A tile of up to 64 rows gives each warp 16 of them
// and all keys. One of up to 16 rows (decodes) gives each warp a quarter of the keys for the scores, which
// all warps then read, and a quarter of the dimensions of the values. Both take the same keys in the same
// order, so a row's bits are the same in either; they depend on its position, on k0 and `split`, and on
// nothing else of the batch.
//
// Bytes of a tile: (k1 - k0) * 2 * D numbers once, whatever the number of rows, two steps of 64 keys on the
// way: 64 KiB a multiprocessor in flight at D 128, where 36 bytes a nanosecond with 700 ns of latency ask for
// 25 KiB. FLOPs: 4 * D a row and key. Decodes (up to 16 rows) are bound by memory; tiles of 64 rows by
// reading shared memory, 32 KiB for 0.5 MFLOP a warp, which is as long as the products take: the class of
// FlashAttention-2. Keys of e4m3 are copied as they are and widened by the thread that copied them.
//
// SASS: HMMA LDSM LDGSTS
#include "attention.cuh"

namespace {

constexpr int kThreads = 128;

template <int D>
constexpr int kKeys = D == 256 ? 32 : 64;  // of a step; as many as registers hold

// Rows of D numbers in shared memory, 16 bytes at a time, so that neither rows nor columns meet in a bank.
// The piece is `even` + `odd`, an even number that is known and 0 or 1, of which only the last bits make
// work.
template <int D, class T>
__device__ __forceinline__ T* at(T* tile, uint32_t row, uint32_t even, uint32_t odd) {
  return tile + row * D + even / 8 * 64 + ((even % 8 + odd) ^ (row & 7)) * 8;
}
template <int D, class T>
__device__ __forceinline__ T* at(T* tile, uint32_t row, uint32_t chunk) {
  return tile + row * D + (chunk ^ (row & 7)) * 8;
}

// Where the keys of one head begin for each position; values lie `to_values` numbers behind.
template <class Number>
struct Pages {
  const Number* kv;
  const uint32_t* pages;
  uint32_t num_kv_heads, head, shift;
  int end;

  template <int D>
  __device__ __forceinline__ const Number* key(int position) const {
    uint32_t index = (uint32_t)position >> shift;
    if (PLANTED(wrong_page))
      index -= index > 0;
    const size_t page = position < end ? pages[index] : 0;
    const uint32_t slot = (uint32_t)position & ((1u << shift) - 1);
    return kv + (((page * 2 * num_kv_heads + head) << shift) + slot) * D;
  }
  template <int D>
  __device__ __forceinline__ size_t to_values() const {
    return ((size_t)num_kv_heads << shift) * D;
  }
};

// How the threads deal with kCount rows of kChunks pieces of 16 bytes: always the same piece of a row, so
// that most of an address is found once.
template <int kCount, int kChunks>
struct Pass {
  static constexpr int kRows = kThreads / kChunks, kTimes = kCount / kRows;
  uint32_t row = threadIdx.x / kChunks, chunk = threadIdx.x % kChunks;
};

// Begins to copy the keys from k on, and their values; zeros behind the end.
template <int D, class T>
__device__ __forceinline__ void copy_step(const Pages<T>& pages, T* stage, char*, int k) {
  const Pass<kKeys<D>, D / 8> pass;
#pragma unroll
  for (int j = 0; j < pass.kTimes; j++) {
    const int row = j * pass.kRows + pass.row;
    const bool ok = k + row < pages.end;
    const T* from = pages.template key<D>(k + row) + pass.chunk * 8;
    cp_async16(at<D>(stage, row, pass.chunk), from, ok);
    cp_async16(at<D>(stage + kKeys<D> * D, row, pass.chunk), from + pages.template to_values<D>(), ok);
  }
}

template <int D, class T>
__device__ __forceinline__ void copy_step(const Pages<e4m3>& pages, T*, char* raw, int k) {
  const Pass<kKeys<D>, D / 16> pass;
#pragma unroll
  for (int j = 0; j < pass.kTimes; j++) {
    const int row = j * pass.kRows + pass.row;
    const bool ok = k + row < pages.end;
    const e4m3* from = pages.key<D>(k + row) + pass.chunk * 16;
    cp_async16(raw + row * D + pass.chunk * 16, from, ok);
    cp_async16(raw + (kKeys<D> + row) * D + pass.chunk * 16, from + pages.to_values<D>(), ok);
  }
}

// Makes T of what this thread copied.
template <int D, class T>
__device__ __forceinline__ void widen_step(const char* raw, T* stage) {
  const Pass<2 * kKeys<D>, D / 16> pass;
#pragma unroll 2
  for (int j = 0; j < pass.kTimes; j++) {
    const int row = j * pass.kRows + pass.row;
    const uint4 from = *(const uint4*)(raw + row * D + pass.chunk * 16);
    const uint2 a = widen_e4m3<T>(from.x), b = widen_e4m3<T>(from.y), c = widen_e4m3<T>(from.z),
                d = widen_e4m3<T>(from.w);
    *(uint4*)at<D>(stage, row, pass.chunk * 2) = make_uint4(a.x, a.y, b.x, b.y);
    *(uint4*)at<D>(stage, row, pass.chunk * 2 + 1) = make_uint4(c.x, c.y, d.x, d.y);
  }
}

// Scores of 16 rows with kCount keys from `first` on, not yet scaled.
template <int D, int kCount, bool kHold, class T>
__device__ __forceinline__ void multiply_keys(float (&c)[kCount / 8][4],
                                              const uint32_t (&held)[kHold ? D / 16 : 1][4], T* query,
                                              int row0, T* keys, int first) {
  const uint32_t lane = threadIdx.x % 32;
#pragma unroll(kHold ? D / 16 : 4)
  for (int d = 0; d < D / 16; d += kCount == 8 ? 2 : 1) {
    uint32_t a[2][4], b[4];
#pragma unroll
    for (int e = 0; e < (kCount == 8 ? 2 : 1); e++)
      if (kHold)
        for (int i = 0; i < 4; i++)
          a[e][i] = held[kHold ? d + e : 0][i];
      else
        ldmatrix_x4<false>(a[e], at<D>(query, row0 + lane % 16, (d + e) * 2, lane / 16));
    if (kCount == 8) {  // 8 keys, 32 dimensions
      ldmatrix_x4<false>(b, at<D>(keys, first + lane % 8, d * 2, lane / 8));
      mma<T>(c[0], a[0], b[0], b[1]);
      mma<T>(c[0], a[1], b[2], b[3]);
    } else {  // 16 keys, 16 dimensions
#pragma unroll
      for (int n = 0; n < kCount / 16; n++) {
        ldmatrix_x4<false>(b, at<D>(keys, first + n * 16 + lane % 8 + lane / 16 * 8, d * 2, lane / 8 % 2));
        mma<T>(c[2 * n], a[0], b[0], b[1]);
        mma<T>(c[2 * n + 1], a[0], b[2], b[3]);
      }
    }
  }
}

// Two rows of a thread (lane / 4 and that + 8) while it goes along the keys.
template <int kDims>
struct Running {
  float o[kDims / 8][4] = {};
  float max[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0};

  // Makes weights of the scores of keys from k on, and brings what was summed to the same base.
  template <int kCount>
  __device__ __forceinline__ void weigh(float (&c)[kCount / 8][4], const AttentionRow (&rows)[2], int k,
                                        float scale) {
    float keep[2];
    weigh_scores<kCount>(c, rows, k, scale, max, sum, keep);
#pragma unroll
    for (int n = 0; n < kDims / 8; n++)
#pragma unroll
      for (int i = 0; i < 4; i++)
        o[n][i] *= keep[i / 2];
  }

  // Adds the weighted values, dimensions from `dim0` on.
  template <int D, int kCount, class T>
  __device__ __forceinline__ void add_values(const float (&c)[kCount / 8][4], T* values, int dim0) {
    const uint32_t lane = threadIdx.x % 32;
#pragma unroll
    for (int n = 0; n < kCount / 16; n++) {
      const float *left = c[2 * n], *right = c[2 * n + 1];
      const uint32_t a[4] = {pack<T>(left[0], left[1]), pack<T>(left[2], left[3]),
                             pack<T>(right[0], right[1]), pack<T>(right[2], right[3])};
#pragma unroll
      for (int d = 0; d < kDims / 16; d++) {
        uint32_t b[4];
        ldmatrix_x4<true>(b, at<D>(values, n * 16 + lane % 16, d * 2, dim0 / 8 + lane / 16));
        mma<T>(o[2 * d], a, b[0], b[1]);
        mma<T>(o[2 * d + 1], a, b[2], b[3]);
      }
    }
  }
};

// Writes what two rows of a thread, `row` and that + 8, have summed over a part of their keys.
template <int D, int kDims, class T>
__device__ __forceinline__ void end_part(const AttentionParams<T>& p, const AttentionTile& t, uint32_t head,
                                         const AttentionRow (&rows)[2], const Running<kDims>& run,
                                         MergedParts (&merged)[2], uint32_t row, uint32_t dim0, bool last) {
  const uint32_t lane = threadIdx.x % 32;
#pragma unroll
  for (int r = 0; r < 2; r++) {
    float sum = run.sum[r];
    sum += __shfl_xor_sync(~0u, sum, 1);
    sum += __shfl_xor_sync(~0u, sum, 2);
    if (!rows[r].ok)
      continue;
    const float inverse = sum == 0 ? 0 : reciprocal(sum);
    const float lse = sum == 0 ? -INFINITY : fmaf(run.max[r], p.scale_log2, log2f(sum));
    const size_t part = (size_t)(t.part + row + r * 8) * p.num_kv_heads + head;
    float* part_out = p.part_out + part * D + dim0 + lane % 4 * 2;
    T* out = p.out + rows[r].out + dim0 + lane % 4 * 2;
    if (t.part < 0) {
#pragma unroll
      for (int n = 0; n < kDims / 8; n++)
        *(uint32_t*)(out + n * 8) = pack<T>(run.o[n][r * 2] * inverse, run.o[n][r * 2 + 1] * inverse);
    } else if (!t.split) {
      if (dim0 == 0 && lane % 4 == 0)
        p.part_lse[part] = lse;
#pragma unroll
      for (int n = 0; n < kDims / 8; n++)
        *(float2*)(part_out + n * 8) = make_float2(run.o[n][r * 2] * inverse, run.o[n][r * 2 + 1] * inverse);
    } else {
      // This thread alone reads and writes these numbers.
      const bool some = merged[r].max != -INFINITY;
      float keep = 1, add = 0;
      if (sum != 0)
        merge_part(merged[r], lse, keep, add);
      const float whole = last ? reciprocal(merged[r].sum) : 1;
#pragma unroll
      for (int n = 0; n < kDims / 8; n++) {
        float2 x = some ? *(const float2*)(part_out + n * 8) : make_float2(0, 0);
        x.x = merge_value(x.x, keep, add, run.o[n][r * 2] * inverse);
        x.y = merge_value(x.y, keep, add, run.o[n][r * 2 + 1] * inverse);
        if (last)
          *(uint32_t*)(out + n * 8) = pack<T>(x.x * whole, x.y * whole);
        else
          *(float2*)(part_out + n * 8) = x;
      }
    }
  }
}

template <int D, int kRows, class T>
__device__ __forceinline__ void copy_queries(const AttentionParams<T>& p, const AttentionTile& t,
                                             uint32_t head, T* query) {
  const Pass<kRows, D / 8> pass;
#pragma unroll 1
  for (int j = 0; j < pass.kTimes; j++) {
    const uint32_t row = j * pass.kRows + pass.row;
    const AttentionRow from = attention_row(p, t, head, row, D);
    cp_async16(at<D>(query, row, pass.chunk), p.query + from.out + pass.chunk * 8, from.ok);
  }
}

// Warps that have the same rows give each other the scores of their keys. `scores` is where this thread's two
// rows and columns begin.
template <int kAll, int kCount>
__device__ __forceinline__ void share_scores(float (&c)[kAll / 8][4], const float (&mine)[kCount / 8][4],
                                             float* scores, uint32_t first) {
  constexpr int kStride = kAll + 8;
#pragma unroll
  for (int i = 0; i < kCount / 4; i++)
    *(float2*)(scores + i % 2 * 8 * kStride + first + i / 2 * 8) =
        make_float2(mine[i / 2][i % 2 * 2], mine[i / 2][i % 2 * 2 + 1]);
  __syncthreads();  // the scores of all warps are here
#pragma unroll
  for (int i = 0; i < kAll / 4; i++) {
    const float2 pair = *(const float2*)(scores + i % 2 * 8 * kStride + i / 2 * 8);
    c[i / 2][i % 2 * 2] = pair.x;
    c[i / 2][i % 2 * 2 + 1] = pair.y;
  }
}

template <int D, class Number, int kRows, class T>
__device__ __forceinline__ void attend(const AttentionParams<T>& p, const AttentionTile& t, uint32_t head,
                                       char* shared) {
  constexpr uint32_t kSharers = 64 / kRows;  // warps that have the same rows
  constexpr int kCount = kKeys<D> / kSharers, kDims = D / kSharers, kStride = kKeys<D> + 8;
  constexpr bool kHold = D <= 128, kWide = sizeof(Number) == 2;
  T* stages = (T*)shared;
  char* raw = (char*)(stages + 4 * kKeys<D> * D);
  T* query = (T*)(raw + (kWide ? 0 : 2 * kKeys<D> * D));
  const uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const uint32_t share = warp % kSharers, row0 = warp / kSharers * 16, dim0 = share * kDims;
  // [kRows, kStride], where warps share rows: so that pairs do not meet in a bank.
  float* scores = (float*)(query + kRows * D) + (row0 + lane / 4) * kStride + lane % 4 * 2;

  AttentionRow rows[2];
#pragma unroll
  for (int r = 0; r < 2; r++)
    rows[r] = attention_row(p, t, head, row0 + lane / 4 + r * 8, D);
  const Pages<Number> pages = {
      (const Number*)p.kv, p.pages + t.pages, p.num_kv_heads, head, p.page_shift, t.k1};

  int k = first_key(p, t, kKeys<D>);
  if (k >= t.k1) {  // all before the window
    if (share == 0 && lane % 4 == 0)
      for (int r = 0; r < 2; r++)
        if (rows[r].ok)
          p.part_lse[(size_t)(t.part + row0 + lane / 4 + r * 8) * p.num_kv_heads + head] = -INFINITY;
    return;
  }
  copy_queries<D, kRows>(p, t, head, query);
  copy_step<D>(pages, stages, raw, k);
  cp_async_commit();

  Running<kDims> run;
  MergedParts merged[2] = {{-INFINITY, 0}, {-INFINITY, 0}};
  uint32_t held[kHold ? D / 16 : 1][4];
  bool first = true;
  for (int s = 0; k < t.k1; s ^= 1) {
    T *keys = stages + s * 2 * kKeys<D> * D, *values = keys + kKeys<D> * D;
    cp_async_wait<0>();
    if (!kWide)
      widen_step<D>(raw, keys);
    __syncthreads();  // this step is here, and the stage of the step before is free
    if (k + kKeys<D> < t.k1) {
      copy_step<D>(pages, stages + (s ^ 1) * 2 * kKeys<D> * D, raw, k + kKeys<D>);
      cp_async_commit();
    }
    if (kHold && first) {
#pragma unroll
      for (int d = 0; d < (kHold ? D / 16 : 1); d++)
        ldmatrix_x4<false>(held[d], at<D>(query, row0 + lane % 16, d * 2, lane / 16));
    }
    first = false;

    float c[kKeys<D> / 8][4] = {};
    if (kSharers == 1) {
      multiply_keys<D, kKeys<D>, kHold>(c, held, query, row0, keys, 0);
    } else {
      float mine[kCount / 8][4] = {};
      multiply_keys<D, kCount, kHold>(mine, held, query, row0, keys, share * kCount);
      share_scores<kKeys<D>, kCount>(c, mine, scores, share * kCount);
    }
    run.template weigh<kKeys<D>>(c, rows, k, p.scale_log2);
    run.template add_values<D, kKeys<D>>(c, values, dim0);
    k += kKeys<D>;

    // The end of the tile, or of a part of it.
    const bool last = k >= t.k1;
    if (!last && (!t.split || k % t.split))
      continue;
    end_part<D>(p, t, head, rows, run, merged, row0 + lane / 4, dim0, last);
    run = Running<kDims>();
  }
}

template <int D, class Number, class T>
__device__ __forceinline__ void attention(const AttentionParams<T>& p) {
  DYN_SHARED(char, shared);
  const uint32_t tile = blockIdx.x / p.num_kv_heads, head = blockIdx.x % p.num_kv_heads;
  if (tile >= *p.num_tiles)
    return;
  const AttentionTile t = p.tiles[tile];
  if (t.num_rows <= 16)
    attend<D, Number, 16>(p, t, head, shared);
  else
    attend<D, Number, D == 256 ? 32 : 64>(p, t, head, shared);
}

}  // namespace

#define ATTENTION(kind, D, Number, T)                                  \
  extern "C" __global__ void __launch_bounds__(kThreads)               \
      attention_##kind(const __grid_constant__ AttentionParams<T> p) { \
    attention<D, Number>(p);                                           \
  }                                                                    \
  EMU_KERNEL(attention_##kind)
#define ATTENTIONS(D, T)      \
  ATTENTION(D##_##T, D, T, T) \
  ATTENTION(D##_e4m3_##T, D, e4m3, T)

ATTENTIONS(64, bf16)
ATTENTIONS(128, bf16)
ATTENTIONS(256, bf16)
ATTENTIONS(64, f16)
ATTENTIONS(128, f16)
ATTENTIONS(256, f16)
