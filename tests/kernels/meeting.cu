// A kernel that does one thing right or wrong, by its number: what the emulator must see and what it must let pass.
#include "portable.h"

namespace {
constexpr unsigned kAll = 0xffffffffu;

__device__ void one_thing(int what, float* out) {
  DAVINCI_SHARED(float, shared, 64);
  const int me = threadIdx.x, lane = me % 32, warp = me / 32;
  float value = (float)me;
  switch (what) {
    case 0:  // right: through shared memory, a barrier between
      shared[me] = value;
      __syncthreads();
      value = shared[63 - me];
      __syncthreads();
      shared[me] = value;
      break;
    case 1:  // wrong: no barrier
      shared[me] = value;
      value = shared[63 - me];
      break;
    case 2:  // wrong: written again while others may still read
      shared[me] = value;
      __syncthreads();
      value = shared[63 - me];
      shared[me] = value;
      break;
    case 3:  // wrong: read before anyone wrote
      value = shared[me];
      break;
    case 4:  // wrong: out of range
      shared[me + 1] = value;
      break;
    case 5:  // wrong: half of the threads do not come
      if (warp == 0) __syncthreads();
      break;
    case 6:  // wrong: two barriers, one for each half
      if (warp == 0) {
        __syncthreads();
      } else {
        __syncthreads();
      }
      break;
    case 7:  // right: lanes of a warp, ordered by a barrier of the warp
      shared[me] = value;
      __syncwarp(kAll);
      value = shared[warp * 32 + 31 - lane];
      break;
    case 8:  // wrong: the same across warps
      shared[me] = value;
      __syncwarp(kAll);
      value = shared[63 - me];
      break;
    case 9:  // right: half of the lanes meet
      if (lane < 16) value = __shfl_xor_sync(0xffffu, value, 8);
      break;
    case 10:  // wrong: the mask names lanes that do not come
      if (lane < 16) value = __shfl_xor_sync(kAll, value, 8);
      break;
    case 11:  // wrong: the mask does not name who calls
      value = __shfl_xor_sync(0xffffu, value, 8);
      break;
    case 12:  // wrong: reads a lane that the mask does not name
      if (lane < 16) value = __shfl_xor_sync(0xffffu, value, 16);
      break;
    case 13: {  // right: votes
      const unsigned odd = __ballot_sync(kAll, lane & 1);
      value = (float)(odd == 0xaaaaaaaau) + 2 * (float)__any_sync(kAll, lane == 3) + 4 * (float)__all_sync(kAll, lane < 32);
      break;
    }
    case 14:  // right: atomics
      atomicAdd(&out[64], 1.0f);
      atomicMax((int*)&out[65], me);
      break;
    case 15:  // wrong: lanes of a warp at two operations
      if (lane < 16) {
        value = __shfl_xor_sync(kAll, value, 1);
      } else {
        value = __shfl_xor_sync(kAll, value, 1);
      }
      break;
    case 16:  // wrong: one wrote while all read it
      if (me == 0) shared[0] = value;
      value = shared[0];
      break;
    case 17:  // right: shuffle down and from one lane
      value = __shfl_down_sync(kAll, value, 2) + __shfl_sync(kAll, value, 5);
      break;
  }
  out[me] = value;
}
}  // namespace

DAVINCI_KERNEL(meeting_fp32, 64, (int what, float* out), (what, out)) { one_thing(what, out); }
