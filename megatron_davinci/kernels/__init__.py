"""The Python face of `csrc/kernels`: one op a file, each with the same in plain torch.

`ways` decides once by which way an op runs on a device: a library that nvcc made ahead of time, NVRTC at run time,
the CPU emulator where it is asked for, or plain torch, which is the way on a CPU.
"""
