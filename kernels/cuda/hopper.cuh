// mbarrier, TMA and wgmma wrappers: the real instruction under nvcc, its documented meaning on the CPU.
#pragma once
#include "ptx.cuh"
#ifdef __CUDACC__
struct __align__(128) TmaMap {
  uint64_t opaque[16];
};  // CUtensorMap

#else
struct alignas(128) TmaMap {
  const char* base;
  uint64_t dim[2], row_bytes;
  uint32_t box[2];
  int elem;
  char pad[80];
};  // 128-byte swizzle only
namespace emu {
struct Mbar {
  uint16_t count, pending;
  uint32_t tx : 31, phase : 1;
};
struct Tma {
  Mbar* b;
  char* dst;
  const TmaMap* m;
  int x, y;
};
struct Wg {
  float (*d)[4];
  uint64_t a, b;
  const uint32_t* regs;  // A, where not in shared memory
  int n;
  bool tb, acc;
  void (*run)(const Wg&);  // for the type that is multiplied
};
struct WgQueue {
  std::vector<Wg> open;
  std::vector<std::vector<Wg> > groups;
};
inline thread_local std::vector<Tma> tmas;
inline thread_local std::vector<WgQueue> wgs(2048);  // by thread
inline void settle(Mbar* b) {
  if (!b->pending && !b->tx) {
    b->phase ^= 1;
    b->pending = b->count;
  }
}
inline char* swz(char* p) {
  uintptr_t a = (uintptr_t)p;
  return (char*)(a ^ (a >> 3 & 0x70));
}
inline void run_tma(const Tma& t) {  // rows of 128 bytes, out of range is zero
  for (uint32_t r = 0; r < t.m->box[1]; r++)
    for (uint32_t c = 0; c < t.m->box[0]; c++) {
      char* d = swz(t.dst + r * 128 + c * t.m->elem);
      uint64_t x = t.x + c, y = t.y + r;
      if (x < t.m->dim[0] && y < t.m->dim[1])
        memcpy(d, t.m->base + y * t.m->row_bytes + x * t.m->elem, t.m->elem);
      else
        memset(d, 0, t.m->elem);
    }
  t.b->tx -= t.m->box[0] * t.m->box[1] * t.m->elem;
  settle(t.b);
}
template <class T>
float desc_at(uint64_t d, int mn, int k, bool mn_major) {  // canonical 128-byte-swizzled layouts
  if (d >> 62 != 1)
    die("wgmma: only the 128-byte swizzle is emulated");
  uint64_t lbo = (d >> 16 & 0x3fff) * 16, sbo = (d >> 32 & 0x3fff) * 16, off = (d & 0x3fff) * 16;
  off += mn_major ? (mn % 64) * 2 + mn / 64 * lbo + k % 8 * 128 + k / 8 * sbo
                  : (mn % 8) * 128 + mn / 8 * sbo + k * 2;
  if (off + 2 > blk->smem_bytes)
    die("wgmma: descriptor reaches past shared memory");
  T v;
  memcpy(&v, swz(blk->smem + off), 2);
  return to_float(v);
}
// A product as its warp sees it: operands are read only now.
template <class T>
void run_wgmma(const Wg& o) {
  struct R {
    uint32_t v[4];
  };
  int l = lane(), w = cur->lin / 32 % 4;
  R mine = {};
  if (o.regs)
    memcpy(&mine, o.regs, sizeof mine);
  auto g = gather(~0u, 19, mine);
  float a[2][16], b[16];
  for (int r = 0; r < 2; r++)
    for (int k = 0; k < 16; k++) {
      uint32_t pair = g[l / 4 * 4 + k % 8 / 2].v[r + k / 8 * 2];
      a[r][k] = !o.regs ? desc_at<T>(o.a, w * 16 + l / 4 + r * 8, k, false)
                : k & 1 ? hi_of<T>(pair)
                        : lo_of<T>(pair);
    }
  for (int col = 0; col < o.n; col++) {
    if (col % 8 / 2 != l % 4)
      continue;
    for (int k = 0; k < 16; k++)
      b[k] = desc_at<T>(o.b, col, k, o.tb);
    for (int r = 0; r < 2; r++) {
      float& d = o.d[col / 8][r * 2 + col % 2];
      float s = o.acc ? d : 0;
      for (int k = 0; k < 16; k++)
        s += a[r][k] * b[k];
      d = s;
    }
  }
}
template <class T>
void queue_wgmma(float (*d)[4], uint64_t a, const uint32_t* regs, uint64_t b, int n, bool tb, int acc) {
  gather<int>(~0u, 20, 0);
  memset(d, 0xff, acc ? 0 : n / 8 * 16);  // unknown until waited for
  wgs[cur->lin].open.push_back({d, a, b, regs, n, tb, acc != 0, run_wgmma<T>});
}
}  // namespace emu
#endif
__device__ __forceinline__ uint64_t smem_desc(const void* p, int lbo, int sbo) {
#ifdef __CUDACC__
  uint64_t a = shared_address(p);
#else
  uint64_t a = (const char*)p - emu::blk->smem;
#endif
  return (a & 0x3ffff) >> 4 | (uint64_t)(lbo >> 4) << 16 | (uint64_t)(sbo >> 4) << 32 | (uint64_t)1 << 62;
}
__device__ __forceinline__ void mbar_init(uint64_t* b, int n) {
#ifdef __CUDACC__
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(b)), "r"(n));
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#else
  *(emu::Mbar*)b = {(uint16_t)n, (uint16_t)n, 0, 0};
