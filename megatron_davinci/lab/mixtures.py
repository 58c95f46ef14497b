"""Looking for the mixture of a stage: rounds of small runs, each proposed by a predictor of those before.

Runs are the lab's: called by what they compute, shared with designs, never trained twice. What was proposed is
written down before it is trained, so that a search that was killed goes on with the same mixtures.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray
from pydantic import Field, model_validator

from megatron_davinci.config import load_config
from megatron_davinci.config.mixture import exact_share, share_text
from megatron_davinci.config.section import Section, shown
from megatron_davinci.config.units import format_tokens
from megatron_davinci.errors import ConfigError, DataError
from megatron_davinci.files import write_atomically, write_json
from megatron_davinci.lab.arms import Arm, arms_of, as_override, runs_of
from megatron_davinci.lab.control import cost_of, refuse
from megatron_davinci.lab.design import Branch, Budget, Design, Metric, Setting, read_as
from megatron_davinci.lab.outcomes import TASK, Outcome
from megatron_davinci.lab.pasts import pasts_of
from megatron_davinci.lab.runner import carry_out
from megatron_davinci.report.axes import Axis
from megatron_davinci.report.colors import assign
from megatron_davinci.report.numbers import percent, with_minus
from megatron_davinci.report.page import KeyFigure, Page
from megatron_davinci.report.plots import Bar, Bars
from megatron_davinci.stats.mixture_search import LEAST_MIXTURES, Bounds, Proposal, best_mixture, propose

_DECIMALS = 4


class Search(Section):
    """What a search's file holds."""

    question: str = Field(min_length=1)
    base: Path = Field(description="A run configuration; relative to the search")
    overrides: Setting = Field(default_factory=dict, description="For every run, by dotted key")
    stage: str = Field(description="Whose mixture is looked for; the base's is tried first")
    floor: dict[str, float] = Field(default_factory=dict, description="Least shares by domain; 0 by default")
    ceiling: dict[str, float] = Field(
        default_factory=dict, description="Largest shares by domain; 1 by default"
    )
    rounds: list[int] = Field(
        default=[16, 8, 4], min_length=1, description="Mixtures of each round; the first includes the base's"
    )
    seeds: list[int] = Field(default=[1], min_length=1, description="Every mixture has all of them")
    metric: str = Field(default="heldout_loss.mean", description="That is to be small, as in a design")
    share_past: bool = Field(
        default=True, description="Train the stages before once a seed, and branch from there"
    )
    budget: Budget = Budget()

    @model_validator(mode="after")
    def _enough_to_predict(self) -> Search:
        if min(self.rounds) < 1 or self.rounds[0] < LEAST_MIXTURES:
            raise ValueError(
                f"rounds: the first should have {LEAST_MIXTURES} mixtures or more, others one; found {self.rounds}"
            )
        if self.metric.startswith(TASK):
            raise ValueError(
                f"metric should be a loss, since a search asks no tasks; found {shown(self.metric)}"
            )
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds should differ; found {self.seeds}")
        return self


@dataclass(frozen=True)
class Found:
    """What a search came to.

    Attributes:
        domains: [k] names.
        tried: [n, k] mixtures whose runs are all done.
        losses: [n] means over seeds.
        proposal: The mixture to use.
        lost: Runs that did not come to their end.
    """

    domains: list[str]
    tried: NDArray
    losses: NDArray
    proposal: Proposal
    lost: list[str]


def load_search(path: Path) -> Search:
    """Read a search.

    Raises:
        ConfigError: There is no such file, it is no YAML, or it says something impossible; every problem is named.
    """
    search = read_as(Search, path, "search")
    return search.model_copy(update={"base": path.resolve().parent / search.base})


