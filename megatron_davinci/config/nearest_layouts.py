"""The layouts that work and are nearest to one that does not."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator
from typing import NamedTuple

from megatron_davinci.config.layout_problems import even_split, layout_problems, listed
from megatron_davinci.config.levers import lever_problems
from megatron_davinci.config.run import RunConfig

_ENOUGH = 3
_VALUES = 12  # of an axis
_TRIES = 30_000  # a few tenths of a second
# A change by a factor of two costs this much; ranks are what a person has, and the last that can be changed.
_WEIGHTS = {
    "train.micro_batch_size": 0.9,
    "parallel.virtual_pipeline": 0.95,
    "parallel.pipeline": 1.0,
    "parallel.tensor": 1.0,
    "parallel.context": 1.1,
    "parallel.expert": 1.0,
    "parallel.expert_tensor": 1.0,
    "ranks": 2.0,
}


class Suggestion(NamedTuple):
    """A layout that works.

    Attributes:
        config: The configuration with it.
        ranks: How many it is laid over.
        overrides: What differs, as it is written on a command line.
    """

    config: RunConfig
    ranks: int
    overrides: str


def nearest_layouts(config: RunConfig, world_size: int) -> list[Suggestion]:
    """Search from `config` outwards for layouts without a problem.

    What is changed are the sizes of the groups, the micro-batch and the number of ranks, and with the pipeline how
    its layers are split; the model and the batch stay. Distance is the sum of the factors' logarithms.

    Returns:
        The nearest ones first, three at most, and none that changes more than another one needs; none where none is
        near.
    """
    batches = _batches(config)
    found: list[Suggestion] = []
    changes: list[set[str]] = []
    for tried, values in enumerate(_outwards(_axes(config, world_size))):
        if tried == _TRIES or len(found) == _ENOUGH:
            break
        if not _may_go(values, batches):
            continue
        candidate = _with(config, values)
        if layout_problems(candidate, values["ranks"]) or lever_problems(candidate):
            continue
        overrides = _overrides(config, world_size, candidate, values["ranks"])
        if not any(needed <= set(overrides) for needed in changes):
            changes.append(set(overrides))
            found.append(Suggestion(candidate, values["ranks"], " ".join(overrides)))
    return found


def _batches(config: RunConfig) -> int:
    """What divides every batch size."""
    return math.gcd(*(phase.size for stage in config.curriculum for phase in stage.global_batch_size))


def _may_go(values: dict[str, int], batches: int) -> bool:
    """Whether ranks and batches divide: most combinations do not, and this says so quickly."""
    pipeline, ranks = values["parallel.pipeline"], values["ranks"]
    together = pipeline * values["parallel.tensor"] * values["parallel.context"]
    if ranks % together or (pipeline == 1 and values["parallel.virtual_pipeline"] > 1):
        return False
    if ranks % (pipeline * values["parallel.expert"] * values["parallel.expert_tensor"]):
        return False
    return batches % (values["train.micro_batch_size"] * (ranks // together)) == 0


def _axes(config: RunConfig, world_size: int) -> dict[str, list[tuple[float, int]]]:
    """For each axis the values that may go, with what they cost, cheapest first."""
    model, parallel, length = config.model, config.parallel, config.data.sequence_length
    experts = model.experts.number if model.experts else 1
    heads = math.gcd(model.num_attention_heads, model.vocab_size)
    groups = model.num_query_groups
    values = {
        "train.micro_batch_size": (config.train.micro_batch_size, _divisors(_batches(config))),
        "parallel.virtual_pipeline": (
            parallel.virtual_pipeline,
            _around(parallel.virtual_pipeline, model.num_layers // 2),
        ),
        "parallel.pipeline": (
            parallel.pipeline,
            _around(parallel.pipeline, min(world_size, model.num_layers)),
        ),
        "parallel.tensor": (
            parallel.tensor,
            [t for t in _divisors(heads) if groups % t == 0 or t % groups == 0],
        ),
        "parallel.context": (parallel.context, [1, *_divisors(length // 2)]),
        "parallel.expert": (parallel.expert, _divisors(experts)),
        "parallel.expert_tensor": (
            parallel.expert_tensor,
            _divisors(model.ffn_hidden_size) if model.experts else [1],
        ),
        "ranks": (world_size, _near(world_size, parallel.model_ranks)),
    }
    axes = {}
    for name, (now, candidates) in values.items():
        costs = {
            value: _WEIGHTS[name] * abs(math.log2(value / now))
            for value in candidates
            if value <= 2 * max(world_size, now)
        }
        if name in ("parallel.virtual_pipeline", "parallel.pipeline") and now <= model.num_layers:
            costs[now] = 0.0  # layers are split unevenly where they do not divide
        axes[name] = sorted((cost, value) for value, cost in costs.items())[:_VALUES]
    return axes


def _near(world_size: int, needed: int) -> set[int]:
    near = {world_size + step for step in range(-8, 9)} | {world_size // 2, world_size * 2}
    near |= {needed, world_size // needed * needed, (world_size // needed + 1) * needed}
    return {ranks for ranks in near if ranks > 0}


def _around(now: int, most: int) -> range:
    """The numbers from 1 to `most` of which the nearest to one are looked at, however many there are."""
    at = min(now, max(1, most))
    return range(max(1, at - _VALUES), min(max(1, most), at + _VALUES) + 1)


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, min(number, 4096) + 1) if number % d == 0]


def _outwards(axes: dict[str, list[tuple[float, int]]]) -> Iterator[dict[str, int]]:
    """All combinations, cheapest first, each once."""
    names, values = list(axes), list(axes.values())
    heap = [(sum(axis[0][0] for axis in values), (0,) * len(values), 0)]
    while heap:
        cost, places, last = heapq.heappop(heap)
        yield {name: axis[place][1] for name, axis, place in zip(names, values, places, strict=True)}
        # Only the last axis that was moved or a later one: so each combination is reached in one way.
        for axis in range(last, len(values)):
            place = places[axis] + 1
            if place < len(values[axis]):
                more = values[axis][place][0] - values[axis][place - 1][0]
                heapq.heappush(heap, (cost + more, (*places[:axis], place, *places[axis + 1 :]), axis))


def _with(config: RunConfig, values: dict[str, int]) -> RunConfig:
    """The configuration with other sizes, and what follows from them."""
    pipeline, virtual = values["parallel.pipeline"], values["parallel.virtual_pipeline"]
    tensor, chunks = values["parallel.tensor"], pipeline * virtual
    split, layers = config.parallel.pipeline_layers, config.model.num_layers
    if split is None or len(split) != chunks or sum(split) != layers or 0 in split[1:-1]:
        split = None if layers % chunks == 0 else even_split(layers, chunks)
    parallel = config.parallel.model_copy(
        update={
            **{
                name.removeprefix("parallel."): n
                for name, n in values.items()
                if name.startswith("parallel.")
            },
            "sequence": tensor > 1 and (config.parallel.sequence or config.model.experts is not None),
            "pipeline_layers": split,
        }
    )
    train = config.train.model_copy(update={"micro_batch_size": values["train.micro_batch_size"]})
    return config.model_copy(update={"parallel": parallel, "train": train})


def _overrides(config: RunConfig, world_size: int, other: RunConfig, ranks: int) -> list[str]:
    parts = []
    for section in ("parallel", "train"):
        before, after = getattr(config, section), getattr(other, section)
        for name in type(before).model_fields:
            value = getattr(after, name)
            if value != getattr(before, name):
                parts.append(f"{section}.{name}={_written(value)}")
    if ranks != world_size:
        parts.append(f"--ranks {ranks}")
    return parts


def _written(value: object) -> str:
    if isinstance(value, list):
        return listed(value)
    return "null" if value is None else str(value).lower()
