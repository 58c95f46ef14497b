// RMSNorm (Zhang and Sennrich, 2019, arXiv 1910.07467), with a residual added before it and its gradient behind it.
//
// Of a row x: x * s * weight, with s one over the root of the mean square. Where there is a residual, x is the sum of
// both, rounded as it is written: what is normalised is what later layers add to. A row is read once. It lies in the
// registers of a group of threads, a warp or a whole block, by vectors of 16 bytes; rows that are too wide for that,
// or not made of whole vectors, are read a second time, from the cache.
#include "reduce.h"

namespace davinci {
namespace rms_norm {

constexpr int kThreads = 256;
constexpr int kElements = 16;  // of a row that a thread keeps, where a row is one of `many`

__device__ __forceinline__ float scale_of(float squares, i64 width, float eps) {
  return 1.0f / sqrtf(squares / (float)width + eps);
}

// Which of the block's groups a thread is of. Where it is the only one the compiler sees that all threads have one row.
template <int kGroup>
__device__ __forceinline__ int group() {
  return kGroup == kThreads ? 0 : threadIdx.x / kGroup;
}

template <int kGroup>
__device__ __forceinline__ float sum_group(float value, int turn) {
  if constexpr (kGroup == 32)
    return sum_warp(value);
  else
    return sum_block<kGroup>(value, turn);
}

// A group holds a row: kKept vectors a thread. The row has no more than kGroup * kKept of them.
template <int kGroup, int kKept, class T>
__device__ __forceinline__ void forward_kept(const T* x, const T* residual, const T* weight, T* sum, T* out,
                                             float* scale, i64 rows, i64 width, float eps) {
  using V = Vector<T>;
  constexpr int kRows = kThreads / kGroup;
  const int me = threadIdx.x % kGroup, vectors = (int)(width / V::kWidth);
  int turn = 0;
  // All threads of a block take the same number of turns, since they meet in each.
  for (i64 first = (i64)blockIdx.x * kRows; first < rows; first += (i64)gridDim.x * kRows, turn ^= 1) {
    const i64 r = first + group<kGroup>(), at = r * vectors + me;
    const int mine = r < rows ? vectors : 0;
    Raw row[kKept] = {}, other[kKept] = {};  // all on their way before the first is waited for
#pragma unroll
    for (int k = 0; k < kKept; ++k)
      if (me + k * kGroup < mine) row[k] = (reinterpret_cast<const Raw*>(x) + at)[k * kGroup];
    if (residual) {
#pragma unroll
      for (int k = 0; k < kKept; ++k)
        if (me + k * kGroup < mine) other[k] = (reinterpret_cast<const Raw*>(residual) + at)[k * kGroup];
#pragma unroll
      for (int k = 0; k < kKept; ++k) {
        float both[V::kWidth], beside[V::kWidth];
        widen<T>(row[k], both);
        widen<T>(other[k], beside);
#pragma unroll
        for (int i = 0; i < V::kWidth; ++i) both[i] += beside[i];
        row[k] = narrow<T>(both);
        if (me + k * kGroup < mine) (reinterpret_cast<Raw*>(sum) + at)[k * kGroup] = row[k];
      }
    }
    float squares = 0.0f;
#pragma unroll
    for (int k = 0; k < kKept; ++k) {
      float part[V::kWidth];
      widen<T>(row[k], part);
#pragma unroll
      for (int i = 0; i < V::kWidth; ++i) squares += part[i] * part[i];
    }
    Raw gains[kKept] = {};  // while the group adds
    const int wanted = out ? mine : 0;
#pragma unroll
    for (int k = 0; k < kKept; ++k)
      if (me + k * kGroup < wanted) gains[k] = (reinterpret_cast<const Raw*>(weight) + me)[k * kGroup];
    const float s = scale_of(sum_group<kGroup>(squares, turn), width, eps);
    if (me == 0 && mine) scale[r] = s;
#pragma unroll
    for (int k = 0; k < kKept; ++k) {
      float part[V::kWidth], gain[V::kWidth];
      widen<T>(row[k], part);
      widen<T>(gains[k], gain);
#pragma unroll
      for (int i = 0; i < V::kWidth; ++i) part[i] = part[i] * s * gain[i];
      if (me + k * kGroup < wanted) (reinterpret_cast<Raw*>(out) + at)[k * kGroup] = narrow<T>(part);
    }
  }
}

template <int kWide, class T>
__device__ __forceinline__ void forward_read_twice(const T* x, const T* residual, const T* weight, T* sum, T* out,
                                                   float* scale, i64 rows, i64 width, float eps) {
  using P = Pack<T, kWide>;
  const i64 packs = width / kWide;
  int turn = 0;
  for (i64 r = blockIdx.x; r < rows; r += gridDim.x, turn ^= 1) {
    const i64 at = r * packs;
    float squares = 0.0f;
    for (i64 p = threadIdx.x; p < packs; p += kThreads) {
      P row = reinterpret_cast<const P*>(x)[at + p];
      if (residual) {
        const P other = reinterpret_cast<const P*>(residual)[at + p];
#pragma unroll
        for (int i = 0; i < kWide; ++i) row.at[i] = store<T>(load(row.at[i]) + load(other.at[i]));
        reinterpret_cast<P*>(sum)[at + p] = row;
      }
#pragma unroll
      for (int i = 0; i < kWide; ++i) squares += load(row.at[i]) * load(row.at[i]);
    }
    const float s = scale_of(sum_block<kThreads>(squares, turn), width, eps);
    if (threadIdx.x == 0) scale[r] = s;
    if (!out) continue;
    const P* rows_of = reinterpret_cast<const P*>(residual ? sum : x);
    for (i64 p = threadIdx.x; p < packs; p += kThreads) {
      P row = rows_of[at + p];
      const P gain = reinterpret_cast<const P*>(weight)[p];
#pragma unroll
      for (int i = 0; i < kWide; ++i) row.at[i] = store<T>(load(row.at[i]) * s * load(gain.at[i]));
      reinterpret_cast<P*>(out)[at + p] = row;
    }
  }
}

// What a thread reads for a row's gradient; zeros where there is no row, or none of it for the thread.
template <int kKept>
struct Row {
  Raw x[kKept], by[kKept], beside[kKept];
  float scale;

