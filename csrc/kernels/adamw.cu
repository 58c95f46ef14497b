// AdamW (Loshchilov and Hutter, 2019, "Decoupled weight decay regularization", arXiv 1711.05101) of many tensors in one
// launch. Parameters and gradients are fp32; moments are fp32, or 8 bits a number (moments.h). A bf16 copy of what is
// updated is written beside it where one is wanted.
//
// `spans` lists runs of elements, 8 numbers each: addresses of parameter, gradient, first and second moment, ranges of
// the moments' groups (top and bottom of the first, then of the second), bf16 copy or 0; elements, at most `most`; 0. A
// run lies in one tensor. Where moments have groups it begins where a group does. Sizes beyond 2^31 are so many runs.
//
// Multiprocessors are not equally near to memory: where each is dealt the same share, the slowest ends last, on an H200
// a twelfth later than all would together. So a block with fp32 moments takes a tile of a run and ends, and the next one
// begins where there is room; with moments in 8 bits, whose blocks go on, they draw their runs.
#include "moments.h"

namespace davinci {
namespace adamw {

constexpr int kThreads = 128;
constexpr int kAtOnce = 4;  // elements that a thread takes together
constexpr int kVectors = 2;  // of so many, of a thread in a tile of fp32 moments

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

__device__ __forceinline__ void full(const Settings& s, const i64* spans, i64 count, i64 most) {
  constexpr int kTile = kThreads * kAtOnce * kVectors;
  const u32 tiles = (u32)((most + kTile - 1) / kTile);  // of a run
  for (i64 unit = blockIdx.x; unit < count * tiles; unit += gridDim.x) {
    const u32 run = (u32)unit / tiles, begin = ((u32)unit - run * tiles) * kTile;
    const Span span(spans + 8 * (i64)run);
    if (begin >= span.count) continue;
    const int end = (int)(span.count - begin < kTile ? span.count : begin + kTile);
    const bool aligned = span.aligned && (((u64)span.first | (u64)span.second) & 15) == 0;
    const int vectors = aligned ? end / kAtOnce : 0, mine = (int)begin / kAtOnce + (int)threadIdx.x;
    Vector<float> p[kVectors], g[kVectors], m[kVectors], v[kVectors];
#pragma unroll
    for (int j = 0; j < kVectors; ++j) {
      const int i = mine + j * kThreads;
      if (i >= vectors) continue;
      p[j] = reinterpret_cast<Vector<float>*>(span.parameter)[i];
      g[j] = reinterpret_cast<const Vector<float>*>(span.gradient)[i];
      m[j] = reinterpret_cast<Vector<float>*>(span.first)[i];
      v[j] = reinterpret_cast<Vector<float>*>(span.second)[i];
    }
#pragma unroll
    for (int j = 0; j < kVectors; ++j) {
      const int i = mine + j * kThreads;
      if (i >= vectors) continue;
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k)
        p[j].at[k] = updated(s, p[j].at[k], g[j].at[k], m[j].at[k], v[j].at[k]);
      reinterpret_cast<Vector<float>*>(span.parameter)[i] = p[j];
      reinterpret_cast<Vector<float>*>(span.first)[i] = m[j];
      reinterpret_cast<Vector<float>*>(span.second)[i] = v[j];
      if (span.copy) reinterpret_cast<Pack<u32, 2>*>(span.copy)[i] = rounded(p[j]);
    }
    const int rest = vectors * kAtOnce > (int)begin ? vectors * kAtOnce : (int)begin;
    for (int i = rest + (int)threadIdx.x; i < end; i += kThreads) one(s, span, i);
  }
}

// What a lane has of a group: some times four elements beside its neighbours' fours, and the group's ranges.
constexpr int kFours = moments::kPerLane / kAtOnce, kApart = moments::kLanes * kAtOnce;

struct Held {
  Vector<float> parameter[kFours], gradient[kFours], ranges;
  u32 first[kFours], second[kFours];
};

// Codes of a warp's two groups are read and written a group after the other, by all lanes, since memory then moves whole
// lines of 128 bytes: a lane has four elements of each, where it computes with eight of one.
static_assert(moments::kLanes == 16 && kFours == 2, "two groups of a warp, of two fours each");

// Where a lane's codes of the warp's first group are.
__device__ __forceinline__ int codes_of(int group) {
  const int lane = (int)threadIdx.x % 32;
  return (group - lane / moments::kLanes) * moments::kGroup + lane * kAtOnce;
}

// From fours as they are read to fours that are computed with, and back. All lanes of a warp call it.
__device__ __forceinline__ void exchange(u32 (&fours)[kFours]) {
  const bool upper = threadIdx.x % 32 >= moments::kLanes;
  const u32 came = __shfl_xor_sync(kAllLanes, upper ? fours[0] : fours[1], moments::kLanes);
  fours[0] = upper ? came : fours[0];
  fours[1] = upper ? fours[1] : came;
}

// `here`: how many elements there are from `at` on; all of them, each four where one instruction moves them, if kWhole.
template <bool kWhole>
__device__ __forceinline__ Held taken(const Span& span, int group, int at, int here) {
  Held held;
  if (kWhole) {
    const int codes = codes_of(group);
#pragma unroll
    for (int j = 0; j < kFours; ++j) {
      held.first[j] = *known_global(reinterpret_cast<const u32*>(span.first + codes + j * moments::kGroup));
      held.second[j] = *known_global(reinterpret_cast<const u32*>(span.second + codes + j * moments::kGroup));
      held.parameter[j] = *known_global(reinterpret_cast<const Vector<float>*>(span.parameter + at + j * kApart));
      held.gradient[j] = *known_global(reinterpret_cast<const Vector<float>*>(span.gradient + at + j * kApart));
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
    const int codes = codes_of(group);
#pragma unroll
    for (int j = 0; j < kFours; ++j) {
      *known_global(reinterpret_cast<Vector<float>*>(span.parameter + at + j * kApart)) = held.parameter[j];
      *known_global(reinterpret_cast<u32*>(span.first + codes + j * moments::kGroup)) = held.first[j];
      *known_global(reinterpret_cast<u32*>(span.second + codes + j * moments::kGroup)) = held.second[j];
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

// Those that draw a run together, a block or a warp, and take its groups by turns.
constexpr int kTogether = kThreads;

__device__ __forceinline__ void meet() {
  if constexpr (kTogether == kThreads)
    __syncthreads();
  else
    __syncwarp(kAllLanes);
}

// Who draws goes on from run to run, and a warp's next group is on its way while it computes one, that of the next run
// too. Each begins with the run of its own number, and `turn`, which begins at 0, says which others have been drawn: one
// ahead, so that nobody waits for it.
__device__ __forceinline__ void eight_bits(const Settings& s, const i64* spans, i64 count, u32* turn) {
  using namespace moments;
  constexpr int kStep = kTogether / kLanes, kDrawers = kThreads / kTogether;
  DAVINCI_SHARED(float, powers, kPowers);
  DAVINCI_SHARED(u32, drawn, 2 * kDrawers);
  const u32 me = kDrawers == 1 ? threadIdx.x : threadIdx.x % kTogether;
  const u32 drawer = kDrawers == 1 ? 0 : threadIdx.x / kTogether;
  const i64 drawers = (i64)gridDim.x * kDrawers;
  fill<kThreads>(powers);
  if (me == 0) drawn[drawer * 2 + 1] = atomicAdd(turn, 1u);
  __syncthreads();
  const int mine = me / kLanes, lane_at = threadIdx.x % kLanes * kAtOnce;
  Held next;
  const auto ask = [&](const Span& span, int group) {
    next = taken<true>(span, group, group * kGroup + lane_at, kPerLane);
  };
  const auto ask_first = [&](i64 run) {
    if (run >= count) return;
    const Span span(spans + 8 * run);
    if (mine < whole_groups(span)) ask(span, mine);
  };
  i64 n = (i64)blockIdx.x * kDrawers + drawer, after = drawers + drawn[drawer * 2 + 1];
  int place = 0;  // each is read before a barrier that comes before it is written again
  ask_first(n);
  while (n < count) {
    if (me == 0) drawn[drawer * 2 + place] = atomicAdd(turn, 1u);
    const Span span(spans + 8 * n);
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
      exchange(held.first);
      exchange(held.second);
      update(s, powers, held);
      exchange(held.first);
      exchange(held.second);
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
    meet();
    n = after;
    after = drawers + drawn[drawer * 2 + place];
    place ^= 1;
  }
}

}  // namespace adamw
}  // namespace davinci

#define DAVINCI_ADAMW(name, bounds, function, type, last)                                                              \
  DAVINCI_KERNEL_WITHIN(name, davinci::adamw::kThreads, 0, bounds,                                                     \
                 (const davinci::i64* spans, davinci::i64 count, type last, float scale, float beta1, float rest1,     \
                  float beta2, float rest2, float epsilon, float step, float correction, float decay),                 \
                 (spans, count, last, scale, beta1, rest1, beta2, rest2, epsilon, step, correction, decay)) {          \
    const davinci::adamw::Settings settings{scale, beta1,   rest1, beta2,      rest2,                                  \
                                            epsilon, step, correction, decay};                                         \
    davinci::adamw::function(settings, spans, count, last);                                                            \
  }

DAVINCI_ADAMW(adamw_fp32, (davinci::adamw::kThreads, 6), full, davinci::i64, most)
DAVINCI_ADAMW(adamw_fp8_moments_fp32, (davinci::adamw::kThreads, 4), eight_bits, davinci::u32*, turn)
