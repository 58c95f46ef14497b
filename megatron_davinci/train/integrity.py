"""Silent corruption: a rank that computes, or holds, other bits than it should.

Two looks, each every so many steps. The gradient of a step is computed twice and compared bit for bit before it is
summed over ranks: a rank whose two answers differ computes wrong. And data-parallel replicas compare their weights:
one that differs from the others holds wrong bits. What is compared are sums of the bits taken as integers, a number a
parameter: a flipped bit changes one, and its name is known.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_davinci.config import RunConfig
from megatron_davinci.errors import ConfigError, Corrupt
from megatron_davinci.optim.schedule import StepPlan
from megatron_davinci.platform.device import Platform
from megatron_davinci.platform.distributed import gather_objects, largest, seed_ranks
from megatron_davinci.train.probe import named_parameters
from megatron_davinci.train.step import Stepper, once

_SHOWN = 3


class Integrity:
    """Looks for it.

    Args:
        config: The run configuration.
        stepper: Takes the steps.
        platform: What the run computes on.

    Raises:
        ConfigError: Steps are to be computed twice where kernels do not add in a fixed order.
    """

    def __init__(self, config: RunConfig, stepper: Stepper, platform: Platform) -> None:
        self._recompute = config.health.recompute_every_steps
        self._compare = config.health.compare_replicas_every_steps
        self._config, self._stepper = config, stepper
        if self._recompute and platform.name == "cuda" and not config.train.deterministic:
            raise ConfigError(
                "A step that is computed twice on a GPU comes out differently by itself.",
                where="health.recompute_every_steps",
                found="train.deterministic: false",
                expected="train.deterministic: true, so that kernels add in a fixed order",
                do="set train.deterministic=true, or health.recompute_every_steps=null",
            )

    def before(self, plan: StepPlan) -> None:
        """Have the step's gradient computed twice, where that is due."""
        due = self._recompute is not None and plan.step % self._recompute == 0
        self._stepper.compute = partial(self._twice, plan) if due else once

    def after(self, plan: StepPlan) -> None:
        """Compare the weights of the replicas, where that is due.

        Raises:
            Corrupt: They differ.
        """
        if self._compare is None or plan.step % self._compare:
            return
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        if dist.get_world_size(group) == 1:
            return
        self._stepper.gather_weights()
        names = [name for name, _ in named_parameters(self._stepper.wrapped)]
        mine = bit_sums([one.detach() for _, one in named_parameters(self._stepper.wrapped)])
        of_all = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
        dist.all_gather(of_all, mine, group=group)
        sums = torch.stack(of_all).cpu()
        differing = torch.nonzero((sums != sums[0]).any(0)).flatten().tolist()
        # Other replicas' ranks must hear of it too: they would wait for these.
        if not largest([len(differing)])[0]:
            return
        ranks = dist.get_process_group_ranks(group)
        odd = sorted({rank for i in differing for rank in _odd_ones(sums[:, i].tolist(), ranks)})
        said = gather_objects((socket.gethostname(), odd, [names[i] for i in differing]))
        suspects = sorted({rank for _, found, _ in said for rank in found})
        where = sorted({name for _, _, found in said for name in found})
        raise Corrupt(
            "Replicas of the model hold different weights.",
            where=f"step {plan.step:,}, {_some(where)}",
            found="\n".join(
                f"rank {rank} on {said[rank][0]}" + ("" if len(suspects) == 1 else ", or another of these")
                for rank in suspects
            ),
            expected="the same bits on all data-parallel ranks",
            do="leave out the node that is named; checkpoints of steps after "
            f"{max(0, plan.step - (self._compare or 0)):,} may hold its weights: move them away, then start the same "
            "command again",
        )

    def _twice(self, plan: StepPlan, gradient: Callable[[], list[Tensor]]) -> list[Tensor]:
        """Compute a step's gradient twice.

        Raises:
            Corrupt: On every rank, where some rank's two differ.
        """
        first, reported = self._sums(plan, gradient)
        second, reports = self._sums(plan, gradient)
        names = [name for name, _ in named_parameters(self._stepper.wrapped)]
        differing = [names[i] for i in torch.nonzero(first != second).flatten().tolist()]
        if any(not torch.equal(one, other) for one, other in zip(reported, reports, strict=True)):
            differing.insert(0, "the loss")
        if not largest([len(differing)])[0]:
            return reports
        said = gather_objects((socket.gethostname(), differing))
        raise Corrupt(
            "A rank has computed the same step twice, with different results.",
            where=f"step {plan.step:,}, which was not applied",
            found="\n".join(
                f"rank {rank} on {host}: {_some(found)}" for rank, (host, found) in enumerate(said) if found
            ),
            expected="the same bits",
            do="leave out the node that is named, and have it tested; then start the same command again: the run "
            "goes on from its newest checkpoint",
        )

    def _sums(self, plan: StepPlan, gradient: Callable[[], list[Tensor]]) -> tuple[Tensor, list[Tensor]]:
        """Compute the gradient: the sums of the bits of this rank's own part of it, and the reports."""
        if self._config.model.dropout:
            seed_ranks(self._config.run.seed + plan.first_sample)
        with OwnGradients(self._stepper.wrapped) as own:
            reports = gradient()
        return own.sums(), reports


