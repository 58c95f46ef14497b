"""Imports where the emulator can be made (`needs("emulator")`)."""

from megatron_davinci.kernels.compilers import find_host_compiler

if find_host_compiler() is None:
    raise ImportError("there is no C++ compiler")