  template <int kGroup, class T>
  __device__ __forceinline__ void read(const T* by_out, const T* by_sum, const T* of, const float* scales, i64 first,
                                       i64 rows, int vectors) {
    const i64 r = first + group<kGroup>();
    const int me = threadIdx.x % kGroup, mine = r < rows ? vectors : 0;
    scale = mine ? scales[r] : 0.0f;
#pragma unroll
    for (int k = 0; k < kKept; ++k) {
      const int v = me + k * kGroup;
      x[k] = by[k] = beside[k] = Raw{};
      if (v < mine) x[k] = (reinterpret_cast<const Raw*>(of) + r * vectors)[v];
      if (v < mine) by[k] = (reinterpret_cast<const Raw*>(by_out) + r * vectors)[v];
      if (v < mine && by_sum) beside[k] = (reinterpret_cast<const Raw*>(by_sum) + r * vectors)[v];
    }
  }
};

// The gradient of x: (a - n * mean(a * n)) * s + by_sum, with n = x * s and a = by_out * weight. That of the weight is
// the sum over rows of by_out * n, of which each of `parts` sets of rows has its share in `shares` [parts, width].
template <int kGroup, int kKept, class T>
__device__ __forceinline__ void backward_kept(const T* by_out, const T* by_sum, const T* x, const T* weight,
                                              const float* scale, T* by_x, float* shares, i64 rows, i64 width,
                                              i64 parts) {
  using V = Vector<T>;
  constexpr int kRows = kThreads / kGroup;
  constexpr bool kAhead = kKept <= 2;  // while a row is computed, the next one is on its way, if it has room
  const int me = threadIdx.x % kGroup, vectors = (int)(width / V::kWidth);
  Raw gains[kKept] = {};
#pragma unroll
  for (int k = 0; k < kKept; ++k)
    if (me + k * kGroup < vectors) gains[k] = reinterpret_cast<const Raw*>(weight)[me + k * kGroup];
  int turn = 0;
  for (i64 part = blockIdx.x; part < parts; part += gridDim.x) {
    float share[kKept][V::kWidth];
#pragma unroll
    for (int k = 0; k < kKept; ++k)
#pragma unroll
      for (int i = 0; i < V::kWidth; ++i) share[k][i] = 0.0f;
    Row<kKept> row, next;
    if (kAhead) next.template read<kGroup>(by_out, by_sum, x, scale, part * kRows, rows, vectors);
    // Two turns at once, so that what has come need not change registers.
#pragma unroll(kAhead ? 2 : 1)
    for (i64 first = part * kRows; first < rows; first += parts * kRows, turn ^= 1) {
      row = next;
      (kAhead ? next : row)
          .template read<kGroup>(by_out, by_sum, x, scale, kAhead ? first + parts * kRows : first, rows, vectors);
      const i64 r = first + group<kGroup>();
      float along = 0.0f;
#pragma unroll
      for (int k = 0; k < kKept; ++k) {
        float of[V::kWidth], by[V::kWidth], gain[V::kWidth];
        widen<T>(row.x[k], of);
        widen<T>(row.by[k], by);
        widen<T>(gains[k], gain);
#pragma unroll
        for (int i = 0; i < V::kWidth; ++i) along += by[i] * gain[i] * (of[i] * row.scale);
      }
      along = sum_group<kGroup>(along, turn) * reciprocal((float)width);
#pragma unroll
      for (int k = 0; k < kKept; ++k) {
        float out[V::kWidth], by[V::kWidth], beside[V::kWidth], gain[V::kWidth];
        widen<T>(row.x[k], out);
        widen<T>(row.by[k], by);
        widen<T>(row.beside[k], beside);
        widen<T>(gains[k], gain);
#pragma unroll
        for (int i = 0; i < V::kWidth; ++i) {
          const float normal = out[i] * row.scale;
          share[k][i] += by[i] * normal;
          const float value = (by[i] * gain[i] - normal * along) * row.scale;
          out[i] = by_sum ? value + beside[i] : value;
        }
        if (r < rows && me + k * kGroup < vectors)
          (reinterpret_cast<Raw*>(by_x) + r * vectors)[me + k * kGroup] = narrow<T>(out);
      }
    }
#pragma unroll
    for (int k = 0; k < kKept; ++k) {
      if constexpr (kGroup < kThreads) {
#pragma unroll
        for (int i = 0; i < V::kWidth; ++i) share[k][i] = sum_warps<kThreads>(share[k][i]);
      }
      if (threadIdx.x >= kGroup || me + k * kGroup >= vectors) continue;
      const i64 at = (part * width) / 4 + (i64)(me + k * kGroup) * (V::kWidth / 4);
#pragma unroll
      for (int i = 0; i < V::kWidth; i += 4)
        reinterpret_cast<Vector<float>*>(shares)[at + i / 4] =
            Vector<float>{{share[k][i], share[k][i + 1], share[k][i + 2], share[k][i + 3]}};
    }
  }
}

template <int kWide, class T>
__device__ __forceinline__ void backward_read_twice(const T* by_out, const T* by_sum, const T* x, const T* weight,
                                                    const float* scale, T* by_x, float* shares, i64 rows, i64 width,
                                                    i64 parts) {
  using P = Pack<T, kWide>;
  using S = Pack<float, kWide>;
  const i64 packs = width / kWide;
  int turn = 0;
  for (i64 part = blockIdx.x; part < parts; part += gridDim.x) {
    S* share = reinterpret_cast<S*>(shares) + part * packs;
    for (i64 p = threadIdx.x; p < packs; p += kThreads) share[p] = S{};
    for (i64 r = part; r < rows; r += parts, turn ^= 1) {
      const i64 at = r * packs;
      const float s = scale[r];
      float along = 0.0f;
      for (i64 p = threadIdx.x; p < packs; p += kThreads) {
        const P row = reinterpret_cast<const P*>(x)[at + p], by = reinterpret_cast<const P*>(by_out)[at + p];
        const P gain = reinterpret_cast<const P*>(weight)[p];
#pragma unroll
        for (int i = 0; i < kWide; ++i) along += load(by.at[i]) * load(gain.at[i]) * (load(row.at[i]) * s);
      }
      along = sum_block<kThreads>(along, turn) / (float)width;
      for (i64 p = threadIdx.x; p < packs; p += kThreads) {
        const P gain = reinterpret_cast<const P*>(weight)[p], by = reinterpret_cast<const P*>(by_out)[at + p];
        P row = reinterpret_cast<const P*>(x)[at + p], beside;
        S sums = share[p];
        if (by_sum) beside = reinterpret_cast<const P*>(by_sum)[at + p];
#pragma unroll
        for (int i = 0; i < kWide; ++i) {
          const float normal = load(row.at[i]) * s, above = load(by.at[i]);
          sums.at[i] += above * normal;
          const float value = (above * load(gain.at[i]) - normal * along) * s;
          row.at[i] = store<T>(by_sum ? value + load(beside.at[i]) : value);
        }
        share[p] = sums;
        reinterpret_cast<P*>(by_x)[at + p] = row;
      }
    }
  }
}

// By the width of rows.
template <class T>
__device__ __forceinline__ void forward_many(const T* x, const T* residual, const T* weight, T* sum, T* out,
                                             float* scale, i64 rows, i64 width, float eps) {
  constexpr int kKept = kElements / Vector<T>::kWidth;
  if (width <= 32 * kElements)
    forward_kept<32, kKept>(x, residual, weight, sum, out, scale, rows, width, eps);
  else
    forward_kept<kThreads, kKept>(x, residual, weight, sum, out, scale, rows, width, eps);
}
template <class T>
__device__ __forceinline__ void backward_many(const T* by_out, const T* by_sum, const T* x, const T* weight,
                                              const float* scale, T* by_x, float* shares, i64 rows, i64 width,
                                              i64 parts) {
  constexpr int kKept = kElements / Vector<T>::kWidth;
  if (width <= 32 * kElements)
    backward_kept<32, kKept>(by_out, by_sum, x, weight, scale, by_x, shares, rows, width, parts);
  else
    backward_kept<kThreads, kKept>(by_out, by_sum, x, weight, scale, by_x, shares, rows, width, parts);
}

// Whatever it is, and wherever it lies.
template <class T>
__device__ __forceinline__ void forward_any(const T* x, const T* residual, const T* weight, T* sum, T* out,
                                            float* scale, i64 rows, i64 width, float eps) {
  if (in_vectors<T>(width, x, residual, weight, sum, out))
    forward_read_twice<Vector<T>::kWidth>(x, residual, weight, sum, out, scale, rows, width, eps);
  else
    forward_read_twice<1>(x, residual, weight, sum, out, scale, rows, width, eps);
}
template <class T>
__device__ __forceinline__ void backward_any(const T* by_out, const T* by_sum, const T* x, const T* weight,
                                             const float* scale, T* by_x, float* shares, i64 rows, i64 width,
                                             i64 parts) {
  if (in_vectors<T>(width, by_out, by_sum, x, weight, by_x))
    backward_read_twice<Vector<T>::kWidth>(by_out, by_sum, x, weight, scale, by_x, shares, rows, width, parts);
  else
    backward_read_twice<1>(by_out, by_sum, x, weight, scale, by_x, shares, rows, width, parts);
}

}  // namespace rms_norm
}  // namespace davinci

