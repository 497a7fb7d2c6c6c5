// Copies the first slots of pages to other pages, for all copies of a step.
//
// Shapes: kv [page, 2, num_kv_heads, page_size, stride] of one layer; copies u32 [num_copies, 3] (from, to,
// slots). Grid: (copies, 2 * num_kv_heads). Bound by memory; 16 bytes a thread.
#include "types.cuh"

namespace {

constexpr int kThreads = 128;

struct CopyKvParams {
  uint8_t* kv;
  const uint32_t* copies;
  uint32_t page_size, slot_bytes;  // of one head
};

}  // namespace

extern "C" __global__ void __launch_bounds__(kThreads) copy_kv(const __grid_constant__ CopyKvParams p) {
  const uint32_t* copy = p.copies + blockIdx.x * 3;
  const size_t head_bytes = (size_t)p.page_size * p.slot_bytes;
  const uint8_t* from = p.kv + ((size_t)copy[0] * gridDim.y + blockIdx.y) * head_bytes;
  uint8_t* to = p.kv + ((size_t)copy[1] * gridDim.y + blockIdx.y) * head_bytes;
  for (uint32_t i = threadIdx.x * 16; i < copy[2] * p.slot_bytes; i += kThreads * 16)
    *(uint4*)(to + i) = *(const uint4*)(from + i);
}
EMU_KERNEL(copy_kv)
