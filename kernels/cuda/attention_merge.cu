// Puts the parts of rows together that attention computed for pieces of their keys.
//
//   out[row] = sum over parts of 2^(lse - max) * part / sum over parts of 2^(lse - max)
//
// Shapes: see AttentionMerge and AttentionMergeParams. Grid: x a token of the list, y four of its heads, a
// warp each. Bytes: 4 * D + 4 read a part and row, 2 * D written a row; bound by memory. Parts come in the
// order of their keys, so the bits of a row do not depend on where its parts lie. A part that saw no key is
// not read.
#include "attention.cuh"

namespace {

template <class T>
struct AttentionMergeParams {
  T* out;                 // [tokens, heads, D], bf16 or f16
  const float* part_out;  // [part rows, kv heads, D]
  const float* part_lse;  // [part rows, kv heads]
  const uint32_t* num_merges;
  const AttentionMerge* merges;
  uint32_t num_kv_heads, group_len, dim;
};

constexpr int kThreads = 128;
constexpr int kMaxPairs = 4;  // of a lane, at 256 dimensions

template <class T>
__device__ __forceinline__ void attention_merge(const AttentionMergeParams<T>& p) {
  const uint32_t query_head = blockIdx.y * (kThreads / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
  const bool has_token = blockIdx.x < *p.num_merges, has_head = query_head < p.num_kv_heads * p.group_len;
  if (!has_token || !has_head)
    return;
  const AttentionMerge m = p.merges[blockIdx.x];
  const uint32_t head = query_head / p.group_len, in_group = query_head % p.group_len;
  MergedParts merged = {-INFINITY, 0};
  float2 sum[kMaxPairs] = {};
#pragma unroll 4
  for (uint32_t i = 0; i < m.num_shared + m.num_own; i++) {
    const uint32_t row =
        i < m.num_shared ? m.shared + i * m.shared_stride : m.own + (i - m.num_shared) * m.own_stride;
    const size_t part = (size_t)(row + in_group) * p.num_kv_heads + head;
    const float lse = p.part_lse[part];
    if (lse == -INFINITY)
      continue;
    float keep, add;
    merge_part(merged, lse, keep, add);
#pragma unroll
    for (int j = 0; j < kMaxPairs; j++) {
      const uint32_t d = (j * 32 + lane) * 2;
      if (d < p.dim) {
        const float2 x = *(const float2*)(p.part_out + part * p.dim + d);
        sum[j] = make_float2(merge_value(sum[j].x, keep, add, x.x), merge_value(sum[j].y, keep, add, x.y));
      }
    }
  }
  const float whole = reciprocal(merged.sum);
  T* out = p.out + ((size_t)m.token * p.num_kv_heads * p.group_len + query_head) * p.dim;
#pragma unroll
  for (int j = 0; j < kMaxPairs; j++) {
    const uint32_t d = (j * 32 + lane) * 2;
    if (d < p.dim)
      *(uint32_t*)(out + d) = pack<T>(sum[j].x * whole, sum[j].y * whole);
  }
}

}  // namespace

KERNELS(attention_merge, AttentionMergeParams, kThreads)
