// The gradient through SwiGLU (gated.h) straight into 8 bits, as it is and transposed, with a scale a tensor: it is
// never written as it is. Its numbers are rounded as they would be written, so that codes are those of quantize.cu.
//
// Tiles and patches are as there. A block makes the gradients of the gates and of what they gate of one place, whose
// codes lie apart by half a row, so each of the three numbers that both are made of is read once. A row of a patch goes
// into codes as soon as it is made, while the next rows, of this tile or of the block's next one, are on their way to
// shared memory. Only codes are kept until they are transposed, which is bytes that change places.
#include "gated.h"
#include "quantize.h"

namespace davinci {
namespace quantize_gradient {

using namespace quantize;

constexpr int kRead = 3;  // tensors: gates, what they gate, and the gradient of the product

// A thread's own rows of its patches that are on their way: two of bf16, one of fp32.
template <class T>
struct Ahead {
  static constexpr int kVectors = kPatch / Vector<T>::kWidth, kRows = 2 / kVectors;
  static constexpr int kSlots = kRows * kRead * kVectors * kThreads;
  __device__ __forceinline__ static int slot(int row, int which, int v) {
    return ((row % kRows * kRead + which) * kVectors + v) * kThreads + threadIdx.x;
  }
};

// Two numbers as they are after they were written and read, and the largest sizes so far.
template <class T>
__device__ __forceinline__ void round(float& one, float& other, Sizes<T>& sizes) {
  if constexpr (sizeof(T) == 4) {
    sizes.see(bits_of(one));
    sizes.see(bits_of(other));
  } else {
    const u32 both = bf16_pair(one, other);
    one = float_of(both << 16);
    other = float_of(both & 0xffff0000u);
    sizes.see(both);
  }
}

// by_out: [rows, width]. x: [rows, 2 width], a multiple of 16, as rows are; both begin where 16 bytes do.
// codes: [rows, 2 width]; turned: [2 width, rows]; either may be null.
// known: the largest number that the scale is made of; null where no codes are wanted. inverse: of the scale.
// amax: the largest number of all, joined to what is there; null where nobody wants it.
template <class Format, class T>
__device__ __forceinline__ void both_ways(const T* x, const T* by_out, const float* known, u8* codes, u8* turned,
                                          float* inverse, u32* amax, i64 rows, i64 width) {
  using V = Vector<T>;
  using A = Ahead<T>;
  DAVINCI_SHARED(Raw, ahead, A::kSlots);
  DAVINCI_SHARED(u64, words, Turned::kWords);
  const int across = threadIdx.x % kAcross, down = threadIdx.x / kAcross;
  // Of 16,384 places each: a word counts them.
  const u32 wide = (u32)((width + kTile - 1) / kTile), tiles = (u32)((rows + kTile - 1) / kTile) * wide;
  float scale = 1.0f;
  if (known) {
    scale = scale_of(size_bits(*known), Format::kTop);
    if (blockIdx.x == 0 && threadIdx.x == 0) *inverse = 1.0f / scale;
  }
  Sizes<T> sizes;
  // Of the row whose copy is the next to begin. A patch is in the matrix as a whole, or outside: then it reads another
  // one and writes it nowhere.
  const T *from = x, *by_from = by_out;
  const auto go_to = [&](u32 tile) {
    i64 row = (i64)(tile / wide) * kTile + down * kPatch, column = (i64)(tile % wide) * kTile + across * kPatch;
    if (row >= rows) row = rows - kPatch;
    if (column >= width) column = width - kPatch;
    from = x + 2 * row * width + column;
    by_from = by_out + row * width + column;
  };
  const auto begin_row = [&](int row) {
#pragma unroll
    for (int v = 0; v < A::kVectors; ++v) {
      begin_copy(ahead, A::slot(row, 0, v), from + v * V::kWidth);
      begin_copy(ahead, A::slot(row, 1, v), from + width + v * V::kWidth);
      begin_copy(ahead, A::slot(row, 2, v), by_from + v * V::kWidth);
    }
    from += 2 * width;
    by_from += width;
  };
  if (blockIdx.x < tiles) go_to(blockIdx.x);
#pragma unroll
  for (int r = 0; r < A::kRows; ++r) {
    if (blockIdx.x < tiles) begin_row(r);
    end_group();
  }
  for (u32 tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const i64 top = (i64)(tile / wide) * kTile, left = (i64)(tile % wide) * kTile;
    const i64 row = top + down * kPatch, column = left + across * kPatch;
    const bool writes = codes && row < rows && column < width;
    const bool is_last = tile + gridDim.x >= tiles;
    u8* to = codes + 2 * row * width + column;
    CodedPatch patch[2];
#pragma unroll
    for (int r = 0; r < kPatch; ++r) {
      if (r == kPatch - A::kRows) go_to(is_last ? tile : tile + gridDim.x);
      wait_but<A::kRows - 1>();
      Eight found[2];
      float gates[A::kVectors][V::kWidth], ups[A::kVectors][V::kWidth], above[A::kVectors][V::kWidth];
#pragma unroll
      for (int v = 0; v < A::kVectors; ++v) {
        widen<T>(ahead[A::slot(r, 0, v)], gates[v]);
        widen<T>(ahead[A::slot(r, 1, v)], ups[v]);
        widen<T>(ahead[A::slot(r, 2, v)], above[v]);
      }
      if (r < kPatch - A::kRows || !is_last) begin_row(r);
      end_group();
#pragma unroll
      for (int v = 0; v < A::kVectors; ++v) {
#pragma unroll
        for (int i = 0; i < V::kWidth; ++i) {
          const GatedGradient one = gated_gradient(gates[v][i], ups[v][i], above[v][i]);
          found[0].at[v * V::kWidth + i] = one.by_gate;
          found[1].at[v * V::kWidth + i] = one.by_up;
        }
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int c = 0; c < kPatch; c += 2) round(found[half].at[c], found[half].at[c + 1], sizes);
#pragma unroll
        for (int c = 0; c < kPatch; ++c) found[half].at[c] *= scale;
        const u64 coded = eight_codes<Format>(found[half]);
        patch[half].set(r, coded);
        if (writes) *reinterpret_cast<u64*>(to) = coded;
        to += width;
      }
    }
    if (!turned) continue;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      patch[half].turn_all();
#pragma unroll
      for (int c = 0; c < kPatch; ++c) words[Turned::place(across * kPatch + c, down)] = patch[half].word(c);
      __syncthreads();
      // Its word begins with a row of this matrix; columns are those of the half.
      const i64 first = top + across * kPatch;
      const int last = first < rows ? (int)(width - left < kTile ? width - left : kTile) : 0;
      u8* place = turned + (half * width + left + down) * rows + first;
#pragma unroll 4
      for (int c = down; c < last; c += kAcross, place += kAcross * rows)
        *reinterpret_cast<u64*>(place) = words[Turned::place(c, across)];
      __syncthreads();  // the next half writes where this one is read
    }
  }
  if (amax) join(amax, sizes.largest());
}

}  // namespace quantize_gradient
}  // namespace davinci

