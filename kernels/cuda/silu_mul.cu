// out = silu(gate) * up; see gated.cuh.
#include "gated.cuh"

namespace {

struct Silu {
  __device__ float operator()(float x) const { return x / (1 + __expf(-x)); }
};

}  // namespace

extern "C" __global__ void __launch_bounds__(kRowThreads) silu_mul(const __grid_constant__ GatedParams p) {
  DYN_SHARED(float, parts);
  gated(p, parts, Silu());
}
EMU_KERNEL(silu_mul)
