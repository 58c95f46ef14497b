// What instructions of PTX do, so that what nvcc made of a kernel can be run on a CPU, by the emulator's threads
// (kernels/ptx_as_cpp.py writes the C++ that calls this). Registers and operands are bits: a function takes each in the lower
// part of 64, and its template arguments say what they mean. Its name is the instruction's, its types apart.
//
// Seen beside what emulator.h sees: addresses that are not multiples of what is moved there, and instructions whose
// result the hardware only approximates. With DAVINCI_EMULATOR_APPROXIMATE=N these are off by up to what NVIDIA's PTX ISA
// allows, by what the argument's bits and N draw; without it, or with 0, they are rounded to the nearest.
#pragma once

#define DAVINCI_EMULATOR_STACK (512 << 10)  // an unoptimised register has a place of its own there
#include "emulator.h"

namespace ptx {

using Bits = uint64_t;

// Where an instruction comes from.
struct Place {
  const char* file;
  int line;
};

template <class Value>
struct Type {
  using C = Value;
};
struct u8 : Type<uint8_t> {};
struct s8 : Type<int8_t> {};
struct b8 : u8 {};
struct u16 : Type<uint16_t> {};
struct s16 : Type<int16_t> {};
struct b16 : u16 {};
struct u32 : Type<uint32_t> {};
struct s32 : Type<int32_t> {};
struct b32 : u32 {};
struct u64 : Type<uint64_t> {};
struct s64 : Type<int64_t> {};
struct b64 : u64 {};
struct f32 : Type<float> {};
struct f64 : Type<double> {};
struct pred : Type<bool> {};
struct u16x2 {};
struct bf16 {};
struct bf16x2 {};
struct e4m3x2 {
  static constexpr int kMantissa = 3, kLeast = -6;  // bits, and the exponent of the smallest normal number
  static constexpr double kTop = 448;
};
struct e5m2x2 {
  static constexpr int kMantissa = 2, kLeast = -14;
  static constexpr double kTop = 57344;
};

template <class T>
using C = typename T::C;

template <class T>
inline C<T> value(Bits bits) {
  C<T> result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}
template <>
inline bool value<pred>(Bits bits) {
  return bits != 0;
}

// Signed numbers fill the rest with their sign, as a register does that is wider than what is loaded.
template <class Value>
inline Bits bits(Value value) {
  if constexpr (std::is_integral_v<Value>) return (Bits)(int64_t)value;
  Bits result = 0;
  std::memcpy(&result, &value, sizeof value);
  return result;
}

// What an instruction makes: of numbers that are none, one.
template <class Value>
inline Bits made(Value value) {
  if constexpr (std::is_same_v<Value, float>)
    if (value != value) return 0x7fffffffu;
  return bits(value);
}

// --- whole numbers and bits ---

#define DAVINCI_PTX_2(name, expression)     \
  template <class T>                        \
  inline Bits op_##name(Bits x, Bits y) {      \
    const C<T> a = value<T>(x), b = value<T>(y); \
    return made((C<T>)(expression));        \
  }
#define DAVINCI_PTX_1(name, expression) \
  template <class T>                    \
  inline Bits op_##name(Bits x) {         \
    const C<T> a = value<T>(x);         \
    return made((C<T>)(expression));    \
  }

template <class T>
struct Unsigned {
  using C = std::make_unsigned_t<typename T::C>;
};
template <>
struct Unsigned<f32> {
  using C = float;
};
template <>
struct Unsigned<pred> {
  using C = bool;
};
// Sums and products of signed numbers may go over, which C++ leaves undefined and PTX does not.
template <class T>
using U = typename Unsigned<T>::C;

template <class T>
inline C<T> least(C<T> a, C<T> b) {
  return b < a ? b : a;
}
template <>
inline float least<f32>(float a, float b) {  // of a number and none, the number; -0 is less than 0
  if (a != a) return b;
  if (b != b) return a;
  return a < b || (a == b && std::signbit(a)) ? a : b;
}
template <class T>
inline C<T> largest(C<T> a, C<T> b) {
  return a < b ? b : a;
}
template <>
inline float largest<f32>(float a, float b) {
  if (a != a) return b;
  if (b != b) return a;
  return a > b || (a == b && !std::signbit(a)) ? a : b;
}

