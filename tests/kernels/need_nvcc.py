"""Imports where CUDA's compiler is installed (`needs("nvcc")`)."""

from megatron_davinci.kernels.compilers import find_nvcc

if find_nvcc() is None:
    raise ImportError("there is no nvcc on the path or in CUDA_HOME")
