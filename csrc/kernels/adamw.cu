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

// An address from memory may be of any kind of memory, as far as the compiler knows. These are global.
template <class T>
__device__ __forceinline__ T* global(i64 address) {
  T* result = reinterpret_cast<T*>(address);
#if defined(__CUDA_ARCH__)
  __builtin_assume(__isGlobal(result));
#endif
  return result;
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

struct alignas(8) Four {
  bf16 at[kAtOnce];
};

template <bool kExact>
__device__ __forceinline__ float updated(const Settings& s, float parameter, float gradient, float& first,
                                         float& second) {
  const float g = s.scale * gradient;
  first = s.beta1 * first + s.rest1 * g;
  second = s.beta2 * second + s.rest2 * g * g;
  if (kExact) {
    const float size = sqrtf(second) * s.correction + s.epsilon;
    return (parameter - s.decay * parameter) - s.step * (first / size);
  }
  const float size = moments::square_root(second) * s.correction + s.epsilon;
  return (parameter - s.decay * parameter) - s.step * (first * reciprocal(size));
}

__device__ __forceinline__ void one(const Settings& s, const Span& span, i64 i) {
  float* first = reinterpret_cast<float*>(span.first) + i;
  float* second = reinterpret_cast<float*>(span.second) + i;
  float m = *first, v = *second;
  const float p = updated<true>(s, span.parameter[i], span.gradient[i], m, v);
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
      for (int k = 0; k < kAtOnce; ++k) p.at[k] = updated<true>(s, p.at[k], g.at[k], m.at[k], v.at[k]);
      reinterpret_cast<Vector<float>*>(span.parameter)[i] = p;
      reinterpret_cast<Vector<float>*>(span.first)[i] = m;
      reinterpret_cast<Vector<float>*>(span.second)[i] = v;
      if (!span.copy) continue;
      Four rounded;
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) rounded.at[k] = store<bf16>(p.at[k]);
      reinterpret_cast<Four*>(span.copy)[i] = rounded;
    }
    for (i64 i = vectors * kAtOnce + threadIdx.x; i < span.count; i += kThreads) one(s, span, i);
  }
}

// What a lane has of a group: four elements, and the group's ranges.
struct Held {
  Vector<float> parameter, gradient, ranges;
  u32 first, second;
};

// `here`: how many of the four there are; all of them, each four where one instruction moves them, if kWhole.
template <bool kWhole>
__device__ __forceinline__ Held taken(const Span& span, int group, int at, int here) {
  Held held;
  held.first = held.second = 0;
  if (kWhole) {
    held.parameter = *reinterpret_cast<const Vector<float>*>(span.parameter + at);
    held.gradient = *reinterpret_cast<const Vector<float>*>(span.gradient + at);
    held.first = *reinterpret_cast<const u32*>(span.first + at);
    held.second = *reinterpret_cast<const u32*>(span.second + at);
  } else {
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      const bool there = k < here;
      held.parameter.at[k] = there ? span.parameter[at + k] : 0.0f;
      held.gradient.at[k] = there ? span.gradient[at + k] : 0.0f;
      if (there) held.first |= (u32)span.first[at + k] << (8 * k);
      if (there) held.second |= (u32)span.second[at + k] << (8 * k);
    }
  }
  held.ranges = span.ranges[group];
  return held;
}

template <bool kWhole>
__device__ __forceinline__ void put(const Span& span, int group, int at, int here, const Held& held) {
  // All lanes have read the ranges: the reductions took what they made of them.
  if (threadIdx.x % 32 == 0) span.ranges[group] = held.ranges;
  if (kWhole) {
    *reinterpret_cast<Vector<float>*>(span.parameter + at) = held.parameter;
    *reinterpret_cast<u32*>(span.first + at) = held.first;
    *reinterpret_cast<u32*>(span.second + at) = held.second;
    if (!span.copy) return;
    Four rounded;
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) rounded.at[k] = store<bf16>(held.parameter.at[k]);
    *reinterpret_cast<Four*>(span.copy + at) = rounded;
    return;
  }
