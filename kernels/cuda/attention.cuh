// What the kernels of attention share: the work list, its rows, and how parts of a row are put together.
//
// A row is a query head of a token; the rows of one head of keys and values are packed, token by token, in
// the order of `tokens`. A tile is some of these rows against keys [k0, k1) of a list of pages.
#pragma once
#include "ptx.cuh"

namespace {

struct __align__(16) AttentionTile {
  uint32_t row0, num_rows;  // packed rows; several sequences where they share the pages
  int k0, k1;               // k0 is a multiple of 64
  int part;                 // first row of the partial results, or -1: the rows end here
  uint32_t pages;           // where the page list begins
  int min_position;         // no row is before it
  int split;                // 0, or: merged in place at multiples of this, and written out at the end
};

// The parts of a token's rows in the order of their keys: those shared with other sequences, then its own.
struct __align__(16) AttentionMerge {
  uint32_t token;
  uint32_t shared, shared_stride, num_shared;  // row of the first head in the first part; to the next part
  uint32_t own, own_stride, num_own;
  uint32_t unused;
};

// T is bf16 or f16.
template <class T>
struct AttentionParams {
  const T* query;   // [tokens, heads, D]
  const void* kv;   // [page][2][kv head][slot][D], T or e4m3
  T* out;           // [tokens, heads, D]
  float* part_out;  // [part rows, kv heads, D]
  float* part_lse;  // [part rows, kv heads], log2 of the sum of exponentials, -inf where no key was seen
  const uint32_t* positions;
  const uint32_t* num_tiles;  // blocks beyond it return
  const AttentionTile* tiles;
  const uint32_t *tokens, *pages;
  uint32_t num_kv_heads, group_len, page_shift;
  int window;        // 0: all keys
  float scale_log2;  // of scores, times log2(e)
};

// A row of a tile as one thread sees it.
struct AttentionRow {
  size_t out;      // where its numbers begin in `query` and `out`
  int low, limit;  // keys that it sees; none where the tile has no such row
  bool ok;
};

template <class T>
__device__ __forceinline__ AttentionRow attention_row(const AttentionParams<T>& p, const AttentionTile& t,
                                                      uint32_t head, uint32_t row, uint32_t dim) {
  AttentionRow a = {0, 0, 0, row < t.num_rows};
  if (!a.ok)
    return a;
  const uint32_t packed = t.row0 + row, token = p.tokens[packed / p.group_len];
  a.out = ((size_t)(token * p.num_kv_heads + head) * p.group_len + packed % p.group_len) * dim;
  const int end = (int)p.positions[token] + (PLANTED(causal_off_by_one) ? 2 : 1);
  a.low = p.window ? max(end - p.window, 0) : 0;
  a.limit = min(end, t.k1);
  return a;
}

// Where the keys of a tile begin: a multiple of `step` from which on some row sees keys.
template <class T>
__device__ __forceinline__ int first_key(const AttentionParams<T>& p, const AttentionTile& t, int step) {
  const int low = p.window ? max(t.min_position + 1 - p.window, 0) : 0;
  return max(t.k0, low / step * step);
}

// Makes weights of the scores of keys from k on: of a thread's two rows (lane / 4 and that + 8) eight columns
// apart, two at a time. `max` (not scaled) and `sum` (of this thread's columns) go along the keys; what was
// summed before is to be multiplied by `keep`.
template <int kCount>
__device__ __forceinline__ void weigh_scores(float (&c)[kCount / 8][4], const AttentionRow (&rows)[2], int k,
                                             float scale, float (&max)[2], float (&sum)[2],
                                             float (&keep)[2]) {
  const int column = threadIdx.x % 4 * 2;
  const int low = rows[0].low > rows[1].low ? rows[0].low : rows[1].low;
  const int limit = rows[0].limit < rows[1].limit ? rows[0].limit : rows[1].limit;
  if (k < low || k + kCount > limit) {
#pragma unroll
    for (int n = 0; n < kCount / 8; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int key = k + n * 8 + column + i % 2;
        if (key < rows[i / 2].low || key >= rows[i / 2].limit)
          c[n][i] = -INFINITY;
      }
  }
#pragma unroll
  for (int r = 0; r < 2; r++) {
    float largest = max[r];
#pragma unroll
    for (int n = 0; n < kCount / 8; n++)
      largest = fmaxf(largest, fmaxf(c[n][r * 2], c[n][r * 2 + 1]));
    largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 1));
    largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 2));
    // Rounded in the same way each time: where the largest stays, what was summed stays bit for bit, so it
    // does not matter to a row how many keys behind its own the tile goes on.
    const float base = largest == -INFINITY ? 0 : product(largest, scale);
    keep[r] = exp2_approx(max[r] == -INFINITY ? -INFINITY : product(max[r], scale) - base);
    max[r] = largest;
    float more = 0;
#pragma unroll
    for (int n = 0; n < kCount / 8; n++)
#pragma unroll
      for (int j = 0; j < 2; j++) {
        float& x = c[n][r * 2 + j];
        x = exp2_approx(fmaf(x, scale, -base));
        more += x;
      }
    sum[r] = fmaf(sum[r], keep[r], more);
  }
}

// Parts of a row put together, one after the other in the order of their keys. Both kernels that do it do the
// same arithmetic, so it does not matter to a row's bits which one did.
struct MergedParts {
  float max, sum;
};

__device__ __forceinline__ void merge_part(MergedParts& merged, float lse, float& keep, float& add) {
  const float max = fmaxf(merged.max, lse);
  keep = exp2_approx(merged.max - max);  // 0 for the first part
  add = exp2_approx(lse - max);
  merged.max = max;
  merged.sum = fmaf(merged.sum, keep, add);
}

__device__ __forceinline__ float merge_value(float sum, float keep, float add, float part) {
  return fmaf(sum, keep, add * part);
}

}  // namespace
