// Runs the body of a CUDA kernel on a CPU: a fiber for each thread of a block, one block at a time.
//
// It checks what a kernel computes and how its threads meet: indices, reductions, rounding, barriers that not all
// reach, lanes that a warp's operation names and that do not come, shared memory that is read before it is written,
// out of range, or by two threads with no barrier between (docs/kernels.md says what it cannot show). A launcher
// returns 0, or kFailed, and davinci_emulator_message() then says what was found.
//
// DAVINCI_EMULATOR_SEED draws the order in which threads and blocks run; 0 is their natural order.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <vector>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

// A library has one copy of this state: all sources are one translation unit (kernels.cu).
namespace emulator {

constexpr int kFailed = 1000;
constexpr int kWarp = 32;
#if defined(DAVINCI_EMULATOR_STACK)
constexpr size_t kStack = DAVINCI_EMULATOR_STACK;
#else
constexpr size_t kStack = 64 << 10;
#endif

struct Index {
  unsigned x = 0, y = 0, z = 0;
};

#if defined(__x86_64__)
// Keeps what a function must leave as it found it, and changes stacks. swapcontext would do, but it asks the kernel
// for the signal mask each time, which takes a hundred times as long.
extern "C" void davinci_switch_stack(void** from, void* to);
asm(R"(
  .text
  .local davinci_switch_stack
  .type davinci_switch_stack, @function
davinci_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
  .size davinci_switch_stack, .-davinci_switch_stack
)");
#endif

enum class Waits { kNot, kBlock, kWarp };

struct Fiber {
  Index index;
  int number = 0;
  Waits waits = Waits::kNot;
  bool done = false;
  const char* file = "";  // of the barrier that it waits at
  int line = 0;
  uint64_t given = 0, taken = 0;  // what it brings to its warp's operation and takes from it
  int lane_wanted = 0;
  unsigned warp_epoch = 0;  // meetings of its warp that it was at
  std::deque<std::vector<std::function<void()>>> copies;  // begun and not waited for, by groups; the last is open
  std::unique_ptr<char[]> stack;
#if defined(__x86_64__)
  void* pointer = nullptr;
#else
  ucontext_t context;
#endif
#if defined(__SANITIZE_ADDRESS__)
  void* fake_stack = nullptr;
#endif
};

// A meeting of lanes of a warp, which one mask names.
struct Meeting {
  unsigned mask = 0, arrived = 0;
  const char* file = "";
  int line = 0;
};

struct State {
  std::vector<Fiber> fibers;
  std::vector<std::vector<Meeting>> meetings;  // by warp
  Fiber* current = nullptr;
  const std::function<void()>* body = nullptr;
  Index block, blocks, threads;
  unsigned generation = 0;  // of blocks, so that shared memory knows a new one
  unsigned epoch = 0;       // barriers that the block has passed
  std::string message;
  bool failed = false;
#if defined(__x86_64__)
  void* main = nullptr;
#else
  ucontext_t main;
#endif
#if defined(__SANITIZE_ADDRESS__)
  void* main_fake_stack = nullptr;
  const void* main_bottom = nullptr;
  size_t main_size = 0;
#endif
};

inline State& state() {
  static State instance;
  return instance;
}

inline void to_main(bool for_good) {
  State& s = state();
  Fiber* me = s.current;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(for_good ? nullptr : &me->fake_stack, s.main_bottom, s.main_size);
#endif
  (void)for_good;
#if defined(__x86_64__)
  davinci_switch_stack(&me->pointer, s.main);
#else
  swapcontext(&me->context, &s.main);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(me->fake_stack, &s.main_bottom, &s.main_size);
#endif
}

inline void to_fiber(Fiber& fiber) {
  State& s = state();
  s.current = &fiber;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&s.main_fake_stack, fiber.stack.get(), kStack);
#endif
#if defined(__x86_64__)
  davinci_switch_stack(&s.main, fiber.pointer);
#else
  swapcontext(&s.main, &fiber.context);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(s.main_fake_stack, nullptr, nullptr);
#endif
}

// Says what is wrong. The block is given up: its fibers are not resumed.
__attribute__((format(printf, 1, 2))) inline void report(const char* format, ...) {
  State& s = state();
  if (s.failed) return;
  char text[400];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  s.failed = true;
  s.message = text;
}

__attribute__((format(printf, 1, 2))) inline void fail(const char* format, ...) {
  State& s = state();
  char text[300];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  report("block %u, thread %u: %s", s.block.x, s.current->index.x, text);
  for (;;) to_main(false);
}