template <class T>
inline Bits op_mov(Bits x) {
  return x;
}
DAVINCI_PTX_2(add, (U<T>)a + (U<T>)b)
DAVINCI_PTX_2(sub, (U<T>)a - (U<T>)b)
DAVINCI_PTX_2(mul, a* b)
DAVINCI_PTX_2(mul_lo, (Bits)(U<T>)a*(Bits)(U<T>)b)
DAVINCI_PTX_2(div, a / b)
DAVINCI_PTX_2(rem, a % b)
DAVINCI_PTX_2(min, least<T>(a, b))
DAVINCI_PTX_2(max, largest<T>(a, b))
DAVINCI_PTX_2(and, a& b)
DAVINCI_PTX_2(or, a | b)
DAVINCI_PTX_2(xor, a ^ b)
DAVINCI_PTX_1(neg, -a)
DAVINCI_PTX_1(abs, a < 0 ? -a : a)
template <>
inline Bits op_abs<f32>(Bits x) {
  return x & 0x7fffffffu;
}
template <class T>
inline Bits op_not(Bits x) {
  return bits((C<T>)~value<T>(x));
}
template <>
inline Bits op_not<pred>(Bits x) {
  return !x;
}
template <class T>
inline Bits op_mul_wide(Bits x, Bits y) {
  return bits((int64_t)value<T>(x) * (int64_t)value<T>(y));
}
template <>
inline Bits op_mul_wide<u32>(Bits x, Bits y) {
  return (Bits)(uint32_t)x * (uint32_t)y;
}
template <class T>
inline Bits op_mul_hi(Bits x, Bits y) {
  using Short = std::conditional_t<std::is_signed_v<C<T>>, int64_t, uint64_t>;
  using Long = std::conditional_t<std::is_signed_v<C<T>>, __int128, unsigned __int128>;
  using Wide = std::conditional_t<sizeof(C<T>) == 8, Long, Short>;
  return bits((C<T>)((Wide)value<T>(x) * (Wide)value<T>(y) >> 8 * sizeof(C<T>)));
}
template <class T>
inline Bits op_mad_lo(Bits x, Bits y, Bits z) {
  return op_add<T>(op_mul_lo<T>(x, y), z);
}
// All bits are gone, or are the sign, where so many are asked for.
template <class T>
inline Bits op_shl(Bits x, Bits by) {
  const uint32_t n = (uint32_t)by;
  return n >= 8 * sizeof(C<T>) ? 0 : bits((C<T>)((U<T>)value<T>(x) << n));
}
template <class T>
inline Bits op_shr(Bits x, Bits by) {
  const uint32_t n = (uint32_t)by, most = 8 * sizeof(C<T>) - 1;
  if (n > most && !std::is_signed_v<C<T>>) return 0;
  return bits((C<T>)(value<T>(x) >> std::min(n, most)));
}
template <class T>
inline Bits op_popc(Bits x) {
  return __builtin_popcountll((Bits)value<T>(x));
}
// The lower `length` bits of x, put into y from bit `from` on.
template <class T>
inline Bits op_bfi(Bits x, Bits y, Bits from, Bits length) {
  from &= 255;
  length &= 255;
  if (from >= 64) return y;
  const Bits ones = length >= 64 ? ~Bits(0) : (Bits(1) << length) - 1;
  return (y & ~(ones << from)) | (x & ones) << from;
}
template <class T>
inline Bits op_prmt(Bits x, Bits y, Bits which) {
  const Bits both = (y & 0xffffffffu) << 32 | (x & 0xffffffffu);
  Bits result = 0;
  for (int i = 0; i < 4; ++i) {
    const Bits digit = which >> 4 * i & 15;
    Bits byte = both >> 8 * (digit & 7) & 255;
    if (digit & 8) byte = byte & 128 ? 255 : 0;
    result |= byte << 8 * i;
  }
  return result;
}
template <>
inline Bits op_max<u16x2>(Bits x, Bits y) {
  const Bits low = std::max(x & 0xffff, y & 0xffff), high = std::max(x >> 16 & 0xffff, y >> 16 & 0xffff);
  return high << 16 | low;
}

// --- comparisons ---

#define DAVINCI_PTX_COMPARE(name, expression)                \
  template <class T>                                         \
  inline Bits op_setp_##name(Bits x, Bits y) {                  \
    const C<T> a = value<T>(x), b = value<T>(y);             \
    return expression;                                       \
  }
