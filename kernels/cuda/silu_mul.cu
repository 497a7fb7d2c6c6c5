// out = silu(gate) * up; see gated.cuh.
#include "gated.cuh"

namespace {

struct Silu {
  __device__ float operator()(float x) const { return x / (1 + __expf(-x)); }
};

template <class T>
__device__ __forceinline__ void silu_mul(const GatedParams<T>& p) {
  DYN_SHARED(float, parts);
  gated(p, parts, Silu());
}

}  // namespace

KERNELS(silu_mul, GatedParams, kRowThreads)
