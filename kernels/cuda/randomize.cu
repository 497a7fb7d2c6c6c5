// Fills an array of bf16 or f16 with random numbers of a given standard deviation, for benchmarks without a
// checkpoint.
//
// Number i depends on (seed, i) alone (SplitMix64), so any grid gives the same. Grid: any; threads stride
// over the array.
#include "types.cuh"

namespace {

template <class T>
struct RandomizeParams {
  T* out;
  uint64_t len, seed;
  float scale;
};

template <class T>
__device__ __forceinline__ void randomize(const RandomizeParams<T>& p) {
  for (uint64_t i = blockIdx.x * (uint64_t)256 + threadIdx.x; i < p.len; i += gridDim.x * (uint64_t)256) {
    uint64_t z = (p.seed << 40) + i + 0x9e3779b97f4a7c15ull;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ z >> 27) * 0x94d049bb133111ebull;
    z ^= z >> 31;
    const float uniform = (float)(uint32_t)(z >> 40) * (1.0f / 16777216.0f);
    p.out[i] = from_float<T>((uniform * 2 - 1) * 1.7320508f * p.scale);
  }
}

}  // namespace

KERNELS(randomize, RandomizeParams, 256)
