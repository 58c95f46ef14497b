// Rotary positions (Su et al., 2021, RoFormer, arXiv 2104.09864) of packed queries, keys and values, and their bias.
//
// A token has `groups` groups of `heads` heads, of which the first `rotated` turn: all queries and the keys of a group
// in Megatron-Core's order, which lays the values behind them. Channel i of a head turns with channel i + half, by the
// angle whose cosine is entry i of a row of `table`, and whose sine is entry half + i. The row is `positions` of the
// token, or without them the token's number over `batch`, since a batch's tokens of one place lie side by side.
#include "reduce.h"

namespace davinci {
namespace rope {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kPair = 2;  // tokens that a warp takes together, so that more loads are on their way

__device__ __forceinline__ i64 place_of(i64 token, i64 batch) {
  // The same, and shorter where 32 bits are enough.
  return (u64)(token | batch) >> 32 ? token / batch : (i64)((u32)token / (u32)batch);
}

// In the first warp: each lane's sums over all warps. All threads call it.
template <int kWide>
__device__ __forceinline__ void add_warps(Pack<float, kWide>& low, Pack<float, kWide>& high) {
  constexpr int kValues = 2 * kWide, kOfWarp = 32 * kValues;
  DAVINCI_SHARED(float, sums, kWarps * kOfWarp);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int i = 0; i < kWide; ++i) {
    sums[warp * kOfWarp + i * 32 + lane] = low.at[i];
    sums[warp * kOfWarp + (kWide + i) * 32 + lane] = high.at[i];
  }
  __syncthreads();
  // A warp adds some values of all lanes, and leaves them where the first warp's were, which nobody else reads.
  for (int i = warp; i < kValues; i += kWarps) {
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) sum += sums[w * kOfWarp + i * 32 + lane];
    sums[i * 32 + lane] = sum;
  }
  __syncthreads();
  if (warp == 0) {
#pragma unroll
    for (int i = 0; i < kWide; ++i) {
      low.at[i] = sums[i * 32 + lane];
      high.at[i] = sums[(kWide + i) * 32 + lane];
    }
  }
  __syncthreads();  // the next unit writes where these are read
}

