// SwiGLU (Shazeer, 2020, GLU Variants Improve Transformer, arXiv 2002.05202): silu(gate) * up, of rows that have all
// gates and behind them all that is gated.
#include "gated.h"

namespace davinci {
namespace swiglu {

constexpr int kThreads = 256;
constexpr int kEach = 4;  // packs that a thread takes of a chunk

// Calls act(row, pack in the row) for each pack of a matrix, which lie in one long line.
template <class Act>
__device__ __forceinline__ void each_pack(i64 rows, i64 packs, Act act) {
  const i64 all = rows * packs, chunk = kThreads * kEach;
  for (i64 first = (i64)blockIdx.x * chunk; first < all; first += (i64)gridDim.x * chunk) {
    // Divided once; from there on it is counted.
    i64 row = (first + threadIdx.x) / packs, p = (first + threadIdx.x) % packs;
#pragma unroll
    for (int k = 0; k < kEach; ++k) {
      if (row >= rows) break;
      act(row, p);
      p += kThreads;
      if (p >= packs) {
        row += p / packs;
        p %= packs;
      }
    }
  }
}

template <int kWide, class T>
__device__ __forceinline__ void forward_packs(const T* x, T* out, i64 rows, i64 width) {
  using E = Elements<T, kWide>;
  using P = typename E::Came;
  const i64 packs = width / kWide;
  each_pack(rows, packs, [&](i64 row, i64 p) {
    float gate[kWide], up[kWide];
    E::open(reinterpret_cast<const P*>(x)[2 * row * packs + p], gate);
    E::open(reinterpret_cast<const P*>(x)[(2 * row + 1) * packs + p], up);
#pragma unroll
    for (int i = 0; i < kWide; ++i) gate[i] = gated(gate[i], up[i]);
    reinterpret_cast<P*>(out)[row * packs + p] = E::close(gate);
  });
}

// by_x may be x. `again`, unless it is null, gets what forward wrote.
template <int kWide, class T>
__device__ __forceinline__ void backward_packs(const T* by_out, const T* x, T* by_x, T* again, i64 rows, i64 width) {
  using E = Elements<T, kWide>;
  using P = typename E::Came;
  const i64 packs = width / kWide;
  each_pack(rows, packs, [&](i64 row, i64 p) {
    float gate[kWide], up[kWide], by[kWide];
    E::open(reinterpret_cast<const P*>(x)[2 * row * packs + p], gate);
    E::open(reinterpret_cast<const P*>(x)[(2 * row + 1) * packs + p], up);
    E::open(reinterpret_cast<const P*>(by_out)[row * packs + p], by);
#pragma unroll
    for (int i = 0; i < kWide; ++i) {
      const GatedGradient found = gated_gradient(gate[i], up[i], by[i]);
      by[i] = found.silu * up[i];
      gate[i] = found.by_gate;
      up[i] = found.by_up;
    }
    reinterpret_cast<P*>(by_x)[2 * row * packs + p] = E::close(gate);
    reinterpret_cast<P*>(by_x)[(2 * row + 1) * packs + p] = E::close(up);
    if (again) reinterpret_cast<P*>(again)[row * packs + p] = E::close(by);
  });
}

template <class T>
__device__ __forceinline__ void forward(const T* x, T* out, i64 rows, i64 width) {
  if (in_vectors<T>(width, x, out))
    forward_packs<Vector<T>::kWidth>(x, out, rows, width);
  else
    forward_packs<1>(x, out, rows, width);
}

template <class T>
__device__ __forceinline__ void backward(const T* by_out, const T* x, T* by_x, T* again, i64 rows, i64 width) {
  if (in_vectors<T>(width, by_out, x, by_x, again))
    backward_packs<Vector<T>::kWidth>(by_out, x, by_x, again, rows, width);
  else
    backward_packs<1>(by_out, x, by_x, again, rows, width);
}

}  // namespace swiglu
}  // namespace davinci

#define DAVINCI_SWIGLU(suffix, type)                                                                                   \
  DAVINCI_KERNEL(swiglu_forward_##suffix, davinci::swiglu::kThreads,                                                   \
                 (const davinci::type* x, davinci::type* out, davinci::i64 rows, davinci::i64 width),                  \
                 (x, out, rows, width)) {                                                                              \
    davinci::swiglu::forward(x, out, rows, width);                                                                     \
  }                                                                                                                    \
  DAVINCI_KERNEL(swiglu_backward_##suffix, davinci::swiglu::kThreads,                                                  \
                 (const davinci::type* by_out, const davinci::type* x, davinci::type* by_x, davinci::type* again,      \
                  davinci::i64 rows, davinci::i64 width),                                                              \
                 (by_out, x, by_x, again, rows, width)) {                                                              \
    davinci::swiglu::backward(by_out, x, by_x, again, rows, width);                                                    \
  }

DAVINCI_SWIGLU(fp32, f32)
DAVINCI_SWIGLU(bf16, bf16)
