// Rotary positions (Su et al., 2021, RoFormer, arXiv 2104.09864) of packed queries, keys and values, and their bias.
//
// A token has `groups` groups of `heads` heads, of which the first `rotated` turn: all queries and the keys of a group
// in Megatron-Core's order, which lays the values behind them. Channel i of a head turns with channel i + half, by the
// angle whose cosine is entry i of a row of `table`, and whose sine is entry half + i. The row is `positions` of the
// token, or without them the token's number over `batch`, since a batch's tokens of one place lie side by side.
#include "reduce.h"

namespace davinci {
namespace rope {

constexpr int kPasses = 5;  // of a warp over a token: 20 heads of 128 channels in bf16
constexpr int kThreads = 256;
constexpr int kSlots = 20;  // of 16 bytes, for a thread's sums in bf16
// With a bias a warp takes a fifth of a token, and more warps are at work: each keeps its part of the bias at hand.
constexpr int kPassesOfBias = 1, kThreadsOfBias = 128;

// An item is kWide channels of the first half of a head and those of the second half: where they begin in a token. A head
// has `of_head` items. Tokens are fewer than 2^31, and so are the channels of one.
template <int kWide>
__device__ __forceinline__ u32 channel_of(u32 item, u32 of_head) {
  return (2 * item - item % of_head) * kWide;
}

// What a lane has in each pass, a bit a pass. A warp's lanes are whole heads where there are several passes.
template <int kPasses>
struct Heads {
  u32 turns = 0, here = 0;
  // `all`: also where a head does not turn there is something to do.
  __device__ __forceinline__ Heads(u32 item, u32 items, u32 of_head, u32 heads, u32 rotated, bool all) {
    const u32 apart = 32 / of_head % heads;
    u32 of_group = item / of_head % heads;
#pragma unroll
    for (int p = 0; p < kPasses; ++p) {
      const bool turned = of_group < rotated;
      if (turned) turns |= 1u << p;
      if (item + 32 * p < items && (turned || all)) here |= 1u << p;
      of_group += apart;
      if (of_group >= heads) of_group -= heads;
    }
  }
};

// A lane's sums: of the first halves of its items, and of the second halves.
template <int kWide, int kPasses>
struct Sums {
  float at[kPasses][2][kWide];
  static constexpr int kWords = (kPasses * 2 * kWide + 3) / 4;
  __device__ __forceinline__ Raw word(int n) const {
    Raw four{};
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const int i = n * 4 + k;
      if (i < kPasses * 2 * kWide) four.at[k] = bits_of(at[i / kWide / 2][i / kWide % 2][i % kWide]);
    }
    return four;
  }
};

// All lanes' sums over the warps of a block, added in the order of the warps, become `shares`: a row of a token's
// channels. All threads call it.
template <int kThreads, int kWide, int kPasses>
__device__ __forceinline__ void add_warps(const Sums<kWide, kPasses>& mine, float* shares, u32 first, u32 items,
                                          u32 of_head, i64 half) {
  constexpr int kWords = Sums<kWide, kPasses>::kWords, kFew = kWide < 4 ? kWide : 4, kWarps = kThreads / 32;
  static_assert(kWords <= kSlots, "room for all, where a multiprocessor has as much");
  DAVINCI_SLOTS(held, kSlots * kThreads);
  const int room = slots_here(kThreads, kSlots), lane = threadIdx.x % 32;
  for (int from = 0; from < kWords; from += room) {
#pragma unroll
    for (int word = 0; word < kWords; ++word)
      if (word >= from && word < from + room) held[(word - from) * kThreads + (int)threadIdx.x] = mine.word(word);
    __syncthreads();
    const int here = kWords - from < room ? kWords - from : room;
    for (int n = (int)threadIdx.x / 32; n < here; n += kWarps) {
      Vector<float> sum{};
#pragma unroll
      for (int warp = 0; warp < kWarps; ++warp) {
        const Vector<float> one = vector_of<float>(held[n * kThreads + warp * 32 + lane]);
#pragma unroll
        for (int k = 0; k < 4; ++k) sum.at[k] += one.at[k];
      }
#pragma unroll
      for (int k = 0; k < 4; k += kFew) {
        const int value = (from + n) * 4 + k, pass = value / (2 * kWide), i = value % (2 * kWide);
        const u32 item = first + pass * 32 + lane;
        if (pass >= kPasses || item >= items) continue;
        const i64 to = channel_of<kWide>(item, of_head) + (i < kWide ? i : half + i - kWide);
        if constexpr (kFew == 4)
          reinterpret_cast<Vector<float>*>(shares)[to / 4] = sum;
        else
          shares[to] = sum.at[k];
      }
    }
    __syncthreads();  // what comes next is written where these are read
  }
}

// A warp takes a token after another, and of each some items in as many passes, of which all loads are on their way
// together; what the first of them takes is on its way before the bias is, and where sums leave room in the registers,
// the next one before one is computed. Lanes have the same channels of their heads in all passes: the token's row of the
// table is read once. With `shares` [parts, channels of a token], each part's sum over its tokens is that row: forward
// has a bias, backward shares in its gradient.
template <int kThreads, int kWide, int kPasses, bool kShares, bool kBias, class T>
__device__ __forceinline__ void turn(const T* x, T* out, const T* bias, const float* table, const i64* positions,
                                     float* shares, float sign, i64 tokens, i64 batch, i64 groups, i64 heads,
                                     i64 rotated, i64 half, i64 parts) {
  using C = Elements<T, kWide>;
  using R = typename C::Came;
  constexpr int kFew = kWide < 4 ? kWide : 4, kWarps = kThreads / 32;
  constexpr int kApart = 64 * kWide;  // channels from pass to pass
  constexpr bool kAhead = kShares;
  using Q = Pack<float, kFew>;
  struct Token {
    R x[kPasses][2];
    Q cosines[kWide / kFew], sines[kWide / kFew];
  };
  const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const u32 of_head = (u32)half / kWide, items = (u32)(groups * heads) * of_head;
  const u32 chunks = (items + 32 * kPasses - 1) / (32 * kPasses), units = chunks * (u32)parts;
  const i64 pitch = groups * heads * 2 * half;
  DAVINCI_SHARED(Q, of_bias, kBias ? kPasses * 2 * kWide / kFew * 32 : 1);  // all warps' lanes have the same channels
  for (u32 unit = blockIdx.x; unit < units; unit += gridDim.x) {
    const u32 part = unit / chunks, first_item = (unit - part * chunks) * 32 * kPasses, mine = first_item + lane;
    const Heads<kPasses> of(mine, items, of_head, (u32)heads, (u32)rotated, kShares || kBias || out != x);
    u32 turns = of.turns, here = of.here, at = channel_of<kWide>(mine, of_head);
    // From token to token, and what that is in rows of the table, each for as many tokens as a batch has.
    const u32 step = (u32)parts * kWarps, rows = step / (u32)batch, rest = step % (u32)batch;
    const u32 first = part * kWarps + warp, end = here ? (u32)tokens : 0;
    u32 row = first / (u32)batch, of_row = first % (u32)batch;
    Token next;
    const auto ask = [&](u32 token) {
      if (token >= end) return;
      opaque(here);
      opaque(at);
      const T* from = x + token * pitch + at;
#pragma unroll
      for (int p = 0; p < kPasses; ++p) {
        if (!(here >> p & 1)) continue;
        next.x[p][0] = *reinterpret_cast<const R*>(from + p * kApart);
        next.x[p][1] = *reinterpret_cast<const R*>(from + half + p * kApart);
      }
      const float* entry = table + (positions ? positions[token] : (i64)row) * 2 * half + mine % of_head * kWide;
#pragma unroll
      for (int k = 0; k < kWide / kFew; ++k) {
        next.cosines[k] = *reinterpret_cast<const Q*>(entry + k * kFew);
        next.sines[k] = *reinterpret_cast<const Q*>(entry + half + k * kFew);
      }
      row += rows;
      of_row += rest;
      if (of_row >= (u32)batch) {
        of_row -= (u32)batch;
        ++row;
      }
    };
    ask(first);
    if constexpr (kBias) {
      __syncthreads();  // warps may still read what was here
      for (u32 n = warp; n < 2 * kPasses; n += kWarps)  // an item's halves one after the other
        if (here >> n / 2 & 1) {
          float numbers[kWide];
          C::open(*reinterpret_cast<const R*>(bias + at + n % 2 * half + n / 2 * kApart), numbers);
#pragma unroll
          for (int k = 0; k < kWide; k += kFew) {
            Q few;
#pragma unroll
            for (int j = 0; j < kFew; ++j) few.at[j] = numbers[k + j];
            of_bias[(n * kWide + k) / kFew * 32 + lane] = few;
          }
        }
      __syncthreads();
    }
    Sums<kWide, kPasses> sums{};
    // Two turns at once, so that what has come need not change registers.
#pragma unroll(kAhead ? 2 : 1)
    for (u32 token = first; token < end; token += step) {
      const Token now = next;
      if (kAhead) ask(token + step);
      opaque(turns);
      opaque(here);
      opaque(at);
      float cosine[kWide], sine[kWide];
#pragma unroll
      for (int k = 0; k < kWide; ++k) {
        cosine[k] = now.cosines[k / kFew].at[k % kFew];
        sine[k] = sign * now.sines[k / kFew].at[k % kFew];
      }
      T* to = out + token * pitch + at;
#pragma unroll
      for (int p = 0; p < kPasses; ++p) {
        if (!(here >> p & 1)) continue;
        float low_of[kWide], high_of[kWide];
        C::open(now.x[p][0], low_of);
        C::open(now.x[p][1], high_of);
        if constexpr (kBias) {
#pragma unroll
          for (int k = 0; k < kWide; k += kFew) {
            const Q low_bias = of_bias[(2 * p * kWide + k) / kFew * 32 + (int)lane];
            const Q high_bias = of_bias[((2 * p + 1) * kWide + k) / kFew * 32 + (int)lane];
#pragma unroll
            for (int j = 0; j < kFew; ++j) {
              low_of[k + j] += low_bias.at[j];
              high_of[k + j] += high_bias.at[j];
            }
          }
        }
        if (turns >> p & 1) {
#pragma unroll
          for (int k = 0; k < kWide; ++k) {
            const float before = low_of[k];
            low_of[k] = before * cosine[k] - high_of[k] * sine[k];
            high_of[k] = high_of[k] * cosine[k] + before * sine[k];
          }
        }
        if constexpr (kShares) {
#pragma unroll
          for (int k = 0; k < kWide; ++k) {
            sums.at[p][0][k] += low_of[k];
            sums.at[p][1][k] += high_of[k];
          }
        }
        *reinterpret_cast<R*>(to + p * kApart) = C::close(low_of);
        *reinterpret_cast<R*>(to + half + p * kApart) = C::close(high_of);
      }
      if (!kAhead) ask(token + step);
    }
    if constexpr (kShares)
      add_warps<kThreads>(sums, shares + (i64)part * pitch, first_item, items, of_head, half);
  }
}

template <int kThreads, int kPasses, bool kShares, bool kBias, class T, class... Rest>
__device__ __forceinline__ void rotate(const T* x, T* out, const T* bias, const float* table, i64 half, Rest... rest) {
  constexpr int kWide = Vector<T>::kWidth;
  // The table's rows then are in vectors too, of fp32 and twice as long.
  if (!in_vectors<T>(half, x, out, bias, table))
    turn<kThreads, 1, 1, kShares, kBias>(x, out, bias, table, rest...);
  else if (32 % (half / kWide) == 0)
    turn<kThreads, kWide, kPasses, kShares, kBias>(x, out, bias, table, rest...);
  else
    turn<kThreads, kWide, 1, kShares, kBias>(x, out, bias, table, rest...);
}

}  // namespace rope
}  // namespace davinci

