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
template <class Format>
__device__ DAVINCI_ROUNDS_HERE u64 eight_codes(Eight values) {
  return (u64)Format::four(values.at + 4) << 32 | Format::four(values.at);
}
__device__ __forceinline__ u64 eight_codes(Eight values, bool e5m2) {
  return e5m2 ? eight_codes<E5M2>(values) : eight_codes<E4M3>(values);
}

// The largest sizes of numbers by their words: of bf16, of those in even and in odd columns, in a half each.
template <class T>
struct Sizes;
template <>
struct Sizes<f32> {
  u32 seen = 0;
  __device__ __forceinline__ void see(u32 word) { seen = larger(seen, word & 0x7fffffffu); }
  __device__ __forceinline__ u32 of(int) const { return seen; }
  __device__ __forceinline__ u32 largest() const { return seen; }
};
template <>
struct Sizes<bf16> {
  u32 seen = 0;
  __device__ __forceinline__ void see(u32 word) { seen = larger_halves(seen, word & 0x7fff7fffu); }
  __device__ __forceinline__ u32 of(int column) const { return column % 2 ? seen & 0xffff0000u : seen << 16; }
  __device__ __forceinline__ u32 largest() const { return larger(of(0), of(1)); }
};

// Four rows of four bytes become columns.
__device__ __forceinline__ void turn(u32& a, u32& b, u32& c, u32& d) {
  const u32 left_above = pick_bytes(a, b, 0x5140), left_below = pick_bytes(c, d, 0x5140);
  const u32 right_above = pick_bytes(a, b, 0x7362), right_below = pick_bytes(c, d, 0x7362);
  a = pick_bytes(left_above, left_below, 0x5410);
  b = pick_bytes(left_above, left_below, 0x7632);
  c = pick_bytes(right_above, right_below, 0x5410);
  d = pick_bytes(right_above, right_below, 0x7632);
}

// The codes of a patch: a word of 8 bytes is a row, and after `turn_all` a column.
struct CodedPatch {
  u32 low[kPatch], high[kPatch];

  __device__ __forceinline__ void set(int r, u64 codes) {
    low[r] = (u32)codes;
    high[r] = (u32)(codes >> 32);
  }
  __device__ __forceinline__ u64 word(int i) const { return (u64)high[i] << 32 | low[i]; }
  __device__ __forceinline__ void turn_all() {
    turn(low[0], low[1], low[2], low[3]);
    turn(low[4], low[5], low[6], low[7]);
    turn(high[0], high[1], high[2], high[3]);
    turn(high[4], high[5], high[6], high[7]);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const u32 below = low[4 + i];
      low[4 + i] = high[i];
      high[i] = below;
    }
  }
};

// The transposed tile, through shared memory: half a warp then writes 128 codes in a row. A column's 16 words are
// moved by its number over 8, so that those which lanes touch at once are in different banks.
struct Turned {
  static constexpr int kWords = kTile * kAcross + kAcross;
  __device__ __forceinline__ static int place(int column, int part) { return column * kAcross + column / kPatch + part; }
};

}  // namespace quantize
}  // namespace davinci