#endif
}
__device__ __forceinline__ void mbar_arrive(uint64_t* b, int bytes = 0) {
#ifdef __CUDACC__
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(b)), "r"(bytes)
               : "memory");
#else
  auto m = (emu::Mbar*)b;
  if (!m->pending)
    emu::die("mbarrier: more arrivals than its count");
  m->tx += bytes;
  m->pending--;
  emu::settle(m);
#endif
}
__device__ __forceinline__ void mbar_wait(uint64_t* b, int parity) {
#ifdef __CUDACC__
  asm volatile(
      "{\n.reg .pred p;\nW: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n@!p bra W;\n}" ::"r"(
          shared_address(b)),
      "r"(parity)
      : "memory");
#else
  auto m = (emu::Mbar*)b;  // copies land only when someone waits for them
  emu::wait_until([&] {
    auto& v = emu::tmas;
    for (size_t i = 0; i < v.size();)
      if (v[i].b == m) {
        auto t = v[i];
        v.erase(v.begin() + i);
        emu::run_tma(t);
      } else
        i++;
    return m->phase != (unsigned)parity;
  });
#endif
}
__device__ __forceinline__ void tma_load_2d(void* dst, const TmaMap* m, uint64_t* b, int x, int y) {
#ifdef __CUDACC__
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3,%4}], "
      "[%2];" ::"r"(shared_address(dst)),
      "l"((uint64_t)m), "r"(shared_address(b)), "r"(x), "r"(y)
      : "memory");
#else
  if ((uintptr_t)dst & 1023)
    emu::die("TMA: swizzled destination not 1024-byte aligned");
  memset(dst, 0xff, m->box[1] * 128);
  emu::tmas.push_back({(emu::Mbar*)b, (char*)dst, m, x, y});
