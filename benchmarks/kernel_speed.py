"""How fast kernels are on a GPU, beside a copy's bandwidth and beside others' kernels: for benchmarks/kernels.py."""

from __future__ import annotations

import importlib.util
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from benchmarks import adamw_speed, memory_bound_speed, quantize_speed
from megatron_davinci.errors import EnvironmentProblem
from megatron_davinci.kernels import cross_entropy_passes as passes
from megatron_davinci.kernels import ways
from megatron_davinci.kernels.cross_entropy import IGNORED

ROUNDS = 20
ROWS, ALL_ROWS = 4096, 16_384  # one of the four sequences of 4,096 tokens, and all of them
VOCABULARY = 151_936  # of the report's model


def seconds(
    action: Callable[[], object], prepare: Callable[[], object] = lambda: None, ahead: int = 1
) -> float:
    """The median time of an action on the GPU, without what prepares it.

    Before it a gigabyte is read: the cache then has nothing of the action's, and nothing that has yet to be written,
    and what the host needs to start the action it does meanwhile. Where that is long, it is read `ahead` times.
    """
    taken = []
    before = torch.empty(1 << 28, device="cuda")
    for number in range(ROUNDS + 3):
        prepare()
        for _ in range(ahead):
            before.sum()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        action()
        end.record()
        torch.cuda.synchronize()
        if number >= 3:
            taken.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(taken)


def bandwidth(device: torch.device) -> float:
    """Bytes a second that a copy reads and writes."""
    here, there = (torch.empty(1 << 30, dtype=torch.uint8, device=device) for _ in range(2))
    return 2 * here.numel() / seconds(lambda: there.copy_(here))


def measure(seed: int) -> tuple[dict[str, float], dict[str, Any]]:
    """Times, and what rivals took.

    Raises:
        EnvironmentProblem: There is no GPU, or kernels do not run on it.
    """
    if not torch.cuda.is_available():
        raise EnvironmentProblem(
            "Speed is measured on a GPU, and torch finds none.",
            where="benchmarks/kernels.py",
            do="give --compile-only for what needs none",
        )
    device = torch.device("cuda", torch.cuda.current_device())
    way = ways.way_for(device)
    if not way.has_kernels:
        raise EnvironmentProblem("Kernels do not run on this GPU.", where=str(device), found=way.why)
    torch.manual_seed(seed)
    copy = bandwidth(device)
    figures = {"copy_gb_s": copy / 1e9}
    timed, peer = cross_entropy(device, copy)
    others, rivals = memory_bound_speed.measure(device, copy, seconds)
    of_adam, with_adam = adamw_speed.measure(device, copy, seconds)
    in_fp8, before = quantize_speed.measure(device, copy, seconds)
    peer = {"way": way.name, "never_run_on_a_gpu": [], **peer, **rivals, **with_adam, "quantize": before}
    return figures | timed | others | of_adam | in_fp8, peer


def cross_entropy(device: torch.device, copy: float) -> tuple[dict[str, float], dict[str, Any]]:
    """The loss and P - Y of bf16 logits: one read and one write of them."""
    figures: dict[str, float] = {}
    for rows, name in ((ALL_ROWS, f"cross_entropy_{ALL_ROWS}_rows"), (ROWS, "cross_entropy")):
        fresh = torch.randn(rows, VOCABULARY, device=device, dtype=torch.bfloat16)
        logits, labels = torch.empty_like(fresh), torch.randint(VOCABULARY, (rows,), device=device)
        place = (logits, labels, VOCABULARY, IGNORED)
        ours = seconds(lambda p=place: passes.whole_(*p), prepare=lambda p=place, f=fresh: p[0].copy_(f))
        figures[f"{name}_fraction_of_copy"] = 2 * fresh.numel() * fresh.element_size() / ours / copy
        figures[f"{name}_{'ms' if rows == ALL_ROWS else 'forward_ms'}"] = 1e3 * ours
    by = torch.ones(ROWS, device=device)
    back = seconds(lambda: passes.scaled_(logits, labels, by, torch.zeros_like(by), 0, VOCABULARY, IGNORED))
    figures["cross_entropy_backward_ms"] = 1e3 * back

    def whole(loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> float:
        leaf = fresh.clone().requires_grad_()
        return seconds(lambda: torch.autograd.grad(loss(leaf, labels).sum(), leaf))

    def eager(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(x.float(), y, reduction="none")

    peer: dict[str, Any] = {
        "torch_eager_forward_and_backward_ms": 1e3 * whole(eager),
        "torch_compile_forward_and_backward_ms": 1e3 * whole(torch.compile(eager)),
    }
    if importlib.util.find_spec("liger_kernel") is not None:
        from liger_kernel.ops.cross_entropy import LigerCrossEntropyFunction

        def liger(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return LigerCrossEntropyFunction.apply(x.clone(), y, None, IGNORED, 0.0, 0.0, "none")[0]

        peer["liger_forward_and_backward_ms"] = 1e3 * whole(liger)
    else:
        peer["liger"] = "not installed"
    return figures, peer