inline void entry() {
  State& s = state();
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &s.main_bottom, &s.main_size);
#endif
  (*s.body)();
  s.current->done = true;
  to_main(true);
}

inline void prepare(Fiber& fiber) {
  if (!fiber.stack) fiber.stack.reset(new char[kStack]);
#if defined(__SANITIZE_ADDRESS__)
  // A thread that has ended or was given up did not unwind, and its frames' marks are still there.
  __asan_unpoison_memory_region(fiber.stack.get(), kStack);
#endif
#if defined(__x86_64__)
  auto top = (reinterpret_cast<uintptr_t>(fiber.stack.get()) + kStack) & ~uintptr_t(15);
  auto* pointer = reinterpret_cast<void**>(top);
  *--pointer = nullptr;  // where a caller's address would be
  *--pointer = reinterpret_cast<void*>(&entry);
  for (int i = 0; i < 6; ++i) *--pointer = nullptr;
  fiber.pointer = pointer;
#else
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.get();
  fiber.context.uc_stack.ss_size = kStack;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, entry, 0);
#endif
}

inline void barrier(const char* file, int line) {
  Fiber* me = state().current;
  me->waits = Waits::kBlock;
  me->file = file;
  me->line = line;
  to_main(false);
}

// Lets a block pass a barrier once all of its threads are there, and says so if that cannot come to be.
inline void pass_barrier() {
  State& s = state();
  int waiting = 0, done = 0;
  const Fiber* first = nullptr;
  for (const Fiber& fiber : s.fibers) {
    done += fiber.done;
    if (fiber.waits != Waits::kBlock) continue;
    ++waiting;
    if (!first) first = &fiber;
    if (fiber.line != first->line || std::strcmp(fiber.file, first->file))
      return report("block %u: thread %d waits at the barrier of %s:%d and thread %d at that of %s:%d", s.block.x,
                    first->number, first->file, first->line, fiber.number, fiber.file, fiber.line);
  }
  const int all = (int)s.fibers.size();
  if (waiting == 0) return report("block %u: all threads wait, none at a barrier", s.block.x);
  if (waiting < all && waiting + done == all)
    return report("block %u: %d of %d threads have left, and the others wait at the barrier of %s:%d", s.block.x, done,
                  all, first->file, first->line);
  if (waiting < all)
    return report("block %u: %d threads wait at the barrier of %s:%d, and others for lanes that do not come", s.block.x,
                  waiting, first->file, first->line);
  ++s.epoch;
  for (Fiber& fiber : s.fibers) fiber.waits = Waits::kNot;
}

inline void run_block(int threads, std::mt19937* order_of) {
  State& s = state();
  ++s.generation;
  s.epoch = 0;
  s.fibers.resize(threads);
  s.meetings.assign((threads + kWarp - 1) / kWarp, {});
  std::vector<int> order(threads);
  for (int i = 0; i < threads; ++i) {
    Fiber& fiber = s.fibers[i];
    prepare(fiber);
    fiber.number = i;
    fiber.index = Index{(unsigned)i, 0, 0};
    fiber.waits = Waits::kNot;
    fiber.done = false;
    fiber.warp_epoch = 0;
    fiber.copies.assign(1, {});
    order[i] = i;
  }
  int left = threads;
  while (left && !s.failed) {
    if (order_of) std::shuffle(order.begin(), order.end(), *order_of);
    bool moved = false;
    for (int i : order) {
      Fiber& fiber = s.fibers[i];
      if (fiber.done || fiber.waits != Waits::kNot) continue;
      moved = true;
      to_fiber(fiber);
      if (s.failed) break;
      left -= fiber.done;
    }
    if (!moved) pass_barrier();
  }
}

inline std::mutex& turn() {
  static std::mutex instance;
  return instance;
}

inline int launch(long long blocks, int threads, const std::function<void()>& body) {
  const std::lock_guard<std::mutex> one_at_a_time(turn());
  State& s = state();
  const char* said = std::getenv("DAVINCI_EMULATOR_SEED");
  const unsigned seed = said ? (unsigned)std::strtoul(said, nullptr, 10) : 0;
  std::mt19937 generator(seed);
  s.body = &body;
  s.failed = false;
  s.message.clear();
  s.blocks = Index{(unsigned)blocks, 1, 1};
  s.threads = Index{(unsigned)threads, 1, 1};
  std::vector<unsigned> order(blocks);
  for (unsigned i = 0; i < blocks; ++i) order[i] = i;
  if (seed) std::shuffle(order.begin(), order.end(), generator);
  for (unsigned number : order) {
    s.block = Index{number, 0, 0};
    run_block(threads, seed ? &generator : nullptr);
    if (s.failed) break;
  }
  return s.failed ? kFailed : 0;
}

