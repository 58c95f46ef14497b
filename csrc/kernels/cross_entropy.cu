// Cross entropy over a vocabulary that may be split over tensor-parallel ranks, in place.
//
// A row is the logits of one token on this rank. Column c is token `first + c`; those at and past `tokens` are padding
// and count as minus infinity. A label is a token, or `ignored`, whose row has no loss and no gradient; any other makes
// its row's loss no number. Statistics are fp32, whatever the logits are.
#include "reduce.h"

namespace davinci {
namespace cross_entropy {

constexpr int kThreads = 512;
// Of the pass that both reads and writes a row: a thread keeps vectors of it in shared memory and in registers, and the
// rest waits in the cache, of which loads of a batch are under way at once. Emulated it is smaller, so that rows of a
// few thousand columns, whose fibers are soon run, have vectors of each kind, whole batches and a rest.
#if defined(DAVINCI_EMULATOR)
constexpr int kWholeThreads = 32, kSlots = 4, kAGroup = 2, kBehind = 1, kKept = 1, kBatch = 2;
#else
constexpr int kWholeThreads = 1024, kSlots = 14, kAGroup = 1, kBehind = 4, kBatch = 2;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr int kKept = 4;  // an A100's compiler has no registers left for another
#else
constexpr int kKept = 5;
#endif
#endif
constexpr int kGroups = kSlots / kAGroup;  // of slots that are waited for together, while kBehind more are on their way
static_assert(kGroups * kAGroup == kSlots && kBehind && kBehind <= kGroups, "whole groups, some of them behind");

// A row has fewer than 2^31 columns.
struct Row {
  int label;      // column of the label; none of this rank's where it is another rank's, ignored or wrong
  int columns;    // those that are no padding
  bool ignored, wrong;
  __device__ __forceinline__ Row(i64 label_, i64 width, i64 first, i64 tokens, i64 ignored_) {
    ignored = label_ == ignored_;
    wrong = !ignored && (label_ < 0 || label_ >= tokens);
    columns = (int)(tokens - first < width ? (tokens > first ? tokens - first : 0) : width);
    label = ignored || wrong || label_ < first || label_ >= first + columns ? -1 : (int)(label_ - first);
  }
};

// `Split` in 32 bits.
struct Parts {
  int head, vectors, tail, width;
  template <class T>
  __device__ __forceinline__ Parts(const T* row, i64 width_) {
    const Split<T> split(row, width_);
    head = (int)split.head;
    vectors = (int)split.vectors;
    tail = (int)split.tail;
    width = (int)width_;
  }
};

// Adds a vector's logits: one comparison with the largest so far for all, then a difference, a product, a power and a
// sum each. The difference comes first: fused with the product it would be taken from a rounded one, and what is largest
// would not be exactly 1, by far not where logits are large.
template <class T>
__device__ __forceinline__ void add_vector(Softmax& sum, const float (&logits)[Vector<T>::kWidth]) {
  constexpr int kWidth = Vector<T>::kWidth;
  float largest = logits[0], powers[kWidth];
#pragma unroll
  for (int k = 1; k < kWidth; ++k) largest = fmaxf(largest, logits[k]);
  if (largest > sum.largest) {
    sum.total *= power_of_two((sum.largest - largest) * kLog2E);
    sum.largest = largest;
  }
  if (fabsf(sum.largest) < infinity()) {
#pragma unroll
    for (int k = 0; k < kWidth; ++k) powers[k] = power_of_two((logits[k] - sum.largest) * kLog2E);
  } else {
#pragma unroll
    for (int k = 0; k < kWidth; ++k) powers[k] = rescale(logits[k], sum.largest);
  }
#pragma unroll
  for (int apart = kWidth / 2; apart; apart /= 2)
#pragma unroll
    for (int k = 0; k < apart; ++k) powers[k] += powers[k + apart];
  sum.total += powers[0];
}

// The columns of a vector from `base` on that are no padding are added.
template <class T>
__device__ __forceinline__ void add_part(Softmax& sum, Raw block, int base, int columns) {
  float logits[Vector<T>::kWidth];
  widen<T>(block, logits);
  if (base + Vector<T>::kWidth > columns) {
#pragma unroll
    for (int k = 0; k < Vector<T>::kWidth; ++k)
      if (base + k >= columns) logits[k] = -infinity();
  }
  add_vector<T>(sum, logits);
}

// Those before the first vector and after the last.
template <int kBlock, class T>
__device__ __forceinline__ void add_ends(Softmax& sum, const T* row, const Parts& parts, int columns) {
  for (int i = threadIdx.x; i < parts.head; i += kBlock)
    if (i < columns) sum = add(sum, load(row[i]));
  for (int i = parts.tail + (int)threadIdx.x; i < parts.width; i += kBlock)
    if (i < columns) sum = add(sum, load(row[i]));
}

__device__ __forceinline__ float probability_of(float logit, float log_z) {
  return power_of_two((logit - log_z) * kLog2E);
}

// The logit of the label: 0 where it is another rank's, so that a sum over ranks has it.
template <class T>
__device__ __forceinline__ float target_of(T logit, const Row& row) {
  if (row.wrong) return not_a_number();
  return row.label < 0 ? 0.0f : load(logit);
}

// Calls visit(vector, its number) for the vectors from `begin` on, of which each thread has every kBlock-th. Loads of a
// batch come before its visits: what a visit does would keep the compiler from it. Backwards, what was read last comes
// first, since it is what a cache still has.
template <int kBlock, bool kBackwards, class Visit>
__device__ __forceinline__ void visit_vectors(const Raw* body, int vectors, int begin, Visit visit) {
  constexpr int kStep = kBlock * kBatch;
  const int whole = vectors > begin ? (vectors - begin) / kStep : 0, rest = begin + whole * kStep;
  auto visit_rest = [&] {
    for (int v = rest + (int)threadIdx.x; v < vectors; v += kBlock) visit(body[v], v);
  };
  if (kBackwards) visit_rest();
#pragma unroll 1
  for (int n = 0; n < whole; ++n) {
    const int first = begin + (kBackwards ? whole - 1 - n : n) * kStep + (int)threadIdx.x;
    Raw blocks[kBatch];
#pragma unroll
    for (int k = 0; k < kBatch; ++k) blocks[k] = body[first + k * kBlock];
#pragma unroll
    for (int k = 0; k < kBatch; ++k) visit(blocks[k], first + k * kBlock);
  }
  if (!kBackwards) visit_rest();
}

// a * (P - Y) + b * Y, where padding has no probability.
struct Gradient {
  int columns, label;
  float log_z, a, b;
  __device__ __forceinline__ Gradient(const Row& row, float log_z_, float a_ = 1.0f, float b_ = 0.0f)
      : columns(row.ignored ? 0 : row.columns), label(row.label), log_z(log_z_), a(a_), b(b_) {}
  __device__ __forceinline__ float left(float probability, int column) const {
    if (column >= columns) probability = 0.0f;
    return column == label ? a * (probability - 1.0f) + b : a * probability;
  }
  __device__ __forceinline__ float one(float logit, int column) const {
    return left(probability_of(logit, log_z), column);
  }
  template <class T>
  __device__ __forceinline__ Raw vector(Raw block, int base) const {
    constexpr int kWidth = Vector<T>::kWidth;
    float numbers[kWidth];
    widen<T>(block, numbers);
#pragma unroll
    for (int k = 0; k < kWidth; ++k) numbers[k] = probability_of(numbers[k], log_z);
    if (base + kWidth <= columns && (unsigned)(label - base) >= (unsigned)kWidth) {
#pragma unroll
      for (int k = 0; k < kWidth; ++k) numbers[k] *= a;
    } else {
#pragma unroll
      for (int k = 0; k < kWidth; ++k) numbers[k] = left(numbers[k], base + k);
    }
    return narrow<T>(numbers);
  }
};

// Over the vectors from `begin` on, and the elements before the first vector and after the last.
template <int kBlock, bool kBackwards, class T>
__device__ __forceinline__ void write_gradient(T* logits, const Parts& parts, int begin, const Gradient& gradient) {
  for (int i = threadIdx.x; i < parts.head; i += kBlock) logits[i] = store<T>(gradient.one(load(logits[i]), i));
  Raw* body = reinterpret_cast<Raw*>(logits + parts.head);
  visit_vectors<kBlock, kBackwards>(body, parts.vectors, begin, [&](Raw block, int v) {
    body[v] = gradient.vector<T>(block, parts.head + v * Vector<T>::kWidth);
  });
  for (int i = parts.tail + (int)threadIdx.x; i < parts.width; i += kBlock)
    logits[i] = store<T>(gradient.one(load(logits[i]), i));
}

// Where the vocabulary is split: what a rank's part comes to, before ranks exchange it.
template <class T>
__device__ __forceinline__ void statistics(const T* logits, const i64* labels, float* largest, float* total,
                                           float* target, i64 rows, i64 width, i64 first, i64 tokens, i64 ignored) {
  for (i64 r = blockIdx.x; r < rows; r += gridDim.x) {
    const Row row(labels[r], width, first, tokens, ignored);
    const T* at = logits + r * width;
    const Parts parts(at, width);
    const Raw* body = reinterpret_cast<const Raw*>(at + parts.head);
    Softmax sum = no_logits();
    add_ends<kThreads>(sum, at, parts, row.columns);
    visit_vectors<kThreads, false>(body, parts.vectors, 0, [&](Raw block, int v) {
      add_part<T>(sum, block, parts.head + v * Vector<T>::kWidth, row.columns);
    });
    sum = join_block<kThreads>(sum);
    if (threadIdx.x == 0) {
      largest[r] = sum.largest;
      total[r] = sum.total;
      target[r] = target_of(row.label < 0 ? T{} : at[row.label], row);
    }
  }
}

template <class T>
__device__ __forceinline__ void gradient(T* logits, const i64* labels, const float* log_z, i64 rows, i64 width,
                                         i64 first, i64 tokens, i64 ignored) {
  for (i64 r = blockIdx.x; r < rows; r += gridDim.x) {
    const Row row(labels[r], width, first, tokens, ignored);
    T* at = logits + r * width;
    write_gradient<kThreads, false>(at, Parts(at, width), 0, Gradient(row, log_z[r]));
  }
}

// Where it is not split: both. A row is read from memory once. While its gradient is written, the block's next row comes
// to where it was, and is added up as it comes: memory is never left to wait for a sum. A thread's vectors are nobody
// else's, so nothing meets for them. What has no room, of rows beyond 155,648 columns of bf16, is read a second time,
// from the cache.
template <class T>
__device__ __forceinline__ void whole(T* logits, const i64* labels, float* log_z, float* target, i64 rows, i64 width,
                                      i64 tokens, i64 ignored) {
  constexpr int kWidth = Vector<T>::kWidth;
  // From the first vector on; without any, no row.
  struct Body {
    Raw* at;
    int vectors, columns;
  };
  DAVINCI_SLOTS(held, kSlots * kWholeThreads);
  const int me = (int)threadIdx.x, of_slots = slots_here(kWholeThreads, kSlots) * kWholeThreads;
  const int all_columns = (int)(tokens < width ? tokens : width);
  Raw kept[kKept];
  Softmax sum = no_logits();
  const Body none{reinterpret_cast<Raw*>(logits), 0, 0};
  Body body = none, next = none;
  Gradient gradient(Row(ignored, width, 0, tokens, ignored), 0.0f);  // of `body`

  auto body_of = [&](i64 r) {
    const Parts parts(logits + r * width, width);
    return Body{reinterpret_cast<Raw*>(logits + r * width + parts.head), parts.vectors, all_columns - parts.head};
  };
  i64 label = blockIdx.x < rows ? labels[blockIdx.x] : ignored;
  for (i64 r = blockIdx.x; r - gridDim.x < rows; r += gridDim.x) {
    next = r < rows ? body_of(r) : none;
    // On their way meanwhile: the label's logit, before it is overwritten, and the label of the row after.
    const Row row(label, width, 0, tokens, ignored);
    T wanted{};
    if (row.label >= 0) wanted = logits[r * width + row.label];
    label = r + gridDim.x < rows ? labels[r + gridDim.x] : ignored;
    // Registers first, which have come when all slots are on their way: the last of those come while they are added.
#pragma unroll
    for (int k = 0; k < kKept; ++k) {
      const int v = of_slots + k * kWholeThreads + me;
      if (v < body.vectors) known_global(body.at)[v] = gradient.vector<T>(kept[k], v * kWidth);
      if (v < next.vectors) kept[k] = known_global(next.at)[v];
    }
    const int here = body.vectors < of_slots ? body.vectors : of_slots;
    const int coming = next.vectors < of_slots ? next.vectors : of_slots;
    // Group after group of slots: that of `body` is written, that of `next` begins to come, an earlier one is added.
#pragma unroll 1
    for (int group = 0; group < kGroups + kBehind; ++group) {
      if (group == kGroups) {
#pragma unroll
        for (int k = 0; k < kKept; ++k) {
          const int v = of_slots + k * kWholeThreads + me;
          if (v < next.vectors) add_part<T>(sum, kept[k], v * kWidth, next.columns);
        }
      }
#pragma unroll
      for (int k = 0; k < kAGroup; ++k) {
        const int v = (group * kAGroup + k) * kWholeThreads + me;
        if (v < here) known_global(body.at)[v] = gradient.vector<T>(held[v], v * kWidth);
        if (v < coming) begin_copy(held, v, next.at + v);
      }
      end_group();
      if (group < kBehind) continue;
      wait_but<kBehind>();
#pragma unroll
      for (int k = 0; k < kAGroup; ++k) {
        const int v = ((group - kBehind) * kAGroup + k) * kWholeThreads + me;
        if (v < coming) add_part<T>(sum, held[v], v * kWidth, next.columns);
      }
    }
    if (r >= rows) return;

    T* at = logits + r * width;
    if (threadIdx.x == 0) target[r] = target_of(wanted, row);
    const Parts parts(at, width);
    const int rest = of_slots + kKept * kWholeThreads;
    body = next;
    add_ends<kWholeThreads>(sum, at, parts, row.columns);
    visit_vectors<kWholeThreads, false>(body.at, body.vectors, rest, [&](Raw block, int v) {
      add_part<T>(sum, block, v * kWidth, body.columns);
    });
    sum = join_block<kWholeThreads>(sum);
    const float z = sum.largest + logf(sum.total);
    if (threadIdx.x == 0) log_z[r] = z;
    gradient = Gradient(row, z);
    write_gradient<kWholeThreads, true>(at, parts, rest, gradient);
    gradient.columns -= parts.head;
    gradient.label -= parts.head;
    sum = no_logits();
  }
}

// Backward: what was P - Y becomes scale * (P - Y) + shift * Y. Rows that this would not change are not touched: a mean
// or a sum over tokens that is scaled elsewhere, and tokens without a loss, cost nothing.
template <class T>
__device__ __forceinline__ void scaled(T* gradient, const i64* labels, const float* scale, const float* shift, i64 rows,
                                       i64 width, i64 first, i64 tokens, i64 ignored) {
  for (i64 r = blockIdx.x; r < rows; r += gridDim.x) {
    const Row row(labels[r], width, first, tokens, ignored);
    const float a = scale[r], b = shift[r];
    if (row.ignored || (a == 1.0f && b == 0.0f)) continue;
    const i64 label = row.label;
    change_row<kThreads>(gradient + r * width, width, [&](i64 column, float value) {
      return a * value + (column == label ? b : 0.0f);
    });
  }
}

// Backward where logits were computed again: they become scale * (P - Y) + shift * Y in one pass.
template <class T>
__device__ __forceinline__ void backward(T* logits, const i64* labels, const float* log_z, const float* scale,
                                         const float* shift, i64 rows, i64 width, i64 first, i64 tokens, i64 ignored) {
  for (i64 r = blockIdx.x; r < rows; r += gridDim.x) {
    const Row row(labels[r], width, first, tokens, ignored);
    const float a = row.ignored ? 0.0f : scale[r], b = row.ignored ? 0.0f : shift[r];
    T* at = logits + r * width;
    write_gradient<kThreads, false>(at, Parts(at, width), 0, Gradient(row, log_z[r], a, b));
  }
}

}  // namespace cross_entropy
}  // namespace davinci