class Space:
    """The mixtures of a search: domains, bounds, and where it begins."""

    def __init__(self, search: Search, where: Path) -> None:
        config = load_config(search.base, [as_override(*item) for item in search.overrides.items()])
        names = [stage.name for stage in config.curriculum]
        if search.stage not in names:
            raise ConfigError(
                "The base has no such stage.",
                where=f"{where}: stage",
                found=shown(search.stage),
                expected="one of " + ", ".join(names),
            )
        self.number = names.index(search.stage)
        self.curriculum = [stage.model_dump(mode="json") for stage in config.curriculum]
        given = config.curriculum[self.number].mixture
        self.domains = list(given)
        for key in ("floor", "ceiling"):
            unknown = [name for name in getattr(search, key) if name not in given]
            if unknown:
                raise ConfigError(
                    "A bound is of a domain that the stage does not mix.",
                    where=f"{where}: {key}",
                    found=", ".join(unknown),
                    expected="of " + ", ".join(self.domains),
                )
        weights = np.array([float(exact_share(name, share_text(one))) for name, one in given.items()])
        self._entries = self.curriculum[self.number]["mixture"]
        self.base = weights / weights.sum()
        self.bounds = Bounds(
            np.array([search.floor.get(name, 0.0) for name in self.domains]),
            np.array([search.ceiling.get(name, 1.0) for name in self.domains]),
        )
        self.before = names[self.number - 1] if self.number and search.share_past else None

    def written(self, mixture: NDArray) -> dict[str, float]:
        """Shares with four decimals that sum to 1."""
        unit = 10**_DECIMALS
        whole = np.floor(mixture * unit).astype(int)
        for one in np.argsort(whole - mixture * unit)[: unit - whole.sum()]:
            whole[one] += 1
        return {name: count / unit for name, count in zip(self.domains, whole.tolist(), strict=True)}

    def setting(self, shares: dict[str, float]) -> dict[str, Any]:
        """The stage's mixture with other shares; how a domain divides its own stays."""
        return {
            name: {**self._entries[name], "share": share} if isinstance(self._entries[name], dict) else share
            for name, share in shares.items()
        }


def design_of(search: Search, space: Space, mixtures: Sequence[dict[str, float]]) -> Design:
    """The runs of a search as a design, whose arms are mixtures."""
    key = f"curriculum.{space.number}.mixture"
    return Design(
        question=search.question,
        base=search.base,
        overrides=search.overrides,
        arms={
            f"mixture {n}": {"set": {key: space.setting(mixture)}}
            for n, mixture in enumerate(mixtures, start=1)
        },
        varies=[key],
        allow={"unequal repetition": "shares are the question"},
        seeds=search.seeds,
        metrics=[Metric(name=search.metric, margin=1e-3)],
        branch=None if space.before is None else Branch(after=space.before),
    )


def look(
    search: Search,
    where: Path,
    root: Path,
    *,
    parallel: int,
    retry: bool = False,
    say: Callable[[Outcome, int, int], None] = lambda outcome, done, total: None,
) -> Path:
    """Carry a search out, and write what it found.

    Args:
        search: The search.
        where: Its file.
        root: The lab's folder.
        parallel: Runs at a time.
        retry: Start runs again that failed before.
        say: Is told of each run that has ended.

    Returns:
        The curriculum's file.

    Raises:
        ConfigError: The search is impossible with its base, or costs more than its budget.
        DataError: Too few of its runs came to their end.
    """
    space, folder = Space(search, where), root / "mixtures" / where.stem
    _refuse_cost(search, space, where)
    proposed: list[dict[str, float]] = _read(folder / "proposed.json", space)
    tried, losses = np.empty((0, len(space.domains))), np.empty(0)
    lost: list[str] = []
    for number in range(len(search.rounds)):
        wanted = sum(search.rounds[: number + 1])
        if len(proposed) < wanted:
            rng = np.random.default_rng([0, number])
            more = propose(space.base, tried, losses, space.bounds, wanted - len(proposed), rng)
            proposed += [space.written(one) for one in more]
        design = design_of(search, space, proposed[:wanted])
        arms = arms_of(design)
        _refuse_confounds(design, arms, where)
        if (different := len({tuple(one.values()) for one in proposed[:wanted]})) < LEAST_MIXTURES:
            raise ConfigError(
                "The bounds leave too few mixtures to predict others from.",
                where=where,
                found=f"{different} that differ in the fourth decimal, of {wanted}",
                expected=f"{LEAST_MIXTURES} or more",
                do="lower floors or raise ceilings, of two domains at least",
            )
        # A search that is refused leaves nothing that the mended one would go on with.
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "proposed.json", proposed)
        outcomes = carry_out(
            root, runs_of(design, arms), parallel=parallel, retry=retry, say=say, design=design
        )
        tried, losses, lost = _measured(proposed[:wanted], outcomes, search, space)
    proposal = best_mixture(space.base, tried, losses, space.bounds, np.random.default_rng(1))
    return write(folder, search, space, Found(space.domains, tried, losses, proposal, lost))