// Lanes of a warp meet. `settle` gives each what it takes, once all that the mask names are there.
template <class Settle>
inline uint64_t meet(unsigned mask, uint64_t given, int lane_wanted, const char* file, int line, Settle settle) {
  State& s = state();
  Fiber* me = s.current;
  const int lane = me->number % kWarp, warp = me->number / kWarp;
  const int first = warp * kWarp, lanes = std::min(kWarp, (int)s.fibers.size() - first);
  if (!(mask >> lane & 1)) fail("the mask %08x of %s:%d does not name lane %d, which is there", mask, file, line, lane);
  if (lanes < kWarp && mask >> lanes) fail("the mask %08x of %s:%d names lanes past the last", mask, file, line);
  Meeting* here = nullptr;
  for (Meeting& meeting : s.meetings[warp]) {
    if (!(meeting.mask & mask)) continue;
    if (meeting.mask != mask || meeting.line != line || std::strcmp(meeting.file, file))
      fail("lanes of a warp are at %s:%d with mask %08x and at %s:%d with mask %08x", meeting.file, meeting.line,
           meeting.mask, file, line, mask);
    here = &meeting;
  }
  if (!here) {
    s.meetings[warp].push_back(Meeting{mask, 0, file, line});
    here = &s.meetings[warp].back();
  }
  me->given = given;
  me->lane_wanted = lane_wanted;
  here->arrived |= 1u << lane;
  if (here->arrived != mask) {
    for (int i = 0; i < lanes; ++i)
      if ((mask >> i & 1) && s.fibers[first + i].done)
        fail("lane %d has left, and %s:%d waits for it", i, file, line);
    me->waits = Waits::kWarp;
    me->file = file;
    me->line = line;
    to_main(false);
    return me->taken;
  }
  s.meetings[warp].erase(s.meetings[warp].begin() + (here - s.meetings[warp].data()));
  for (int i = 0; i < lanes; ++i) {
    if (!(mask >> i & 1)) continue;
    Fiber& fiber = s.fibers[first + i];
    fiber.taken = settle(&s.fibers[first], mask, i);
    fiber.waits = Waits::kNot;
    ++fiber.warp_epoch;
  }
  return me->taken;
}

template <class T>
inline T shuffle(unsigned mask, T value, int lane, const char* file, int line) {
  static_assert(sizeof(T) <= 8, "a lane gives 8 bytes at most");
  uint64_t given = 0;
  std::memcpy(&given, &value, sizeof value);
  if (!(mask >> (lane & 31) & 1)) fail("%s:%d reads lane %d, which mask %08x does not name", file, line, lane, mask);
  const uint64_t taken = meet(mask, given, lane & 31, file, line, [](Fiber* lanes, unsigned, int i) {
    return lanes[lanes[i].lane_wanted].given;
  });
  T result;
  std::memcpy(&result, &taken, sizeof result);
  return result;
}

inline unsigned ballot(unsigned mask, bool predicate, const char* file, int line) {
  return (unsigned)meet(mask, predicate, 0, file, line, [](Fiber* lanes, unsigned named, int) {
    uint64_t votes = 0;
    for (int i = 0; i < kWarp; ++i)
      if (named >> i & 1) votes |= lanes[i].given << i;
    return votes;
  });
}

inline unsigned extreme(unsigned mask, unsigned value, bool largest, const char* file, int line) {
  return (unsigned)meet(mask, value, 0, file, line, [largest](Fiber* lanes, unsigned named, int) {
    uint64_t found = largest ? 0 : ~uint64_t(0);
    for (int i = 0; i < kWarp; ++i)
      if (named >> i & 1) found = largest ? std::max(found, lanes[i].given) : std::min(found, lanes[i].given);
    return found;
  });
}

inline int lane() { return state().current->number % kWarp; }

// Who touched an element of shared memory last, and when: by barriers of the block and meetings of the warp.
struct Touch {
  int thread = -1;
  unsigned generation = 0, epoch = 0, warp_epoch = 0;

  static Touch now() {
    const State& s = state();
    return Touch{s.current->number, s.generation, s.epoch, s.current->warp_epoch};
  }
  bool is_of_this_block() const { return generation == state().generation; }
  // Whether nothing orders it before what the current thread does.
  bool races() const {
    const State& s = state();
    if (!is_of_this_block() || epoch != s.epoch || thread == s.current->number) return false;
    return thread / kWarp != s.current->number / kWarp || warp_epoch >= s.current->warp_epoch;
  }
};

