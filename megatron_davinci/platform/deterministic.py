"""Only kernels that add in a fixed order."""

from __future__ import annotations

import os

import torch

_VARIABLES = {
    # cuBLAS chooses among algorithms by the workspace that it gets; with a fixed one it always chooses alike.
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    # Switches that add on their own (NVLink SHARP) do so in the order of arrival.
    "NCCL_ALGO": "^NVLS",
}


def be_deterministic() -> None:
    """Make torch, cuBLAS, NCCL and Transformer Engine add in a fixed order; before anything runs on the device.

    What torch has no such kernel for raises an error when it is called. A variable of the environment that is set
    already is left as it is, but Transformer Engine's, which Megatron-Core asks for.
    """
    for name, value in _VARIABLES.items():
        os.environ.setdefault(name, value)
    os.environ["NVTE_ALLOW_NONDETERMINISTIC_ALGO"] = "0"
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