#pragma unroll
  for (int k = 0; k < kAtOnce; ++k) {
    if (k >= here) continue;
    span.parameter[at + k] = held.parameter.at[k];
    span.first[at + k] = (u8)(held.first >> (8 * k));
    span.second[at + k] = (u8)(held.second >> (8 * k));
    if (span.copy) span.copy[at + k] = store<bf16>(held.parameter.at[k]);
  }
}

__device__ __forceinline__ void update(const Settings& s, Held& held) {
  using namespace moments;
  const Decoder of_first(Range{held.ranges.at[0], held.ranges.at[1]});
  const Decoder of_second(Range{held.ranges.at[2], held.ranges.at[3]});
  float m[kPerLane], v[kPerLane], size[kPerLane];
#pragma unroll
  for (int k = 0; k < kPerLane; ++k) {
    m[k] = of_first.first(held.first >> (8 * k));
    v[k] = of_second.size_of(held.second >> (8 * k));
    held.parameter.at[k] = updated<false>(s, held.parameter.at[k], held.gradient.at[k], m[k], v[k]);
    size[k] = fabsf(m[k]);
  }
  const Encoder to_first(range_of<false>(size)), to_second(range_of<true>(v));
#pragma unroll
  for (int k = 0; k < kPerLane; ++k) {
    m[k] = float_of(bits_of(to_first.stretched<false>(size[k])) | (bits_of(m[k]) & 0x80000000u));
    v[k] = to_second.stretched<true>(v[k]);
  }
  held.first = E4M3::pair(m[0], m[1]) | E4M3::pair(m[2], m[3]) << 16;
  held.second = E4M3::pair(v[0], v[1]) | E4M3::pair(v[2], v[3]) << 16;
  const Range first = to_first.range, second = to_second.range;
  held.ranges = Vector<float>{{first.top, first.bottom, second.top, second.bottom}};
}

// A warp for a group, a lane for four of its elements.
__device__ __forceinline__ void eight_bits(const Settings& s, const i64* spans, i64 count) {
  using moments::kGroup;
  constexpr int kWarps = kThreads / 32;
  const int warp = threadIdx.x / 32, lane_at = threadIdx.x % 32 * kAtOnce;
  for (i64 n = blockIdx.x; n < count; n += gridDim.x) {
    const Span span(spans + 8 * n);
    const bool aligned = span.aligned && (((u64)span.first | (u64)span.second) & 3) == 0;
    const int elements = (int)span.count, groups = (elements + kGroup - 1) / kGroup;  // a run is short
    const int whole = aligned ? elements / kGroup : 0;
    int group = warp;
    Held next;
    if (group < whole) next = taken<true>(span, group, group * kGroup + lane_at, kAtOnce);
    for (; group < whole; group += kWarps) {
      Held held = next;
      // The next group is on its way while this one is computed.
      const int then = group + kWarps;
      if (then < whole) next = taken<true>(span, then, then * kGroup + lane_at, kAtOnce);
      update(s, held);
      put<true>(span, group, group * kGroup + lane_at, kAtOnce, held);
    }
    for (group = whole + warp; group < groups; group += kWarps) {
      const int at = group * kGroup + lane_at;
      Held held = taken<false>(span, group, at, elements - at);
      update(s, held);
      put<false>(span, group, at, elements - at, held);
    }
  }
}

}  // namespace adamw
}  // namespace davinci

#define DAVINCI_ADAMW(name, function)                                                                                  \
  DAVINCI_KERNEL(name, davinci::adamw::kThreads,                                                                       \
                 (const davinci::i64* spans, davinci::i64 count, float scale, float beta1, float rest1, float beta2,   \
                  float rest2, float epsilon, float step, float correction, float decay),                              \
                 (spans, count, scale, beta1, rest1, beta2, rest2, epsilon, step, correction, decay)) {                \
    const davinci::adamw::Settings settings{scale, beta1,   rest1, beta2,      rest2,                                  \
                                            epsilon, step, correction, decay};                                         \
    davinci::adamw::function(settings, spans, count);                                                                  \
  }

DAVINCI_ADAMW(adamw_fp32, full)
DAVINCI_ADAMW(adamw_fp8_moments_fp32, eight_bits)