// A kernel a format: a thread has no register to spare for which of them it is.
#define DAVINCI_QUANTIZE_GRADIENT(format, Format, suffix, type, resident)                                              \
  DAVINCI_KERNEL_WITHIN(quantize_swiglu_gradient_##format##_##suffix, davinci::quantize::kThreads, 0,                  \
                        (davinci::quantize::kThreads, resident),                                                       \
                        (const davinci::type* x, const davinci::type* by_out, const float* known, davinci::u8* codes,  \
                         davinci::u8* turned, float* inverse, davinci::u32* amax, davinci::i64 rows,                   \
                         davinci::i64 width),                                                                          \
                        (x, by_out, known, codes, turned, inverse, amax, rows, width)) {                               \
    davinci::quantize_gradient::both_ways<davinci::Format>(x, by_out, known, codes, turned, inverse, amax, rows,       \
                                                           width);                                                     \
  }

DAVINCI_QUANTIZE_GRADIENT(e4m3, E4M3, fp32, f32, 1)
DAVINCI_QUANTIZE_GRADIENT(e4m3, E4M3, bf16, bf16, 2)
DAVINCI_QUANTIZE_GRADIENT(e5m2, E5M2, fp32, f32, 1)
DAVINCI_QUANTIZE_GRADIENT(e5m2, E5M2, bf16, bf16, 2)
