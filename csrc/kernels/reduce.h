// Reductions over a warp and over a block, in a fixed order: the same bits from run to run.
#pragma once

#include "portable.h"

namespace davinci {

constexpr unsigned kAllLanes = 0xffffffffu;

// Largest value and sum of exponentials relative to it, of a part of a row (Milakov and Gimelshein, 2018, "Online
// normalizer calculation for softmax", arXiv 1805.02867, algorithm 3).
struct Softmax {
  float largest, total;
};

__device__ __forceinline__ Softmax no_logits() { return Softmax{-infinity(), 0.0f}; }

// What a sum relative to `from` is multiplied by to be relative to `to`. Of two infinities the difference is no number.
__device__ __forceinline__ float rescale(float from, float to) { return from == to ? 1.0f : exponential(from - to); }

__device__ __forceinline__ Softmax join(Softmax a, Softmax b) {
  const float largest = fmaxf(a.largest, b.largest);
  return Softmax{largest, a.total * rescale(a.largest, largest) + b.total * rescale(b.largest, largest)};
}

__device__ __forceinline__ Softmax add(Softmax sum, float logit) {
  // One exponential a logit, whichever of the two is larger.
  const bool larger = logit > sum.largest;
  const float other = rescale(larger ? sum.largest : logit, larger ? logit : sum.largest);
  if (larger) return Softmax{logit, sum.total * other + 1.0f};
  return Softmax{sum.largest, sum.total + other};
}

// The joined value of all threads of a block, the same bits in each of them.
// kThreads is a multiple of 32, at most 1,024. All threads call it.
template <int kThreads>
__device__ __forceinline__ Softmax join_block(Softmax value) {
  constexpr int kWarps = kThreads / 32;
  DAVINCI_SHARED(float, largest, kWarps);
  DAVINCI_SHARED(float, total, kWarps);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int bits = 16; bits; bits >>= 1) {
    const float other_largest = __shfl_xor_sync(kAllLanes, value.largest, bits);
    const float other_total = __shfl_xor_sync(kAllLanes, value.total, bits);
    value = join(value, Softmax{other_largest, other_total});
  }
  if (lane == 0) {
    largest[warp] = value.largest;
    total[warp] = value.total;
  }
  __syncthreads();
  value = no_logits();
  if (lane < kWarps) value = Softmax{largest[lane], total[lane]};
#pragma unroll
  for (int bits = 16; bits; bits >>= 1) {
    const float other_largest = __shfl_xor_sync(kAllLanes, value.largest, bits);
    const float other_total = __shfl_xor_sync(kAllLanes, value.total, bits);
    value = join(value, Softmax{other_largest, other_total});
  }
  // Two lanes may have contracted products and sums unlike each other: all take lane 0's.
  value.largest = __shfl_sync(kAllLanes, value.largest, 0);
  value.total = __shfl_sync(kAllLanes, value.total, 0);
  __syncthreads();  // the next row writes where this one is read
  return value;
}

// The sum over a warp, the same bits in each lane. All lanes call it.
__device__ __forceinline__ float sum_warp(float value) {
#pragma unroll
  for (int bits = 16; bits; bits >>= 1) value += __shfl_xor_sync(kAllLanes, value, bits);
  return value;
}

// The sum over a block, the same bits in each thread. All threads call it, with a `turn` that is 0 and 1 by turns: what
// one call reads is then not what the next writes, and one barrier is enough.
template <int kThreads>
__device__ __forceinline__ float sum_block(float value, int turn) {
  constexpr int kWarps = kThreads / 32;
  DAVINCI_SHARED(float, sums, 2 * kWarps);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  value = sum_warp(value);
  if (lane == 0) sums[turn * kWarps + warp] = value;
  __syncthreads();
  value = sums[turn * kWarps + lane % kWarps];
#pragma unroll
  for (int bits = kWarps / 2; bits; bits >>= 1) value += __shfl_xor_sync(kAllLanes, value, bits);
  return value;
}

// Of a value of each thread: thread i of the first warp gets the sum over threads i, i + 32, i + 64, ...
// All threads call it.
template <int kThreads>
__device__ __forceinline__ float sum_warps(float value) {
  DAVINCI_SHARED(float, values, kThreads);
  values[threadIdx.x] = value;
  __syncthreads();
  float sum = 0.0f;
  if (threadIdx.x < 32) {
#pragma unroll
    for (int warp = 0; warp < kThreads / 32; ++warp) sum += values[warp * 32 + threadIdx.x];
  }
  __syncthreads();  // the next call writes where this one is read
  return sum;
}

}  // namespace davinci
