"""What a run directory holds, read so that a run in progress or one that crashed can be looked at too.

Nothing here raises for what is in the files: a report is wanted most when something went wrong. Whatever is
missing or unreadable is left out and said in `RunFiles.problems`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_davinci.errors import DataError
from megatron_davinci.report.run_metrics import Metrics, as_number, metrics_of, numbers_of, place_of

RECORD = ("manifest.json", "config.yaml", "metrics.jsonl", "evals.jsonl", "journal.jsonl")
"""What a run writes of itself."""


@dataclass(frozen=True)
class Evaluation:
    """One line of `evals.jsonl`: held-out loss (nats per token, bits per byte) by domain at a point of the run."""

    step: int
    consumed_tokens: float
    heldout_loss: dict[str, float]
    bits_per_byte: dict[str, float]


@dataclass(frozen=True)
class Mix:
    """One `mix` record of the journal: from `first_sample` on, the sources are drawn with these weights."""

    first_sample: int
    stage: str
    weights: dict[str, float]


@dataclass(frozen=True)
class Proposal:
    """One line of `proposals.jsonl`: what the controller said after a step. Shares are by domain or source."""

    consumed_tokens: float
    mode: str
    policy: str
    present: dict[str, float]
    mixture: dict[str, float]
    reason: str


@dataclass(frozen=True)
class RunFiles:
    """A run directory. What is not there is empty, and named in `problems`."""

    directory: Path
    manifest: dict[str, Any]
    config: dict[str, Any]
    metrics: Metrics
    evaluations: list[Evaluation]
    mixes: list[Mix]
    domains: dict[str, str]
    summary: dict[str, Any]
    samples: list[dict[str, str]]
    problems: list[str]
    proposals: list[Proposal] = field(default_factory=list)
    skips: list[tuple[int, int]] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The run's name, by its manifest or else by its folder."""
        return str(self.manifest.get("name") or self.directory.name)

    @property
    def sequence_length(self) -> float:
        """Tokens in a sequence, by the config or else by what the metrics counted; not a number if unknown."""
        data = self.config.get("data")
        configured = as_number(data.get("sequence_length")) if isinstance(data, dict) else np.nan
        if configured > 0:
            return configured
        ratio = self.metrics["consumed_tokens"] / np.maximum(self.metrics["consumed_samples"], 1)
        ratio = ratio[np.isfinite(ratio) & (ratio > 0)]
        return float(ratio[-1]) if len(ratio) else float("nan")

    @property
    def planned_tokens(self) -> float:
        """Tokens of all stages, by the config; not a number if unknown."""
        stages = self.config.get("curriculum")
        found = (
            [as_number(stage.get("tokens")) for stage in stages if isinstance(stage, dict)]
            if isinstance(stages, list)
            else []
        )
        return sum(found) if found else float("nan")

    def reached_samples(self) -> float:
        """How far the clock has come: behind the last step, and the samples after it that are passed over."""
        consumed = self.metrics["consumed_samples"]
        reached = float(consumed[-1]) if len(consumed) else 0.0
        for first, end in sorted(self.skips):
            if first <= reached < end:
                reached = float(end)
        return reached

    def domain_numbers(self, key: str) -> dict[str, float]:
        """A `{domain: number}` of `summary.json`; empty where there is none."""
        return numbers_of(self.summary.get(key))


def is_run(folder: Path) -> bool:
    """Whether a folder has anything of a run's record."""
    return any((folder / name).is_file() for name in RECORD)


def read_run(run_dir: Path) -> RunFiles:
    """Read whatever of the run directory is there.

    Raises:
        DataError: There is no such folder.
    """
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise DataError(
            "There is no run to report on.",
            where=run_dir,
            found="a file" if run_dir.exists() else "nothing",
            expected="a run directory, with metrics.jsonl and config.yaml in it",
            do="Give the folder that `davinci train` wrote.",
        )
    problems: list[str] = []
    manifest = _document(run_dir / "manifest.json", dict, problems)
    config = _document(run_dir / "config.yaml", dict, problems, parse=_yaml)
    metrics = metrics_of(_lines(run_dir / "metrics.jsonl", problems))
    evaluations = _evaluations(_lines(run_dir / "evals.jsonl", problems))
    journal = list(_lines(run_dir / "journal.jsonl", problems))
    proposals = run_dir / "proposals.jsonl"
    proposed = _proposals(_lines(proposals, problems) if proposals.exists() else [])
    domains = _document(run_dir / "domains.json", dict, problems, optional=True)
    samples = _document(run_dir / "samples.json", list, problems, optional=True)
    return RunFiles(
        directory=run_dir,
        manifest=manifest,
        config=config,
        metrics=metrics,
        evaluations=evaluations,
        mixes=_mixes(journal),
        domains={str(source): str(domain) for source, domain in domains.items()},
        summary=_document(run_dir / "summary.json", dict, problems, optional=True),
        samples=[
            {key: str(sample.get(key) or "") for key in ("prompt", "text", "domain")}
            for sample in samples
            if isinstance(sample, dict)
        ],
        problems=problems,
        proposals=proposed,
        skips=_skips(journal),
    )


