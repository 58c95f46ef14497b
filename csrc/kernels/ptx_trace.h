// What an emulated launch did, for a library with DAVINCI_TRACE: how often each run of instructions was gone through,
// and of each that touches memory what a warp's lanes asked for together.
//
// Lanes are emulated one after the other. What the n-th time of one has to do with the n-th time of another is taken to
// be one request of their warp: so it is on a GPU where lanes go through a loop together, and where they do not the
// GPU makes more requests than are counted here.
#pragma once

#include <array>
#include <set>
#include <unordered_set>

namespace ptx {

extern const int kPlaceCount, kBlockCount;

// Of an instruction, over all warps.
struct Touched {
  uint64_t requests = 0;  // of a warp
  uint64_t bytes = 0;     // that its lanes asked for
  uint64_t parts = 0;     // global: sectors of 32 bytes; shared: turns of the banks
  uint64_t least = 0;     // turns, if no two lanes of a turn wanted the same bank
};

struct Request {
  std::array<Bits, 32> address;
  uint32_t lanes = 0;
};

struct Trace {
  std::vector<uint64_t> ran;
  std::vector<Touched> touched;
  std::unordered_set<Bits> read, written;  // sectors
  unsigned generation = 0;
  std::vector<std::vector<uint32_t>> times;             // by thread and place
  std::vector<std::vector<std::vector<Request>>> asked;  // by warp, place and time
  std::vector<std::array<int, 3>> kinds;                // by place: space, whether it writes, bytes of a lane

  void begin(unsigned block) {
    if (block == generation && !ran.empty()) return;
    settle();
    generation = block;
    ran.resize(kBlockCount);
    touched.resize(kPlaceCount);
    kinds.resize(kPlaceCount);
    const size_t threads = emulator::state().fibers.size();
    times.assign(threads, std::vector<uint32_t>(kPlaceCount));
    asked.assign((threads + 31) / 32, std::vector<std::vector<Request>>(kPlaceCount));
  }

  void note(int place, Space space, bool writes, Bits address, int size) {
    begin(emulator::state().generation);
    const int thread = emulator::state().current->number, lane = thread % 32;
    const uint32_t time = times[thread][place]++;
    auto& requests = asked[thread / 32][place];
    if (requests.size() <= time) requests.resize(time + 1);
    requests[time].address[lane] = address;
    requests[time].lanes |= 1u << lane;
    kinds[place] = {(int)space, writes, size};
  }

  // Adds up a block's requests.
  void settle() {
    for (auto& warp : asked)
      for (int place = 0; place < (int)warp.size(); ++place)
        for (const Request& request : warp[place]) {
          const auto [space, writes, size] = kinds[place];
          Touched& sum = touched[place];
          ++sum.requests;
          sum.bytes += (uint64_t)size * __builtin_popcount(request.lanes);
          if (space == (int)Space::kGlobal)
            sectors(request, size, writes, sum);
          else
            turns(request, size, sum);
        }
    asked.clear();
  }

  void sectors(const Request& request, int size, bool writes, Touched& sum) {
    std::set<Bits> found;
    for (int lane = 0; lane < 32; ++lane)
      if (request.lanes >> lane & 1)
        for (Bits at = request.address[lane] / 32; at <= (request.address[lane] + size - 1) / 32; ++at) found.insert(at);
    sum.parts += found.size();
    (writes ? written : read).insert(found.begin(), found.end());
  }

  // 32 banks of a word. 8 bytes a lane are moved by half a warp at a time, 16 by a quarter.
  void turns(const Request& request, int size, Touched& sum) {
    const int words = std::max(1, size / 4), together = 32 / words;
    for (int first = 0; first < 32; first += together) {
      std::array<std::set<Bits>, 32> banks;
      for (int lane = first; lane < first + together; ++lane)
        if (request.lanes >> lane & 1)
          for (int word = 0; word < words; ++word) {
            const Bits at = request.address[lane] / 4 + word;
            banks[at % 32].insert(at);
          }
      size_t most = 0;
      for (const auto& bank : banks) most = std::max(most, bank.size());
      sum.parts += most;
      sum.least += most > 0;
    }
  }
};

inline Trace& tracing() {
  static Trace instance;
  return instance;
}
inline void trace(int place, Space space, bool writes, Bits address, int size) {
  tracing().note(place, space, writes, address, size);
}
inline void ran(int block) {
  tracing().begin(emulator::state().generation);
  ++tracing().ran[block];
}

}  // namespace ptx

// Empties what was noted into arrays of the caller: how often each run of instructions was gone through, `Touched` of
// each place, and how many sectors were read and written at all.
extern "C" __attribute__((visibility("default"))) void davinci_trace_take(uint64_t* ran, uint64_t* touched,
                                                                          uint64_t* sectors) {
  ptx::Trace& trace = ptx::tracing();
  trace.settle();
  if (!trace.ran.empty()) {
    std::memcpy(ran, trace.ran.data(), 8 * trace.ran.size());
    std::memcpy(touched, trace.touched.data(), sizeof(ptx::Touched) * trace.touched.size());
  }
  sectors[0] = trace.read.size();
  sectors[1] = trace.written.size();
  const unsigned generation = trace.generation;
  trace = ptx::Trace{};
  trace.generation = generation;
}