// The channels of a token are fewer than 2^31.
// A lane takes kWide channels of one half of a head, and those of the other half, of token after token: what they are
// is found once. Tokens that are taken together often have one row of the table, which is then read once. With `shares`
// [parts, channels of a token], each part's sum over its tokens is that row: forward has a bias, backward shares in its
// gradient.
template <int kWide, bool kShares, class T>
__device__ __forceinline__ void turn(const T* x, T* out, const T* bias, const float* table, const i64* positions,
                                     float* shares, float sign, i64 tokens, i64 batch, int groups, int heads,
                                     int rotated, int half, i64 parts) {
  using P = Pack<T, kWide>;
  using F = Pack<float, kWide>;
  constexpr int kFew = kWide < 4 ? kWide : 4;
  using Q = Pack<float, kFew>;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int touched = kShares || bias || out != x ? heads : rotated;
  const int of_head = half / kWide, items = groups * touched * of_head, tiles = (items + 31) / 32;
  const int pitch = groups * heads * 2 * half;
  for (i64 unit = blockIdx.x; unit < tiles * parts; unit += gridDim.x) {
    const i64 part = unit / tiles;
    const int item = (int)(unit % tiles) * 32 + lane;
    const int head = item / of_head, c = item % of_head * kWide;
    const int low = (head / touched * heads + head % touched) * 2 * half + c, high = low + half;
    const bool here = item < items, turns = head % touched < rotated;
    P bias_low{}, bias_high{};
    if (!kShares && bias && here) {
      bias_low = *reinterpret_cast<const P*>(bias + low);
      bias_high = *reinterpret_cast<const P*>(bias + high);
    }
    F sum_low{}, sum_high{};
    const i64 step = parts * kWarps * kPair;
    for (i64 first = here ? (part * kWarps + warp) * kPair : tokens; first < tokens; first += step) {
      // The last token may be without another: it is then taken twice, and added once.
      const i64 second = first + 1 < tokens ? first + 1 : first;
      const i64 at[kPair] = {first * pitch, second * pitch};
      P a[kPair], b[kPair];
#pragma unroll
      for (int t = 0; t < kPair; ++t) {
        a[t] = *reinterpret_cast<const P*>(x + at[t] + low);
        b[t] = *reinterpret_cast<const P*>(x + at[t] + high);
      }
      i64 row[kPair];
      if (positions) {
        row[0] = positions[first];
        row[1] = positions[second];
      } else {
        row[0] = place_of(first, batch);
        row[1] = row[0] + (second == (row[0] + 1) * batch);
      }
#pragma unroll
      for (int from = 0; from < kWide; from += kFew) {
        Q cosine, sine;
#pragma unroll
        for (int t = 0; t < kPair; ++t) {
          if (turns && (t == 0 || row[t] != row[0])) {
            const float* entry = table + row[t] * 2 * half + c + from;
            cosine = *reinterpret_cast<const Q*>(entry);
            sine = *reinterpret_cast<const Q*>(entry + half);
          }
#pragma unroll
          for (int k = 0; k < kFew; ++k) {
            const int i = from + k;
            float one = load(a[t].at[i]), two = load(b[t].at[i]);
            if (!kShares && bias) {
              one += load(bias_low.at[i]);
              two += load(bias_high.at[i]);
            }
            if (turns) {
              const float s = sign * sine.at[k], before = one;
              one = before * cosine.at[k] - two * s;
              two = two * cosine.at[k] + before * s;
            }
            if (kShares && !(t == 1 && second == first)) {
              sum_low.at[i] += one;
              sum_high.at[i] += two;
            }
            a[t].at[i] = store<T>(one);
            b[t].at[i] = store<T>(two);
          }
        }
      }
#pragma unroll
      for (int t = 0; t < kPair; ++t) {
        *reinterpret_cast<P*>(out + at[t] + low) = a[t];
        *reinterpret_cast<P*>(out + at[t] + high) = b[t];
      }
    }
    if constexpr (!kShares) continue;
    add_warps<kWide>(sum_low, sum_high);
    if (warp == 0 && here) {
      *reinterpret_cast<F*>(shares + part * pitch + low) = sum_low;
      *reinterpret_cast<F*>(shares + part * pitch + high) = sum_high;
    }
  }
}

template <bool kShares, class T>
__device__ __forceinline__ void rotate(const T* x, T* out, const T* bias, const float* table, const i64* positions,
                                       float* shares, float sign, i64 tokens, i64 batch, i64 groups, i64 heads,
                                       i64 rotated, i64 half, i64 parts) {
  // The table's rows then are too, of fp32 and twice as long.
  if (in_vectors<T>(half, x, out, bias, table))
    turn<Vector<T>::kWidth, kShares>(x, out, bias, table, positions, shares, sign, tokens, batch, (int)groups, (int)heads,
                                     (int)rotated, (int)half, parts);
  else
    turn<1, kShares>(x, out, bias, table, positions, shares, sign, tokens, batch, (int)groups, (int)heads, (int)rotated,
                     (int)half, parts);
}

}  // namespace rope
}  // namespace davinci

#define DAVINCI_ROPE(name, shared, suffix, type)                                                                       \
  DAVINCI_KERNEL(name##_##suffix, davinci::rope::kThreads,                                                             \
                 (const davinci::type* x, davinci::type* out, const davinci::type* bias, const float* table,           \
                  const davinci::i64* positions, float* shares, float sign, davinci::i64 tokens, davinci::i64 batch,   \
                  davinci::i64 groups, davinci::i64 heads, davinci::i64 rotated, davinci::i64 half,                    \
                  davinci::i64 parts),                                                                                 \
                 (x, out, bias, table, positions, shares, sign, tokens, batch, groups, heads, rotated, half,           \
                  parts)) {                                                                                            \
    davinci::rope::rotate<shared>(x, out, bias, table, positions, shares, sign, tokens, batch, groups, heads, rotated, \
                                  half, parts);                                                                        \
  }

DAVINCI_ROPE(rope, false, fp32, f32)
DAVINCI_ROPE(rope, false, bf16, bf16)
DAVINCI_ROPE(rope_sums, true, fp32, f32)
DAVINCI_ROPE(rope_sums, true, bf16, bf16)
