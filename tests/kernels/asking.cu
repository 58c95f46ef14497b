// A kernel that asks memory in one way or another, by a number: what a trace of it must count, and what is refused.
#include "fp8.h"

namespace {
using namespace davinci;

__device__ __forceinline__ void one_way(const float* in, float* out, i64 count, i64 what) {
  DAVINCI_SHARED(float, words, 33 * 32);
  const int me = threadIdx.x, lane = me % 32;
  switch (what) {
    case 0:  // 16 bytes a lane, side by side
      reinterpret_cast<Vector<float>*>(out)[me] = reinterpret_cast<const Vector<float>*>(in)[me];
      break;
    case 1:  // 4 bytes of every 32
      out[me] = in[8 * me];
      break;
    case 2:  // a word of each bank
      if (me < 32) words[lane] = in[lane];
      __syncthreads();
      out[me] = words[31 - lane];
      break;
    case 3:  // 32 words of one bank
      if (me < 32) words[32 * lane] = in[lane];
      __syncthreads();
      out[me] = words[32 * (31 - lane)];
      break;
    case 4:  // a column whose rows are a word longer
      if (me < 32) words[33 * lane] = in[lane];
      __syncthreads();
      out[me] = words[33 * (31 - lane)];
      break;
    case 5:  // not where 16 bytes begin
      reinterpret_cast<Vector<float>*>(out)[me] = *reinterpret_cast<const Vector<float>*>(in + 1);
      break;
    case 6:
      for (i64 i = me; i < count; i += 64) out[i] = power_of_two(in[i]);
      break;
    case 7:
      for (i64 i = me; i < count / 4; i += 64) {
        reinterpret_cast<u32*>(out)[4 * i] = E4M3::four(in + 4 * i);
        reinterpret_cast<u32*>(out)[4 * i + 1] = E5M2::four(in + 4 * i);
        reinterpret_cast<u32*>(out)[4 * i + 2] = bf16_pair(in[4 * i], in[4 * i + 1]);
        reinterpret_cast<u32*>(out)[4 * i + 3] = bf16_pair(in[4 * i + 2], in[4 * i + 3]);
      }
      break;
  }
}
}  // namespace

DAVINCI_KERNEL(asking_fp32, 64, (const float* in, float* out, davinci::i64 count, davinci::i64 what),
               (in, out, count, what)) {
  one_way(in, out, count, what);
}