class OwnGradients:
    """Sums the bits of the gradient that this rank has computed, before it is added to that of other ranks.

    Megatron-Core begins that sum bucket by bucket: after the backward pass, or in its midst where it overlaps. A
    bucket is looked at right before. A hook of a parameter would see what autograd hands it, which is no gradient
    where a product has written that into `main_grad`.

    Args:
        chunks: The wrapped model chunks.
    """

    def __init__(self, chunks: Sequence[Any]) -> None:
        parameters = [parameter for _, parameter in named_parameters(chunks)]
        self._groups = [
            group
            for chunk in chunks
            for group in (*chunk.bucket_groups, *chunk.expert_parallel_bucket_groups)
        ]
        self._number = {parameter: number for number, parameter in enumerate(parameters)}
        self._sums = torch.zeros(len(parameters), dtype=torch.int64, device=parameters[0].device)

    def __enter__(self) -> OwnGradients:
        for group in self._groups:
            group.start_grad_sync = partial(self._looked_at, group, group.start_grad_sync)
        return self

    def __exit__(self, *exc: object) -> None:
        for group in self._groups:
            del group.start_grad_sync  # the class's is seen again

    def _looked_at(self, group: Any, start: Callable[..., Any], *args: Any, **keywords: Any) -> Any:
        if group.grad_reduce_handle is None:  # else it has begun, and this call does nothing
            held = [parameter for bucket in group.buckets for parameter in bucket.params_list]
            numbers = torch.tensor([self._number[parameter] for parameter in held], device=self._sums.device)
            self._sums[numbers] = bit_sums([parameter.main_grad for parameter in held])
        return start(*args, **keywords)

    def sums(self) -> Tensor:
        """[parameters] int64."""
        return self._sums


def bit_sums(tensors: Sequence[Tensor]) -> Tensor:
    """The sum of each tensor's bits, taken as integers of its elements' size: [tensors] int64, on their device.

    Any single bit that flips changes it; that several cancel out takes two of the same weight in opposite directions.
    """
    sums: list[Any] = []
    for tensor in tensors:
        kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
        sums.append(tensor.contiguous().view(kind).sum(dtype=torch.int64))
    return torch.stack(sums) if sums else torch.zeros(0, dtype=torch.int64)


def _odd_ones(values: list[int], ranks: list[int]) -> list[int]:
    """The ranks that hold another value than most; all of those that differ where there is no most."""
    counts = {value: values.count(value) for value in values}
    most = max(counts.values())
    usual = [value for value, count in counts.items() if count == most]
    if len(usual) > 1:
        return list(ranks)
    return [rank for rank, value in zip(ranks, values, strict=True) if value != usual[0]]


def _some(names: Sequence[str]) -> str:
    rest = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {rest} more" if rest > 0 else "")
