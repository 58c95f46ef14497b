// The keyed shuffle of megatron_davinci/data/permutation.py, an element at a time. That module says what it is and why;
// its numpy form gives the same numbers, and is used where this library was not built.

#include <cstdint>

namespace {

// As HALF_ROUNDS in permutation.py.
constexpr int64_t kHalfRounds = 8;

// A hash's 32 bits times a radix fit into 64; sizes are up to 2^62.
constexpr int64_t kLargestRadix = int64_t{1} << 31;

// The hash of `of` under `key`, scaled to 0 to radix - 1.
uint64_t scaled_hash(uint64_t of, uint64_t key, uint64_t radix) {
    uint64_t z = of + key;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return ((z >> 32) * radix) >> 32;
}

// `to + hash`, modulo the radix: both are below it.
uint64_t add(uint64_t to, uint64_t hash, uint64_t radix) {
    const uint64_t sum = to + hash;
    return sum < radix ? sum : sum - radix;
}

uint64_t once(uint64_t x, uint64_t a, uint64_t b, const uint64_t* keys, int64_t stride) {
    uint64_t left = x / b;
    uint64_t right = x - left * b;
    for (int64_t k = 0; k < kHalfRounds; k += 2) {
        left = add(left, scaled_hash(right, keys[k * stride], a), a);
        right = add(right, scaled_hash(left, keys[(k + 1) * stride], b), b);
    }
    return left * b + right;
}

}  // namespace

// Element i becomes entry `positions[i]` of permutation `which[i]`.
//
// `sizes`, `a`, `b`: [permutations]; `keys`: [8, permutations].
// Returns the first element whose permutation or position is none; n if all are, -1 if a permutation is none.
extern "C" int64_t davinci_permute(int64_t n, const int64_t* positions, const int64_t* which, int64_t permutations,
                                   const int64_t* sizes, const int64_t* a, const int64_t* b, const uint64_t* keys,
                                   int64_t* result) {
    for (int64_t p = 0; p < permutations; ++p) {
        const bool has_radices = a[p] >= 1 && a[p] <= kLargestRadix && b[p] >= 1 && b[p] <= kLargestRadix;
        if (!has_radices || a[p] * b[p] < sizes[p]) {
            return -1;
        }
    }
    for (int64_t i = 0; i < n; ++i) {
        const int64_t p = which[i];
        if (p < 0 || p >= permutations || positions[i] < 0 || positions[i] >= sizes[p]) {
            return i;
        }
        auto x = static_cast<uint64_t>(positions[i]);
        do {
            x = once(x, static_cast<uint64_t>(a[p]), static_cast<uint64_t>(b[p]), keys + p, permutations);
        } while (x >= static_cast<uint64_t>(sizes[p]));
        result[i] = static_cast<int64_t>(x);
    }
    return n;
}
