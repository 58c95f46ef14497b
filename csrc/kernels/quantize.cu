// Matrices in 8 bits, and transposed as well in the same pass: a scale a tensor, one for each 128 neighbours of a row,
// or one for each 128 x 128 (DeepSeek-AI, 2024, DeepSeek-V3 Technical Report, arXiv 2412.19437, section 3.3.2).
//
// A block of threads takes a tile of 128 x 128. A thread has a patch of 8 x 8 of it in registers, so that it can write
// both ways: a row of the patch is 8 codes in a row, and a column 8 codes in a row of the transposed matrix. Scales are
// those of precision/scaling.py, to the bit.
//
// What SwiGLU or RMSNorm makes can be made on the way, rounded as it would be written: then it is in memory in 8 bits
// only. A call without codes to write, and with no largest number known, finds the largest.
#include "gated.h"
#include "quantize.h"

namespace davinci {
namespace quantize {

// Where the numbers of a matrix of so many columns come from. What is read is apart from what is made of it, so that a
// thread has many reads on their way before it waits for one. They come from memory,
template <class T>
struct AsIs {
  using Number = T;
  const T* x;
  i64 columns;
  struct Parts {
    Raw x;
  };
  __device__ __forceinline__ Parts read(i64 row, i64 column) const {
    return Parts{*reinterpret_cast<const Raw*>(x + row * columns + column)};
  }
  __device__ __forceinline__ Raw make(const Parts& parts) const { return parts.x; }
};

// rows that have all gates and behind them all that is gated,
template <class T>
struct Gated {
  using Number = T;
  const T* x;
  i64 columns;
  struct Parts {
    Raw gate, up;
  };
  __device__ __forceinline__ Parts read(i64 row, i64 column) const {
    const T* here = x + 2 * row * columns + column;
    return Parts{*reinterpret_cast<const Raw*>(here), *reinterpret_cast<const Raw*>(here + columns)};
  }
  __device__ __forceinline__ Raw make(const Parts& parts) const {
    float gate[Vector<T>::kWidth], up[Vector<T>::kWidth];
    widen<T>(parts.gate, gate);
    widen<T>(parts.up, up);
#pragma unroll
    for (int i = 0; i < Vector<T>::kWidth; ++i) gate[i] = gated(gate[i], up[i]);
    return narrow<T>(gate);
  }
};

// or rows that are normalised: each times its scale and the weights.
template <class T>
struct Normed {
  using Number = T;
  const T* x;
  i64 columns;
  const float* scale;
  const T* weight;
  struct Parts {
    Raw x, gain;
    float scale;
  };
  __device__ __forceinline__ Parts read(i64 row, i64 column) const {
    return Parts{*reinterpret_cast<const Raw*>(x + row * columns + column),
                 *reinterpret_cast<const Raw*>(weight + column), scale[row]};
  }
  __device__ __forceinline__ Raw make(const Parts& parts) const {
    float part[Vector<T>::kWidth], gain[Vector<T>::kWidth];
    widen<T>(parts.x, part);
    widen<T>(parts.gain, gain);
#pragma unroll
    for (int i = 0; i < Vector<T>::kWidth; ++i) part[i] = part[i] * parts.scale * gain[i];
    return narrow<T>(part);
  }
};

// A patch of a tile: which rows and columns of the matrix a thread has, and their numbers.
template <class T>
struct Patch {
  static constexpr int kVectors = kPatch / Vector<T>::kWidth;  // of a row
  i64 row, column;  // its first ones
  Raw at[kPatch][kVectors];