DAVINCI_PTX_COMPARE(eq, a == b)
DAVINCI_PTX_COMPARE(ne, a < b || b < a)  // none is unlike nothing
DAVINCI_PTX_COMPARE(lt, a < b)
DAVINCI_PTX_COMPARE(le, a <= b)
DAVINCI_PTX_COMPARE(gt, a > b)
DAVINCI_PTX_COMPARE(ge, a >= b)
DAVINCI_PTX_COMPARE(equ, !(a < b || b < a))  // or one of them is none
DAVINCI_PTX_COMPARE(neu, !(a == b))
DAVINCI_PTX_COMPARE(ltu, !(a >= b))
DAVINCI_PTX_COMPARE(leu, !(a > b))
DAVINCI_PTX_COMPARE(gtu, !(a <= b))
DAVINCI_PTX_COMPARE(geu, !(a < b))
DAVINCI_PTX_COMPARE(num, a == a && b == b)
DAVINCI_PTX_COMPARE(nan, a != a || b != b)
template <class T>
inline Bits op_selp(Bits x, Bits y, Bits which) {
  return which ? x : y;
}

// --- fp32 ---

inline float flush(float x) { return std::fabs(x) < 1.17549435e-38f ? std::copysign(0.0f, x) : x; }

inline Bits mixed(Bits x) {  // Stafford's variant 13 of the finaliser of MurmurHash3
  x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
  x = (x ^ x >> 27) * 0x94d049bb133111ebu;
  return x ^ x >> 31;
}

inline Bits& approximating() {
  static Bits seed = 0;
  return seed;
}

inline Bits drawn(Bits argument, int which) { return mixed(argument + mixed(approximating() * 8 + which)); }

// A float near `exact`, off by at most `error`, of which 2^-24 of `exact` are for rounding.
inline float near(double exact, double error, Bits argument, int which) {
  if (!approximating() || !std::isfinite(exact) || exact == 0) return (float)exact;
  const double room = error - std::fabs(exact) * 0x1p-24;
  return (float)(exact + ((double)(drawn(argument, which) >> 11) * 0x1p-52 - 1) * room);
}

// A float that is at most so many units in the last place from the rounded one.
inline float near_in_units(double exact, int units, Bits argument, int which) {
  const float rounded = (float)exact;
  if (!approximating() || !std::isfinite(rounded) || rounded == 0) return rounded;
  const Bits moved = bits(rounded) + drawn(argument, which) % (2 * units + 1) - units;
  const float found = value<f32>(moved);
  return std::isfinite(found) ? found : rounded;
}

template <class T>
inline Bits op_fma_rn(Bits x, Bits y, Bits z) {
  return made(std::fma(value<T>(x), value<T>(y), value<T>(z)));
}
DAVINCI_PTX_2(div_rn, a / b)
DAVINCI_PTX_2(add_rn, a + b)
DAVINCI_PTX_2(sub_rn, a - b)
DAVINCI_PTX_2(mul_rn, a* b)
DAVINCI_PTX_1(rcp_rn, 1 / a)
DAVINCI_PTX_1(sqrt_rn, std::sqrt(a))
// 2^0 is 1.
inline float power_of_two(float a, Bits x) {
  return a == 0 ? 1.0f : near_in_units(std::exp2((double)a), 2, x, 0);
}
inline float root(float a, Bits x) {
  return near(std::sqrt((double)a), std::sqrt((double)a) * 0x1p-23, x, 2);
}
DAVINCI_PTX_1(ex2_approx, power_of_two(a, x))
DAVINCI_PTX_1(ex2_approx_ftz, flush(power_of_two(flush(a), x)))
DAVINCI_PTX_1(rcp_approx_ftz, flush(near_in_units(1 / (double)flush(a), 1, x, 1)))
DAVINCI_PTX_1(sqrt_approx_ftz, flush(root(flush(a), x)))
template <class T>
inline Bits op_lg2_approx_ftz(Bits x) {
  const double a = flush(value<f32>(x)), exact = std::log2(a);
  const double error = a > 0.5 && a < 2 ? 1.0 : std::fabs(exact);
  return made(flush(near(exact, error * 0x1p-22, x, 3)));
}

// --- from one type to another ---

