// What SwiGLU is made of (Shazeer, 2020, GLU Variants Improve Transformer, arXiv 2002.05202): silu(gate) * up. With
// e = exp(-gate) and s = 1 / (1 + e), silu(gate) = gate * s, and its derivative is s * (1 + gate * (e * s)): in e * s
// nothing cancels, as it would in 1 - s.
#pragma once

#include "portable.h"

namespace davinci {

// Bounded: above, 1 / (1 + e) is 0, and so would have to be e * 0.
__device__ __forceinline__ float negative_exponential(float gate) {
  return fminf(power_of_two(-gate * kLog2E), 1e38f);
}

// silu(gate) * up.
__device__ __forceinline__ float gated(float gate, float up) {
  return gate * reciprocal(1.0f + negative_exponential(gate)) * up;
}

// The gradients of a gate and of what it gates, of one that came from above; and silu(gate).
struct GatedGradient {
  float by_gate, by_up, silu;
};
__device__ __forceinline__ GatedGradient gated_gradient(float gate, float up, float above) {
  const float e = negative_exponential(gate), s = reciprocal(1.0f + e), silu = gate * s;
  return GatedGradient{above * up * (s * (1.0f + gate * (e * s))), above * silu, silu};
}

}  // namespace davinci
