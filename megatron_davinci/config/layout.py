"""Does the layout divide? All that does not, said at once, with the nearest layouts that do."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_davinci.config.layout_problems import layout_problems
from megatron_davinci.config.nearest_layouts import nearest_layouts
from megatron_davinci.config.run import RunConfig
from megatron_davinci.errors import ConfigError


@dataclass(frozen=True)
class Layout:
    """Ranks along each axis."""

    world: int
    tensor: int
    pipeline: int
    data: int
    context: int = 1
    virtual_pipeline: int = 1
    expert: int = 1
    expert_tensor: int = 1

    def __str__(self) -> str:
        parts = [f"TP{self.tensor}", f"PP{self.pipeline}"]
        further = {
            "VP": self.virtual_pipeline,
            "CP": self.context,
            "EP": self.expert,
            "ETP": self.expert_tensor,
        }
        parts += [f"{name}{size}" for name, size in further.items() if size > 1]
        return f"{' x '.join(parts)} x DP{self.data} = {self.world} ranks"


def check_layout(config: RunConfig, world_size: int) -> Layout:
    """Lay `config` over `world_size` ranks.

    Raises:
        ConfigError: Numbers that do not divide; the message lists every one of them, and layouts that go.
    """
    if world_size < 1:
        raise ConfigError(
            "A run needs at least one rank.", where="ranks", found=world_size, expected="1 or more"
        )
    parallel = config.parallel
    problems = layout_problems(config, world_size)
    if problems:
        near = [suggestion.overrides for suggestion in nearest_layouts(config, world_size)]
        raise ConfigError(
            "The layout is impossible.",
            where=f"parallel, on {world_size} rank{'s' if world_size > 1 else ''}",
            found="\n".join(problems),
            expected="every one of these divisions without a remainder",
            do="\n".join(["take one of the nearest layouts that go:", *near])
            if near
            else "change the layout, the number of ranks, or the size that is named",
        )
    return Layout(
        world_size,
        parallel.tensor,
        parallel.pipeline,
        world_size // (parallel.tensor * parallel.pipeline * parallel.context),
        parallel.context,
        parallel.virtual_pipeline,
        parallel.expert,
        parallel.expert_tensor,
    )
