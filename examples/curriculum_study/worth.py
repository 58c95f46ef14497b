"""What a domain's share was worth in the runs, beside what its curve over time says.

A controller sees the second and needs the first. They differ where a domain is learnt from others too, or where the
tokens of others drive it out.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from figures import Outcome

FROM, TO = 0.4, 0.8
"""Of the tokens: between them the learning rate stays, and curves are past their steepest."""
LEAST = 0.1
"""Logarithm of a share: what differs by less tells nothing."""


def by_share(arms: Mapping[str, Mapping[int, Outcome]]) -> dict[str, float]:
    """By how many nats loss is lower at the end for an e-fold of a domain's share, by runs whose mixture stayed.

    A line through the even mixture of the same seed, by least squares over runs.

    Returns:
        By domain; empty without the even mixture or without others to compare it with.
    """
    even = arms.get("even", {})
    found = {}
    for domain in next(iter(even.values())).losses if even else ():
        pairs = [
            (
                np.log(one.drawn[domain] / even[seed].drawn[domain]),
                even[seed].losses[domain][-1] - one.losses[domain][-1],
            )
            for runs in arms.values()
            for seed, one in runs.items()
            if seed in even
            and len(one.origins) == len(even[seed].origins)
            and _stays(one)
            and one.drawn[domain] > 0
        ]
        logs, lower = np.array(pairs).T
        if np.abs(logs).max() > LEAST:
            found[domain] = float(logs @ lower / (logs @ logs))
    return found


def by_time(arms: Mapping[str, Mapping[int, Outcome]]) -> dict[str, float]:
    """By how many nats loss falls in the even mixture for an e-fold of tokens, mean over seeds."""
    slopes: dict[str, list[float]] = {}
    for one in arms.get("even", {}).values():
        ends = np.array([FROM, TO]) * one.tokens[-1]
        for domain, curve in one.losses.items():
            first, last = np.interp(ends, one.tokens, curve)
            slopes.setdefault(domain, []).append((first - last) / np.log(TO / FROM))
    return {domain: float(np.mean(values)) for domain, values in slopes.items()}


def in_words(arms: Mapping[str, Mapping[int, Outcome]]) -> str | None:
    """A sentence; None where runs do not show it."""
    shares, times = by_share(arms), by_time(arms)
    if not shares:
        return None
    parts = [
        f"{domain} {worth:.2f} ({times[domain]:.2f})".replace("-", "−") for domain, worth in shares.items()
    ]
    return (
        "By all runs whose mixture stayed, an e-fold of a domain's share lowers its loss at the end by so many nats, "
        f"and in brackets an e-fold of tokens in the even mixture, which a controller sees: {', '.join(parts)}."
    )


def _stays(one: Outcome) -> bool:
    return all(np.ptp(shares) < 1e-6 for shares in one.shares.values())