#define DAVINCI_CROSS_ENTROPY(suffix, type)                                                                            \
  DAVINCI_KERNEL(cross_entropy_statistics_##suffix, davinci::cross_entropy::kThreads,                                  \
                 (const davinci::type* logits, const davinci::i64* labels, float* largest, float* total,               \
                  float* target, davinci::i64 rows, davinci::i64 width, davinci::i64 first, davinci::i64 tokens,       \
                  davinci::i64 ignored),                                                                               \
                 (logits, labels, largest, total, target, rows, width, first, tokens, ignored)) {                      \
    davinci::cross_entropy::statistics(logits, labels, largest, total, target, rows, width, first, tokens, ignored);   \
  }                                                                                                                    \
  DAVINCI_KERNEL(cross_entropy_gradient_##suffix, davinci::cross_entropy::kThreads,                                    \
                 (davinci::type* logits, const davinci::i64* labels, const float* log_z, davinci::i64 rows,            \
                  davinci::i64 width, davinci::i64 first, davinci::i64 tokens, davinci::i64 ignored),                  \
                 (logits, labels, log_z, rows, width, first, tokens, ignored)) {                                       \
    davinci::cross_entropy::gradient(logits, labels, log_z, rows, width, first, tokens, ignored);                      \
  }                                                                                                                    \
  DAVINCI_KERNEL_OF(cross_entropy_whole_##suffix, davinci::cross_entropy::kWholeThreads,                               \
                 davinci::cross_entropy::kSlots,                                                                       \
                 (davinci::type* logits, const davinci::i64* labels, float* log_z, float* target, davinci::i64 rows,   \
                  davinci::i64 width, davinci::i64 tokens, davinci::i64 ignored),                                      \
                 (logits, labels, log_z, target, rows, width, tokens, ignored)) {                                      \
    davinci::cross_entropy::whole(logits, labels, log_z, target, rows, width, tokens, ignored);                        \
  }                                                                                                                    \
  DAVINCI_KERNEL(cross_entropy_scaled_##suffix, davinci::cross_entropy::kThreads,                                      \
                 (davinci::type* gradient, const davinci::i64* labels, const float* scale, const float* shift,         \
                  davinci::i64 rows, davinci::i64 width, davinci::i64 first, davinci::i64 tokens,                      \
                  davinci::i64 ignored),                                                                               \
                 (gradient, labels, scale, shift, rows, width, first, tokens, ignored)) {                              \
    davinci::cross_entropy::scaled(gradient, labels, scale, shift, rows, width, first, tokens, ignored);               \
  }                                                                                                                    \
  DAVINCI_KERNEL(cross_entropy_backward_##suffix, davinci::cross_entropy::kThreads,                                    \
                 (davinci::type* logits, const davinci::i64* labels, const float* log_z, const float* scale,           \
                  const float* shift, davinci::i64 rows, davinci::i64 width, davinci::i64 first, davinci::i64 tokens,  \
                  davinci::i64 ignored),                                                                               \
                 (logits, labels, log_z, scale, shift, rows, width, first, tokens, ignored)) {                         \
    davinci::cross_entropy::backward(logits, labels, log_z, scale, shift, rows, width, first, tokens, ignored);        \
  }

DAVINCI_CROSS_ENTROPY(fp32, f32)
DAVINCI_CROSS_ENTROPY(bf16, bf16)
