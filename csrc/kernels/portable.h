// What lets one kernel source be compiled by nvcc, by NVRTC and, for the emulator, by g++.
//
// A kernel is declared with DAVINCI_KERNEL, which also makes its launcher: a C function that takes raw pointers, sizes
// and a stream, so that nothing here needs a header of torch or Python, and a library fits any version of either.
#pragma once

#if defined(DAVINCI_EMULATOR)
#include "emulator.h"
#elif !defined(__CUDACC_RTC__)
#include <cuda_runtime.h>
#endif

#if !defined(DAVINCI_EMULATOR)
#define DAVINCI_SHARED(type, name, count) __shared__ type name[count]
// As many as the launch has room for, at most `count`: see DAVINCI_KERNEL_OF.
#define DAVINCI_SLOTS(name, count) extern __shared__ davinci::Raw name[]
#endif

#define DAVINCI_UNWRAP(...) __VA_ARGS__
#define DAVINCI_EXPORT extern "C" __attribute__((visibility("default")))

// DAVINCI_KERNEL(name, threads, (parameters), (arguments)) { body }
// Threads of a block are fixed by the kernel; the number of blocks is the caller's, and every kernel is right for any.
// DAVINCI_KERNEL_OF(name, threads, slots, ...) takes shared memory too: up to `slots` of 16 bytes a thread, fewer where
// a multiprocessor has not as much. The kernel asks `slots_here` how many there are.
// DAVINCI_KERNEL_WITHIN takes beside these what __launch_bounds__ does: how many blocks are to have room, and how few
// registers that leaves.
#define DAVINCI_KERNEL(name, threads, parameters, arguments) \
  DAVINCI_KERNEL_WITHIN(name, threads, 0, (threads), parameters, arguments)
#define DAVINCI_KERNEL_OF(name, threads, slots, parameters, arguments) \
  DAVINCI_KERNEL_WITHIN(name, threads, slots, (threads, 1), parameters, arguments)
#if defined(__CUDACC_RTC__)
#define DAVINCI_KERNEL_WITHIN(name, threads, slots, bounds, parameters, arguments) \
  extern "C" __global__ void __launch_bounds__ bounds name parameters
#elif defined(DAVINCI_EMULATOR)
#define DAVINCI_KERNEL_WITHIN(name, threads, slots, bounds, parameters, arguments)                     \
  static void name parameters;                                                                         \
  DAVINCI_EXPORT int davinci_##name(long long blocks, DAVINCI_UNWRAP parameters, void*) {              \
    return emulator::launch(blocks, threads, [=] { name arguments; });                                 \
  }                                                                                                    \
  DAVINCI_EXPORT int davinci_threads_##name() { return threads; }                                      \
  DAVINCI_EXPORT int davinci_slots_##name() { return slots; }                                          \
  static void name parameters
#else
#define DAVINCI_KERNEL_WITHIN(name, threads, slots, bounds, parameters, arguments)                     \
  extern "C" __global__ void __launch_bounds__ bounds name parameters;                                 \
  DAVINCI_EXPORT int davinci_##name(long long blocks, DAVINCI_UNWRAP parameters, void* stream) {       \
    const int bytes = slots ? davinci::room_for((const void*)name, threads, slots) : 0;                \
    name<<<(unsigned)blocks, threads, bytes, (cudaStream_t)stream>>> arguments;                        \
    return (int)cudaGetLastError();                                                                    \
  }                                                                                                    \
  DAVINCI_EXPORT int davinci_threads_##name() { return threads; }                                      \
  DAVINCI_EXPORT int davinci_slots_##name() { return slots; }                                          \
  extern "C" __global__ void __launch_bounds__ bounds name parameters

namespace davinci {

// Bytes of shared memory for a block's slots, which the kernel is allowed from now on. nvrtc.py does the same.
inline int room_for(const void* kernel, int threads, int slots) {
  constexpr int kOwn = 1024;  // of what the kernel has beside, and of what CUDA keeps for itself
  int device = 0, most = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  const int a_slot = 16 * threads, fit = (most - kOwn) / a_slot;
  const int bytes = (fit < slots ? fit : slots) * a_slot;
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  return bytes;
}

}  // namespace davinci
#endif

namespace davinci {

// NVRTC has no <cstdint>.
using i64 = long long;
using u64 = unsigned long long;
using u32 = unsigned int;
using u16 = unsigned short;
using u8 = unsigned char;
using f32 = float;

__device__ __forceinline__ u32 bits_of(float value) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(value);
#else
  u32 bits;
  __builtin_memcpy(&bits, &value, 4);
  return bits;
#endif
}

__device__ __forceinline__ float float_of(u32 bits) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(bits);
#else
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
#endif
}

__device__ __forceinline__ int count_bits(u32 bits) {
#if defined(__CUDA_ARCH__)
  return __popc(bits);
#else
  return __builtin_popcount(bits);
#endif
}

