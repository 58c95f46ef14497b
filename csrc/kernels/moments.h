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

constexpr int kGroup = 128, kPerLane = 8;
constexpr int kLanes = kGroup / kPerLane;  // of a group; a warp has several groups at a time
constexpr float kLog2Top = 8.807354922057604f;       // log2(448)
constexpr float kLog2Range = 17.807354922057604f;    // log2(448 / 2^-9)
constexpr float kPerLog2Range = 0.05615657509639467f;
constexpr float kLeastTop = 7.523163845262640e-37f;  // 2^-120; a group below it is all zeros
constexpr float kSmallest = 1.1754943508222875e-38f; // 2^-126
constexpr float kFirstDepth = 2.3283064365386963e-10f;   // 2^-32 of the top: first moments below become zero,
constexpr float kSecondDepth = 5.421010862427522e-20f;   // 2^-64: second moments below are raised to it

// One instruction of the hardware each, of numbers that are not subnormal; those count as zeros.
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
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#else
  return sqrtf(x);
#endif
}

// `top` and `bottom` are no numbers where one of the group is none or is infinite, and 0 where all are zeros.
struct Range {
  float top, bottom;
  // log2(top / bottom): at least 1, at most 64; 1 where they are zeros or no numbers.
  __device__ __forceinline__ float octaves() const { return fmaxf(log2_of(top * reciprocal(bottom)), 1.0f); }
};

// The power of top / bottom that a code's size is, relative to the top: 0 for the largest, -1 for the smallest, minus
// infinity for zero. Each lane has its own copy, a word in 32, so that no two wait for the same bank.
constexpr int kPowers = 128 * 32;

// All threads of a block call it; a barrier must follow.
template <int kThreads, class Powers>
__device__ __forceinline__ void fill(Powers& powers) {
  constexpr int kEach = kPowers / kThreads;  // codes that a warp fills in
  static_assert(kEach <= 32 && kEach * kThreads == kPowers, "a lane takes the logarithm of a code, and all are taken");
  const int lane = threadIdx.x % 32, from = threadIdx.x / 32 * kEach;
  // The code's bits in a float's places, with its exponent's offset.
  const u32 code = from + lane % kEach;
  const float size = float_of(code << 20) * 1.329227995784916e36f;  // 2^120
  const float power = code ? log2_of(size / E4M3::kTop) * kPerLog2Range : -infinity();
#pragma unroll
  for (int k = 0; k < kEach; ++k) powers[(from + k) * 32 + lane] = __shfl_sync(kAllLanes, power, k);
}

// The power of code `k` of four in a word. `lane`: the lane's number, times 4.
template <class Powers>
__device__ __forceinline__ float power_of(Powers& powers, u32 codes, int k, u32 lane) {
  // Where it is, in bytes: an index would be shifted twice.
  const u32 at = ((k ? codes >> (8 * k - 7) : codes << 7) & (127u << 7)) | lane;
#if defined(__CUDA_ARCH__)
  return *reinterpret_cast<const float*>(reinterpret_cast<const char*>(powers) + at);
#else
  return powers[at / 4];
#endif
}

// The sign of code `k` of four in a word, at a float's place.
__device__ __forceinline__ u32 sign_of(u32 codes, int k) { return codes << (24 - 8 * k) & 0x80000000u; }

__device__ __forceinline__ u32 larger(u32 a, u32 b) { return a > b ? a : b; }
__device__ __forceinline__ u32 smaller(u32 a, u32 b) { return a < b ? a : b; }

__device__ __forceinline__ u32 largest_of_group(u32 value) {
#pragma unroll
  for (int bits = kLanes / 2; bits; bits >>= 1) value = larger(value, __shfl_xor_sync(kAllLanes, value, bits));
  return value;
}

__device__ __forceinline__ u32 smallest_of_group(u32 value) {
#pragma unroll
  for (int bits = kLanes / 2; bits; bits >>= 1) value = smaller(value, __shfl_xor_sync(kAllLanes, value, bits));
  return value;
}

// The ends of a group's sizes, by their bits, which are ordered as sizes are. Numbers that are none come last.
struct Ends {
  u32 most, least;  // least: other than zero, less 1, which makes zero the largest of all
  __device__ __forceinline__ explicit Ends(const float (&of)[kPerLane]) : most(0), least(~0u) {
#pragma unroll
    for (int k = 0; k < kPerLane; ++k) {
      const u32 size = bits_of(of[k]) & 0x7fffffffu;
      most = larger(most, size);
      least = smaller(least, size - 1);
    }
    most = largest_of_group(most);
    least = smallest_of_group(least);
  }
  __device__ __forceinline__ float floor(float depth) const { return fmaxf(float_of(most) * depth, kSmallest); }
  __device__ __forceinline__ bool reach_below(float floor) const { return least < bits_of(floor) - 1; }
  __device__ __forceinline__ Range range() const {
    const float top = float_of(most), bottom = fminf(float_of(least + 1), 0.5f * top);
    // No branches: lanes of a group agree, but the compiler does not know.
    const bool bad = most >= 0x7f800000u, zeros = top < kLeastTop;
    return Range{bad ? not_a_number() : zeros ? 0.0f : top, bad ? not_a_number() : zeros ? 0.0f : bottom};
  }
};

// Ranges of both moments of a group, of which each lane has some; what is too small beside the largest is made zero, of
// the first, or raised, of the second. All lanes of a warp call it.
__device__ __forceinline__ void fit(float (&first)[kPerLane], float (&second)[kPerLane], Range& of_first,
                                    Range& of_second) {
  Ends m(first), v(second);
  const float drop = m.floor(kFirstDepth), raise = v.floor(kSecondDepth);
  // Seldom: moments of a group that lie so far apart.
  if (__any_sync(kAllLanes, m.reach_below(drop) || v.reach_below(raise))) {
#pragma unroll
    for (int k = 0; k < kPerLane; ++k) {
      if (fabsf(first[k]) < drop) first[k] = float_of(bits_of(first[k]) & 0x80000000u);
      if (second[k] > 0.0f && second[k] < raise) second[k] = raise;
    }
    m = Ends(first);
    v = Ends(second);
  }
  of_first = m.range();
  of_second = v.range();
}

struct Encoder {
  float per_top, power;
  __device__ __forceinline__ explicit Encoder(Range range) {
    per_top = range.top == 0.0f ? 0.0f : reciprocal(0.25f * range.top) * 0.25f;
    power = kLog2Range * reciprocal(range.octaves());
  }
  // What the code nearest to it stands for.
  __device__ __forceinline__ float stretched(float size) const {
    return power_of_two(log2_of(fabsf(size) * per_top) * power + kLog2Top);
  }
};

}  // namespace moments
}  // namespace davinci
