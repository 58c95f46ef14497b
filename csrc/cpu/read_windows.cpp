// Many ranges of files, each by one read into its row, and the largest token of each row while it is in cache.
//
// Called by megatron_davinci/data/native.py without the interpreter lock. Everything here could be done in Python, and
// is where this library was not built: for a window of 8 KB Python's part is as large as the kernel's.

#include <algorithm>
#include <cerrno>
#include <cstdint>

#include <sys/uio.h>
#include <unistd.h>

namespace {

// Tokens are compared without their sign: a negative one is then larger than any vocabulary.
template <typename Token>
uint64_t largest(const void* row, int64_t nbytes) {
    const auto* tokens = static_cast<const Token*>(row);
    const int64_t count = nbytes / static_cast<int64_t>(sizeof(Token));
    // Four maxima side by side: one alone would wait for itself at every step.
    const int64_t quarter = count / 4;
    Token first = 0, second = 0, third = 0, fourth = 0;
    for (int64_t i = 0; i < quarter; ++i) {
        first = std::max(first, tokens[i]);
        second = std::max(second, tokens[i + quarter]);
        third = std::max(third, tokens[i + 2 * quarter]);
        fourth = std::max(fourth, tokens[i + 3 * quarter]);
    }
    Token result = std::max(std::max(first, second), std::max(third, fourth));
    for (int64_t i = 4 * quarter; i < count; ++i) {
        result = std::max(result, tokens[i]);
    }
    return result;
}

using Largest = uint64_t (*)(const void*, int64_t);

Largest largest_of(int32_t itemsize) {
    switch (itemsize) {
        case 1: return largest<uint8_t>;
        case 2: return largest<uint16_t>;
        case 4: return largest<uint32_t>;
        case 8: return largest<uint64_t>;
        default: return nullptr;
    }
}

// One read of what the page cache holds.
int64_t read_cached(int fd, char* to, int64_t nbytes, int64_t offset) {
#if defined(__linux__) && defined(RWF_NOWAIT)
    iovec range = {to, static_cast<size_t>(nbytes)};
    const ssize_t count = preadv2(fd, &range, 1, offset, RWF_NOWAIT);
#else
    const ssize_t count = pread(fd, to, static_cast<size_t>(nbytes), offset);
#endif
    return count < 0 ? -errno : count;
}

// As many reads as it takes. Fewer bytes than were asked for are the file's end.
int64_t read_whole(int fd, char* to, int64_t nbytes, int64_t offset) {
    int64_t done = 0;
    while (done < nbytes) {
        const ssize_t count = pread(fd, to + done, static_cast<size_t>(nbytes - done), offset + done);
        if (count > 0) {
            done += count;
        } else if (count == 0) {
            return done;
        } else if (errno != EINTR) {
            return -errno;
        }
    }
    return done;
}

}  // namespace

// Reads range i, `nbytes` from `offsets[i]` on of the file `fds[i]`, to `rows[i]`.
//
// `wait`: 0 reads what is in memory, else whatever it takes. A descriptor below 0 is no file and is not read.
// `got[i]`: the bytes that were read, or -errno. A row of fewer than `nbytes` has no meaning, and its `highest` is 0.
// `highest[i]`: the largest token of row i, of `itemsize` bytes without sign.
// Returns how many rows are not whole; -1 for an itemsize that no token has.
extern "C" int64_t davinci_read_windows(int64_t n, const int32_t* fds, const int64_t* offsets, char* const* rows,
                                        int64_t nbytes, int32_t itemsize, int32_t wait, int64_t* got,
                                        uint64_t* highest) {
    const Largest look = largest_of(itemsize);
    if (look == nullptr) {
        return -1;
    }
    const auto read = wait != 0 ? read_whole : read_cached;
    int64_t missing = 0;
    for (int64_t i = 0; i < n; ++i) {
        got[i] = fds[i] < 0 ? -EBADF : read(fds[i], rows[i], nbytes, offsets[i]);
        const bool is_whole = got[i] == nbytes;
        highest[i] = is_whole ? look(rows[i], nbytes) : 0;
        missing += is_whole ? 0 : 1;
    }
    return missing;
}
