// All kernels as one translation unit: what nvcc and the emulator's g++ compile. NVRTC compiles a file at a time.
#include "adamw.cu"
#include "column_sums.cu"
#include "cross_entropy.cu"
#include "documents.cu"
#include "quantize.cu"
#include "quantize_gradient.cu"
#include "rms_norm.cu"
#include "rope.cu"
#include "swiglu.cu"

#if !defined(__CUDACC_RTC__)
// Of the sources that this library was made from; `davinci` refuses one that was made from others.
DAVINCI_EXPORT const char* davinci_kernels_digest() { return DAVINCI_DIGEST; }
#endif
