"""What is compared: the arms of the study, and the grid of mixtures that the oracle is the best of."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import numpy as np

from megatron_davinci.train.policies.bounded import as_text, within_bounds
from megatron_davinci.train.policies.situation import Bounds

Mixture = Mapping[str, Fraction]
Kind = Literal["controller", "random", "amounts", "fixed", "grid"]
MILLION = 10**6
SOON = ("qa", "tables", "digests")
"""The domains that are learned soonest."""


@dataclass(frozen=True)
class Change:
    """A mixture that takes effect in mid-run.

    Attributes:
        sample: From this sample on.
        mixture: Share by domain.
        reason: Why, for the journal.
    """

    sample: int
    mixture: Mixture
    reason: str


@dataclass(frozen=True)
class Arm:
    """One side of the comparison, before a seed is chosen.

    Attributes:
        name: Short, and the folder's.
        kind: `fixed` are the three that nobody needs to know anything for, `grid` the oracle's other candidates.
        words: What it is, for the reader.
        mixture: Share by domain, from the first sample on.
        second: The mixture of the second half; None where the first one stays.
    """

    name: str
    kind: Kind
    words: str
    mixture: Mixture
    second: Mixture | None = None


def mixture(weights: Mapping[str, float]) -> dict[str, Fraction]:
    """Weights as shares in whole millionths that sum to 1 exactly."""
    total = sum(weights.values())
    exact = {name: weight / total * MILLION for name, weight in weights.items()}
    shares = {name: int(value) for name, value in exact.items()}
    largest_rest = sorted(exact, key=lambda name: (shares[name] - exact[name], name))
    for name in largest_rest[: MILLION - sum(shares.values())]:
        shares[name] += 1
    return {name: Fraction(share, MILLION) for name, share in shares.items()}


def as_override(shares: Mixture) -> str:
    """A mixture as the value of a configuration's key."""
    return "{" + ", ".join(f'{name}: "{as_text(share)}"' for name, share in shares.items()) + "}"


def bounded(weights: Mapping[str, float], bounds: Bounds) -> dict[str, Fraction]:
    """The mixture nearest to `weights` within floors and ceilings: what a fixed arm may be, to be comparable."""
    start = mixture(dict.fromkeys(weights, 1.0))
    return within_bounds(weights, start, Bounds(bounds.floors, bounds.ceilings, Fraction(1)))


def fixed_arms(pools: Mapping[str, int], bounds: Bounds) -> list[Arm]:
    """The three mixtures that one may choose without a run: even, by pool size, and skewed as the report's first
    stage is, with most of it general text."""
    skewed = {"general": 0.60, "code": 0.09, "science": 0.20, "qa": 0.05}
    rest = (1 - sum(skewed.values())) / max(1, len(pools) - len(skewed))
    return [
        Arm("even", "fixed", "the same share for every domain", mixture(dict.fromkeys(pools, 1.0))),
        Arm("pools", "fixed", "by how much text there is", bounded(pools, bounds)),
        Arm(
            "skewed",
            "fixed",
            "most of it general text, as in the report's first stage",
            bounded({name: skewed.get(name, rest) for name in pools}, bounds),
        ),
    ]


def grid_arms(domains: Sequence[str], bounds: Bounds) -> list[Arm]:
    """The oracle's other candidates: each domain doubled against the others, and two schedules.

    The schedules draw nearly the same amounts in another order: the three domains that are learned soonest doubled in
    one half of the tokens, the others in the other half.
    """
    arms = []
    for one in domains:
        weights = {name: 2.0 if name == one else 1.0 for name in domains}
        arms.append(Arm(f"more {one}", "grid", f"even, with {one} doubled", bounded(weights, bounds)))
    soon = {name: 2.0 if name in SOON else 1.0 for name in domains}
    late = {name: 1.0 if name in SOON else 2.0 for name in domains}
    first, second = bounded(soon, bounds), bounded(late, bounds)
    words = ", ".join(name for name in domains if name in SOON)
    return [
        *arms,
        Arm(
            "easy first",
            "grid",
            f"{words} doubled in the first half, the others in the second",
            first,
            second,
        ),
        Arm(
            "easy last", "grid", f"{words} doubled in the second half, the others in the first", second, first
        ),
    ]


def combined_arm(helped: Iterable[str], domains: Sequence[str], bounds: Bounds) -> Arm:
    """Every domain doubled whose doubling alone helped.

    Args:
        helped: Those.
        domains: All.
        bounds: Of the controller.
    """
    chosen = set(helped)
    weights = {name: 2.0 if name in chosen else 1.0 for name in domains}
    words = ", ".join(name for name in domains if name in chosen) or "none"
    return Arm("combined", "grid", f"doubled where that alone helped: {words}", bounded(weights, bounds))


def random_changes(
    times: Sequence[int], start: Mixture, bounds: Bounds, seed: int, domains: Sequence[str]
) -> list[Change]:
    """As many adjustments as a controller made, at the same samples and within the same bounds, but at random.

    Each time a wish is drawn, uniform over all mixtures, and the nearest mixture that bounds allow is taken: what
    `controller.maximum_change` leaves of it.

    Args:
        times: Samples from which the controller's mixtures held.
        start: The mixture before the first of them.
        bounds: Of the controller.
        seed: Of the run.
        domains: In the order of the draw.
    """
    generator = np.random.default_rng([seed, 20261126])
    present, found = dict(start), []
    for number, sample in enumerate(times, start=1):
        wish = dict(zip(domains, generator.dirichlet(np.ones(len(domains))).tolist(), strict=True))
        present = within_bounds(wish, present, bounds)
        found.append(Change(sample, present, f"adjustment {number} of the random arm"))
    return found
