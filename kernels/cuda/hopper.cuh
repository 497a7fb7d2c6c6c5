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
  float* d;
  uint64_t a, b;
  int n;
  bool tb, acc;
};
inline thread_local std::vector<Tma> tmas;
inline thread_local std::vector<std::vector<Wg> > wgs(2048);  // wgs: by thread
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
inline float desc_at(uint64_t d, int mn, int k, bool mn_major) {  // canonical 128-byte-swizzled layouts
  if (d >> 62 != 1)
    die("wgmma: only the 128-byte swizzle is emulated");
  uint64_t lbo = (d >> 16 & 0x3fff) * 16, sbo = (d >> 32 & 0x3fff) * 16, off = (d & 0x3fff) * 16;
  off += mn_major ? (mn % 64) * 2 + mn / 64 * lbo + k % 8 * 128 + k / 8 * sbo
                  : (mn % 8) * 128 + mn / 8 * sbo + k * 2;
  if (off + 2 > blk->smem_bytes)
    die("wgmma: descriptor reaches past shared memory");
  bf16 v;
  memcpy(&v, swz(blk->smem + off), 2);
  return to_float(v);
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
__device__ __forceinline__ void wgmma_fence() {
#ifdef __CUDACC__
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}
__device__ __forceinline__ void wgmma_wait() {
#ifdef __CUDACC__
  asm volatile("wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 0;" ::: "memory");
#else
  __syncwarp();
  auto& v = emu::wgs[emu::cur->lin];
  int l = emu::lane(), w = emu::cur->lin / 32 % 4;
  for (auto& o : v)
    for (int j = 0; j < o.n / 8; j++)
      for (int r = 0; r < 2; r++)
        for (int e = 0; e < 2; e++) {
          float s = o.acc ? o.d[j * 4 + r * 2 + e] : 0;
          int row = w * 16 + l / 4 + r * 8, col = j * 8 + l % 4 * 2 + e;
          for (int k = 0; k < 16; k++)
            s += emu::desc_at(o.a, row, k, false) * emu::desc_at(o.b, col, k, o.tb);
          o.d[j * 4 + r * 2 + e] = s;
        }
  v.clear();
#endif
}
// D[64,64] (+)= A[64,16] B[16,64]; A K-major; B K-major, or MN-major when TB.
template <bool TB>
__device__ __forceinline__ void wgmma_64x64(float (&c)[32], uint64_t da, uint64_t db, int acc) {
#ifdef __CUDACC__
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\nwgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
      "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%"
      "27,%28,%29,%30,%31}, %32, %33, p, 1, 1, 0, %35;\n}"
#define R4(i) "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3])
      : R4(0), R4(4), R4(8), R4(12), R4(16), R4(20), R4(24), R4(28)
      : "l"(da), "l"(db), "r"(acc), "n"(TB ? 1 : 0));
#else
  __syncwarp();
  emu::wgs[emu::cur->lin].push_back({c, da, db, 64, TB, acc != 0});  // reads shared memory only at the wait
#endif
}
