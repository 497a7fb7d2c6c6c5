// What every kernel builds on: integer types, bf16, f16 and e4m3 numbers, shared memory.
//
// Compiled three ways: by nvcc ahead of time, by NVRTC at run time (so nothing of CUDA's own headers is
// included), and by a C++ compiler over the emulation, where each wrapper of an instruction has its meaning
// written out.
#pragma once

#ifdef __CUDACC__
#ifdef __CUDACC_RTC__
typedef unsigned char uint8_t;
typedef unsigned short uint16_t;
typedef int int32_t;
typedef unsigned int uint32_t;
typedef long long int64_t;
typedef unsigned long long uint64_t;
typedef unsigned long long uintptr_t;
#else
#include <stdint.h>
#endif
#ifndef INFINITY
#define INFINITY __int_as_float(0x7f800000)
#endif
// Dynamic shared memory, aligned for the swizzles of TMA.
#define DYN_SHARED(T, name)                                \
  extern __shared__ __align__(1024) char dynamic_shared[]; \
  T* name = (T*)dynamic_shared
#define EMU_KERNEL(f)
#define PLANTED(name) false
#else
#include "emu.h"
#endif

// The two kinds of 16-bit floats. What is the same for both is a template of T, one of them.
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};
template <class T>
constexpr bool is_f16 = false;
template <>
constexpr bool is_f16<f16> = true;

// Makes a kernel `name_T` for blocks of `threads` of the template `name`, which takes a struct Params<T>.
#define KERNEL(name, T, Params, threads)                                                                  \
  extern "C" __global__ void __launch_bounds__(threads) name##_##T(const __grid_constant__ Params<T> p) { \
    name(p);                                                                                              \
  }                                                                                                       \
  EMU_KERNEL(name##_##T)
#define KERNELS(name, Params, threads) KERNEL(name, bf16, Params, threads) KERNEL(name, f16, Params, threads)

// Eight-bit floats with 4 bits of exponent and 3 of mantissa: no infinity, up to 448.
struct e4m3 {
  uint8_t bits;
};

constexpr float kLog2E = 1.4426950408889634f;

__device__ __forceinline__ float to_float(bf16 x) {
  return __uint_as_float((uint32_t)x.bits << 16);
}
__device__ __forceinline__ float to_float(f16 x) {
#ifdef __CUDACC__
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
#else
  // Exponent and mantissa stand in the place of a float's; the product moves the bias, also of subnormal
  // numbers. That of infinity and NaN stays the largest.
  const uint32_t sign = (uint32_t)(x.bits & 0x8000) << 16, magnitude = (uint32_t)(x.bits & 0x7fff) << 13;
  if (magnitude >= 0x7c00 << 13)
    return __uint_as_float(sign | 0x7f800000u | magnitude);
  return __uint_as_float(sign | __float_as_uint(__uint_as_float(magnitude) * __uint_as_float(0x77800000u)));
#endif
}
__device__ __forceinline__ float to_float(float x) {
  return x;
}

__device__ __forceinline__ float to_float(e4m3 x) {
  // Exponent and mantissa stand in the place of a float's; the product moves the bias, also of subnormal
  // numbers.
  float magnitude = __uint_as_float((uint32_t)(x.bits & 0x7f) << 20) * __uint_as_float(0x7b800000u);
  if ((x.bits & 0x7f) == 0x7f)
    magnitude = __uint_as_float(0x7fc00000u);
  return x.bits & 0x80 ? -magnitude : magnitude;
}

// Rounds to the nearest, ties to even; what is beyond the largest number becomes infinity, NaN stays NaN.
template <class T>
__device__ T from_float(float x) = delete;
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ bf16 from_float<bf16>(float x) {
#ifdef __CUDACC__
  bf16 y;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
#else
  uint32_t u = __float_as_uint(x);
  if (x != x)
    return {0x7fff};
  return {(uint16_t)((u + 0x7fff + (u >> 16 & 1)) >> 16)};
#endif
}
template <>
__device__ __forceinline__ f16 from_float<f16>(float x) {
#ifdef __CUDACC__
  f16 y;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
#else
  uint32_t u = __float_as_uint(x);
  const uint16_t sign = u >> 16 & 0x8000;
  const float magnitude = fabsf(x);
  if (x != x)
    return {0x7fff};
  if (magnitude >= 65520.0f)  // half a step beyond the largest number
    return {(uint16_t)(sign | 0x7c00)};
  if (magnitude < 0.00006103515625f)  // subnormal: steps of 2^-24
    return {(uint16_t)(sign | (uint16_t)rintf(magnitude * 16777216.0f))};
  u = (u & 0x7fffffff) + 0xfff + (u >> 13 & 1);
  return {(uint16_t)(sign | ((u >> 13) - (112 << 10)))};
#endif
}

// Two numbers in a register, the first in the low half.
template <class T>
__device__ __forceinline__ uint32_t pack(float lo, float hi) {
#ifdef __CUDACC__
  uint32_t r;
  if constexpr (is_f16<T>)
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
  else
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
  return r;
#else
  return from_float<T>(lo).bits | (uint32_t)from_float<T>(hi).bits << 16;
#endif
}

template <class T>
__device__ __forceinline__ float lo_of(uint32_t pair) {
  if constexpr (is_f16<T>)
    return to_float(f16{(uint16_t)pair});
  else
    return __uint_as_float(pair << 16);
}
template <class T>
__device__ __forceinline__ float hi_of(uint32_t pair) {
  if constexpr (is_f16<T>)
    return to_float(f16{(uint16_t)(pair >> 16)});
  else
    return __uint_as_float(pair & 0xffff0000u);
}

// Rounds to the nearest, ties to even; what is beyond 448 becomes 448, NaN stays NaN.
__device__ __forceinline__ e4m3 to_e4m3(float x) {
#if defined(__CUDACC__) && __CUDA_ARCH__ >= 890
  uint16_t pair;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(0.0f), "f"(x));
  return {(uint8_t)pair};
#else
  uint32_t u = __float_as_uint(x);
  uint8_t sign = u >> 24 & 0x80;
  float magnitude = fabsf(x);
  if (x != x)
    return {0x7f};
  if (magnitude >= 448.0f)
    return {(uint8_t)(sign | 0x7e)};
  if (magnitude < 0.015625f)  // subnormal: steps of 2^-9
    return {(uint8_t)(sign | (uint8_t)rintf(magnitude * 512.0f))};
  u = (u & 0x7fffffff) + 0x7ffff + (u >> 20 & 1);
  return {(uint8_t)(sign | ((u >> 20) - (120 << 3)))};
#endif
}

// Sum over the lanes of a warp, in the same order in every lane.
__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2)
    x += __shfl_xor_sync(~0u, x, offset);
  return x;
}

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2)
    x = fmaxf(x, __shfl_xor_sync(~0u, x, offset));
  return x;
}
