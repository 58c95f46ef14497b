// Another way for AdamW with moments in 8 bits: each warp draws runs, and its next tiles are on their way to shared memory
// instead of to registers, so that more of them are, or more warps are at work. Tried by tune_kernels.py.
#pragma once

namespace davinci {
namespace adamw {

constexpr int kStages = DAVINCI_STAGES;    // tiles of a warp that are on their way or computed
constexpr int kOfStage = 2 * kFours + 1;   // slots of a lane: parameters, gradients, codes of both moments
constexpr int kSlots = kOfStage * kStages + 1;  // and one in which lanes of a warp have its groups' ranges
static_assert(kGroups * kStages <= 32 && kGroups * moments::kGroup * 2 == 32 * 16, "a slot a lane is room for all");

template <int kStage>
struct At {
  static constexpr int kHere = kStage, kLater = (kStage + kStages - 1) % kStages;
};

// As moments::fill, for threads of any number.
template <class Powers>
__device__ __forceinline__ void fill_by_all(Powers& powers) {
  for (int n = threadIdx.x; n < moments::kPowers; n += kThreads) {
    const u32 code = n / 32;
    const float size = float_of(code << 20) * 1.329227995784916e36f;  // 2^120
    powers[n] = code ? moments::log2_of(size / E4M3::kTop) * moments::kPerLog2Range : -infinity();
  }
}

template <class Slots>
__device__ __forceinline__ u32 word_of(Slots& slots, int i, int k) {
#if defined(__CUDA_ARCH__)
  return reinterpret_cast<const u32*>(slots + i)[k];
#else
  const Raw raw = slots[i];
  return raw.at[k];
#endif
}

__device__ __forceinline__ void ahead(const Settings& s, const i64* spans, i64 count, u32* turn) {
  using namespace moments;
  constexpr int kWarps = kThreads / 32;
  struct Tile {
    u32 run;
    int group;
    bool whole;
  };
  DAVINCI_SHARED(float, powers, kPowers);
  DAVINCI_SLOTS(held, kSlots * kThreads);
  fill_by_all(powers);
  __syncthreads();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, of_warp = warp * 32;
  const u32 drawers = gridDim.x * kWarps, runs = (u32)count;
  // Of what is asked for next; the run behind it; what lane 0 draws, which nobody waits for until it is needed.
  u32 run = blockIdx.x * kWarps + warp, following, drawn = 0;
  int group = 0, whole = 0, end = 0;
  const auto draw = [&] {
    if (lane == 0) drawn = atomicAdd(turn, 1u);
  };
  const auto look = [&] {
    following = drawers + __shfl_sync(kAllLanes, drawn, 0);
    if (following < runs) prefetch(spans + 8 * (i64)following);
    draw();
    group = 0;
    end = 0;
    if (run >= runs) return;
    const Span span(spans + 8 * (i64)run);
    whole = whole_groups(span);
    end = (int)((span.count + kGroup - 1) / kGroup);
  };
  const auto ask = [&](int stage) {
    if (group >= end && run < runs) {
      run = following;
      look();
    }
    const Tile tile{run, group, group < whole};
    if (run < runs && tile.whole) {
      const Span span(spans + 8 * (i64)run);
      const int at = (group + lane / kLanes) * kGroup + lane % kLanes * kAtOnce;
      const int slot = stage * kOfStage * kThreads + (int)threadIdx.x;
#pragma unroll
      for (int j = 0; j < kFours; ++j) {
        begin_copy(held, slot + j * kThreads, span.parameter + at + j * kApart);
        begin_copy(held, slot + (kFours + j) * kThreads, span.gradient + at + j * kApart);
      }
      const u8* codes = lane < kLanes ? span.first : span.second;
      begin_copy(held, slot + 2 * kFours * kThreads, codes + group * kGroup + lane % kLanes * 16);
      if (lane < kGroups)
        begin_copy(held, kStages * kOfStage * kThreads + of_warp + stage * kGroups + lane, span.ranges + group + lane);
    }
    end_group();
    group += kGroups;
    return tile;
  };
  draw();
  look();
  Tile tiles[kStages];
#pragma unroll
  for (int stage = 0; stage < kStages - 1; ++stage) tiles[stage] = ask(stage);
  const auto step = [&](auto stages) {
    constexpr int kStage = decltype(stages)::kHere, kLater = decltype(stages)::kLater;
    __syncwarp(kAllLanes);  // all lanes have read what was there
    tiles[kLater] = ask(kLater);
    const Tile tile = tiles[kStage];
    if (tile.run >= runs) return false;
    const Span span(spans + 8 * (i64)tile.run);
    const int mine = tile.group + lane / kLanes, at = mine * kGroup + lane % kLanes * kAtOnce;
    wait_but<kStages - 1>();
    __syncwarp(kAllLanes);
    if (tile.whole) {
      Held one;
      const int slot = kStage * kOfStage * kThreads + (int)threadIdx.x;
      const int codes = kStage * kOfStage * kThreads + 2 * kFours * kThreads + of_warp + lane / kLanes * (kGroup / 16);
#pragma unroll
      for (int j = 0; j < kFours; ++j) {
        one.parameter[j] = vector_of<float>(held[slot + j * kThreads]);
        one.gradient[j] = vector_of<float>(held[slot + (kFours + j) * kThreads]);
        const int word = codes + j * (kApart / 16) + lane % kLanes / 4;
        one.first[j] = word_of(held, word, lane % 4);
        one.second[j] = word_of(held, word + kLanes, lane % 4);
      }
      one.ranges = vector_of<float>(held[kStages * kOfStage * kThreads + of_warp + kStage * kGroups + lane / kLanes]);
      update(s, powers, one);
      exchange(one.first);
      exchange(one.second);
      put<true>(span, mine, at, kPerLane, one);
    } else {
      const int here = (int)span.count - at;
      Held one = taken<false>(span, mine, at, here);
      update(s, powers, one);
      put<false>(span, mine, at, here, one);
    }
    return true;
  };
  for (;;) {
    if (!step(At<0>())) return;
    if (!step(At<1>())) return;
    if constexpr (kStages > 2)
      if (!step(At<2 % kStages>())) return;
    if constexpr (kStages > 3)
      if (!step(At<3 % kStages>())) return;
  }
}

}  // namespace adamw
}  // namespace davinci
