// Documents of packed sequences, from the token that ends one: each token's place in its document, and where documents
// begin. A sequence begins one too, whatever stands before it.
#include "reduce.h"

namespace davinci {
namespace documents {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;

// Of each thread's value that of the threads before it and its own, at most: `largest` of all before is handed on.
__device__ __forceinline__ int largest_so_far(int value, int& before, int turn) {
  DAVINCI_SHARED(int, of_warp, 2 * kWarps);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int by = 1; by < 32; by *= 2) {
    const int other = __shfl_sync(kAllLanes, value, lane >= by ? lane - by : lane);
    if (lane >= by && other > value) value = other;
  }
  if (lane == 31) of_warp[turn * kWarps + warp] = value;
  __syncthreads();
  int most = before;
  for (int w = 0; w < kWarps; ++w) {
    const int other = of_warp[turn * kWarps + w];
    if (w < warp && other > value) value = other;
    if (other > most) most = other;
  }
  if (before > value) value = before;
  before = most;
  return value;
}

// How many threads before this one have it; `all` is raised by how many do.
__device__ __forceinline__ int count_before(bool has, int& all, int turn) {
  DAVINCI_SHARED(int, of_warp, 2 * kWarps);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const u32 votes = __ballot_sync(kAllLanes, has);
  if (lane == 0) of_warp[turn * kWarps + warp] = count_bits(votes);
  __syncthreads();
  int before = all + count_bits(votes & ((1u << lane) - 1u));
  for (int w = 0; w < kWarps; ++w) {
    const int other = of_warp[turn * kWarps + w];
    if (w < warp) before += other;
    all += other;
  }
  return before;
}

// A block has a sequence. positions: [rows, length]; counts: [rows], documents of each.
__device__ __forceinline__ void positions_of(const i64* tokens, i64* positions, i64* counts, i64 end, i64 rows,
                                             i64 length) {
  int turn = 0;
  for (i64 r = blockIdx.x; r < rows; r += gridDim.x) {
    int begin = 0, count = 0;
    for (i64 first = 0; first < length; first += kThreads, turn ^= 1) {
      const i64 i = first + threadIdx.x;
      const bool here = i < length, begins = here && (i == 0 || tokens[r * length + i - 1] == end);
      const int start = largest_so_far(begins ? (int)i : 0, begin, turn);
      count_before(begins, count, turn);
      if (here) positions[r * length + i] = i - start;
    }
    if (threadIdx.x == 0) counts[r] = count;
  }
}

// bounds: [rows * length + 1], first tokens of documents in the order of sequences one behind the other, then the end
// of the last, as often as there is room. total: how many documents there are.
__device__ __forceinline__ void bounds_of(const i64* positions, const i64* counts, int* bounds, i64* total, i64 rows,
                                          i64 length) {
  int turn = 0;
  for (i64 r = blockIdx.x; r < rows; r += gridDim.x) {
    int found = 0;
    for (i64 before = 0; before < r; ++before) found += (int)counts[before];
    for (i64 first = 0; first < length; first += kThreads, turn ^= 1) {
      const i64 i = first + threadIdx.x;
      const bool begins = i < length && positions[r * length + i] == 0;
      const int place = count_before(begins, found, turn);
      if (begins) bounds[place] = (int)(r * length + i);
    }
    if (r + 1 < rows) continue;
    for (i64 i = found + threadIdx.x; i <= rows * length; i += kThreads) bounds[i] = (int)(rows * length);
    if (threadIdx.x == 0) *total = found;
  }
}

}  // namespace documents
}  // namespace davinci

DAVINCI_KERNEL(document_positions_int64, davinci::documents::kThreads,
               (const davinci::i64* tokens, davinci::i64* positions, davinci::i64* counts, davinci::i64 end,
                davinci::i64 rows, davinci::i64 length),
               (tokens, positions, counts, end, rows, length)) {
  davinci::documents::positions_of(tokens, positions, counts, end, rows, length);
}
DAVINCI_KERNEL(document_bounds_int64, davinci::documents::kThreads,
               (const davinci::i64* positions, const davinci::i64* counts, int* bounds, davinci::i64* total,
                davinci::i64 rows, davinci::i64 length),
               (positions, counts, bounds, total, rows, length)) {
  davinci::documents::bounds_of(positions, counts, bounds, total, rows, length);
}
