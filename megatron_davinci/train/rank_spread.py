"""How far ranks lie apart, phase by phase: the straggler is the one whose own work takes longest."""

from __future__ import annotations

import torch
import torch.distributed as dist

from megatron_davinci.platform.device import Platform
from megatron_davinci.train.phases import BETWEEN_STEPS, PHASES

_IN_STEPS = [phase for phase in PHASES if phase not in BETWEEN_STEPS]


class RankSpread:
    """Compares the phases of all ranks, every so many steps, in one small collective.

    Args:
        platform: What the run computes on.
        every: Steps that are taken together.
    """

    def __init__(self, platform: Platform, every: int) -> None:
        self._device, self._every = platform.device, every
        self._sum, self._steps = [0.0] * len(_IN_STEPS), 0

    def add(self, phases: dict[str, float]) -> dict[str, dict[str, float]] | None:
        """Take a step; every rank calls this for every step.

        Args:
            phases: This rank's seconds by phase.

        Returns:
            After every `every` steps, by phase that took any time: the seconds a step of the rank that it took
            `least`, of the one that it took `most`, and that one's number, `rank`. None at other steps, and where
            there is one rank.
        """
        if dist.get_world_size() == 1:
            return None
        self._sum = [total + phases[name] for total, name in zip(self._sum, _IN_STEPS, strict=True)]
        self._steps += 1
        if self._steps < self._every:
            return None
        mine = torch.tensor(self._sum, dtype=torch.float32, device=self._device) / self._steps
        self._sum, self._steps = [0.0] * len(_IN_STEPS), 0
        world = dist.get_world_size()
        of_all = torch.empty(world * len(_IN_STEPS), dtype=torch.float32, device=self._device)
        dist.all_gather_into_tensor(of_all, mine)
        by_rank = of_all.view(world, -1).cpu()
        most, rank = by_rank.max(0)
        return {
            name: {"least": round(least, 6), "most": round(highest, 6), "rank": where}
            for name, least, highest, where in zip(
                _IN_STEPS, by_rank.min(0).values.tolist(), most.tolist(), rank.tolist(), strict=True
            )
            if highest >= 1e-6
        }
