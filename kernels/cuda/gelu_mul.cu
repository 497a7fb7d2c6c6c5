// out = gelu(gate) * up, gelu in its tanh form; see gated.cuh.
#include "gated.cuh"

namespace {

struct Gelu {
  __device__ float operator()(float x) const {
    const float inner = 0.7978845608028654f * (x + 0.044715f * x * x * x);
    // tanh by one exponential; it saturates at both ends.
    return x - x / (1 + __expf(2 * inner));
  }
};

template <class T>
__device__ __forceinline__ void gelu_mul(const GatedParams<T>& p) {
  DYN_SHARED(float, parts);
  gated(p, parts, Gelu());
}

}  // namespace

KERNELS(gelu_mul, GatedParams, kRowThreads)