def _yaml(text: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(str(error).splitlines()[0]) from error


def _document(
    path: Path,
    kind: Callable[[], Any],
    problems: list[str],
    *,
    parse: Callable[[str], Any] = json.loads,
    optional: bool = False,
) -> Any:
    """A whole JSON or YAML file, or an empty `kind()`."""
    try:
        value = parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if not optional:
            problems.append(f"{path.name} is not there.")
        return kind()
    except (OSError, ValueError, RecursionError) as error:
        problems.append(f"{path.name} could not be read: {error}")
        return kind()
    if not isinstance(value, type(kind())):
        problems.append(f"{path.name} could not be read: it holds a {type(value).__name__}.")
        return kind()
    return value


def _lines(path: Path, problems: list[str]) -> Iterator[dict[str, Any]]:
    """The objects of a JSON-lines file. The last line may be half written: a run is at work, or was stopped."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        problems.append(f"{path.name} is not there.")
        return
    except OSError as error:
        problems.append(f"{path.name} could not be read: {error}")
        return
    damaged: list[int] = []
    with file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                if line.endswith(b"\n"):
                    damaged.append(number)
                continue
            if isinstance(record, dict):
                yield record
            else:
                damaged.append(number)
    if damaged:
        lines = "1 line" if len(damaged) == 1 else f"{len(damaged)} lines"
        problems.append(
            f"{path.name}: {lines} could not be read and are left out, the first is line {damaged[0]}."
        )


def _last_attempt(clock: Iterable[int]) -> NDArray[np.int64]:
    """Which records count: those with no record after them that has the same or an earlier place.

    A run that goes on from a checkpoint writes the steps after it again; the later lines are what happened.
    """
    places = np.fromiter(clock, dtype=np.int64)
    if not len(places):
        return places
    earliest_after = np.minimum.accumulate(np.r_[places[1:], np.iinfo(np.int64).max][::-1])[::-1]
    return np.flatnonzero(places < earliest_after)


def _evaluations(records: Iterable[dict[str, Any]]) -> list[Evaluation]:
    found = []
    for record in records:
        step = place_of(record, "step")
        tokens = as_number(record.get("consumed_tokens"))
        if step is not None and np.isfinite(tokens):
            losses, bits = (numbers_of(record.get(f"heldout_{what}")) for what in ("loss", "bits_per_byte"))
            found.append(Evaluation(step, tokens, losses, bits))
    return [found[i] for i in _last_attempt(one.step for one in found)]


def _mixes(records: Iterable[dict[str, Any]]) -> list[Mix]:
    found = []
    for record in records:
        first = place_of(record, "first_sample")
        if record.get("kind") != "mix" or first is None or not isinstance(record.get("weights"), dict):
            continue
        weights = {str(source): _share(weight) for source, weight in record["weights"].items()}
        total = sum(weights.values())
        if total > 0:
            shares = {source: weight / total for source, weight in weights.items()}
            found.append(Mix(first, str(record.get("stage", "")), shares))
    return [found[i] for i in _last_attempt(one.first_sample for one in found)]


def _skips(records: Iterable[dict[str, Any]]) -> list[tuple[int, int]]:
    """The ranges of samples that are passed over: the first of each, and the first behind it."""
    found = []
    for record in records:
        first, end = place_of(record, "from_sample"), place_of(record, "to_sample")
        if record.get("kind") == "skip" and first is not None and end is not None:
            found.append((first, end))
    return found


def _proposals(records: Iterable[dict[str, Any]]) -> list[Proposal]:
    def shares(value: object) -> dict[str, float]:
        return {str(unit): _share(share) for unit, share in value.items()} if isinstance(value, dict) else {}

    return [
        Proposal(
            consumed_tokens=as_number(record.get("consumed_tokens")),
            mode=str(record.get("mode", "")),
            policy=str(record.get("policy", "")),
            present=shares(record.get("present")),
            mixture=shares(record.get("mixture")),
            reason=str(record.get("reason", "")),
        )
        for record in records
    ]


def _share(weight: object) -> float:
    """A journal's weight, written exactly as "0.25" or "1/3"."""
    try:
        return max(0.0, float(Fraction(str(weight))))
    except (ValueError, ZeroDivisionError, OverflowError):
        return 0.0
