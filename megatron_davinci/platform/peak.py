"""What this machine's matrix products reach: the yardstick for `flops_utilization`."""

from __future__ import annotations

import time

import torch
import torch.distributed as dist

from megatron_davinci.platform.device import Platform


def measure_matmul_peak(platform: Platform, dtype: torch.dtype, seconds: float = 0.4) -> float:
    """Measure one rank's matrix-product rate while every rank measures.

    Data-sheet peaks are not reached by any product, and a CPU's is not known at all, so utilization is given
    against this.

    Args:
        platform: What to measure.
        dtype: The dtype of the factors.
        seconds: About how long to measure.

    Returns:
        FLOP/s of one rank; the smallest over the ranks.
    """
    size = 8192 if platform.name == "cuda" else 768
    a = torch.randn(size, size, device=platform.device).to(dtype)
    b = torch.randn(size, size, device=platform.device).to(dtype)
    a @ b
    platform.synchronize()
    best, deadline = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < deadline:
        begin = time.perf_counter()
        a @ b
        platform.synchronize()
        best = min(best, time.perf_counter() - begin)
    peak = torch.tensor(2 * size**3 / best, dtype=torch.float64, device=platform.device)
    if dist.is_initialized():
        dist.all_reduce(peak, op=dist.ReduceOp.MIN)
    return float(peak)
