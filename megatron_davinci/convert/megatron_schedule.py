"""Megatron-LM's batch ramp and learning-rate schedule as stages of a curriculum.

Megatron-LM counts both in samples; a decay that ends before training does becomes a stage of its own.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Run = tuple[int, int]
"""A batch size, and for how many steps it holds."""
_THRESHOLD = re.compile(r"([0-9]+(?:\.[0-9]+)?)([KMBT]?)")
_SCALE = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
MOST_SIZES = 10_000


@dataclass(frozen=True)
class Decay:
    """A learning-rate schedule, in samples.

    Attributes:
        style: `constant`, `linear`, `cosine` or `WSD`.
        peak: The largest learning rate.
        end: The smallest, after the decay.
        warmup: Where the warm-up is over.
        warmup_from: Where it begins.
        decay_end: Where the decay arrives.
        wsd_style: Of WSD: `linear` or `cosine`.
        wsd_begin: Of WSD: where the decay begins.
    """

    style: str
    peak: float
    end: float
    warmup: int
    warmup_from: float
    decay_end: int
    wsd_style: str = "linear"
    wsd_begin: int = 0


def ramp(start: int, increment: int, samples: int, size: int) -> list[tuple[int, int]]:
    """`--rampup-batch-size START INCREMENT SAMPLES` as (samples after which it holds, batch size).

    Raises:
        ValueError: The increments do not lead to the final size.
    """
    if not 0 < start <= size or increment <= 0 or (size - start) % increment:
        raise ValueError(f"a ramp from {start} by {increment} does not arrive at {size}")
    count = (size - start) // increment
    if count > MOST_SIZES:
        raise ValueError(f"a ramp of {count:,} sizes")
    # The last increment takes effect after all samples of the ramp, as the others do after their share.
    return [(math.ceil(samples * k / count) if count else 0, start + k * increment) for k in range(count + 1)]


def step_schedule(text: str, sequence_length: int) -> list[tuple[int, int]]:
    """`--step-batch-size-schedule "0:16 2.4B:320"`, whose thresholds are tokens, like `ramp`.

    Raises:
        ValueError: It is not of that form.
    """
    found: list[tuple[int, int]] = []
    for entry in text.split():
        threshold, colon, size = entry.partition(":")
        match = _THRESHOLD.fullmatch(threshold.upper())
        if match is None or not colon or not size.isdecimal() or not 0 < int(size[:10]) < 10**9:
            raise ValueError(f"{entry!r} is not TOKENS:SIZE")
        found.append((int(float(match[1]) * _SCALE[match[2]]) // sequence_length, int(size)))
    if not found or found[0][0] or [t for t, _ in found] != sorted({t for t, _ in found}):
        raise ValueError(f"{text!r} does not begin at 0 and rise")
    return found


def runs_for(sizes: Sequence[tuple[int, int]], *, samples: int | None, steps: int | None) -> list[Run]:
    """The batch sizes of a whole training, with the number of steps of each.

    Args:
        sizes: From `ramp` or `step_schedule`.
        samples: How long to train; the last step is one that is filled, as Megatron-LM counts.
        steps: Or for how many steps.
    """
    runs: list[Run] = []
    consumed, taken = 0, 0
    for index, (_, size) in enumerate(sizes):
        following = sizes[index + 1][0] if index + 1 < len(sizes) else None
        most = -(-(following - consumed) // size) if following is not None else None
        left = steps - taken if steps is not None else ((samples or 0) - consumed) // size
        count = max(0, left if most is None else min(most, left))
        if count:
            runs.append((size, count))
            consumed += count * size
            taken += count
    return runs


def total(runs: Sequence[Run]) -> int:
    """Samples in all."""
    return sum(size * steps for size, steps in runs)


def split(runs: Sequence[Run], samples: int) -> tuple[list[Run], list[Run]]:
    """Cut before the first step that begins at or after `samples`."""
    before: list[Run] = []
    after: list[Run] = []
    consumed = 0
    for size, steps in runs:
        first = min(steps, max(0, -(-(samples - consumed) // size)))
        before += [(size, first)] if first else []
        after += [(size, steps - first)] if first < steps else []
        consumed += size * steps
    return before, after


def stages(
    runs: Sequence[Run], decay: Decay, sequence_length: int
) -> tuple[list[dict[str, Any]], list[tuple[str, str]]]:
    """The stages of a curriculum, without mixtures.

    Returns:
        The stages, and what of the decay they do not keep: the flag, and why.
    """
    kept: list[dict[str, Any]] = []
    changed: list[tuple[str, str]] = []
    warmup_steps = sum(steps for _, steps in split(runs, decay.warmup)[0])
    if decay.style == "constant" or decay.peak == decay.end:
        parts: list[tuple[str, list[Run], float, float | None]] = [("constant", list(runs), decay.peak, None)]
    else:
        inside, after = split(runs, decay.decay_end)
        begin = decay.wsd_begin if decay.style == "WSD" else 0
        shape = decay.wsd_style if decay.style == "WSD" else decay.style
        stable, falling = split(inside, begin)
        end, whole = decay.end, total(runs)
        if whole + max(size for size, _ in runs) <= decay.decay_end:
            first = begin if decay.style == "WSD" else decay.warmup
            progress = min(1.0, max(0.0, (whole - first) / max(1, decay.decay_end - first)))
            kept_share = 1 - progress if shape == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
            end = float(f"{decay.end + (decay.peak - decay.end) * kept_share:.6g}")
            if shape == "cosine":
                changed.append(
                    (
                        "--lr-decay",
                        f"the decay ends after training does; the cosine here arrives at {end:g} when it ends",
                    )
                )
        parts = [("constant", stable, decay.peak, None), (shape, falling, decay.peak, end)]
        parts.append(("constant", after, decay.end, None))
    parts = [part for part in parts if part[1]]
    names = {1: ["main"], 2: ["main", "end"], 3: ["stable", "decay", "end"]}[len(parts)]
    if len(parts) == 2 and decay.style == "WSD" and parts[1][0] != "constant":
        names = ["stable", "decay"]
    for number, (shape, part, peak, arrives) in enumerate(parts):
        rate: dict[str, Any] = {"shape": shape, "peak": peak}
        rate |= {} if arrives is None else {"end": arrives}
        if number == 0 and warmup_steps:
            rate |= {"warmup_steps": warmup_steps, "warmup_from": decay.warmup_from}
        kept.append(
            {
                "name": names[number],
                "tokens": total(part) * sequence_length,
                "global_batch_size": _phases(part),
                "learning_rate": rate,
            }
        )
    return kept, changed


def _phases(runs: Sequence[Run]) -> int | list[dict[str, int]]:
    if len(runs) == 1:
        return runs[0][0]
    return [{"size": size, "steps": steps} for size, steps in runs[:-1]] + [{"size": runs[-1][0]}]
