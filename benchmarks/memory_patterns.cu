// What AdamW with moments in 8 bits moves, and next to nothing computed: for benchmarks/memory_patterns.py.
//
// A warp takes 256 elements at a time: of fp32 parameters and gradients 16 bytes a lane twice, of two codes 4 bytes a
// lane twice, of ranges 16 bytes for each 128 elements; and writes them, but for gradients, and a bf16 copy.
typedef unsigned int u32;
typedef long long i64;

struct Of {
  float* parameters;
  const float* gradients;
  u32 *first, *second;
  float4* ranges;
  uint2* copies;
};

struct Held {
  float4 parameters[2], gradients[2], ranges;
  u32 first[2], second[2];
};

// Where a lane's four are, and those of its codes: a half warp has 128 elements, or a warp has them twice.
template <bool kLines>
__device__ __forceinline__ int code_of(int lane, int j) {
  return kLines ? lane * 4 + 128 * j : lane / 16 * 128 + lane % 16 * 4 + 64 * j;
}
__device__ __forceinline__ int element_of(int lane, int j) { return lane / 16 * 128 + lane % 16 * 4 + 64 * j; }

template <bool kLines>
__device__ __forceinline__ Held taken(const Of& of, i64 from) {
  const int lane = threadIdx.x % 32;
  Held held;
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    held.parameters[j] = *(const float4*)(of.parameters + from + element_of(lane, j));
    held.gradients[j] = *(const float4*)(of.gradients + from + element_of(lane, j));
    held.first[j] = of.first[(from + code_of<kLines>(lane, j)) / 4];
    held.second[j] = of.second[(from + code_of<kLines>(lane, j)) / 4];
  }
  held.ranges = of.ranges[from / 128 + lane / 16];
  return held;
}

template <bool kLines>
__device__ __forceinline__ void put(const Of& of, i64 from, Held& held) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    float4 next = held.parameters[j];
    next.x += 1e-9f * held.gradients[j].x;
    next.y += 1e-9f * held.gradients[j].y;
    next.z += 1e-9f * held.gradients[j].z;
    next.w += 1e-9f * held.gradients[j].w;
    *(float4*)(of.parameters + from + element_of(lane, j)) = next;
    of.first[(from + code_of<kLines>(lane, j)) / 4] = held.first[j] ^ 1;
    of.second[(from + code_of<kLines>(lane, j)) / 4] = held.second[j] ^ 1;
    of.copies[(from + element_of(lane, j)) / 4] =
        make_uint2(__float_as_uint(next.x) >> 16 | (__float_as_uint(next.y) & 0xffff0000u),
                   __float_as_uint(next.z) >> 16 | (__float_as_uint(next.w) & 0xffff0000u));
  }
  if (lane % 16) return;
  held.ranges.x += 1.0f;
  of.ranges[from / 128 + lane / 16] = held.ranges;
}

// Tile after tile of 8 elements a thread, each block every gridDim-th of them; the next one is on its way, or not.
template <int kThreads, bool kLines, bool kAhead>
__device__ __forceinline__ void go(const Of& of, i64 count) {
  const i64 tiles = count / (kThreads * 8);
  const auto from = [&](i64 tile) { return tile * (kThreads * 8) + (int)threadIdx.x / 32 * 256; };
  Held next;
  if (kAhead && blockIdx.x < tiles) next = taken<kLines>(of, from(blockIdx.x));
  for (i64 tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    Held held;
    if (kAhead) {
      held = next;
      if (tile + gridDim.x < tiles) next = taken<kLines>(of, from(tile + gridDim.x));
    } else {
      held = taken<kLines>(of, from(tile));
    }
    put<kLines>(of, from(tile), held);
  }
}

#define PATTERN(name, threads, blocks, lines, ahead)                                                               \
  extern "C" __global__ void __launch_bounds__(threads, blocks)                                                    \
      name##_fp32(float* parameters, const float* gradients, u32* first, u32* second, float4* ranges, uint2* copies, \
                  i64 count) {                                                                                     \
    go<threads, lines, ahead>(Of{parameters, gradients, first, second, ranges, copies}, count);                    \
  }

PATTERN(ahead_in_pieces, 256, 2, false, true)
PATTERN(ahead_in_lines, 256, 2, true, true)
PATTERN(in_pieces, 256, 4, false, false)
PATTERN(in_lines, 256, 4, true, false)
PATTERN(large_in_lines, 1024, 1, true, false)
