// Numbers of 8 bits: E4M3 and E5M2 (Micikevicius et al., 2022, arXiv 2209.05433), to the nearest, ties to even. What
// is beyond the largest number becomes the largest; what is no number stays none.
#pragma once

#include "portable.h"

namespace davinci {

// The codes of four, the first one in the lowest byte, of a format whose pairs the hardware knows by a name.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
#define DAVINCI_CODES_OF_FOUR(name)                                                                              \
  __device__ __forceinline__ static u32 four(const float* values) {                                             \
    u32 result;                                                                                                 \
    asm("{ .reg .b16 low, high; cvt.rn.satfinite." name ".f32 low, %2, %1; cvt.rn.satfinite." name              \
        ".f32 high, %4, %3; mov.b32 %0, {low, high}; }"                                                         \
        : "=r"(result)                                                                                          \
        : "f"(values[0]), "f"(values[1]), "f"(values[2]), "f"(values[3]));                                      \
    return result;                                                                                              \
  }
#else
#define DAVINCI_CODES_OF_FOUR(name)                                                 \
  __device__ __forceinline__ static u32 four(const float* values) {                \
    return pair(values[0], values[1]) | pair(values[2], values[3]) << 16;          \
  }
#endif

// Hardware rounds two at once from compute capability 8.9 on; `low` is in the lower byte.
struct E4M3 {
  static constexpr float kTop = 448.0f;
  static constexpr u32 kTopCode = 126;
  __device__ __forceinline__ static u32 pair(float low, float high) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
    u16 result;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(result) : "f"(high), "f"(low));
    return result;
#else
    return code(low) | code(high) << 8;
#endif
  }
  DAVINCI_CODES_OF_FOUR("e4m3x2")
  __device__ __forceinline__ static u32 code(float value) {
    const float size = fabsf(value);
    u32 result;
    if (!(size <= kTop)) {
      result = size > kTop ? kTopCode : 127u;
    } else if (size < 0.015625f) {
      result = bits_of(size + 16384.0f) - bits_of(16384.0f);  // of which the last bit is 2^-9
    } else {
      const u32 bits = bits_of(size);
      result = ((bits + 0x7ffffu + ((bits >> 20) & 1u)) >> 20) - (120u << 3);
    }
    return result | ((bits_of(value) >> 24) & 128u);
  }
};

struct E5M2 {
  static constexpr float kTop = 57344.0f;
  static constexpr u32 kTopCode = 123;
  __device__ __forceinline__ static u32 pair(float low, float high) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
    u16 result;
    asm("cvt.rn.satfinite.e5m2x2.f32 %0, %1, %2;" : "=h"(result) : "f"(high), "f"(low));
    return result;
#else
    return code(low) | code(high) << 8;
#endif
  }
  DAVINCI_CODES_OF_FOUR("e5m2x2")
  __device__ __forceinline__ static u32 code(float value) {
    const float size = fabsf(value);
    u32 result;
    if (!(size <= kTop)) {
      result = size > kTop ? kTopCode : 127u;
    } else if (size < 6.103515625e-05f) {
      result = bits_of(size + 128.0f) - bits_of(128.0f);  // of which the last bit is 2^-16
    } else {
      const u32 bits = bits_of(size);
      result = ((bits + 0xfffffu + ((bits >> 21) & 1u)) >> 21) - (112u << 2);
    }
    return result | ((bits_of(value) >> 24) & 128u);
  }
};

}  // namespace davinci