#endif
}
// Registers of each thread of this warpgroup from here on: fewer, for others to take, or more.
template <int N>
__device__ __forceinline__ void give_registers() {
#ifdef __CUDACC__
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
#endif
}
template <int N>
__device__ __forceinline__ void take_registers() {
#ifdef __CUDACC__
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
#endif
}
// What this thread wrote to shared memory is seen by TMA and wgmma that follow a barrier.
__device__ __forceinline__ void fence_async_shared() {
#ifdef __CUDACC__
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}
// A barrier of `n` threads; number 0 is __syncthreads.
#ifdef __CUDACC__
__device__ __forceinline__ void named_barrier(int id, int n) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(n) : "memory");
}
#else
inline void named_barrier(int id, int n, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  emu::sync(id, n, file, line);
}
#endif
// Registers that wgmma is to read or write are ready.
__device__ __forceinline__ void wgmma_fence() {
#ifdef __CUDACC__
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}
__device__ __forceinline__ void wgmma_commit() {
#ifdef __CUDACC__
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#else
  auto& q = emu::wgs[emu::cur->lin];
  q.groups.push_back(std::move(q.open));
  q.open.clear();
#endif
}
// Waits until no more than N groups are in flight.
template <int N>
__device__ __forceinline__ void wgmma_wait() {
#ifdef __CUDACC__
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
#else
  auto& groups = emu::wgs[emu::cur->lin].groups;
  while ((int)groups.size() > N) {
    for (auto& o : groups[0])
      o.run(o);
    groups.erase(groups.begin());
  }
#endif
}
// Keep the compiler from moving registers of a product in flight, sums and operands.
template <int N>
__device__ __forceinline__ void wgmma_hold(float (&c)[N][4]) {
#ifdef __CUDACC__
#pragma unroll
  for (int i = 0; i < N; i++)
    asm volatile("" : "+f"(c[i][0]), "+f"(c[i][1]), "+f"(c[i][2]), "+f"(c[i][3])::"memory");
#endif
}
template <int N>
__device__ __forceinline__ void wgmma_hold(uint32_t (&a)[N][4]) {
#ifdef __CUDACC__
#pragma unroll
  for (int i = 0; i < N; i++)
    asm volatile("" : "+r"(a[i][0]), "+r"(a[i][1]), "+r"(a[i][2]), "+r"(a[i][3])::"memory");
#endif
}
#define WGMMA_R4(i) "+f"(c[i][0]), "+f"(c[i][1]), "+f"(c[i][2]), "+f"(c[i][3])
#define WGMMA_R16(i) WGMMA_R4(i), WGMMA_R4(i + 1), WGMMA_R4(i + 2), WGMMA_R4(i + 3)
#define WGMMA_D32                                                                                       \
  "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26," \
  "%27,%28,%29,%30,%31"
#define WGMMA_D64                                                                                          \
  WGMMA_D32                                                                                                \
  ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%" \
  "57,"                                                                                                    \
  "%58,%59,%60,%61,%62,%63"
// D[64,128] (+)= A[64,16] B[16,128], both from shared memory and K-major.
template <class T>
__device__ __forceinline__ void wgmma_64x128(float (&c)[16][4], uint64_t a, uint64_t b, int acc) {
#ifdef __CUDACC__
  ASM_OF_T(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.",
      " " WGMMA_D64 "}, %64, %65, p, 1, 1, 0, 0;\n}" : WGMMA_R16(0), WGMMA_R16(4), WGMMA_R16(8),
      WGMMA_R16(12) : "l"(a), "l"(b), "r"(acc));
#else
  emu::queue_wgmma<T>(c, a, nullptr, b, 128, false, acc);
#endif
}
// D[64,N] += A[64,16] B[16,N]: A from registers, as `mma` has it; B from shared memory, MN-major.
template <class T>
__device__ __forceinline__ void wgmma_add(float (&c)[16][4], const uint32_t (&a)[4], uint64_t b) {
#ifdef __CUDACC__
  ASM_OF_T("wgmma.mma_async.sync.aligned.m64n128k16.f32.",
           " " WGMMA_D64 "}, {%64,%65,%66,%67}, %68, 1, 1, 1, 1;" : WGMMA_R16(0), WGMMA_R16(4), WGMMA_R16(8),
           WGMMA_R16(12) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
#else
  emu::queue_wgmma<T>(c, 0, a, b, 128, true, 1);
#endif
}
template <class T>
__device__ __forceinline__ void wgmma_add(float (&c)[8][4], const uint32_t (&a)[4], uint64_t b) {
#ifdef __CUDACC__
  ASM_OF_T("wgmma.mma_async.sync.aligned.m64n64k16.f32.",
           " " WGMMA_D32 "}, {%32,%33,%34,%35}, %36, 1, 1, 1, 1;" : WGMMA_R16(0), WGMMA_R16(4) : "r"(a[0]),
           "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
#else
  emu::queue_wgmma<T>(c, 0, a, b, 64, true, 1);
#endif
}
