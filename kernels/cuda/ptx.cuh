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
// An instruction whose name is `before`, then T for both operands, then what follows.
#define ASM_OF_T(before, ...)                       \
  do                                                \
    if constexpr (is_f16<T>)                        \
      asm volatile(before "f16.f16" __VA_ARGS__);   \
    else                                            \
      asm volatile(before "bf16.bf16" __VA_ARGS__); \
  while (0)

// D[16,8] += A[16,16] B[16,8], T in, fp32 accumulate.
template <class T>
__device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#ifdef __CUDACC__
  ASM_OF_T("mma.sync.aligned.m16n8k16.row.col.f32.",
           ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};" : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]),
           "+f"(c[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
  struct R {
    uint32_t v[6];
  };
  auto g = emu::gather(~0u, 18, R{{a[0], a[1], a[2], a[3], b0, b1}});
  int l = emu::lane();
  auto of = [](uint32_t w, int h) { return h ? hi_of<T>(w) : lo_of<T>(w); };
  for (int k = 0; k < 16; k++) {  // a: rows l/4, l/4+8; k pairs at 2*(lane%4), +8
    int q = k % 8 / 2, h = k & 1, hi = k / 8;
    float a0 = of(g[l / 4 * 4 + q].v[2 * hi], h), a1 = of(g[l / 4 * 4 + q].v[2 * hi + 1], h);
    float x0 = of(g[(l % 4 * 2) * 4 + q].v[4 + hi], h), x1 = of(g[(l % 4 * 2 + 1) * 4 + q].v[4 + hi], h);
    c[0] += a0 * x0;
    c[1] += a0 * x1;
    c[2] += a1 * x0;
    c[3] += a1 * x1;
  }
#endif
}

// 2^x to about two units in the last place; small results are flushed to zero.
__device__ __forceinline__ float exp2_approx(float x) {
#ifdef __CUDACC__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return exp2f(x);
#endif
}
// A product that no sum is drawn into.
__device__ __forceinline__ float product(float x, float y) {
#ifdef __CUDACC__
  float z;
  asm("mul.rn.f32 %0, %1, %2;" : "=f"(z) : "f"(x), "f"(y));
  return z;
#else
  return x * y;
#endif
}
// 1 / x to about one unit in the last place, and 1 for 1.
__device__ __forceinline__ float reciprocal(float x) {
#ifdef __CUDACC__
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return x == 1 ? 1 : y;
#else
  return 1 / x;
#endif
}
// Four e4m3 numbers as T, exactly. A NaN becomes 480; the emulation keeps it, so that tests see it.
template <class T>
__device__ __forceinline__ uint2 widen_e4m3(uint32_t four) {
#ifdef __CUDACC__
  // Exponent and mantissa stand in the place of a T's; the product moves the bias, also of subnormal numbers.
  // It is a sum with -0, as sm_80 has no other of bf16.
  uint2 pairs;
#define WIDEN(type, shift, mask, factor)                                  \
  asm("{\n.reg .b32 a, b, s, t;\n"                                        \
      "prmt.b32 a, %2, 0, 0x1404;\nprmt.b32 b, %2, 0, 0x3424;\n"          \
      "and.b32 s, a, 0x80008000;\nand.b32 t, b, 0x80008000;\n"            \
      "shr.u32 a, a, %5;\nshr.u32 b, b, %5;\n"                            \
      "lop3.b32 a, a, %6, s, 0xea;\nlop3.b32 b, b, %6, t, 0xea;\n"        \
      "fma.rn." type " %0, a, %3, %4;\nfma.rn." type " %1, b, %3, %4;\n}" \
      : "=r"(pairs.x), "=r"(pairs.y)                                      \
      : "r"(four), "r"(factor), "r"(0x80008000), "n"(shift), "n"(mask))
  if constexpr (is_f16<T>)
    WIDEN("f16x2", 1, 0x3f803f80, 0x5c005c00);
  else
    WIDEN("bf16x2", 4, 0x07f007f0, 0x7b807b80);
#undef WIDEN
  return pairs;
#else
  auto number = [&](int i) { return to_float(e4m3{(uint8_t)(four >> 8 * i)}); };
  return {pack<T>(number(0), number(1)), pack<T>(number(2), number(3))};
#endif
}
