// Stand-in for the CUDA device language on the CPU, so that kernels are tested where there is no GPU.
//
// A fiber plays each CUDA thread; blocks run on all cores, one after the other on each. Memory that nobody
// wrote is NaN, copies in flight land only when somebody waits for them, and the order in which threads run
// is chosen (configure): a missing barrier, a buffer released too early or a slot read before it is written
// changes the answer. It cannot show speed, bank conflicts, missing proxy fences, the memory model's races or
// spin-waits between blocks.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) alignas(n)
#define __restrict__
#define __CUDA_EMU__ 1
#define __CUDA_ARCH__ 900
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline float2 make_float2(float x, float y) {
  return {x, y};
}
inline float4 make_float4(float x, float y, float z, float w) {
  return {x, y, z, w};
}
inline uint2 make_uint2(unsigned x, unsigned y) {
  return {x, y};
}
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) {
  return {x, y, z, w};
}
namespace emu {
struct Barrier {
  int arrived = 0;
  uint64_t gen = 0;
  int line = 0;
};
struct Sync {
  uint32_t mask;
  Barrier bar;
  int op, flip[32] = {};
  alignas(16) char buf[2][32][64];
};  // one per (warp, lane mask)
struct Warp {
  std::vector<Sync*> syncs;
  uint32_t alive;
};
struct Copy {
  void* dst;
  const void* src;
  int bytes;
};
struct Thread {
  void* sp;
  dim3 tid;
  int lin;
  bool done;
  Barrier* bar;
  uint64_t gen;
  bool poll;
  std::vector<Copy> open;
  std::vector<std::vector<Copy>> groups;
};
struct Block {
  dim3 idx, dim, grid;
  char* smem;
  size_t smem_bytes;
  int alive;
  Barrier bar[16];
  int expect[16];
  std::vector<Thread> th;
  std::vector<Warp> warps;
  void* sched_sp;
  uint64_t progress;
};
extern thread_local Block* blk;
extern thread_local Thread* cur;
void yield();
[[noreturn]] void die(const char* what);
// Threads meet at barrier `id`: n of them, or all that live where n is 0. `file` and `line` must agree among
// them, and are what a test names to leave the barrier out; none for barriers that cannot be left out.
void sync(int id, int n, const char* file, int line);
// Whether a test asked for this mistake, to see that it is found.
bool planted(const char* name);
Sync& collective(uint32_t mask, int op, const void* mine, size_t n, int& slot);
template <class T>
struct Lanes {
  const char (*b)[64];
  T operator[](int i) const {
    T v;
    memcpy(&v, b[i], sizeof v);
    return v;
  }
};
template <class T>
Lanes<T> gather(uint32_t mask, int op, const T& v) {
  static_assert(sizeof(T) <= 64);
  int s;
  Sync& y = collective(mask, op, &v, sizeof v, s);
  return {y.buf[s]};
}
template <class F>
void wait_until(F f) {
  while (!f()) {
    cur->poll = true;
    yield();
  }
  cur->poll = false;
  blk->progress++;
}
using Entry = void (*)(void* fn, void** args);
void launch(Entry e, void* fn, dim3 grid, dim3 block, size_t smem, void** args);
template <class F>
struct Tramp;
template <class... A>
struct Tramp<void (*)(A...)> {
  template <size_t... I>
  static void go(void* f, void** p, std::index_sequence<I...>) {
    ((void (*)(A...))f)(*(std::remove_reference_t<A>*)p[I]...);
  }
  static void call(void* f, void** p) { go(f, p, std::index_sequence_for<A...>{}); }
  static constexpr size_t param_bytes = (size_t{0} + ... + sizeof(std::remove_reference_t<A>));
};
struct Kernel {
  const char* name;
  void* fn;
  Entry entry;
  size_t param_bytes;
  Kernel* next;
  Kernel(const char*, void*, Entry, size_t);
};
inline int lane() {
  return cur->lin & 31;
}
}  // namespace emu
#define EMU_KERNEL(f)                                                          \
  static emu::Kernel emu_reg_##f(#f, (void*)f, emu::Tramp<decltype(&f)>::call, \
                                 emu::Tramp<decltype(&f)>::param_bytes);
#define DYN_SHARED(T, name) T* name = (T*)emu::blk->smem
#define threadIdx (emu::cur->tid)
#define blockIdx (emu::blk->idx)
#define blockDim (emu::blk->dim)
#define gridDim (emu::blk->grid)
inline void __syncthreads(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  emu::sync(0, 0, file, line);
}
#define PLANTED(name) emu::planted(#name)
inline void __syncwarp(uint32_t m = ~0u) {
  emu::gather<int>(m, 1, 0);
}
template <class T>
T __shfl_xor_sync(uint32_t m, T v, int x, int w = 32) {
  auto g = emu::gather(m, 2, v);
  return g[emu::lane() ^ x];
}
template <class T>
T __shfl_sync(uint32_t m, T v, int s, int w = 32) {
  auto g = emu::gather(m, 3, v);
  return g[(emu::lane() & ~(w - 1)) | (s & (w - 1))];
}
template <class T>
T __shfl_down_sync(uint32_t m, T v, int d, int w = 32) {
  auto g = emu::gather(m, 4, v);
  int l = emu::lane();
  return g[(l & (w - 1)) + d < w ? l + d : l];
}
inline uint32_t __ballot_sync(uint32_t m, int p) {
  auto g = emu::gather(m, 5, p);
  uint32_t r = 0;
  for (int i = 0; i < 32; i++)
    if ((m >> i & 1) && g[i])
      r |= 1u << i;
  return r;
}
template <class T>
T atomicAdd(T* p, T v) {
  T o = *p, n;
  do
    n = o + v;
  while (!__atomic_compare_exchange(p, &o, &n, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST));
  return o;
}
template <class T>
T atomicMax(T* p, T v) {
  T o = *p;
  while (o < v && !__atomic_compare_exchange_n(p, &o, v, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)) {
  }
  return o;
}
template <class T>
T atomicMin(T* p, T v) {
  T o = *p;
  while (o > v && !__atomic_compare_exchange_n(p, &o, v, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)) {
  }
  return o;
}
inline int __popc(unsigned x) {
  return __builtin_popcount(x);
}
inline int __ffs(int x) {
  return __builtin_ffs(x);
}
inline int __clz(int x) {
  return x ? __builtin_clz(x) : 32;
}
inline unsigned __float_as_uint(float x) {
  unsigned u;
  memcpy(&u, &x, 4);
  return u;
}
inline float __uint_as_float(unsigned u) {
  float x;
  memcpy(&x, &u, 4);
  return x;
}
inline float __int_as_float(int i) {
  return __uint_as_float((unsigned)i);
}
inline void __threadfence() {
  __atomic_thread_fence(__ATOMIC_SEQ_CST);
}
inline float __expf(float x) {
  return expf(x);
}
inline float rsqrtf(float x) {
  return 1 / sqrtf(x);
}
inline float __fdividef(float a, float b) {
  return a / b;
}
using std::max;
using std::min;