template <class To, class From>
inline Bits op_cvt(Bits x) {
  return bits((C<To>)value<From>(x));
}
template <class To, class From>
inline Bits op_cvt_rn(Bits x) {  // to bf16 and from whole numbers
  if constexpr (std::is_same_v<To, f32>) return bits((float)value<From>(x));
  if constexpr (std::is_same_v<To, bf16>) {
    const uint32_t a = (uint32_t)x, rounded = a + 0x7fffu + (a >> 16 & 1u);
    return (a & 0x7fffffffu) > 0x7f800000u ? 0x7fffu : rounded >> 16;
  }
}
template <class To, class From>
inline Bits op_cvt_rn(Bits high, Bits low) {
  static_assert(std::is_same_v<To, bf16x2>, "two are made of two");
  return op_cvt_rn<bf16, f32>(high) << 16 | op_cvt_rn<bf16, f32>(low);
}
template <class To>
inline Bits code_of(float a) {
  const Bits sign = std::signbit(a) ? 128 : 0;
  if (a != a) return 127;
  const double size = std::min((double)std::fabs(a), To::kTop);
  if (size == 0) return sign;
  const int exponent = std::max(std::ilogb(size), To::kLeast);
  // In units of the last place: what begins at 2^kLeast is numbered from 2^kMantissa on, and so is what is smaller.
  const double units = std::nearbyint(std::ldexp(size, To::kMantissa - exponent));
  const Bits number = ((Bits)(exponent - To::kLeast) << To::kMantissa) + (Bits)units;
  const Bits top = ((Bits)(std::ilogb(To::kTop) - To::kLeast) << To::kMantissa) +
                  (Bits)std::ldexp(To::kTop, To::kMantissa - std::ilogb(To::kTop));
  return sign | std::min(number, top);
}
template <class To, class From>
inline Bits op_cvt_rn_satfinite(Bits high, Bits low) {
  return code_of<To>(value<f32>(high)) << 8 | code_of<To>(value<f32>(low));
}
template <class T>
inline Bits op_cvta_to_global(Bits x) {
  return x;
}

// --- memory ---

// All that a block has of shared memory: what the kernel names, and behind it what the launch adds.
struct SharedMemory {
  static constexpr uint32_t kMost = DAVINCI_SHARED_KIB << 10;
  emulator::Element<uint32_t> words[kMost / 4];
  uint32_t bytes = 0, added = 0;  // all, and of these the launch's

  void give(uint32_t named, uint32_t wanted, uint32_t a_slot) {
    const uint32_t fit = (kMost - 1024 - named) / (a_slot ? a_slot : 1) * a_slot;
    added = std::min(wanted, fit);
    bytes = named + added;
  }
};

inline SharedMemory& shared_memory() {
  static SharedMemory instance;
  return instance;
}

enum class Space { kGlobal, kShared };