def _refuse_cost(search: Search, space: Space, where: Path) -> None:
    count, budget = sum(search.rounds), search.budget
    design = design_of(search, space, [space.written(space.base)] * 2)
    runs = [run for run in runs_of(design) if run.arm.name == "mixture 1"]
    past = sum(cost_of(one.arm.config).tokens for one in pasts_of(design, runs))
    whole = sum(cost_of(one.arm.config).tokens for one in runs)
    # What comes before the stage is trained once a seed, where it is shared.
    total, tokens = count * len(search.seeds), past + count * (whole - past)
    if (budget.runs or total) < total or (budget.tokens or tokens) < tokens:
        raise ConfigError(
            "The search costs more than its budget.",
            where=where,
            found=f"{total} runs, {format_tokens(tokens)} tokens",
            expected=f"at most {budget.runs or total} runs, {format_tokens(budget.tokens or tokens)} tokens",
            do="fewer or smaller rounds, fewer seeds, or a larger budget",
        )


def _refuse_confounds(design: Design, arms: Sequence[Arm], where: Path) -> None:
    # One seed is enough to fit a predictor, whose noise is estimated; a verdict would need two.
    seeds = design.seeds if len(design.seeds) > 1 else [*design.seeds, design.seeds[0] + 1]
    refuse(design.model_copy(update={"seeds": seeds}), list(arms), where)


def _read(path: Path, space: Space) -> list[dict[str, float]]:
    if not path.exists():
        return []
    found = json.loads(path.read_text(encoding="utf-8"))
    do = "give the search's file another name, or remove the folder"
    if not isinstance(found, list) or any(list(one) != list(space.domains) for one in found):
        raise DataError("What was proposed before is of other domains.", where=path, do=do)
    base = space.written(space.base)
    if found and found[0] != base:
        # The first is what gains are counted from, and it would not be the base's any more.
        raise DataError(
            "What was proposed before began at another mixture.",
            where=path,
            found=f"{found[0]}",
            expected=f"{base}, which the base has",
            do=do,
        )
    return [dict(one) for one in found]


def _measured(
    proposed: Sequence[dict[str, float]], outcomes: Sequence[Outcome], search: Search, space: Space
) -> tuple[NDArray, NDArray, list[str]]:
    by_arm: dict[str, list[float]] = {}
    lost = []
    for one in outcomes:
        value = one.metric(search.metric)
        if value is None:
            lost.append(f"{one.run.label}: {'diverged' if one.diverged(search.metric) else one.state}")
        else:
            by_arm.setdefault(one.run.arm.name, []).append(value)
    rows, values = [], []
    for number, mixture in enumerate(proposed, start=1):
        there = by_arm.get(f"mixture {number}", [])
        # The same mixture twice is the same runs, which would make their noise look like none.
        if len(there) == len(search.seeds) and mixture not in proposed[: number - 1]:
            rows.append([mixture[name] for name in space.domains])
            values.append(float(np.mean(there)))
    if len(rows) < LEAST_MIXTURES or len(by_arm.get("mixture 1", [])) < len(search.seeds):
        raise DataError(
            "Too few runs of the search came to their end.",
            found="; ".join(lost[:6]),
            expected=f"the base's mixture and {LEAST_MIXTURES} in all, with every seed",
            do="look at their logs, then start it again with --retry",
        )
    return np.array(rows), np.array(values), lost


