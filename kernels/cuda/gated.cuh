// The body of silu_mul and gelu_mul: out = activation(gate) * up, where a row holds all gates, then all ups.
//
// Shapes: gate_up T [rows, 2, size]; out T [rows, size], or e4m3 with a scale for the row; T is bf16 or f16.
// Grid: a block a row. Bytes: 4 read and 2 (or 1) written a number of `out`; bound by memory.
#pragma once
#include "rows.cuh"

template <class T>
struct GatedParams {
  const T* gate_up;
  void* out;         // T, or e4m3 where out_scale is given
  float* out_scale;  // [rows]
  uint32_t size;
};

template <class T, class F>
__device__ __forceinline__ Eight gated_eight(const T* row, uint32_t size, uint32_t i, F activation) {
  Eight gate = load_eight(row + i);
  const Eight up = load_eight(row + size + i);
#pragma unroll
  for (int j = 0; j < 8; j++)
    gate.x[j] = activation(gate.x[j]) * up.x[j];
  return gate;
}

template <class T, class F>
__device__ __forceinline__ void gated(const GatedParams<T>& p, float* parts, F activation) {
  const T* row = p.gate_up + (size_t)blockIdx.x * 2 * p.size;
  float scale = 1;
  if (p.out_scale) {
    float largest = 0;
    for (uint32_t i = threadIdx.x * 8; i < p.size; i += kRowThreads * 8) {
      const Eight x = gated_eight(row, p.size, i, activation);
#pragma unroll
      for (int j = 0; j < 8; j++)
        largest = fmaxf(largest, fabsf(x.x[j]));
    }
    const float step = e4m3_step(block_max(largest, parts));
    if (threadIdx.x == 0)
      p.out_scale[blockIdx.x] = step;
    scale = 1 / step;
  }
  for (uint32_t i = threadIdx.x * 8; i < p.size; i += kRowThreads * 8) {
    Eight x = gated_eight(row, p.size, i, activation);
    const size_t at = (size_t)blockIdx.x * p.size + i;
    if (p.out_scale) {
#pragma unroll
      for (int j = 0; j < 8; j++)
        x.x[j] *= scale;
      store_eight((e4m3*)p.out + at, x);
    } else {
      store_eight((T*)p.out + at, x);
    }
  }
}
