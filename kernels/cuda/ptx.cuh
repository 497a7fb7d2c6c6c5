// Instructions for copies into shared memory and for the tensor cores of sm_80 on: the real one under nvcc,
// its documented meaning on the CPU otherwise.
#pragma once
#include "types.cuh"

#ifdef __CUDACC__
__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return (uint32_t)__cvta_generic_to_shared(p);
}
#endif

// Copies 16 bytes, or writes zeros when ok is false.
__device__ __forceinline__ void cp_async16(void* dst, const void* src, bool ok) {
#ifdef __CUDACC__
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(dst)), "l"(src),
               "r"(ok ? 16 : 0)
               : "memory");
#else
  if ((uintptr_t)dst & 15 || (ok && (uintptr_t)src & 15))
    emu::die("cp.async: not 16-byte aligned");
  memset(dst, 0xff, 16);
  emu::cur->open.push_back({dst, ok ? src : nullptr, 16});  // garbage until waited for
#endif
}
__device__ __forceinline__ void cp_async_commit() {
#ifdef __CUDACC__
  asm volatile("cp.async.commit_group;" ::: "memory");
#else
  emu::cur->groups.push_back(std::move(emu::cur->open));
  emu::cur->open.clear();
#endif
}
template <int N>
__device__ __forceinline__ void cp_async_wait() {
#ifdef __CUDACC__
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
#else
  auto& g = emu::cur->groups;
  while ((int)g.size() > N) {
    for (auto& c : g[0])
      if (c.src)
        memcpy(c.dst, c.src, c.bytes);
      else
        memset(c.dst, 0, c.bytes);
    g.erase(g.begin());
  }
#endif
}
// Four 8x8 b16 matrices; lane i gives the address of row i%8 of matrix i/8.
template <bool TRANS>
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* p) {
#ifdef __CUDACC__
  if (TRANS)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(p))
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(p))
                 : "memory");
#else
  if ((uintptr_t)p & 15)
    emu::die("ldmatrix: not 16-byte aligned");
  auto g = emu::gather(~0u, 16 + TRANS, (const uint16_t*)p);
  int l = emu::lane();
  for (int m = 0; m < 4; m++)
    r[m] = TRANS ? g[m * 8 + 2 * (l % 4)][l / 4] | (uint32_t)g[m * 8 + 2 * (l % 4) + 1][l / 4] << 16
                 : g[m * 8 + l / 4][2 * (l % 4)] | (uint32_t)g[m * 8 + l / 4][2 * (l % 4) + 1] << 16;
#endif
}
// D[16,8] += A[16,16] B[16,8], bf16 in, fp32 accumulate.
__device__ __forceinline__ void mma_bf16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#ifdef __CUDACC__
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
  struct R {
    uint32_t v[6];
  };
  auto g = emu::gather(~0u, 18, R{{a[0], a[1], a[2], a[3], b0, b1}});
  int l = emu::lane();
  auto bf = [](uint32_t w, int h) { return h ? hi_of(w) : lo_of(w); };
  for (int k = 0; k < 16; k++) {  // a: rows l/4, l/4+8; k pairs at 2*(lane%4), +8
    int q = k % 8 / 2, h = k & 1, hi = k / 8;
    float a0 = bf(g[l / 4 * 4 + q].v[2 * hi], h), a1 = bf(g[l / 4 * 4 + q].v[2 * hi + 1], h);
    float x0 = bf(g[(l % 4 * 2) * 4 + q].v[4 + hi], h), x1 = bf(g[(l % 4 * 2 + 1) * 4 + q].v[4 + hi], h);
    c[0] += a0 * x0;
    c[1] += a0 * x1;
    c[2] += a1 * x0;
    c[3] += a1 * x1;
  }
#endif
}
