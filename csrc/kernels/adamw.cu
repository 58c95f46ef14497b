// AdamW (Loshchilov and Hutter, 2019, "Decoupled weight decay regularization", arXiv 1711.05101) of many tensors in one
// launch. Parameters and gradients are fp32; moments are fp32, or 8 bits a number (moments.h). A bf16 copy of what is
// updated is written beside it where one is wanted.
//
// `spans` lists runs of elements, 8 numbers each: addresses of parameter, gradient, first and second moment, ranges of
// the moments' groups (top and bottom of the first, then of the second), bf16 copy or 0; elements; 0. A run lies in one
// tensor. Where moments have groups it begins where a group does. Sizes beyond 2^31 are so many runs.
#include "moments.h"

namespace davinci {
namespace adamw {

constexpr int kThreads = 256;
constexpr int kAtOnce = 4;  // elements that a thread takes together

template <class T>
__device__ __forceinline__ T* global(i64 address) {
  return known_global(reinterpret_cast<T*>(address));
}

struct Span {
  float* parameter;
  const float* gradient;
  u8 *first, *second;
  Vector<float>* ranges;
  bf16* copy;
  i64 count;
  bool aligned;  // to what one instruction moves
  __device__ __forceinline__ explicit Span(const i64* row) {
    parameter = global<float>(row[0]);
    gradient = global<const float>(row[1]);
    first = global<u8>(row[2]);
    second = global<u8>(row[3]);
    ranges = global<Vector<float>>(row[4]);
    copy = global<bf16>(row[5]);
    count = row[6];
    aligned = ((row[0] | row[1]) & 15) == 0 && (row[5] & 7) == 0;
  }
};

struct Settings {
  float scale;  // of the gradient
  float beta1, rest1, beta2, rest2, epsilon;
  float step;        // learning rate / (1 - beta1^t)
  float correction;  // 1 / sqrt(1 - beta2^t)
  float decay;       // learning rate * weight decay
};

__device__ __forceinline__ float updated(const Settings& s, float parameter, float gradient, float& first,
                                         float& second) {
  const float g = s.scale * gradient;
  first = s.beta1 * first + s.rest1 * g;
  second = s.beta2 * second + s.rest2 * g * g;
  const float size = sqrtf(second) * s.correction + s.epsilon;
  return (parameter - s.decay * parameter) - s.step * (first / size);
}

__device__ __forceinline__ Pack<u32, 2> rounded(const Vector<float>& of) {
  return Pack<u32, 2>{{bf16_pair(of.at[0], of.at[1]), bf16_pair(of.at[2], of.at[3])}};
}

__device__ __forceinline__ void one(const Settings& s, const Span& span, i64 i) {
  float* first = reinterpret_cast<float*>(span.first) + i;
  float* second = reinterpret_cast<float*>(span.second) + i;
  float m = *first, v = *second;
  const float p = updated(s, span.parameter[i], span.gradient[i], m, v);
  *first = m;
  *second = v;
  span.parameter[i] = p;
  if (span.copy) span.copy[i] = store<bf16>(p);
}

__device__ __forceinline__ void full(const Settings& s, const i64* spans, i64 count) {
  for (i64 n = blockIdx.x; n < count; n += gridDim.x) {
    const Span span(spans + 8 * n);
    if (!span.aligned || (((u64)span.first | (u64)span.second) & 15)) {
      for (i64 i = threadIdx.x; i < span.count; i += kThreads) one(s, span, i);
      continue;
    }
    const i64 vectors = span.count / kAtOnce;
    for (i64 i = threadIdx.x; i < vectors; i += kThreads) {
      Vector<float> p = reinterpret_cast<Vector<float>*>(span.parameter)[i];
      const Vector<float> g = reinterpret_cast<const Vector<float>*>(span.gradient)[i];
      Vector<float> m = reinterpret_cast<Vector<float>*>(span.first)[i];
      Vector<float> v = reinterpret_cast<Vector<float>*>(span.second)[i];
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) p.at[k] = updated(s, p.at[k], g.at[k], m.at[k], v.at[k]);
      reinterpret_cast<Vector<float>*>(span.parameter)[i] = p;
      reinterpret_cast<Vector<float>*>(span.first)[i] = m;
      reinterpret_cast<Vector<float>*>(span.second)[i] = v;
      if (!span.copy) continue;
      reinterpret_cast<Pack<u32, 2>*>(span.copy)[i] = rounded(p);
    }
    for (i64 i = vectors * kAtOnce + threadIdx.x; i < span.count; i += kThreads) one(s, span, i);
  }
}

// What a lane has of a group: some times four elements beside its neighbours' fours, and the group's ranges.
constexpr int kFours = moments::kPerLane / kAtOnce, kApart = moments::kLanes * kAtOnce;

struct Held {
  Vector<float> parameter[kFours], gradient[kFours], ranges;
  u32 first[kFours], second[kFours];
};

// `here`: how many elements there are from `at` on; all of them, each four where one instruction moves them, if kWhole.
template <bool kWhole>
__device__ __forceinline__ Held taken(const Span& span, int group, int at, int here) {
  Held held;
  if (kWhole) {
#pragma unroll
    for (int j = 0; j < kFours; ++j) {
      held.parameter[j] = *known_global(reinterpret_cast<const Vector<float>*>(span.parameter + at + j * kApart));
      held.gradient[j] = *known_global(reinterpret_cast<const Vector<float>*>(span.gradient + at + j * kApart));
      held.first[j] = *known_global(reinterpret_cast<const u32*>(span.first + at + j * kApart));
      held.second[j] = *known_global(reinterpret_cast<const u32*>(span.second + at + j * kApart));
    }
  } else {
#pragma unroll
    for (int j = 0; j < kFours; ++j) {
      held.first[j] = held.second[j] = 0;
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) {
        const int i = j * kApart + k;
        const bool there = i < here;
        held.parameter[j].at[k] = there ? span.parameter[at + i] : 0.0f;
        held.gradient[j].at[k] = there ? span.gradient[at + i] : 0.0f;
        if (there) held.first[j] |= (u32)span.first[at + i] << (8 * k);
        if (there) held.second[j] |= (u32)span.second[at + i] << (8 * k);
      }
    }
  }
  held.ranges = kWhole || group * moments::kGroup < span.count ? span.ranges[group] : Vector<float>{};
  return held;
}

