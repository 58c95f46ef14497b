// Moments of Adam in 8 bits: E4M3 codes of groups of 128, whose range is stretched to all that E4M3 has.
//
// After COAT (Xi et al., 2025, "COAT: Compressing Optimizer states and Activation for Memory-Efficient FP8 Training",
// arXiv 2410.19313, section 4.1): x is stored as the code nearest to 448 (|x| / top)^k. Here k is such that the largest
// of a group is 448 and its smallest, other than zero, 2^-9: both ends come back exactly, and so what is decoded and
// encoded again has the same codes. Zero is code 0. A group keeps `top` and `bottom`, which give k.
#pragma once

#include "fp8.h"
#include "reduce.h"

namespace davinci {
namespace moments {

constexpr int kGroup = 128, kPerLane = 4;
constexpr float kLog2Top = 8.807354922057604f;       // log2(448)
constexpr float kLog2Range = 17.807354922057604f;    // log2(448 / 2^-9)
constexpr float kPerLog2Range = 0.05615657509639467f;
constexpr float kLeastTop = 7.523163845262640e-37f;  // 2^-120; a group below it is all zeros
constexpr float kSmallest = 1.1754943508222875e-38f; // 2^-126
constexpr float kFirstDepth = 2.3283064365386963e-10f;   // 2^-32 of the top: first moments below become zero,
constexpr float kSecondDepth = 5.421010862427522e-20f;   // 2^-64: second moments below are raised to it

// One instruction of the hardware each, of numbers that are not subnormal.
__device__ __forceinline__ float log2_of(float x) {
#if defined(__CUDA_ARCH__)
  float result;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#else
  return log2f(x);
#endif
}

__device__ __forceinline__ float square_root(float x) {
#if defined(__CUDA_ARCH__)
  float result;
  asm("sqrt.approx.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#else
  return sqrtf(x);
#endif
}

// `top` and `bottom` are no numbers where one of the group is none or is infinite, and 0 where all are zeros.
struct Range {
  float top, bottom;
  // log2(top / bottom): at least 1, at most 64. The factors keep an inverse from being subnormal.
  __device__ __forceinline__ float octaves() const { return log2_of(top * reciprocal(bottom)); }
};

// Top and bottom come back to a few units of 2^-22 here; in kernels/moments.py, which checkpoints use, exactly.
struct Decoder {
  float top, slope, shift;
  __device__ __forceinline__ explicit Decoder(Range range) : top(range.top) {
    slope = range.octaves() * kPerLog2Range;
    shift = -kLog2Top * slope;
  }
  __device__ __forceinline__ float size_of(u32 code) const {
    const u32 size = code & 127u;
    // The code's bits in a float's places, with its exponent's offset.
    const float value = float_of(size << 20) * 1.329227995784916e36f;  // 2^120
    const float result = top * power_of_two(log2_of(value) * slope + shift);
    return size == 0 ? 0.0f : result;
  }
  __device__ __forceinline__ float first(u32 code) const {
    return float_of(bits_of(size_of(code)) | ((code & 128u) << 24));
  }
};

__device__ __forceinline__ u32 largest_of_warp(u32 value) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
#pragma unroll
  for (int bits = 16; bits; bits >>= 1) {
    const u32 other = __shfl_xor_sync(kAllLanes, value, bits);
    value = other > value ? other : value;
  }
  return value;
#else
  return __reduce_max_sync(kAllLanes, value);
#endif
}

__device__ __forceinline__ u32 smallest_of_warp(u32 value) { return ~largest_of_warp(~value); }

// The range of a group, of which each lane of a warp has four sizes. `kSecond`: whether they are second moments.
template <bool kSecond>
__device__ __forceinline__ Range range_of(const float (&size)[kPerLane]) {
  // Sizes are no less than 0, so they are ordered as their bits are. Numbers that are none come last.
  u32 most = 0;
#pragma unroll
  for (int k = 0; k < kPerLane; ++k) most = bits_of(size[k]) > most ? bits_of(size[k]) : most;
  most = largest_of_warp(most);
  const float top = float_of(most);
  const float floor = fmaxf(top * (kSecond ? kSecondDepth : kFirstDepth), kSmallest);
  u32 least = most;
#pragma unroll
  for (int k = 0; k < kPerLane; ++k) {
    const bool counts = kSecond ? size[k] > 0.0f : size[k] >= floor;
    if (counts && bits_of(size[k]) < least) least = bits_of(size[k]);
  }
  least = smallest_of_warp(least);
  float bottom = float_of(least);
  if (kSecond) bottom = fmaxf(bottom, floor);
  bottom = fminf(bottom, 0.5f * top);
  // No branches: a warp's lanes agree, but the compiler does not know.
  const bool bad = most >= 0x7f800000u, zeros = top < kLeastTop;
  return Range{bad ? not_a_number() : zeros ? 0.0f : top, bad ? not_a_number() : zeros ? 0.0f : bottom};
}

// `fmaxf` would hide what is no number.
__device__ __forceinline__ float larger(float a, float b) { return a < b ? b : a; }

struct Encoder {
  Range range;
  float per_top, power;
  __device__ __forceinline__ explicit Encoder(Range range_) : range(range_) {
    per_top = reciprocal(0.25f * range.top) * 0.25f;
    power = kLog2Range * reciprocal(range.octaves());
    if (range.top == 0.0f) {
      per_top = 0.0f;
      power = 1.0f;
    }
  }
  // What the code nearest to it stands for.
  template <bool kSecond>
  __device__ __forceinline__ float stretched(float size) const {
    const float held = kSecond ? larger(size, range.bottom) : size;
    const float result = power_of_two(log2_of(held * per_top) * power + kLog2Top);
    const bool zero = kSecond ? size == 0.0f : size < range.bottom;
    return zero ? 0.0f : result;
  }
};

}  // namespace moments
}  // namespace davinci
