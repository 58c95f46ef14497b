"""Hugging Face and Megatron-Core: the same weights under other names and in other cuts."""
