"""Whole parameters dealt to data-parallel ranks: each keeps and moves its own, and sends them to the others.

Megatron-Core's distributed optimizer cuts all parameters, end to end, into equal runs; a rank then has rows of a
matrix. What moves a matrix as a whole, as Muon does, needs the matrix: here every parameter has one rank of its
data-parallel group that has its main weights and state. This is the first stage of ZeRO (Rajbhandari et al. 2020,
arXiv 1910.02054) with parameters for its parts. Gradients are summed on all ranks, as without it.

In a checkpoint each parameter's state lies under the parameter's own name, as replicas store it; so it is read on
any number of ranks, dealt or not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from megatron_davinci.optim.muon import Muon, is_expert

_MAIN = "fp32_from_fp16_params"


def owners(sizes: Sequence[int], ranks: int) -> list[int]:
    """Which of some ranks gets each of some things: the largest first, each to whoever has the least.

    So nobody has more than 4/3 of what the best deal would leave the fullest with (Graham 1969).

    Args:
        sizes: Of each.
        ranks: How many there are.

    Returns:
        A rank for each. The same sizes are dealt the same way everywhere.
    """
    held, found = [0] * ranks, [0] * len(sizes)
    for place in sorted(range(len(sizes)), key=lambda place: -sizes[place]):
        found[place] = rank = held.index(min(held))
        held[rank] += sizes[place]
    return found


class DealtMuon(Muon):
    """Muon for this rank's part of the parameters.

    Args:
        params: Megatron-Core's groups with all parameters; in those of this optimizer are the rank's own. A group of
            which it has none is there too, so that all ranks have the same groups.
        keywords: `Muon`'s.

    Attributes:
        group: Data-parallel ranks of these parameters.
        everyone: All parameters, each with its owner's global rank.
    """

    def __init__(self, params: Iterable[dict[str, Any]], **keywords: Any) -> None:
        from megatron.core import parallel_state

        whole = list(params)
        parameters = [p for one in whole for p in one["params"]]
        # Megatron-Core has an optimizer for experts and one for all else.
        self.group = (
            parallel_state.get_expert_data_parallel_group()
            if is_expert(parameters[0])
            else parallel_state.get_data_parallel_group(with_context_parallel=True)
        )
        found = owners([p.numel() for p in parameters], dist.get_world_size(self.group))
        self.everyone = [
            (p, dist.get_global_rank(self.group, owner)) for p, owner in zip(parameters, found, strict=True)
        ]
        own = {p for p, owner in self.everyone if owner == dist.get_rank()}
        super().__init__(
            [{**one, "params": [p for p in one["params"] if p in own]} for one in whole], **keywords
        )

    @torch.no_grad()
    def share(self) -> None:
        """Send every parameter of the model from its owner to the others; all ranks call this."""
        if dist.get_world_size(self.group) == 1:
            return
        sent = [
            dist.broadcast(p.detach(), owner, group=self.group, async_op=True) for p, owner in self.everyone
        ]
        for one in sent:
            one.wait()


def join(optimizer: Any) -> None:
    """Have an optimizer of Megatron-Core's know that its parameters are dealt.

    Args:
        optimizer: A `ChainedOptimizer` around `DealtMuon`.
    """
    parts = [one for one in optimizer.chained_optimizers if not getattr(one, "is_stub_optimizer", False)]
    for one in parts:
        one.grad_stats_parallel_group = None  # the world: each gradient counts where its parameter is kept
        _store_own(one)
    update: Callable[[], bool] = optimizer.step_with_ready_grads

    def updated() -> bool:
        done = update()
        for one in parts:
            one.optimizer.share()
        return done

    optimizer.step_with_ready_grads = updated


def _store_own(one: Any) -> None:
    """Have this rank write what it has, whichever replica it is, and read no more."""
    describe, fill = one.sharded_state_dict, one.load_state_dict

    def described(*args: Any, **keywords: Any) -> dict[str, Any]:
        from megatron.core.dist_checkpointing.dict_utils import nested_values

        state: dict[str, Any] = describe(*args, **keywords)
        for tensor in nested_values(state):
            if hasattr(tensor, "replica_id"):
                # (…, tensor, data): the only one of its data-parallel ranks.
                tensor.replica_id = (*tensor.replica_id[:-1], 0)
        if _MAIN in state:
            # Of a list of lists Megatron-Core loses the places of the empty ones.
            state[_MAIN] = {place: group for place, group in enumerate(state[_MAIN]) if group}
        return state

    def filled(state: dict[str, Any]) -> None:
        # A rank that has none of a group, or nothing at all, finds no tensors.
        if hasattr(one, "fp32_from_float16_groups"):
            main = state.get(_MAIN, {})
            state[_MAIN] = [main.get(place, []) for place in range(len(one.fp32_from_float16_groups))]
            state["optimizer"].setdefault("state", {})
        else:
            state.setdefault("state", {})
        fill(state)

    one.sharded_state_dict, one.load_state_dict = described, filled
