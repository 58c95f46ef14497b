"""cpu | cuda: devices, process groups, and the Megatron-Core patches for a CPU."""
