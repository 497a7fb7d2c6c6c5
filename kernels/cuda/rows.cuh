// Rows of numbers, eight at a time, and sums over a block.
//
// Rows have a multiple of eight numbers and begin at 16 bytes (an e4m3 row: at 8), which the ops check.
#pragma once
#include "types.cuh"

// Threads of a block that shares a row.
constexpr int kRowThreads = 256;

struct Eight {
  float x[8];
};

__device__ __forceinline__ Eight load_eight(const float* p) {
  const float4 a = ((const float4*)p)[0], b = ((const float4*)p)[1];
  return {{a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w}};
}

template <class T>
__device__ __forceinline__ Eight load_eight(const T* p) {
  static_assert(sizeof(T) == 2);
  const uint4 v = *(const uint4*)p;
  return {{lo_of<T>(v.x), hi_of<T>(v.x), lo_of<T>(v.y), hi_of<T>(v.y), lo_of<T>(v.z), hi_of<T>(v.z),
           lo_of<T>(v.w), hi_of<T>(v.w)}};
}

__device__ __forceinline__ void store_eight(float* p, const Eight& v) {
  ((float4*)p)[0] = make_float4(v.x[0], v.x[1], v.x[2], v.x[3]);
  ((float4*)p)[1] = make_float4(v.x[4], v.x[5], v.x[6], v.x[7]);
}

template <class T>
__device__ __forceinline__ void store_eight(T* p, const Eight& v) {
  static_assert(sizeof(T) == 2);
  *(uint4*)p = make_uint4(pack<T>(v.x[0], v.x[1]), pack<T>(v.x[2], v.x[3]), pack<T>(v.x[4], v.x[5]),
                          pack<T>(v.x[6], v.x[7]));
}

__device__ __forceinline__ void store_eight(e4m3* p, const Eight& v) {
  uint32_t words[2] = {};
#pragma unroll
  for (int i = 0; i < 8; i++)
    words[i / 4] |= (uint32_t)to_e4m3(v.x[i]).bits << i % 4 * 8;
  *(uint2*)p = make_uint2(words[0], words[1]);
}

// Over the block, the same in every thread; `parts` has a number a warp, and may be used again at once behind
// a sum, not behind a maximum.
__device__ __forceinline__ float block_sum(float x, float* parts) {
  x = warp_sum(x);
  if (threadIdx.x % 32 == 0)
    parts[threadIdx.x / 32] = x;
  __syncthreads();
  float sum = parts[0];
#pragma unroll
  for (int i = 1; i < kRowThreads / 32; i++)
    sum += parts[i];
  __syncthreads();
  return sum;
}

__device__ __forceinline__ float block_max(float x, float* parts) {
  x = warp_max(x);
  if (threadIdx.x % 32 == 0)
    parts[threadIdx.x / 32] = x;
  __syncthreads();
  float max = parts[0];
#pragma unroll
  for (int i = 1; i < kRowThreads / 32; i++)
    max = fmaxf(max, parts[i]);
  return max;
}

// The step of e4m3 that lets the largest number of a row be its largest.
__device__ __forceinline__ float e4m3_step(float largest) {
  return fmaxf(largest, 1e-12f) / 448.0f;
}
