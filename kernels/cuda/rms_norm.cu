// Adds a part's output to the residual stream and normalizes the sum for the next part.
//
//   residual[row] += post_norm ? norm(delta[row]) * post_norm : delta[row]
//   out[row] = norm(residual[row]) * weight                      T, or e4m3 with a scale for the row
//
// Shapes: residual f32 [rows, size], delta T [rows, size] or null, weight and post_norm f32 [size]; T is bf16
// or f16. With `rows_of`, row i of `out` comes from row rows_of[i] of the stream, which is only read then.
// Grid: a block a row. Bytes: 4 + 2 read and 4 + 2 written a number; bound by memory. The second look at a
// row finds it in the L1 cache.
#include "rows.cuh"

namespace {

template <class T>
struct RmsNormParams {
  float* residual;
  const T* delta;
  const float *weight, *post_norm;
  void* out;         // T, or e4m3 where out_scale is given
  float* out_scale;  // [rows]
  uint32_t size;
  float epsilon;
};

template <class T>
__device__ __forceinline__ void rms_norm(const RmsNormParams<T>& p) {
  DYN_SHARED(float, parts);
  const size_t row = blockIdx.x;
  float* residual = p.residual + row * p.size;
  const T* delta = p.delta ? p.delta + row * p.size : nullptr;
  float delta_scale = 1;
  if (delta && p.post_norm) {
    float squares = 0;
    for (uint32_t i = threadIdx.x * 8; i < p.size; i += kRowThreads * 8) {
      const Eight d = load_eight(delta + i);
#pragma unroll
      for (int j = 0; j < 8; j++)
        squares += d.x[j] * d.x[j];
    }
    delta_scale = rsqrtf(block_sum(squares, parts) / p.size + p.epsilon);
  }
  // Each thread looks again only at what it wrote itself.
  float squares = 0, largest = 0;
  for (uint32_t i = threadIdx.x * 8; i < p.size; i += kRowThreads * 8) {
    Eight x = load_eight(residual + i);
    const Eight weight = load_eight(p.weight + i);
    if (delta) {
      const Eight d = load_eight(delta + i);
      if (p.post_norm) {
        const Eight post = load_eight(p.post_norm + i);
#pragma unroll
        for (int j = 0; j < 8; j++)
          x.x[j] += d.x[j] * delta_scale * post.x[j];
      } else {
#pragma unroll
        for (int j = 0; j < 8; j++)
          x.x[j] += d.x[j];
      }
      store_eight(residual + i, x);
    }
#pragma unroll
    for (int j = 0; j < 8; j++) {
      squares += x.x[j] * x.x[j];
      largest = fmaxf(largest, fabsf(x.x[j] * weight.x[j]));
    }
  }
  float scale = rsqrtf(block_sum(squares, parts) / p.size + p.epsilon);
  if (p.out_scale) {
    const float step = e4m3_step(block_max(largest, parts) * scale);
    if (threadIdx.x == 0)
      p.out_scale[row] = step;
    scale /= step;
  }
  for (uint32_t i = threadIdx.x * 8; i < p.size; i += kRowThreads * 8) {
    Eight x = load_eight(residual + i);
    const Eight weight = load_eight(p.weight + i);
#pragma unroll
    for (int j = 0; j < 8; j++)
      x.x[j] *= scale * weight.x[j];
    const size_t at = row * p.size + i;
    if (p.out_scale)
      store_eight((e4m3*)p.out + at, x);
    else
      store_eight((T*)p.out + at, x);
  }
}

}  // namespace

KERNELS(rms_norm, RmsNormParams, kRowThreads)
