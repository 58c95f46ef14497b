"""Muon inside Megatron-Core's optimizers: matrices of the layers move by their momentum made orthogonal.

Jordan et al. 2024 (https://kellerjordan.github.io/posts/muon) for the method and the iteration's coefficients;
Liu et al. 2025 (Moonlight, arXiv 2502.16982) for weight decay and the size of an update, with which what AdamW moves
may have the same learning rate.

What is made orthogonal is a matrix of the model, however parameters hold it: queries, keys and values lie in one,
and so do an MLP's gate and what it gates. Parts of a matrix on tensor-parallel ranks are gathered first, so that an
update depends on the layout by rounding alone. Data-parallel ranks compute the same, or deal the parameters among
themselves (`optim.dealt`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_davinci.config.training import MuonConfig
from megatron_davinci.optim.adamw import GroupAdamW

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_GATED = re.compile(r"linear_fc1\.weight\d*$")  # with a number: Transformer Engine's experts


def orthogonal(matrix: Tensor, rounds: int = 5) -> Tensor:
    """A matrix with about the same singular vectors, and singular values near 1.

    Newton and Schulz's iteration with a polynomial of the fifth degree, whose coefficients bring small values up
    fast and keep none at 1 (Jordan et al. 2024): by five rounds, those of at least 0.3% of the matrix's norm come to
    between 0.68 and 1.21.

    Args:
        matrix: [rows, columns]; in bf16 on a GPU, where that is how it is computed, and else in its own dtype.
        rounds: Of the iteration.

    Returns:
        [rows, columns] of the dtype of `matrix`; zeros of zeros.
    """
    a, b, c = _COEFFICIENTS
    x = matrix.bfloat16() if matrix.is_cuda else matrix
    high = x.shape[0] > x.shape[1]
    x = x.mT if high else x
    x = x / x.norm().clamp_min(torch.finfo(x.dtype).tiny)
    for _ in range(rounds):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if high else x).to(matrix.dtype)


@dataclass(frozen=True)
class Matrices:
    """How a parameter holds matrices of the model.

    Attributes:
        rows: Of each of them in turn, which is repeated until the parameter ends; empty for one matrix.
        dim: Which dimension lies on tensor-parallel ranks; None for none.
        group: Those ranks.
    """

    rows: tuple[int, ...] = ()
    dim: int | None = None
    group: Any = None

    def whole(self, part: Tensor) -> Tensor:
        """What all ranks have of the parameter."""
        if self.dim is None:
            return part
        parts = [torch.empty_like(part) for _ in range(dist.get_world_size(self.group))]
        dist.all_gather(parts, part.contiguous(), group=self.group)
        return torch.cat(parts, self.dim)

    def mine(self, whole: Tensor) -> Tensor:
        """What this rank has of it."""
        if self.dim is None:
            return whole
        return whole.chunk(dist.get_world_size(self.group), self.dim)[dist.get_rank(self.group)]

    def each(self, whole: Tensor, make: Callable[[Tensor], Tensor]) -> Tensor:
        """A whole parameter, [rows, columns], with what `make` makes of each matrix in the place of it."""
        rows = self.rows or (len(whole),)
        parts = whole.view(-1, sum(rows), whole.shape[1]).split(rows, 1)
        made = [make(part.flatten(0, 1)).view(part.shape) for part in parts]
        return torch.cat(made, 1).view(whole.shape)


class Muon(GroupAdamW):
    """Muon for the parameters of `matrices`, `GroupAdamW` for all others.

    State of a matrix: `exp_avg`, its momentum, of its shape and dtype.

    Attributes:
        matrices: By parameter, what it holds.
        settings: Of the configuration.
    """

    matrices: dict[Tensor, Matrices]
    settings: MuonConfig

    def take_over(self, matrices: dict[Tensor, Matrices], settings: MuonConfig) -> None:
        """Say which parameters are matrices, and make all state: Megatron-Core would make AdamW's for each."""
        self.matrices, self.settings = matrices, settings
        for group in self.param_groups:
            for p in group["params"]:
                names = ("exp_avg",) if p in matrices else ("exp_avg", "exp_avg_sq")
                self.state[p] = {name: torch.zeros_like(p, requires_grad=False) for name in names}

    def _update(self, params: list[Tensor], group: dict[str, Any]) -> None:
        if others := [p for p in params if p not in self.matrices]:
            super()._update(others, group)
        learning_rate = float(group["lr"])
        for p in params:
            if p in self.matrices:
                p.mul_(1.0 - learning_rate * group["weight_decay"])
                p.add_(self._direction(p), alpha=-learning_rate)

    def _direction(self, p: Tensor) -> Tensor:
        """Where a parameter goes, of `update_rms` in each of its matrices."""
        settings, held, momentum = self.settings, self.matrices[p], self.state[p]["exp_avg"]
        assert p.grad is not None
        momentum.mul_(settings.momentum).add_(p.grad)
        ahead = p.grad.add(momentum, alpha=settings.momentum) if settings.nesterov else momentum
        whole = held.whole(ahead)

        def made(matrix: Tensor) -> Tensor:
            size = settings.update_rms * math.sqrt(max(matrix.shape))
            return orthogonal(matrix, settings.rounds) * size

        return held.mine(held.each(whole, made))


def join(optimizer: Any, chunks: Sequence[Any], settings: MuonConfig) -> None:
    """Tell the `Muon` in an optimizer of Megatron-Core's what its parameters are.

    Args:
        optimizer: A `ChainedOptimizer`.
        chunks: The model chunks that it updates.
        settings: Of the configuration.
    """
    found = {parameter: held for chunk in chunks for parameter, held in _matrices(chunk)}
    for one in optimizer.chained_optimizers:
        if not getattr(one, "is_stub_optimizer", False):
            one.optimizer.take_over(found, settings)


def is_expert(parameter: Tensor) -> bool:
    """Whether Megatron-Core sums a parameter's gradient over the ranks that have the same experts."""
    return not getattr(parameter, "allreduce", True)


def _matrices(chunk: Any) -> Iterator[tuple[Tensor, Matrices]]:
    """What is updated for each parameter of the layers that holds matrices: main weights, or the parameter itself."""
    from megatron.core import parallel_state

    config = chunk.config
    of_group = config.num_attention_heads // config.num_query_groups
    queries_keys_values = (of_group * config.kv_channels, config.kv_channels, config.kv_channels)
    group = parallel_state.get_tensor_model_parallel_group()
    for name, parameter in chunk.named_parameters():
        if ".layers." not in name or parameter.dim() != 2:
            continue
        rows: tuple[int, ...] = ()
        if name.endswith("linear_qkv.weight"):
            rows = queries_keys_values
        elif _GATED.search(name):
            rows = (len(parameter) // 2,) * 2  # on each rank
        # An expert is whole on its rank (`parallel.expert_tensor` is 1), whatever Megatron-Core marks it with.
        parallel = getattr(parameter, "tensor_model_parallel", False) and not is_expert(parameter)
        cut = parallel and dist.get_world_size(group) > 1
        held = Matrices(rows, parameter.partition_dim, group) if cut else Matrices(rows)
        yield getattr(parameter, "main_param", parameter), held