#define DAVINCI_ROPE(name, threads, passes, shared, biased, slots, blocks, suffix, type)                               \
  DAVINCI_KERNEL_WITHIN(name##_##suffix, threads, slots, (threads, blocks),                                            \
                        (const davinci::type* x, davinci::type* out, const davinci::type* bias, const float* table,    \
                         const davinci::i64* positions, float* shares, float sign, davinci::i64 tokens,                \
                         davinci::i64 batch, davinci::i64 groups, davinci::i64 heads, davinci::i64 rotated,            \
                         davinci::i64 half, davinci::i64 parts),                                                       \
                        (x, out, bias, table, positions, shares, sign, tokens, batch, groups, heads, rotated, half,    \
                         parts)) {                                                                                     \
    davinci::rope::rotate<threads, passes, shared, biased>(x, out, bias, table, half, positions, shares, sign, tokens, \
                                                           batch, groups, heads, rotated, half, parts);                \
  }
#define DAVINCI_ROPES(suffix, type)                                                                                    \
  DAVINCI_ROPE(rope, davinci::rope::kThreads, davinci::rope::kPasses, false, false, 0, 2, suffix, type)                \
  DAVINCI_ROPE(rope_bias, davinci::rope::kThreadsOfBias, davinci::rope::kPassesOfBias, false, true, 0, 8, suffix,      \
               type)                                                                                                   \
  DAVINCI_ROPE(rope_sums, davinci::rope::kThreads, davinci::rope::kPasses, true, false, davinci::rope::kSlots, 1,      \
               suffix, type)

// Of so many blocks a multiprocessor has room; with sums of one, since a lane then has five times as many of them.
DAVINCI_ROPES(fp32, f32)
DAVINCI_ROPES(bf16, bf16)
