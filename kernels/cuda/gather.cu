// Copies rows to stand one after the other: out[i] = rows[row_of[i]].
//
// Shapes: rows and out [.., size] of any 16-bit numbers, row_of u32 [num]. Grid: a block a row. Bound by
// memory.
#include "rows.cuh"

namespace {

struct GatherParams {
  const uint16_t* rows;
  const uint32_t* row_of;
  uint16_t* out;
  uint32_t size;
};

}  // namespace

extern "C" __global__ void __launch_bounds__(kRowThreads) gather(const __grid_constant__ GatherParams p) {
  const uint16_t* from = p.rows + (size_t)p.row_of[blockIdx.x] * p.size;
  uint16_t* to = p.out + (size_t)blockIdx.x * p.size;
  for (uint32_t i = threadIdx.x * 8; i < p.size; i += kRowThreads * 8)
    *(uint4*)(to + i) = *(const uint4*)(from + i);
}
EMU_KERNEL(gather)