template <bool kWhole>
__device__ __forceinline__ void put(const Span& span, int group, int at, int here, const Held& held) {
  // All lanes of the group have read its ranges: the reductions took what they made of them.
  const bool there = kWhole || group * moments::kGroup < span.count;
  if (threadIdx.x % moments::kLanes == 0 && there) span.ranges[group] = held.ranges;
  if (kWhole) {
#pragma unroll
    for (int j = 0; j < kFours; ++j) {
      *known_global(reinterpret_cast<Vector<float>*>(span.parameter + at + j * kApart)) = held.parameter[j];
      *known_global(reinterpret_cast<u32*>(span.first + at + j * kApart)) = held.first[j];
      *known_global(reinterpret_cast<u32*>(span.second + at + j * kApart)) = held.second[j];
      if (span.copy)
        *known_global(reinterpret_cast<Pack<u32, 2>*>(span.copy + at + j * kApart)) = rounded(held.parameter[j]);
    }
  } else {
#pragma unroll
    for (int j = 0; j < kFours; ++j) {
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) {
        const int i = j * kApart + k;
        if (i >= here) continue;
        span.parameter[at + i] = held.parameter[j].at[k];
        span.first[at + i] = (u8)(held.first[j] >> (8 * k));
        span.second[at + i] = (u8)(held.second[j] >> (8 * k));
        if (span.copy) span.copy[at + i] = store<bf16>(held.parameter[j].at[k]);
      }
    }
  }
}