  // A patch is in the matrix as a whole, or outside, where it is 0, as is what any source makes of zeros.
  template <class Source>
  __device__ __forceinline__ void read(const Source& source, bool inside) {
    constexpr int kRowsAtOnce = sizeof(T) == 2 ? kPatch : 2;  // as registers allow
#pragma unroll
    for (int first = 0; first < kPatch; first += kRowsAtOnce) {
      typename Source::Parts parts[kRowsAtOnce][kVectors] = {};
      if (inside) {
#pragma unroll
        for (int r = 0; r < kRowsAtOnce; ++r)
#pragma unroll
          for (int v = 0; v < kVectors; ++v)
            parts[r][v] = source.read(row + first + r, column + v * Vector<T>::kWidth);
      }
#pragma unroll
      for (int r = 0; r < kRowsAtOnce; ++r)
#pragma unroll
        for (int v = 0; v < kVectors; ++v) at[first + r][v] = source.make(parts[r][v]);
    }
  }

  // Of its numbers those of a row or of a column, times a scale or their scales.
  __device__ __forceinline__ Eight scaled_row(int r, float scale) const {
    Eight values;
#pragma unroll
    for (int c = 0; c < kPatch; ++c) values.at[c] = number(r, c) * scale;
    return values;
  }
  __device__ __forceinline__ Eight scaled_column(int c, float scale) const {
    Eight values;
#pragma unroll
    for (int r = 0; r < kPatch; ++r) values.at[r] = number(r, c) * scale;
    return values;
  }
  __device__ __forceinline__ u32 word(int r, int c) const {
    return at[r][c / Vector<T>::kWidth].at[c % Vector<T>::kWidth * (int)sizeof(T) / 4];
  }
  __device__ __forceinline__ float number(int r, int c) const {
    return element_of<T>(at[r][c / Vector<T>::kWidth], c % Vector<T>::kWidth);
  }

