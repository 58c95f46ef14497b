// A library that was built from older sources than the package has is not called: its functions may take something else.

#include <cstdint>

// Raised with every change of a function's parameters or meaning; as INTERFACE in megatron_davinci/data/native.py.
extern "C" int32_t davinci_interface() { return 1; }
