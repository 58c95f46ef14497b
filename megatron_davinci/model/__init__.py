"""The model on Megatron-Core: layer spec, attention, norm, construction."""
