"""The colours of every page and plot, in light and in dark, and which one a domain always has.

The series colours were chosen by search: each keeps a contrast of 4.5:1 to the paper, and any two stay apart
for normal sight and for protanopia, deuteranopia and tritanopia (simulated with the matrices of Machado,
Oliveira & Fernandes 2009). The tests measure both.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Colour:
    """One role on the page, as `#rrggbb`: `light` on white paper (and in PNG and print), `dark` on the dark one."""

    light: str
    dark: str


PAGE: dict[str, Colour] = {
    "paper": Colour("#ffffff", "#14171c"),
    "panel": Colour("#f5f6f8", "#1c2027"),
    "rule": Colour("#dfe2e7", "#323842"),
    "muted": Colour("#5c6470", "#9aa4b1"),
    "ink": Colour("#191c21", "#e7eaee"),
}

SERIES: dict[str, Colour] = {
    "blue": Colour("#0b4a96", "#4c93f5"),
    "vermillion": Colour("#d0430c", "#f0702a"),
    "green": Colour("#00856a", "#34c48e"),
    "violet": Colour("#9a3df0", "#d6a4ff"),
    "sand": Colour("#553a08", "#ecd484"),
    "wine": Colour("#75153c", "#d4567a"),
    "slate": Colour("#6b7280", "#c3cad3"),
}

ALL: dict[str, Colour] = {**PAGE, **SERIES}

_FIXED = {"general": "blue", "code": "vermillion", "science": "green", "qa": "violet", "math": "sand"}
_FREE = ("sand", "wine", "slate", "blue", "vermillion", "green", "violet")


def assign(names: Iterable[str]) -> dict[str, str]:
    """The series colour of each name (a domain, an arm of a comparison): `{name: key of SERIES}`.

    The domains of the daVinci recipe have the same colour in every plot of every page. Any other name takes a
    colour that follows from its own spelling, or the next free one where a name before it in the alphabet has
    that already; with more names than colours, colours repeat (series are labelled by name as well).
    """
    names = sorted(set(names))
    chosen = {name: _FIXED[name.lower()] for name in names if name.lower() in _FIXED}
    taken = set(chosen.values())
    for name in names:
        if name in chosen:
            continue
        start = zlib.crc32(name.encode("utf-8", "replace")) % len(_FREE)
        order = _FREE[start:] + _FREE[:start]
        chosen[name] = next((slot for slot in order if slot not in taken), order[0])
        taken.add(chosen[name])
    return chosen


def css_variables(theme: str) -> str:
    """Declarations of every colour, `--ink: #191c21; ...`, for `theme` "light" or "dark"."""
    return " ".join(f"--{name}: {getattr(colour, theme)};" for name, colour in ALL.items())
