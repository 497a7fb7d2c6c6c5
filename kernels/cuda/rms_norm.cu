// Adds a part's output to the residual stream and normalizes the sum for the next part.
//
//   residual[row] += post_norm ? norm(delta[row]) * post_norm : delta[row]
//   out[row] = norm(residual[row]) * weight                      bf16, or e4m3 with a scale for the row
//
// Shapes: residual f32 [rows, size], delta bf16 [rows, size] or null, weight and post_norm f32 [size]. With `rows_of`,
// row i of `out` comes from row rows_of[i] of the stream, which is only read then.
// Grid: a block a row. Bytes: 4 + 2 read and 4 + 2 written a number; bound by memory.
#include "types.cuh"

namespace {

constexpr int kThreads = 256;

struct RmsNormParams {
  float* residual;
  const bf16* delta;
  const float *weight, *post_norm;
  void* out;         // bf16, or e4m3 where out_scale is given
  float* out_scale;  // [rows]
  const uint32_t* rows_of;
  uint32_t size;
  float epsilon;
};

// Sum over the block, the same in every thread; `parts` has a number a warp.
__device__ float block_sum(float x, float* parts) {
  x = warp_sum(x);
  __syncthreads();  // the parts of the sum before are read
  if (threadIdx.x % 32 == 0)
    parts[threadIdx.x / 32] = x;
  __syncthreads();
  float sum = 0;
  for (int i = 0; i < kThreads / 32; i++)
    sum += parts[i];
  return sum;
}

__device__ float block_max(float x, float* parts) {
  x = warp_max(x);
  __syncthreads();
  if (threadIdx.x % 32 == 0)
    parts[threadIdx.x / 32] = x;
  __syncthreads();
  float max = parts[0];
  for (int i = 1; i < kThreads / 32; i++)
    max = fmaxf(max, parts[i]);
  return max;
}

}  // namespace

extern "C" __global__ void __launch_bounds__(kThreads) rms_norm(const __grid_constant__ RmsNormParams p) {
  DYN_SHARED(float, parts);
  const size_t row = p.rows_of ? p.rows_of[blockIdx.x] : blockIdx.x;
  float* residual = p.residual + row * p.size;
  const bf16* delta = p.delta ? p.delta + row * p.size : nullptr;
  float delta_scale = 1;
  if (delta && p.post_norm) {
    float squares = 0;
    for (uint32_t i = threadIdx.x; i < p.size; i += kThreads) {
      float x = to_float(delta[i]);
      squares += x * x;
    }
    delta_scale = rsqrtf(block_sum(squares, parts) / p.size + p.epsilon);
  }
  // Each thread reads again only what it wrote itself.
  float squares = 0, largest = 0;
  for (uint32_t i = threadIdx.x; i < p.size; i += kThreads) {
    float x = residual[i];
    if (delta) {
      float d = to_float(delta[i]);
      x += p.post_norm ? d * delta_scale * p.post_norm[i] : d;
      residual[i] = x;
    }
    squares += x * x;
    largest = fmaxf(largest, fabsf(x * p.weight[i]));
  }
  const float scale = rsqrtf(block_sum(squares, parts) / p.size + p.epsilon);
  if (p.out_scale) {
    const float step = fmaxf(block_max(largest, parts) * scale, 1e-12f) / 448.0f;
    if (threadIdx.x == 0)
      p.out_scale[blockIdx.x] = step;
    for (uint32_t i = threadIdx.x; i < p.size; i += kThreads)
      ((e4m3*)p.out)[(size_t)blockIdx.x * p.size + i] = to_e4m3(residual[i] * scale * p.weight[i] / step);
  } else {
    for (uint32_t i = threadIdx.x; i < p.size; i += kThreads)
      ((bf16*)p.out)[(size_t)blockIdx.x * p.size + i] = to_bf16(residual[i] * scale * p.weight[i]);
  }
}
EMU_KERNEL(rms_norm)
