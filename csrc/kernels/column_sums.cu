// The sum of each column of an fp32 matrix, in a fixed order: the second stage of a gradient that all rows add to.
//
// There are few rows, and they lie in the cache: what takes time is to wait for it. So there are many threads, each
// with all that it adds on the way at once, unless there are more than 512 rows.
#include "reduce.h"

namespace davinci {
namespace column_sums {

constexpr int kThreads = 512;
constexpr int kColumns = 8;  // of a block: 32 bytes of a row, which is what the cache reads at once
constexpr int kRows = kThreads / kColumns;
constexpr int kEach = 8;  // rows of a thread at once

// of: [rows, width]; out: [width].
template <class T>
__device__ __forceinline__ void sum(const float* of, T* out, i64 rows, i64 width) {
  for (i64 left = (i64)blockIdx.x * kColumns; left < width; left += (i64)gridDim.x * kColumns) {
    const i64 column = left + threadIdx.x % kColumns;
    float value = 0.0f;
#pragma unroll 1
    for (i64 first = column < width ? threadIdx.x / kColumns : rows; first < rows; first += kRows * kEach) {
      float some[kEach];
#pragma unroll
      for (int k = 0; k < kEach; ++k) {
        const i64 r = first + k * kRows;
        some[k] = r < rows ? of[r * width + column] : 0.0f;
      }
#pragma unroll
      for (int k = 0; k < kEach; ++k) value += some[k];
    }
    // Of the threads of a warp each eighth has the same column.
    value = sum_warps<kThreads>(value);
#pragma unroll
    for (int bits = kColumns; bits < 32; bits <<= 1) value += __shfl_xor_sync(kAllLanes, value, bits);
    if (threadIdx.x < kColumns && column < width) out[column] = store<T>(value);
  }
}

}  // namespace column_sums
}  // namespace davinci

#define DAVINCI_COLUMN_SUMS(suffix, type)                                                             \
  DAVINCI_KERNEL(column_sums_##suffix, davinci::column_sums::kThreads,                                \
                 (const float* of, davinci::type* out, davinci::i64 rows, davinci::i64 width),        \
                 (of, out, rows, width)) {                                                            \
    davinci::column_sums::sum(of, out, rows, width);                                                  \
  }

DAVINCI_COLUMN_SUMS(fp32, f32)
DAVINCI_COLUMN_SUMS(bf16, bf16)
