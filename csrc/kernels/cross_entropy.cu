// Cross entropy over a vocabulary that may be split over tensor-parallel ranks, in place.
//
// A row is the logits of one token on this rank. Column c is token `first + c`; those at and past `tokens` are padding
// and count as minus infinity. A label is a token, or `ignored`, whose row has no loss and no gradient; any other makes
// its row's loss no number. Statistics are fp32, whatever the logits are.
#include "reduce.h"

namespace davinci {
namespace cross_entropy {

constexpr int kThreads = 512;

struct Row {
  i64 label;      // column of the label; none of this rank's where it is another rank's, ignored or wrong
  i64 columns;    // those that are no padding
  bool ignored, wrong;
  __device__ __forceinline__ Row(i64 label_, i64 width, i64 first, i64 tokens, i64 ignored_) {
    ignored = label_ == ignored_;
    wrong = !ignored && (label_ < 0 || label_ >= tokens);
    columns = tokens - first < width ? (tokens > first ? tokens - first : 0) : width;
    label = ignored || wrong || label_ < first || label_ >= first + columns ? -1 : label_ - first;
  }
};

template <class T>
__device__ __forceinline__ Softmax softmax_of(const T* row, i64 columns) {
  Softmax sum = no_logits();
  visit_row<kThreads>(row, columns, [&](i64, float logit) { sum = add(sum, logit); });
  return join_block<kThreads>(sum);
}

// The logit of the label: 0 where it is another rank's, so that a sum over ranks has it.
template <class T>
__device__ __forceinline__ float target_of(const T* logits, const Row& row) {
  if (row.wrong) return not_a_number();
  return row.label < 0 ? 0.0f : load(logits[row.label]);
}

// P - Y, over the logits. Padding has no probability.
template <class T>
__device__ __forceinline__ void write_gradient(T* logits, i64 width, const Row& row, float log_z) {
  const i64 columns = row.ignored ? 0 : row.columns, label = row.label;
  change_row<kThreads>(logits, width, [&](i64 column, float logit) {
    const float probability = column < columns ? exponential(logit - log_z) : 0.0f;
    return column == label ? probability - 1.0f : probability;
  });
}

// Where the vocabulary is split: what a rank's part comes to, before ranks exchange it.
template <class T>
__device__ __forceinline__ void statistics(const T* logits, const i64* labels, float* largest, float* total,
                                           float* target, i64 rows, i64 width, i64 first, i64 tokens, i64 ignored) {
  for (i64 r = blockIdx.x; r < rows; r += gridDim.x) {
    const Row row(labels[r], width, first, tokens, ignored);
    const T* at = logits + r * width;
    const Softmax sum = softmax_of(at, row.columns);
    if (threadIdx.x == 0) {
      largest[r] = sum.largest;
      total[r] = sum.total;
      target[r] = target_of(at, row);
    }
  }
}

template <class T>
__device__ __forceinline__ void gradient(T* logits, const i64* labels, const float* log_z, i64 rows, i64 width,
                                         i64 first, i64 tokens, i64 ignored) {
  for (i64 r = blockIdx.x; r < rows; r += gridDim.x)
    write_gradient(logits + r * width, width, Row(labels[r], width, first, tokens, ignored), log_z[r]);
}

// Where it is not split: both, so that the second read of a row comes from the cache.
template <class T>
__device__ __forceinline__ void whole(T* logits, const i64* labels, float* log_z, float* target, i64 rows, i64 width,
                                      i64 tokens, i64 ignored) {
  for (i64 r = blockIdx.x; r < rows; r += gridDim.x) {
    const Row row(labels[r], width, 0, tokens, ignored);
    T* at = logits + r * width;
    // Before any thread overwrites it: `softmax_of` ends with a barrier.
    if (threadIdx.x == 0) target[r] = target_of(at, row);
    const Softmax sum = softmax_of(at, row.columns);
    const float z = sum.largest + logf(sum.total);
    if (threadIdx.x == 0) log_z[r] = z;
    write_gradient(at, width, row, z);
  }
}

// Backward: what was P - Y becomes scale * (P - Y) + shift * Y.
template <class T>
__device__ __forceinline__ void scaled(T* gradient, const i64* labels, const float* scale, const float* shift, i64 rows,
                                       i64 width, i64 first, i64 tokens, i64 ignored) {
  for (i64 r = blockIdx.x; r < rows; r += gridDim.x) {
    const Row row(labels[r], width, first, tokens, ignored);
    const float a = row.ignored ? 0.0f : scale[r], b = row.ignored ? 0.0f : shift[r];
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
    const i64 columns = row.ignored ? 0 : row.columns, label = row.label;
    const float a = row.ignored ? 0.0f : scale[r], b = row.ignored ? 0.0f : shift[r], z = log_z[r];
    change_row<kThreads>(logits + r * width, width, [&](i64 column, float logit) {
      const float probability = column < columns ? exponential(logit - z) : 0.0f;
      return column == label ? a * (probability - 1.0f) + b : a * probability;
    });
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
  DAVINCI_KERNEL(cross_entropy_whole_##suffix, davinci::cross_entropy::kThreads,                                       \
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
