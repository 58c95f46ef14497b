"""Problems that need more than one place of a configuration to see, each with the place that it is said of."""

from __future__ import annotations

import re
from collections.abc import Iterable

Place = tuple[str | int, ...]
"""Keys and list positions from the top of the file: `("curriculum", 0, "tokens")`."""

Problem = tuple[Place, str]
"""Where, and what is wrong."""


class Problems(ValueError):
    """What a validator found, all of it. `config.load` shows each problem with its line.

    Args:
        problems: At least one.
    """

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = list(problems)
        super().__init__("\n".join(said for _, said in self.problems))


def placed(said: str) -> Problem:
    """A problem whose text begins with its place: `parallel.tensor: ...`, or `parallel.tensor (4) is ...`."""
    match = re.match(r"(\w+(?:\.\w+)+)(: )?", said)
    if match is None:
        return (), said
    place = tuple(int(part) if part.isdecimal() else part for part in match[1].split("."))
    return place, said[match.end() :] if match[2] else said