#if defined(DAVINCI_TRACE)
}  // namespace ptx
#include "ptx_trace.h"
namespace ptx {
#else
inline void trace(int, Space, bool, Bits, int) {}
inline void ran(int) {}
#endif

inline void check(const Place& place, Space space, Bits address, int size) {
  if (address % size)
    emulator::fail("%s:%d: address %llx is no multiple of %d", place.file, place.line, (unsigned long long)address, size);
  if (space == Space::kShared && address + size > shared_memory().bytes)
    emulator::fail("%s:%d: byte %llu of %u of shared memory", place.file, place.line, (unsigned long long)address,
                   shared_memory().bytes);
  if (space == Space::kGlobal && address < 4096) emulator::fail("%s:%d: a null pointer", place.file, place.line);
}

extern const Place kPlaces[];
extern const char* const kNames[];  // of shared memory at a place, for messages

template <Space kSpace, class T, int kCount>
inline void load(int place, Bits address, Bits* to) {
  constexpr int kSize = sizeof(C<T>);
  check(kPlaces[place], kSpace, address, kSize * kCount);
  trace(place, kSpace, false, address, kSize * kCount);
  char bytes[kSize * kCount];
  if constexpr (kSpace == Space::kShared) {
    static_assert(kSize * kCount % 4 == 0, "less than a word of shared memory");
    for (int i = 0; i < kSize * kCount / 4; ++i) {
      auto& element = shared_memory().words[address / 4 + i];
      element.check_read(kNames[place]);
      std::memcpy(bytes + 4 * i, &element.value, 4);
    }
  } else {
    std::memcpy(bytes, reinterpret_cast<const void*>(address), sizeof bytes);
  }
  for (int i = 0; i < kCount; ++i) {
    C<T> one;
    std::memcpy(&one, bytes + kSize * i, kSize);
    to[i] = ptx::bits(one);
  }
}

template <Space kSpace, class T, int kCount>
inline void store(int place, Bits address, const Bits* from) {
  constexpr int kSize = sizeof(C<T>);
  check(kPlaces[place], kSpace, address, kSize * kCount);
  trace(place, kSpace, true, address, kSize * kCount);
  char bytes[kSize * kCount];
  for (int i = 0; i < kCount; ++i) std::memcpy(bytes + kSize * i, from + i, kSize);
  if constexpr (kSpace == Space::kShared) {
    static_assert(kSize * kCount % 4 == 0, "less than a word of shared memory");
    for (int i = 0; i < kSize * kCount / 4; ++i) {
      auto& element = shared_memory().words[address / 4 + i];
      element.check_write(kNames[place]);
      std::memcpy(&element.value, bytes + 4 * i, 4);
    }
  } else {
    std::memcpy(reinterpret_cast<void*>(address), bytes, sizeof bytes);
  }
}

// `place` of what is read, and the next of where it is written.
inline void copy(int place, Bits to, Bits from) {
  check(kPlaces[place], Space::kShared, to, 16);
  check(kPlaces[place], Space::kGlobal, from, 16);
  trace(place, Space::kGlobal, false, from, 16);
  trace(place + 1, Space::kShared, true, to, 16);
  emulator::state().current->copies.back().push_back([=] {
    for (int i = 0; i < 4; ++i) {
      auto& element = shared_memory().words[to / 4 + i];
      element.check_write(kNames[place]);
      std::memcpy(&element.value, reinterpret_cast<const char*>(from) + 4 * i, 4);
    }
  });
}

template <class T>
inline Bits op_atom_max(int place, Bits address, Bits with) {
  check(kPlaces[place], Space::kGlobal, address, sizeof(C<T>));
  trace(place, Space::kGlobal, true, address, sizeof(C<T>));
  auto* at = reinterpret_cast<C<T>*>(address);
  return bits(emulator::exchange(at, [=](C<T> before) { return std::max(before, value<T>(with)); }));
}
template <class T>
inline Bits op_atom_add(int place, Bits address, Bits with) {
  check(kPlaces[place], Space::kGlobal, address, sizeof(C<T>));
  trace(place, Space::kGlobal, true, address, sizeof(C<T>));
  auto* at = reinterpret_cast<C<T>*>(address);
  return bits(emulator::exchange(at, [=](C<T> before) {
    if constexpr (std::is_same_v<T, f32>) return flush(flush(before) + flush(value<f32>(with)));
    return (C<T>)(before + value<T>(with));
  }));
}

// Starts a kernel that names so many bytes of shared memory and wants some more, in whole slots.
inline int launch(long long blocks, int threads, uint32_t named, uint32_t wanted, uint32_t a_slot,
                  const std::function<void()>& body) {
  const char* said = std::getenv("DAVINCI_EMULATOR_APPROXIMATE");
  approximating() = said ? std::strtoull(said, nullptr, 10) : 0;
  shared_memory().give(named, wanted, a_slot);
  return emulator::launch(blocks, threads, body);
}

// --- threads that meet ---

enum class To { kUp, kDown, kButterfly, kIndex };

// Of a lane, as the PTX ISA defines it; `ok` is whether there was one to read.
inline Bits shuffle(To how, int place, Bits& ok, Bits given, Bits by, Bits clamp, Bits mask) {
  const int lane = emulator::lane(), b = by & 31, segment = clamp >> 8 & 31;
  const int most = (lane & segment) | ((int)(clamp & 31) & ~segment), first = lane & segment;
  int from = 0;
  switch (how) {
    case To::kUp: from = lane - b; break;
    case To::kDown: from = lane + b; break;
    case To::kButterfly: from = lane ^ b; break;
    case To::kIndex: from = first | (b & ~segment); break;
  }
  ok = how == To::kUp ? from >= most : from <= most;
  return emulator::shuffle((unsigned)mask, (uint32_t)given, ok ? from : lane, kPlaces[place].file, kPlaces[place].line);
}
inline unsigned votes(int place, Bits predicate, Bits mask) {
  return emulator::ballot((unsigned)mask, predicate != 0, kPlaces[place].file, kPlaces[place].line);
}
inline void barrier(int place) { emulator::barrier(kPlaces[place].file, kPlaces[place].line); }

}  // namespace ptx