// The compiler cannot know that it stays as it is, nor what it follows from: it keeps nothing that would follow from it in
// registers, and does not make it again.
__device__ __forceinline__ void opaque(u32& value) { asm volatile("" : "+r"(value)); }

// Four of the eight bytes of two words, those of `low` being 0 to 3: a digit of `which` says each, the last one first.
__device__ __forceinline__ u32 pick_bytes(u32 low, u32 high, u32 which) {
#if defined(__CUDA_ARCH__)
  return __byte_perm(low, high, which);
#else
  const u64 both = (u64)high << 32 | low;
  u32 result = 0;
  for (int i = 0; i < 4; ++i) result |= (u32)(both >> 8 * (which >> 4 * i & 7u) & 255u) << 8 * i;
  return result;
#endif
}

// Of both halves of two words, each as a whole number, the larger ones.
__device__ __forceinline__ u32 larger_halves(u32 a, u32 b) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  u32 result;
  asm("max.u16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
  return result;
#else
  const u32 high = (a >> 16 > b >> 16 ? a : b) & 0xffff0000u, low_a = a & 0xffffu, low_b = b & 0xffffu;
  return high | (low_a > low_b ? low_a : low_b);
#endif
}

// The upper half of a float, rounded to nearest, ties to even, as the hardware and torch do.
struct bf16 {
  u16 bits;
};

__device__ __forceinline__ float load(float value) { return value; }
__device__ __forceinline__ float load(bf16 value) { return float_of((u32)value.bits << 16); }

template <class T>
__device__ __forceinline__ T store(float value);
template <>
__device__ __forceinline__ float store<float>(float value) {
  return value;
}
template <>
__device__ __forceinline__ bf16 store<bf16>(float value) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  bf16 rounded;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(rounded.bits) : "f"(value));
  return rounded;
#else
  u32 bits = bits_of(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return bf16{0x7fc0};  // NaN
  bits += 0x7fffu + ((bits >> 16) & 1u);
  return bf16{(u16)(bits >> 16)};
#endif
}

// Two in a word, `low` in the lower half: one instruction.
__device__ __forceinline__ u32 bf16_pair(float low, float high) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  u32 pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
#else
  return store<bf16>(low).bits | (u32)store<bf16>(high).bits << 16;
#endif
}

constexpr float kLog2E = 1.4426950408889634f;
__device__ __forceinline__ float infinity() { return float_of(0x7f800000u); }
__device__ __forceinline__ float not_a_number() { return float_of(0x7fc00000u); }
// exp as the hardware has it: a power of two, of a rounded product. Relative error about 2 + |x| units of 2^-24.
__device__ __forceinline__ float exponential(float x) { return exp2f(x * kLog2E); }

// 2^x, as the hardware has it: 2 units in the last place, 0 where that is below 2^-126.
__device__ __forceinline__ float power_of_two(float x) {
#if defined(__CUDA_ARCH__)
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#else
  return exp2f(x);
#endif
}

// A pointer that came from memory, or that is one of several, may be of any kind of memory, as far as the compiler knows.
template <class T>
__device__ __forceinline__ T* known_global(T* pointer) {
#if defined(__CUDA_ARCH__)
  __builtin_assume(__isGlobal(pointer));
#endif
  return pointer;
}

// 1 / x, of an x that is not subnormal, to a unit in the last place; 0 where that is below 2^-126.
__device__ __forceinline__ float reciprocal(float x) {
#if defined(__CUDA_ARCH__)
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#else
  return x > 8.507059e37f ? 0.0f : 1.0f / x;
#endif
}

// 16 bytes, which one instruction moves.
template <class T>
struct alignas(16) Vector {
  static constexpr int kWidth = 16 / sizeof(T);
  T at[kWidth];
};

// 16 bytes as they came. Of a vector that a branch or a turn of a loop may have loaded the compiler keeps the elements:
// it takes it apart where it is loaded, and so waits for it there. Of these it does not.
struct alignas(16) Raw {
  u32 at[4];
};
template <class T>
__device__ __forceinline__ Vector<T> vector_of(Raw raw) {
  Vector<T> vector;
  memcpy(&vector, &raw, sizeof raw);
  return vector;
}
template <class T>
__device__ __forceinline__ Raw raw_of(Vector<T> vector) {
  Raw raw;
  memcpy(&raw, &vector, sizeof raw);
  return raw;
}

// A vector's elements in fp32, and the vector of such. Two bf16 of a word take an instruction each, and one together on
// the way back, where a compiler that is given them one by one takes two or three.
template <class T>
__device__ __forceinline__ float element_of(const Raw& raw, int k) {
  const u32 word = raw.at[k * (int)sizeof(T) / 4];
  return float_of(sizeof(T) == 4 ? word : k % 2 ? word & 0xffff0000u : word << 16);
}
template <class T>
__device__ __forceinline__ void widen(Raw raw, float (&to)[Vector<T>::kWidth]) {
#pragma unroll
  for (int k = 0; k < Vector<T>::kWidth; ++k) to[k] = element_of<T>(raw, k);
}
template <class T>
__device__ __forceinline__ Raw narrow(const float (&from)[Vector<T>::kWidth]) {
  Raw raw;
#pragma unroll
  for (int word = 0; word < 4; ++word) {
    constexpr int kIn = 4 / sizeof(T);
    raw.at[word] = kIn == 1 ? bits_of(from[word]) : bf16_pair(from[word * kIn], from[word * kIn + kIn - 1]);
  }
  return raw;
}

