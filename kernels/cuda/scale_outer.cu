// Gives a product of e4m3 numbers its scales, where the library that made it could not.
//
//   out[row, column] *= x_scale[row] * weight_scale[column]     bf16 or f32, in place
//
// Grid: rows, and columns by 2048. Bound by memory.
#include "types.cuh"

namespace {

constexpr int kThreads = 256;
constexpr uint32_t kColumns = 2048;

struct ScaleOuterParams {
  void* out;                  // [rows, num_columns]
  const float* x_scale;       // [rows]
  const float* weight_scale;  // [num_columns]
  uint32_t num_columns, is_f32;
};

}  // namespace

extern "C" __global__ void __launch_bounds__(kThreads)
    scale_outer(const __grid_constant__ ScaleOuterParams p) {
  const size_t row = (size_t)blockIdx.x * p.num_columns;
  const float x_scale = p.x_scale[blockIdx.x];
  const uint32_t first = blockIdx.y * kColumns;
  const uint32_t end = first + kColumns < p.num_columns ? first + kColumns : p.num_columns;
  for (uint32_t i = first + threadIdx.x; i < end; i += kThreads) {
    const float scale = x_scale * p.weight_scale[i];
    if (p.is_f32) {
      ((float*)p.out)[row + i] *= scale;
    } else {
      bf16* out = (bf16*)p.out + row + i;
      *out = to_bf16(to_float(*out) * scale);
    }
  }
}
EMU_KERNEL(scale_outer)
