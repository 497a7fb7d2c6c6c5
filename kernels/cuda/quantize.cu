// Rounds rows to e4m3, each with a scale that lets its largest number be e4m3's largest.
//
// Shapes: x T [rows, size], out e4m3 [rows, size], out_scale f32 [rows]; T is bf16 or f16. Grid: a block a
// row. Bytes: 2 read and 1 written a number; bound by memory.
#include "rows.cuh"

namespace {

template <class T>
struct QuantizeParams {
  const T* x;
  e4m3* out;
  float* out_scale;
  uint32_t size;
};

template <class T>
__device__ __forceinline__ void quantize(const QuantizeParams<T>& p) {
  DYN_SHARED(float, parts);
  const size_t first = (size_t)blockIdx.x * p.size;
  float largest = 0;
  for (uint32_t i = threadIdx.x * 8; i < p.size; i += kRowThreads * 8) {
    const Eight x = load_eight(p.x + first + i);
#pragma unroll
    for (int j = 0; j < 8; j++)
      largest = fmaxf(largest, fabsf(x.x[j]));
  }
  const float step = e4m3_step(block_max(largest, parts)), scale = 1 / step;
  if (threadIdx.x == 0)
    p.out_scale[blockIdx.x] = step;
  for (uint32_t i = threadIdx.x * 8; i < p.size; i += kRowThreads * 8) {
    Eight x = load_eight(p.x + first + i);
#pragma unroll
    for (int j = 0; j < 8; j++)
      x.x[j] *= scale;
    store_eight(p.out + first + i, x);
  }
}

}  // namespace

KERNELS(quantize, QuantizeParams, kRowThreads)