template <class Powers>
__device__ __forceinline__ void update(const Settings& s, Powers& powers, Held& held) {
  using namespace moments;
  Range of_first{held.ranges.at[0], held.ranges.at[1]}, of_second{held.ranges.at[2], held.ranges.at[3]};
  // Of a decoded moment, top * 2^(power * octaves), beta times that is wanted.
  const float first_octaves = of_first.octaves(), first_top = s.beta1 * of_first.top;
  const float second_octaves = of_second.octaves(), second_top = s.beta2 * of_second.top;
  float m[kPerLane], v[kPerLane];
  u32 lane = threadIdx.x % 32 * 4;
  opaque(lane);
#pragma unroll
  for (int k = 0; k < kPerLane; ++k) {
    const int j = k / kAtOnce, at = k % kAtOnce;
    const float g = s.scale * held.gradient[j].at[at];
    const float first = power_of_two(power_of(powers, held.first[j], at, lane) * first_octaves);
    const float second = power_of_two(power_of(powers, held.second[j], at, lane) * second_octaves);
    m[k] = float_of(bits_of(first) | sign_of(held.first[j], at)) * first_top + s.rest1 * g;
    v[k] = second * second_top + s.rest2 * g * g;
    const float size = square_root(v[k]) * s.correction + s.epsilon;
    float& parameter = held.parameter[j].at[at];
    parameter = (parameter - s.decay * parameter) - s.step * (m[k] * reciprocal(size));
  }
  fit(m, v, of_first, of_second);
  const Encoder to_first(of_first), to_second(of_second);
#pragma unroll
  for (int k = 0; k < kPerLane; ++k) {
    m[k] = float_of(bits_of(to_first.stretched(m[k])) | (bits_of(m[k]) & 0x80000000u));
    v[k] = to_second.stretched(v[k]);
  }
#pragma unroll
  for (int j = 0; j < kFours; ++j) {
    const int k = j * kAtOnce;
    held.first[j] = E4M3::four(m + k);
    held.second[j] = E4M3::four(v + k);
  }
  held.ranges = Vector<float>{{of_first.top, of_first.bottom, of_second.top, of_second.bottom}};
}

// A warp for some groups, neighbours, at a time.
constexpr int kGroups = 32 / moments::kLanes;

// Groups of a run of which all that a warp has at a time are whole; others are taken as if none were.
__device__ __forceinline__ int whole_groups(const Span& span) {
  const bool aligned = span.aligned && (((u64)span.first | (u64)span.second) & 3) == 0;
  return aligned ? (int)span.count / moments::kGroup / kGroups * kGroups : 0;  // a run is short
}

// Blocks go on from run to run, and a warp's next group is on its way while it computes one, that of the next run too.
__device__ __forceinline__ void eight_bits(const Settings& s, const i64* spans, i64 count) {
  using namespace moments;
  constexpr int kStep = kThreads / kLanes;
  DAVINCI_SHARED(float, powers, kPowers);
  fill<kThreads>(powers);
  __syncthreads();
  const int mine = threadIdx.x / kLanes, lane_at = threadIdx.x % kLanes * kAtOnce;
  Held next;
  const auto ask = [&](const Span& span, int group) {
    next = taken<true>(span, group, group * kGroup + lane_at, kPerLane);
  };
  const auto ask_first = [&](i64 run) {
    if (run >= count) return;
    const Span span(spans + 8 * run);
    if (mine < whole_groups(span)) ask(span, mine);
  };
  ask_first(blockIdx.x);
  for (i64 n = blockIdx.x; n < count; n += gridDim.x) {
    const Span span(spans + 8 * n);
    const i64 after = n + gridDim.x;
    if (after < count) prefetch(spans + 8 * after);
    const int elements = (int)span.count, whole = whole_groups(span);
    int group = mine;
    // Two turns at once: what has come then need not change registers, which takes an instruction in ten.
#pragma unroll 2
    for (; group < whole; group += kStep) {
      Held held = next;
      if (group + kStep < whole)
        ask(span, group + kStep);
      else
        ask_first(after);
      update(s, powers, held);
      put<true>(span, group, group * kGroup + lane_at, kPerLane, held);
    }
    if (mine >= whole) ask_first(after);
    for (int first = whole; first * kGroup < elements; first += kStep) {
      group = first + mine;
      const int at = group * kGroup + lane_at;
      Held held = taken<false>(span, group, at, elements - at);
      update(s, powers, held);
      put<false>(span, group, at, elements - at, held);
    }
  }
}

}  // namespace adamw
}  // namespace davinci

#define DAVINCI_ADAMW(name, bounds, function)                                                                          \
  DAVINCI_KERNEL_WITHIN(name, davinci::adamw::kThreads, 0, bounds,                                                     \
                 (const davinci::i64* spans, davinci::i64 count, float scale, float beta1, float rest1, float beta2,   \
                  float rest2, float epsilon, float step, float correction, float decay),                              \
                 (spans, count, scale, beta1, rest1, beta2, rest2, epsilon, step, correction, decay)) {                \
    const davinci::adamw::Settings settings{scale, beta1,   rest1, beta2,      rest2,                                  \
                                            epsilon, step, correction, decay};                                         \
    davinci::adamw::function(settings, spans, count);                                                                  \
  }

DAVINCI_ADAMW(adamw_fp32, (davinci::adamw::kThreads), full)
DAVINCI_ADAMW(adamw_fp8_moments_fp32, (davinci::adamw::kThreads, 2), eight_bits)