  __device__ __forceinline__ void see_row(int r, Sizes<T>& sizes) const {
#pragma unroll
    for (int v = 0; v < kVectors; ++v)
#pragma unroll
      for (int w = 0; w < 4; ++w) sizes.see(at[r][v].at[w]);
  }
  __device__ __forceinline__ u32 largest_of_row(int r) const {
    Sizes<T> sizes;
    see_row(r, sizes);
    return sizes.largest();
  }
  __device__ __forceinline__ u32 largest_of_column(int c) const {
    Sizes<T> sizes;
#pragma unroll
    for (int r = 0; r < kPatch; ++r) sizes.see(word(r, c));
    return sizes.of(c);
  }
  __device__ __forceinline__ u32 largest() const {
    Sizes<T> sizes;
#pragma unroll
    for (int r = 0; r < kPatch; ++r) see_row(r, sizes);
    return sizes.largest();
  }
};

enum Scales { kTensor, kRows, kTiles };

// source: of [rows, columns], both multiples of 16, and of 128 where blocks lie along them; what it reads begins where
// 16 bytes do.
// codes: the same shape; turned: [columns, rows]; either may be null.
// inverse: of a tensor one, of rows [columns / 128, rows], of tiles [rows / 128, columns / 128].
// inverse_turned: of rows, for the transposed matrix, [rows / 128, columns].
// known: of a tensor, the largest number that its scale is made of; null where no codes are wanted. amax: the largest
// number of all, joined to what is there; null where nobody wants it.
template <Scales kScales, class Source>
__device__ __forceinline__ void whole(const Source& source, const float* known, u8* codes, u8* turned, float* inverse,
                                      float* inverse_turned, u32* amax, i64 rows, bool e5m2) {
  using T = typename Source::Number;
  const i64 columns = source.columns;
  DAVINCI_SHARED(u64, words, Turned::kWords);
  DAVINCI_SHARED(u32, largest, kTile * kThreads / 32);
  DAVINCI_SHARED(float, of_columns, kTile);
  const int across = threadIdx.x % kAcross, down = threadIdx.x / kAcross, lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  const float most = e5m2 ? E5M2::kTop : E4M3::kTop;
  const i64 wide = (columns + kTile - 1) / kTile, tiles = (rows + kTile - 1) / kTile * wide;
  float scale = 1.0f;
  if (kScales == kTensor && known) {
    scale = scale_of(bits_of(*known) & 0x7fffffffu, most);
    if (blockIdx.x == 0 && threadIdx.x == 0) *inverse = 1.0f / scale;
  }
  u32 seen = 0;
  for (i64 tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    const i64 top = tile / wide * kTile, left = tile % wide * kTile;
    Patch<T> patch;
    patch.row = top + down * kPatch;
    patch.column = left + across * kPatch;
    const bool inside = patch.row < rows && patch.column < columns;
    patch.read(source, inside);
    float of_row[kPatch];
    if (kScales == kTiles) {
      u32 found = largest_of_lanes(patch.largest(), 16);
      if (lane == 0) largest[warp] = found;
      __syncthreads();
      for (int w = 0; w < kThreads / 32; ++w) found = larger(found, largest[w]);
      seen = larger(seen, found);
      scale = power_of_two_scale(found, most);
      if (threadIdx.x == 0) inverse[tile] = 1.0f / scale;
    }
#pragma unroll
    for (int r = 0; r < kPatch; ++r) {
      of_row[r] = scale;
      if (kScales == kRows) {
        const u32 found = largest_of_lanes(patch.largest_of_row(r), kAcross / 2);
        seen = larger(seen, found);
        of_row[r] = power_of_two_scale(found, most);
        if (codes && across == r && inside)
          inverse[left / kTile * rows + patch.row + r] = 1.0f / of_row[r];
      }
    }
    if (kScales == kTensor && amax) seen = larger(seen, patch.largest());
    CodedPatch coded;
    if (codes || (turned && kScales != kRows)) {
      const bool writes = codes && inside;
      u8* to = codes + patch.row * columns + patch.column;
#pragma unroll
      for (int r = 0; r < kPatch; ++r, to += columns) {
        coded.set(r, eight_codes(patch.scaled_row(r, of_row[r]), e5m2));
        if (writes) *reinterpret_cast<u64*>(to) = coded.word(r);
      }
    }
    if (turned) {
      if (kScales == kRows) {
        // A warp has two rows of patches; what all eight have is joined by one thread a column.
#pragma unroll
        for (int c = 0; c < kPatch; ++c) {
          u32 found = patch.largest_of_column(c);
          found = larger(found, __shfl_xor_sync(kAllLanes, found, kAcross));
          if (lane < kAcross) largest[warp * kTile + across * kPatch + c] = found;
        }
        __syncthreads();
        if (threadIdx.x < kTile) {
          u32 found = 0;
          for (int w = 0; w < kThreads / 32; ++w) found = larger(found, largest[w * kTile + threadIdx.x]);
          const float one = power_of_two_scale(found, most);
          of_columns[threadIdx.x] = one;
          if (left + threadIdx.x < columns) inverse_turned[top / kTile * columns + left + threadIdx.x] = 1.0f / one;
        }
        __syncthreads();
      }
      // With one scale they are the same codes; with others for columns they are not.
      if (kScales != kRows) coded.turn_all();
#pragma unroll
      for (int c = 0; c < kPatch; ++c) {
        if (kScales == kRows)
          coded.set(c, eight_codes(patch.scaled_column(c, of_columns[across * kPatch + c]), e5m2));
        words[Turned::place(across * kPatch + c, down)] = coded.word(c);
      }
      __syncthreads();
      const i64 row = top + across * kPatch;  // that its word begins with
      const int last = row < rows ? (int)(columns - left < kTile ? columns - left : kTile) : 0;
      u8* to = turned + (left + down) * rows + row;
#pragma unroll 4
      for (int c = down; c < last; c += kAcross, to += kAcross * rows)
        *reinterpret_cast<u64*>(to) = words[Turned::place(c, across)];
    }
    __syncthreads();  // the next tile writes where this one is read
  }
  if (amax) join(amax, seen);
}

// The largest size of all numbers, joined to what is there.
template <class T>
__device__ __forceinline__ void largest_of_all(const T* x, u32* amax, i64 count) {
  const Split<T> split(x, count);
  const Raw* body = reinterpret_cast<const Raw*>(x + split.head);
  Sizes<T> sizes;
  const i64 step = (i64)gridDim.x * kThreads, me = (i64)blockIdx.x * kThreads + threadIdx.x;
  u32 found = 0;
  if (me < split.head) found = size_bits(load(x[me]));
  if (me < count - split.tail) found = larger(found, size_bits(load(x[split.tail + me])));
#pragma unroll 4
  for (i64 v = me; v < split.vectors; v += step) {
    const Raw part = body[v];
#pragma unroll
    for (int w = 0; w < 4; ++w) sizes.see(part.at[w]);
  }
  join(amax, larger(found, sizes.largest()));
}

}  // namespace quantize
}  // namespace davinci

