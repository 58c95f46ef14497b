// What SwiGLU is made of (Shazeer, 2020, GLU Variants Improve Transformer, arXiv 2002.05202).
#pragma once

#include "portable.h"

namespace davinci {

// Bounded: above, 1 / (1 + e) is 0, and so would have to be e * 0.
__device__ __forceinline__ float negative_exponential(float gate) { return fminf(exponential(-gate), 1e38f); }

// silu(gate) * up.
__device__ __forceinline__ float gated(float gate, float up) {
  return gate * reciprocal(1.0f + negative_exponential(gate)) * up;
}

}  // namespace davinci