// `one`: rows of up to 256 vectors; forward a warp has one, and two blocks are to have room (left to itself the compiler
// saves registers that nobody else can use, and waits for the row before it asks for all of the residual), backward a
// block, of which four are. `many`: a thread has up to 16 elements, and narrow rows take a warp each. `any`: whatever
// rows there are.
#define DAVINCI_RMS_NORM_FORWARD(kind, bounds, suffix, type, ...)                                                      \
  DAVINCI_KERNEL_WITHIN(rms_norm_forward_##kind##_##suffix, davinci::rms_norm::kThreads, 0, bounds,                    \
                        (const davinci::type* x, const davinci::type* residual, const davinci::type* weight,           \
                         davinci::type* sum, davinci::type* out, float* scale, davinci::i64 rows, davinci::i64 width,  \
                         float eps),                                                                                   \
                        (x, residual, weight, sum, out, scale, rows, width, eps)) {                                    \
    davinci::rms_norm::__VA_ARGS__(x, residual, weight, sum, out, scale, rows, width, eps);                            \
  }
#define DAVINCI_RMS_NORM_BACKWARD(kind, bounds, suffix, type, ...)                                                     \
  DAVINCI_KERNEL_WITHIN(rms_norm_backward_##kind##_##suffix, davinci::rms_norm::kThreads, 0, bounds,                   \
                        (const davinci::type* by_out, const davinci::type* by_sum, const davinci::type* x,             \
                         const davinci::type* weight, const float* scale, davinci::type* by_x, float* shares,          \
                         davinci::i64 rows, davinci::i64 width, davinci::i64 parts),                                   \
                        (by_out, by_sum, x, weight, scale, by_x, shares, rows, width, parts)) {                        \
    davinci::rms_norm::__VA_ARGS__(by_out, by_sum, x, weight, scale, by_x, shares, rows, width, parts);                \
  }
#define DAVINCI_RMS_NORM(suffix, type)                                                                                 \
  DAVINCI_RMS_NORM_FORWARD(one, (davinci::rms_norm::kThreads, 2), suffix, type,                                        \
                           forward_kept<32, davinci::rms_norm::kThreads / 32>)                                         \
  DAVINCI_RMS_NORM_FORWARD(many, (davinci::rms_norm::kThreads), suffix, type, forward_many)                            \
  DAVINCI_RMS_NORM_FORWARD(any, (davinci::rms_norm::kThreads), suffix, type, forward_any)                              \
  DAVINCI_RMS_NORM_BACKWARD(one, (davinci::rms_norm::kThreads, 4), suffix, type,                                       \
                            backward_kept<davinci::rms_norm::kThreads, 1>)                                             \
  DAVINCI_RMS_NORM_BACKWARD(many, (davinci::rms_norm::kThreads), suffix, type, backward_many)                          \
  DAVINCI_RMS_NORM_BACKWARD(any, (davinci::rms_norm::kThreads), suffix, type, backward_any)

DAVINCI_RMS_NORM(fp32, f32)
DAVINCI_RMS_NORM(bf16, bf16)
