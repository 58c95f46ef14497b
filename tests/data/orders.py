"""Data orders to try properties on: sources of some windows, mixed anew by up to 50 records."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np
from hypothesis import strategies as st

from megatron_davinci.data.curriculum import Curriculum
from megatron_davinci.data.journal import MixRecord


class Order(NamedTuple):
    """What a `Curriculum` is made of. `windows` comes in an order of no meaning."""

    windows: dict[str, int]
    seed: int
    records: list[MixRecord]

    @property
    def names(self) -> list[str]:
        return sorted(self.windows)

    def curriculum(self, records: Sequence[MixRecord] | None = None) -> Curriculum:
        return Curriculum(self.windows, self.seed, self.records if records is None else records)

    def shares(self, record: MixRecord) -> list[Fraction]:
        """The exact shares of a record, by sorted source."""
        return [Fraction(record.weights.get(name, "0")) for name in self.names]


@st.composite
def orders(
    draw: st.DrawFn,
    most_records: int = 50,
    most_sources: int = 40,
    largest_source: int = 60,
    longest_segment: int = 80,
) -> Order:
    # The shape is hypothesis's, so that it shrinks; the many weights come from a generator that it seeds, since
    # drawing 50 x 40 of them one by one would take longer than what is tested.
    sources, length = draw(st.integers(1, most_sources)), draw(st.integers(1, most_records))
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    kinds = draw(st.lists(st.sampled_from(list(KINDS)), min_size=1, max_size=3))
    names = [f"source {i}" for i in generator.permutation(sources).tolist()]
    windows = {name: int(generator.integers(1, largest_source + 1)) for name in names}
    longest = draw(st.sampled_from([1, 4, longest_segment]))
    records, first = [], 0
    for number in range(length):
        parts = KINDS[kinds[number % len(kinds)]](generator, sources)
        total = sum(parts)
        weights = {name: str(part / total) for name, part in zip(names, parts, strict=True) if part}
        records.append(MixRecord(first, f"stage {number}", weights))
        first += int(generator.integers(1, longest + 1))
    return Order(windows, draw(st.integers(-(2**64), 2**64)), records)


def _a_few(generator: np.random.Generator, sources: int) -> list[Fraction]:
    parts = generator.choice([0, 0, 0, 1, 2, 7, 300], sources)
    parts[generator.integers(sources)] = 1
    return [Fraction(int(part)) for part in parts]


def _percent(generator: np.random.Generator, sources: int) -> list[Fraction]:
    return [Fraction(int(part), 10_000) for part in generator.integers(1, 10_000, sources)]


def _a_millionth_beside_nine_tenths(generator: np.random.Generator, sources: int) -> list[Fraction]:
    parts = [Fraction(1, 10**6)] * sources
    parts[generator.integers(sources)] += Fraction(9, 10)
    parts[generator.integers(sources)] += 1 - sum(parts)
    return parts


def _fine(generator: np.random.Generator, sources: int) -> list[Fraction]:
    # No common denominator of 32 bits: the shares are rounded.
    return [Fraction(int(part), 10**12 + 39) for part in generator.integers(1, 10**12, sources)]


def _equal(generator: np.random.Generator, sources: int) -> list[Fraction]:
    return [Fraction(1)] * sources


KINDS = {
    "a few": _a_few,
    "percent": _percent,
    "a millionth beside nine tenths": _a_millionth_beside_nine_tenths,
    "fine": _fine,
    "equal": _equal,
}


def end(order: Order) -> int:
    """A sample well inside the last segment."""
    return order.records[-1].first_sample + 150
