"""The steps that a run has on record, as columns.

A run of the report's size has a million of them: a line becomes numbers at once, and is not kept.
"""

from __future__ import annotations

import math
from array import array
from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

_NUMBERS = (
    "consumed_samples",
    "consumed_tokens",
    "loss",
    "grad_norm",
    "learning_rate",
    "global_batch_size",
    "tokens_per_second",
    "seconds",
    "flops_utilization",
    "logit_sharpness",
    "reference_gap",
)
_LOST = {"amax", "scale", "underflow", "overflow"}


@dataclass(frozen=True)
class Metrics:
    """`metrics.jsonl` as columns; where a value is missing it is not a number.

    Args:
        step: `[n]` int64, increasing.
        stage: The stage of each step, `n` names.
        columns: `{name: [n] float64}` of the numbers of the contract.
        phases: `{phase: [n] float64}`, seconds of each step in it, 0 where a step has no such phase.
        slowest: `{phase: (least, most)}`, seconds a step of the ranks that it took least and most, the mean over
            the run; empty on one rank.
        source_loss: `{source: [n, 2] float64}`, the training loss of each step's samples of it, nats a token, and
            what their labels weigh; 0 and 0 where a step has none.
        low_precision: `{row: {linear layer: {operand: {figure: number}}}}` of the rows that say what products of few
            bits lost; an operand that is there has `amax`, `scale`, `underflow` and `overflow`.
    """

    step: NDArray[np.int64]
    stage: list[str]
    columns: dict[str, NDArray[np.float64]]
    phases: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    slowest: dict[str, tuple[float, float]] = field(default_factory=dict)
    source_loss: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    low_precision: dict[int, dict[str, dict[str, dict[str, float]]]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.step)

    def __getitem__(self, name: str) -> NDArray[np.float64]:
        return self.columns[name]


def metrics_of(records: Iterable[dict[str, Any]]) -> Metrics:
    """The steps that count: those with no record after them of the same or an earlier one.

    A run that goes on from a checkpoint writes the steps after it again; the later lines are what happened.

    Args:
        records: The lines, in order. Those without a step are left out.
    """
    rows = _Rows()
    for record in records:
        step = place_of(record, "step")
        if step is not None:
            rows.add(step, record)
    return rows.columns()


def as_number(value: object) -> float:
    """A JSON value as a float; not a number for anything else than a number."""
    try:
        return (
            float(value) if isinstance(value, int | float) and not isinstance(value, bool) else float("nan")
        )
    except OverflowError:  # of an integer, which JSON may have of any length
        return float("nan")


def numbers_of(value: object) -> dict[str, float]:
    """The `{name: number}` that a JSON value is; what is not a finite number is left out."""
    if not isinstance(value, dict):
        return {}
    numbers = {str(name): as_number(number) for name, number in value.items()}
    return {name: number for name, number in numbers.items() if math.isfinite(number)}


def place_of(record: dict[str, Any], key: str) -> int | None:
    """A step or a sample; None for what cannot be one."""
    value = as_number(record.get(key))
    return int(value) if 0 <= value < 2**62 else None


class _Pairs:
    """Two numbers of some rows, by rising row."""

    def __init__(self) -> None:
        self.rows, self.numbers = array("q"), array("d")

    def add(self, row: int, first: float, second: float = 0.0) -> None:
        self.rows.append(row)
        self.numbers.extend((first, second))

    def forget_from(self, row: int) -> None:
        kept = bisect_left(self.rows, row)
        del self.rows[kept:], self.numbers[2 * kept :]

    def known(self) -> NDArray[np.float64]:
        """[rows that have any, 2]"""
        return np.array(self.numbers, dtype=np.float64).reshape(-1, 2)

    def spread(self, rows: int) -> NDArray[np.float64]:
        """[rows, 2], 0 for those that have none."""
        found = np.zeros((rows, 2))
        found[np.array(self.rows, dtype=np.int64)] = self.known()
        return found


class _Rows:
    """Columns that grow; from a step that comes again on, what was there is forgotten."""

    def __init__(self) -> None:
        self._steps = array("q")
        self._stages: list[str] = []
        self._names: dict[str, str] = {}  # one text for each stage, however many steps name it
        self._columns = {name: array("d") for name in _NUMBERS}
        self._phases: dict[str, _Pairs] = {}
        self._slowest: dict[str, _Pairs] = {}
        self._sources: dict[str, _Pairs] = {}
        self._low: dict[int, dict[str, dict[str, dict[str, float]]]] = {}

    def add(self, step: int, record: dict[str, Any]) -> None:
        if self._steps and self._steps[-1] >= step:
            self._forget_from(bisect_left(self._steps, step))
        row = len(self._steps)
        self._steps.append(step)
        stage = str(record.get("stage", ""))
        self._stages.append(self._names.setdefault(stage, stage))
        for name, column in self._columns.items():
            column.append(as_number(record.get(name)))
        for name, seconds in numbers_of(record.get("phases")).items():
            self._phases.setdefault(name, _Pairs()).add(row, seconds)
        for name, said in _each(record.get("phases_by_rank")):
            if "least" in said and "most" in said:
                self._slowest.setdefault(name, _Pairs()).add(row, said["least"], said["most"])
        for name, said in _each(record.get("sources")):
            if "loss" in said and said.get("weight", 0.0) > 0:
                self._sources.setdefault(name, _Pairs()).add(row, said["loss"], said["weight"])
        if found := _low_precision(record.get("low_precision")):
            self._low[row] = found

    def _forget_from(self, row: int) -> None:
        del self._steps[row:], self._stages[row:]
        for column in self._columns.values():
            del column[row:]
        for pairs in (*self._phases.values(), *self._slowest.values(), *self._sources.values()):
            pairs.forget_from(row)
        for known in [known for known in self._low if known >= row]:
            del self._low[known]

    def columns(self) -> Metrics:
        rows = len(self._steps)
        # A phase or a source that only forgotten steps had is none.
        some = [{name: one for name, one in all_.items() if one.rows} for all_ in
                (self._phases, self._slowest, self._sources)]  # fmt: skip
        phases, slowest, sources = some
        return Metrics(
            step=np.array(self._steps, dtype=np.int64),
            stage=self._stages,
            columns={name: np.array(column, dtype=np.float64) for name, column in self._columns.items()},
            phases={name: pairs.spread(rows)[:, 0] for name, pairs in phases.items()},
            slowest={name: tuple(pairs.known().mean(0).tolist()) for name, pairs in slowest.items()},
            source_loss={name: pairs.spread(rows) for name, pairs in sources.items()},
            low_precision=self._low,
        )


def _each(value: object) -> Iterable[tuple[str, dict[str, float]]]:
    for name, said in value.items() if isinstance(value, dict) else ():
        yield str(name), numbers_of(said)


def _low_precision(said: object) -> dict[str, dict[str, dict[str, float]]]:
    found: dict[str, dict[str, dict[str, float]]] = {}
    for name, operands in said.items() if isinstance(said, dict) else ():
        ours = {
            str(operand): numbers
            for operand, one in (operands.items() if isinstance(operands, dict) else ())
            if set(numbers := numbers_of(one)) >= _LOST
        }
        if ours:
            found[str(name)] = ours
    return found
