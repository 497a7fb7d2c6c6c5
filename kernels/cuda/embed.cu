// Copies rows of the embedding to the residual stream.
//
//   id = from[row] < 0 ? ids[row] : sampled[from[row]]
//   out[row] = table[id] * scale
//
// Shapes: table T [vocab, size], bf16 or f16, ids u32 [rows], from i32 [rows], sampled u32 (what the step
// before sampled, never seen by the host), out f32 [rows, size]. Grid: a block a row. Bytes: 2 read and 4
// written a number; bound by memory.
#include "rows.cuh"

namespace {

template <class T>
struct EmbedParams {
  const T* table;
  const uint32_t* ids;
  const int32_t* from;
  const uint32_t* sampled;
  float* out;
  uint32_t size;
  float scale;
};

template <class T>
__device__ __forceinline__ void embed(const EmbedParams<T>& p) {
  const size_t row = blockIdx.x;
  const int32_t from = p.from[row];
  const size_t id = from < 0 ? p.ids[row] : p.sampled[from];
  for (uint32_t i = threadIdx.x * 8; i < p.size; i += kRowThreads * 8) {
    Eight x = load_eight(p.table + id * p.size + i);
#pragma unroll
    for (int j = 0; j < 8; j++)
      x.x[j] *= p.scale;
    store_eight(p.out + row * p.size + i, x);
  }
}

}  // namespace

KERNELS(embed, EmbedParams, kRowThreads)
