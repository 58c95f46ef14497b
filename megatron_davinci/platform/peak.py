"""What this machine's matrix products reach: the yardstick for `flops_utilization`."""

from __future__ import annotations

import time

import torch
import torch.distributed as dist

from megatron_davinci.platform.device import Platform


def measure_matmul_peak(platform: Platform, dtype: torch.dtype) -> float:
    """Measure one rank's matrix-product rate while every rank measures.

    Data-sheet peaks are not reached by any product, and a CPU's is not known at all, so utilization is given
    against this.

    Args:
        platform: What to measure.
        dtype: The dtype of the factors.

    Returns:
        FLOP/s of one rank; the smallest over the ranks.
    """
    # Every start waits for it: on a CPU half a dozen products, on a GPU as long as its clocks take to rise.
    size, seconds = (8192, 0.4) if platform.name == "cuda" else (768, 0.1)
    a = torch.randn(size, size, device=platform.device).to(dtype)
    b = torch.randn(size, size, device=platform.device).to(dtype)
    a @ b
    platform.synchronize()
    best, count, deadline = float("inf"), 0, time.perf_counter() + seconds
    while count < 3 or time.perf_counter() < deadline:
        begin = time.perf_counter()
        a @ b
        platform.synchronize()
        best, count = min(best, time.perf_counter() - begin), count + 1
    peak = torch.tensor(2 * size**3 / best, dtype=torch.float64, device=platform.device)
    if dist.is_initialized():
        dist.all_reduce(peak, op=dist.ReduceOp.MIN)
    return float(peak)