// Elements as they came, a vector of them or one, and in fp32.
template <class T, int kWide>
struct Elements {
  using Came = Raw;
  static __device__ __forceinline__ void open(Raw raw, float (&to)[kWide]) { widen<T>(raw, to); }
  static __device__ __forceinline__ Raw close(const float (&from)[kWide]) { return narrow<T>(from); }
};
template <class T>
struct Elements<T, 1> {
  using Came = T;
  static __device__ __forceinline__ void open(T one, float (&to)[1]) { to[0] = load(one); }
  static __device__ __forceinline__ T close(const float (&from)[1]) { return store<T>(from[0]); }
};

// Copies to shared memory which go on while the thread does other things. What is begun belongs to a group, which
// `end_group` ends; after `wait_but<n>()` all groups of the thread have arrived but the last n.
#if defined(DAVINCI_EMULATOR)
template <int kCount>
inline void begin_copy(emulator::Shared<Raw, kCount>& slots, int i, const void* from) {
  emulator::begin_copy(slots[i], static_cast<const Raw*>(from));
}
inline void end_group() { emulator::end_group(); }
template <int kGroups>
inline void wait_but() {
  emulator::wait_but(kGroups);
}
#else
__device__ __forceinline__ void begin_copy(Raw* slots, int i, const void* from) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  const u32 to = (u32)__cvta_generic_to_shared(slots + i);
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
#else
  slots[i] = *static_cast<const Raw*>(from);
#endif
}
__device__ __forceinline__ void end_group() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
template <int kGroups>
__device__ __forceinline__ void wait_but() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
#endif
}
#endif

// What is read soon, and is not waited for.
__device__ __forceinline__ void prefetch(const void* address) {
#if defined(__CUDA_ARCH__)
  asm volatile("prefetch.global.L1 [%0];" ::"l"(address));
#else
  (void)address;
#endif
}

// How many slots a thread has.
__device__ __forceinline__ int slots_here(int threads, int most) {
#if defined(__CUDA_ARCH__)
  u32 bytes;
  asm("mov.u32 %0, %%dynamic_smem_size;" : "=r"(bytes));
  const int fit = (int)bytes / (16 * threads);
  return fit < most ? fit : most;
#else
  (void)threads;
  return most;
#endif
}

// Some elements, which one instruction moves where they are 16 bytes or fewer.
template <class T, int kWide>
struct alignas(sizeof(T) * kWide) Pack {
  T at[kWide];
};

// Whether rows of so many elements, one behind the other from these pointers on, are all made of whole vectors.
template <class T>
__device__ __forceinline__ bool in_vectors(i64 columns) {
  return columns % Vector<T>::kWidth == 0;
}
template <class T, class Pointer, class... Others>
__device__ __forceinline__ bool in_vectors(i64 columns, Pointer first, Others... others) {
  return (u64)first % 16 == 0 && in_vectors<T>(columns, others...);
}

// A row of any length at any address: elements before the first and after the last whole vector are alone.
template <class T>
struct Split {
  i64 head, vectors, tail;  // elements, vectors, first element of the tail
  __device__ __forceinline__ Split(const T* row, i64 columns) {
    const i64 past = (i64)(((u64)row & 15) / sizeof(T));
    head = past ? Vector<T>::kWidth - past : 0;
    if (head > columns) head = columns;
    vectors = (columns - head) / Vector<T>::kWidth;
    tail = head + vectors * Vector<T>::kWidth;
  }
};

// Replaces each element of a row by change(column, value).
template <int kThreads, class T, class Change>
__device__ __forceinline__ void change_row(T* row, i64 columns, Change change) {
  const Split<T> split(row, columns);
  for (i64 i = threadIdx.x; i < split.head; i += kThreads) row[i] = store<T>(change(i, load(row[i])));
  Vector<T>* body = reinterpret_cast<Vector<T>*>(row + split.head);
  for (i64 v = threadIdx.x; v < split.vectors; v += kThreads) {
    Vector<T> block = body[v];
#pragma unroll
    for (int k = 0; k < Vector<T>::kWidth; ++k)
      block.at[k] = store<T>(change(split.head + v * Vector<T>::kWidth + k, load(block.at[k])));
    body[v] = block;
  }
  for (i64 i = split.tail + threadIdx.x; i < columns; i += kThreads) row[i] = store<T>(change(i, load(row[i])));
}

}  // namespace davinci
