"""Imports where NVRTC is installed (`needs("nvrtc")`)."""

from megatron_davinci.kernels.nvrtc import find_compiler

if find_compiler() is None:
    raise ImportError("there is no libnvrtc; the package nvidia-cuda-nvrtc has it")
