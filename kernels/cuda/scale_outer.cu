// Gives a product of e4m3 numbers its scales, where the library that made it could not.
//
//   out[row, column] *= x_scale[row] * weight_scale[column]     bf16, f16 or f32, in place
//
// A product of numbers up to 448 goes beyond f16, so there it comes divided by 2^18, which is undone here.
//
// Grid: rows, and columns by 2048. Bound by memory.
#include "types.cuh"

namespace {

using f32 = float;  // for the kernel's name

constexpr int kThreads = 256;
constexpr uint32_t kColumns = 2048;

template <class T>
struct ScaleOuterParams {
  T* out;                     // [rows, num_columns]
  const float* x_scale;       // [rows]
  const float* weight_scale;  // [num_columns]
  uint32_t num_columns;
};

template <class T>
__device__ __forceinline__ void scale_outer(const ScaleOuterParams<T>& p) {
  const size_t row = (size_t)blockIdx.x * p.num_columns;
  const float x_scale = p.x_scale[blockIdx.x] * (is_f16<T> ? 262144.0f : 1.0f);
  const uint32_t first = blockIdx.y * kColumns;
  const uint32_t end = first + kColumns < p.num_columns ? first + kColumns : p.num_columns;
  for (uint32_t i = first + threadIdx.x; i < end; i += kThreads) {
    T& out = p.out[row + i];
    out = from_float<T>(to_float(out) * (x_scale * p.weight_scale[i]));
  }
}

}  // namespace

KERNELS(scale_outer, ScaleOuterParams, kThreads)
KERNEL(scale_outer, f32, ScaleOuterParams, kThreads)
