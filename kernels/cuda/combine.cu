// A token's answer from those of its experts: out[token] = sum over its routes of weight * answers[route].
//
// Shapes: answers T [routes, size], bf16 or f16, weights f32 and routes_of u32 [tokens, num_chosen], in the
// order of the experts (route.cu); out T [tokens, size]. size is a multiple of 8.
//
// Grid: a block a token. Sums are f32, in the order of the experts, so a token's answer depends on nothing
// else. Bytes: 2 for each answer of each expert and 2 written a number; bound by memory.
#include "types.cuh"

namespace {

constexpr int kThreads = 128;

template <class T>
struct CombineParams {
  const T* answers;
  const float* weights;
  const uint32_t* routes_of;
  T* out;
  uint32_t size, num_chosen;
};

template <class T>
__device__ __forceinline__ void combine(const CombineParams<T>& p) {
  const size_t token = blockIdx.x;
  const float* weights = p.weights + token * p.num_chosen;
  const uint32_t* routes_of = p.routes_of + token * p.num_chosen;
  for (uint32_t first = threadIdx.x * 8; first < p.size; first += kThreads * 8) {
    float sums[8] = {};
    for (uint32_t i = 0; i < p.num_chosen; i++) {
      const uint4 pairs = *(const uint4*)(p.answers + (size_t)routes_of[i] * p.size + first);
      const uint32_t words[4] = {pairs.x, pairs.y, pairs.z, pairs.w};
      const float weight = weights[i];
#pragma unroll
      for (int j = 0; j < 4; j++) {
        sums[j * 2] = fmaf(weight, lo_of<T>(words[j]), sums[j * 2]);
        sums[j * 2 + 1] = fmaf(weight, hi_of<T>(words[j]), sums[j * 2 + 1]);
      }
    }
    *(uint4*)(p.out + token * p.size + first) =
        make_uint4(pack<T>(sums[0], sums[1]), pack<T>(sums[2], sums[3]), pack<T>(sums[4], sums[5]),
                   pack<T>(sums[6], sums[7]));
  }
}

}  // namespace

KERNELS(combine, CombineParams, kThreads)