def write(folder: Path, search: Search, space: Space, found: Found) -> Path:
    """Write `curriculum.yaml`, `mixture.json`, `tried.csv`, `mixture.md` and `mixture.html`; return the first."""
    folder.mkdir(parents=True, exist_ok=True)
    best, shares = found.proposal, space.written(found.proposal.mixture)
    said = with_minus(
        f"{search.metric} {best.loss:.4f} expected ({best.loss_low:.4f} to {best.loss_high:.4f}), {best.gain:.4f} "
        f"less than the base's mixture ({best.gain_low:+.4f} to {best.gain_high:+.4f}); better with a probability of "
        f"{percent(best.better)}, from {len(found.tried)} mixtures at this size"
    )
    stages = [dict(stage) for stage in space.curriculum]
    stages[space.number]["mixture"] = space.setting(shares)
    path = folder / "curriculum.yaml"
    text = yaml.safe_dump({"curriculum": stages}, sort_keys=False, allow_unicode=True)
    write_atomically(path, f"# {search.question}\n# {said}\n{text}")
    rows = [
        [name, percent(base), percent(shares[name]), f"{percent(low)} to {percent(high)}"]
        for name, base, low, high in zip(found.domains, space.base, best.low, best.high, strict=True)
    ]
    headers = ["domain", "base", "proposed", "95% interval of the best"]
    write_json(
        folder / "mixture.json",
        {
            "question": search.question,
            "metric": search.metric,
            "mixture": shares,
            "low": dict(zip(found.domains, best.low.round(6).tolist(), strict=True)),
            "high": dict(zip(found.domains, best.high.round(6).tolist(), strict=True)),
            **{k: v for k, v in vars(best).items() if isinstance(v, float)},
            "tried": len(found.tried),
            "lost": found.lost,
        },
    )
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*found.domains, search.metric])
    writer.writerows([*map(str, row), f"{loss:.6f}"] for row, loss in zip(found.tried.tolist(), found.losses))
    write_atomically(folder / "tried.csv", out.getvalue())
    lines = [
        f"# {search.question}",
        "",
        f"**{said}.**",
        "",
        "| " + " | ".join(headers) + " |",
        "|---" * 4 + "|",
    ]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    lines += ["", *(f"- not at its end: {one}" for one in found.lost)]
    write_atomically(folder / "mixture.md", "\n".join(lines).rstrip() + "\n")
    page = Page(
        search.question, f"{len(found.tried)} mixtures, {len(search.seeds)} seeds, stage {search.stage}"
    )
    for one in found.lost:
        page.notice(f"not at its end: {one}")
    page.figures(
        [
            KeyFigure(
                "Gain", f"{best.gain:.4f}", f"{best.gain_low:.4f} to {best.gain_high:.4f}, {search.metric}"
            ),
            KeyFigure("Better than the base", percent(best.better), "probability"),
        ]
    )
    page.section("Proposed", f"{said}. The interval of a share says how far it may move with little loss.")
    colours = assign(found.domains)
    bars = [
        Bar(name, 100 * shares[name], colours[name], 100 * float(low), 100 * float(high), 100 * float(base))
        for name, base, low, high in zip(found.domains, space.base, best.low, best.high, strict=True)
    ]
    plot = Bars(title="Shares", value=Axis("share", "%", zero=True), bars=bars, note="mark: the base's")
    page.plot(plot, "With the interval of where the best mixture lies.")
    page.table(headers, rows)
    order = np.argsort(found.losses)
    page.section("Tried")
    page.table(
        [*found.domains, search.metric],
        [[*(percent(v) for v in found.tried[i]), f"{found.losses[i]:.4f}"] for i in order],
    )
    page.write(folder / "mixture.html")
    return path