#define DAVINCI_QUANTIZE_OF(name, Source, scales, suffix, type, bounds)                                                \
  DAVINCI_KERNEL_WITHIN(name##_##suffix, davinci::quantize::kThreads, 0, bounds,                                       \
                 (const davinci::type* x, const float* known, davinci::u8* codes, davinci::u8* turned, float* inverse, \
                  float* inverse_turned, davinci::u32* amax, davinci::i64 rows, davinci::i64 columns,                  \
                  davinci::i64 e5m2),                                                                                  \
                 (x, known, codes, turned, inverse, inverse_turned, amax, rows, columns, e5m2)) {                      \
    davinci::quantize::whole<davinci::quantize::scales>(davinci::quantize::Source<davinci::type>{x, columns}, known,   \
                                                        codes, turned, inverse, inverse_turned, amax, rows,            \
                                                        e5m2 != 0);                                                    \
  }
#define DAVINCI_QUANTIZE_NORM(kind, scales, suffix, type)                                                              \
  DAVINCI_KERNEL(quantize_norm_##kind##_##suffix, davinci::quantize::kThreads,                                         \
                 (const davinci::type* x, const float* scale, const davinci::type* weight, const float* known,         \
                  davinci::u8* codes, davinci::u8* turned, float* inverse, float* inverse_turned, davinci::u32* amax,  \
                  davinci::i64 rows, davinci::i64 columns, davinci::i64 e5m2),                                         \
                 (x, scale, weight, known, codes, turned, inverse, inverse_turned, amax, rows, columns, e5m2)) {       \
    davinci::quantize::whole<davinci::quantize::scales>(                                                               \
        davinci::quantize::Normed<davinci::type>{x, columns, scale, weight}, known, codes, turned, inverse,            \
        inverse_turned, amax, rows, e5m2 != 0);                                                                        \
  }
#define DAVINCI_QUANTIZE(suffix, type, bounds)                                                                         \
  DAVINCI_QUANTIZE_OF(quantize_tensor, AsIs, kTensor, suffix, type, bounds)                                            \
  DAVINCI_QUANTIZE_OF(quantize_rows, AsIs, kRows, suffix, type, bounds)                                                \
  DAVINCI_QUANTIZE_OF(quantize_tiles, AsIs, kTiles, suffix, type, bounds)                                              \
  DAVINCI_QUANTIZE_OF(quantize_swiglu_tensor, Gated, kTensor, suffix, type, bounds)                                    \
  DAVINCI_QUANTIZE_OF(quantize_swiglu_rows, Gated, kRows, suffix, type, bounds)                                        \
  DAVINCI_QUANTIZE_NORM(tensor, kTensor, suffix, type)                                                                 \
  DAVINCI_QUANTIZE_NORM(rows, kRows, suffix, type)                                                                     \
  DAVINCI_KERNEL(quantize_amax_##suffix, davinci::quantize::kThreads,                                                  \
                 (const davinci::type* x, davinci::u32* amax, davinci::i64 count), (x, amax, count)) {                 \
    davinci::quantize::largest_of_all(x, amax, count);                                                                 \
  }

// A block of fp32 patches takes the registers of two.
DAVINCI_QUANTIZE(fp32, f32, (davinci::quantize::kThreads, 1))
DAVINCI_QUANTIZE(bf16, bf16, (davinci::quantize::kThreads))