template <class T>
struct Element {
  T value{};
  Touch written, read, read_before;  // of two different threads

  void check_read(const char* name) {
    if (!written.is_of_this_block()) fail("%s is read before it is written", name);
    if (written.races()) fail("%s is read with no barrier after thread %d wrote it", name, written.thread);
    const Touch me = Touch::now();
    if (read.thread != me.thread) read_before = read;
    read = me;
  }
  void check_write(const char* name) {
    for (const Touch* touch : {&written, &read, &read_before})
      if (touch->races())
        fail("%s is written with no barrier after thread %d %s it", name, touch->thread,
             touch == &written ? "wrote" : "read");
    written = Touch::now();
  }
};

template <class T>
struct Reference {
  Element<T>* element;
  const char* name;

  Reference(Element<T>* element_, const char* name_) : element(element_), name(name_) {}
  Reference(const Reference& other) = default;
  operator T() const {
    element->check_read(name);
    return element->value;
  }
  Reference& operator=(T value) {
    element->check_write(name);
    element->value = value;
    return *this;
  }
  Reference& operator=(const Reference& other) { return *this = (T)other; }
  Reference& operator+=(T value) { return *this = (T)*this + value; }
};

template <class T, int kCount>
struct Shared {
  const char* name;
  Element<T> elements[kCount];

  Reference<T> operator[](long long i) {
    if (i < 0 || i >= kCount) fail("%s[%lld] of %d elements", name, i, kCount);
    return Reference<T>(&elements[i], name);
  }
};

// What a thread begins to copy is there when it has waited for it, and not before.
template <class T>
inline void begin_copy(Reference<T> to, const T* from) {
  state().current->copies.back().push_back([=]() mutable { to = *from; });
}

inline void end_group() { state().current->copies.emplace_back(); }

inline void wait_but(int groups) {
  auto& copies = state().current->copies;
  for (; (int)copies.size() - 1 > groups; copies.pop_front())
    for (auto& copy : copies.front()) copy();
}

// Fibers never run at once, so what is atomic only has to be done.
template <class T, class Change>
inline T exchange(T* at, Change change) {
  const T before = *at;
  *at = change(before);
  return before;
}

}  // namespace emulator

#define DAVINCI_SHARED(type, name, count) static emulator::Shared<type, count> name{#name, {}}
#define DAVINCI_SLOTS(name, count) DAVINCI_SHARED(davinci::Raw, name, count)

#define threadIdx (emulator::state().current->index)
#define blockIdx (emulator::state().block)
#define blockDim (emulator::state().threads)
#define gridDim (emulator::state().blocks)

#define __syncthreads() emulator::barrier(__FILE__, __LINE__)
#define __syncwarp(mask) ((void)emulator::ballot(mask, false, __FILE__, __LINE__))
#define __shfl_sync(mask, value, from) emulator::shuffle(mask, value, from, __FILE__, __LINE__)
#define __shfl_xor_sync(mask, value, bits) \
  emulator::shuffle(mask, value, emulator::lane() ^ (bits), __FILE__, __LINE__)
#define __shfl_down_sync(mask, value, by)                                                             \
  emulator::shuffle(mask, value, emulator::lane() + (by) < emulator::kWarp ? emulator::lane() + (by) \
                                                                           : emulator::lane(),        \
                    __FILE__, __LINE__)
#define __ballot_sync(mask, predicate) emulator::ballot(mask, predicate, __FILE__, __LINE__)
#define __reduce_max_sync(mask, value) emulator::extreme(mask, value, true, __FILE__, __LINE__)
#define __reduce_min_sync(mask, value) emulator::extreme(mask, value, false, __FILE__, __LINE__)
#define __any_sync(mask, predicate) (emulator::ballot(mask, predicate, __FILE__, __LINE__) != 0)
#define __all_sync(mask, predicate) (emulator::ballot(mask, predicate, __FILE__, __LINE__) == (mask))

template <class T>
inline T atomicAdd(T* at, T value) {
  return emulator::exchange(at, [=](T before) { return before + value; });
}
template <class T>
inline T atomicMax(T* at, T value) {
  return emulator::exchange(at, [=](T before) { return before > value ? before : value; });
}
template <class T>
inline T atomicCAS(T* at, T expected, T value) {
  return emulator::exchange(at, [=](T before) { return before == expected ? value : before; });
}

extern "C" __attribute__((visibility("default"))) const char* davinci_emulator_message() { return emulator::state().message.c_str(); }
