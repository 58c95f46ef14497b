// The sum of each column of an fp32 matrix, in a fixed order: the second stage of a gradient that all rows add to.
#include "reduce.h"

namespace davinci {
namespace column_sums {

constexpr int kThreads = 512;
constexpr int kRows = kThreads / 32;  // that a block adds at once, 32 columns wide

// of: [rows, width]; out: [width].
template <class T>
__device__ __forceinline__ void sum(const float* of, T* out, i64 rows, i64 width) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (i64 first = (i64)blockIdx.x * 32; first < width; first += (i64)gridDim.x * 32) {
    const i64 column = first + lane;
    float value = 0.0f;
    if (column < width) {
#pragma unroll 8
      for (i64 r = warp; r < rows; r += kRows) value += of[r * width + column];
    }
    value = sum_warps<kThreads>(value);
    if (warp == 0 && column < width) out[column] = store<T>(value);
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
