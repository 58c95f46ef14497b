// What all kernels have that put matrices into 8 bits: scales, codes of eight numbers, and a transposed tile.
#pragma once

#include "fp8.h"
#include "reduce.h"

namespace davinci {
namespace quantize {

constexpr int kThreads = 256;
constexpr int kTile = 128;
constexpr int kPatch = 8;
constexpr int kAcross = kTile / kPatch;  // patches of a tile, both ways
constexpr u32 kInfinity = 0x7f800000u;
constexpr u32 kNoNumber = 0x7fc00000u;

// Sizes are ordered as their bits are, and what is no number is larger than all.
__device__ __forceinline__ u32 larger(u32 a, u32 b) { return a > b ? a : b; }
__device__ __forceinline__ u32 size_bits(float value) { return bits_of(value) & 0x7fffffffu; }

// What brings a largest number to the format's; NaN where it is infinite or none, so that it is seen.
__device__ __forceinline__ float scale_of(u32 amax, float top) {
  if (amax >= kInfinity) return float_of(kNoNumber);
  if (amax == 0) return 1.0f;
  return fminf(top / float_of(amax), 3.4028234663852886e38f);
}

// The power of two at or below it, at most 2^126: its inverse is a normal number too.
__device__ __forceinline__ float power_of_two_scale(u32 amax, float top) {
  const u32 power = bits_of(scale_of(amax, top)) & kInfinity;
  if (power == kInfinity) return float_of(kNoNumber);
  return float_of(power > 253u << 23 ? 253u << 23 : power);
}

// Of a whole warp, or with `bits` = 8 of each half of it.
__device__ __forceinline__ u32 largest_of_lanes(u32 value, int bits) {
  for (; bits; bits >>= 1) value = larger(value, __shfl_xor_sync(kAllLanes, value, bits));
  return value;
}

// The largest of a warp, joined to what is there. Most warps see that they change nothing, and leave the place that all
// of them want alone.
__device__ __forceinline__ void join(u32* amax, u32 seen) {
  seen = largest_of_lanes(seen, 16);
  if (threadIdx.x % 32 == 0 && seen > *reinterpret_cast<volatile u32*>(amax)) atomicMax(amax, seen);
}

struct Eight {
  float at[kPatch];
};

// The codes of 8 numbers. Where the hardware does not round, all patches call one copy of the code that does: such a
// GPU has no products of FP8 either.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 890
#define DAVINCI_ROUNDS_HERE __noinline__
#else
#define DAVINCI_ROUNDS_HERE __forceinline__
#endif
__device__ DAVINCI_ROUNDS_HERE u64 eight_codes(Eight values, bool e5m2) {
  u64 result = 0;
#pragma unroll
  for (int i = 0; i < kPatch; i += 2) {
    const float low = values.at[i], high = values.at[i + 1];
    result |= (u64)(e5m2 ? E5M2::pair(low, high) : E4M3::pair(low, high)) << (8 * i);
  }
  return result;
}

// The same of a kernel that has a copy of itself for each format, where registers are short.
template <class Format>
__device__ DAVINCI_ROUNDS_HERE u64 eight_codes(Eight values) {
  return (u64)Format::four(values.at + 4) << 32 | Format::four(values.at);
}

// The transposed tile, through shared memory: half a warp then writes 128 codes in a row. A column's 16 words are
// moved by its number over 8, so that those which lanes touch at once are in different banks.
struct Turned {
  static constexpr int kWords = kTile * kAcross + kAcross;
  __device__ __forceinline__ static int place(int column, int part) { return column * kAcross + column / kPatch + part; }
};

}  // namespace quantize
}  // namespace davinci
