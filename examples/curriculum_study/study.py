"""The study from beginning to end: data, runs in rounds, comparison, page."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arms import Arm, combined_arm, fixed_arms, grid_arms, mixture, random_changes
from conclude import Comparison, compare, summary
from figures import change_times, outcome, samples_drawn
from study_page import subtitle_of, write_page
from study_runs import Run, Study, Trainer, mean_loss, train_missing

from megatron_davinci.config.mixture import exact_share
from megatron_davinci.errors import DavinciError
from megatron_davinci.files import write_json
from megatron_davinci.train.policies.situation import Bounds
from megatron_davinci.train.run_directory import read_lines


@dataclass(frozen=True)
class Design:
    """Which arms with which seeds.

    Attributes:
        study: What all runs have in common.
        pools: Tokens to train on, by domain.
        seeds: The controller's, and those of all it is compared with.
        grid: Whether the oracle's further candidates are run.
    """

    study: Study
    pools: dict[str, int]
    seeds: Sequence[int]
    grid: bool = True

    @property
    def domains(self) -> list[str]:
        """As they are configured."""
        return list(self.pools)

    def bounds(self) -> Bounds:
        """Of the controller."""
        settings = self.study.base().controller
        floors, ceilings = (
            {name: exact_share(name, text) for name, text in texts.items()}
            for texts in (settings.floors, settings.ceilings)
        )
        return Bounds(floors, ceilings, exact_share("maximum_change", settings.maximum_change))

    def controller(self) -> Arm:
        """The arm that the study is about: it begins even, since it knows nothing."""
        policy = self.study.base().controller.policy
        return Arm(
            "controller",
            "controller",
            f"policy {policy}, from an even mixture on",
            mixture(dict.fromkeys(self.pools, 1.0)),
        )

    def rounds(self) -> list[Callable[[], list[Run]]]:
        """The runs, in rounds: what a round is can be said when those before it are done."""
        rounds = [self.compared, self.controls]
        return [*rounds, self.candidates, self.finalists] if self.grid else rounds

    def compared(self) -> list[Run]:
        """The controller and the fixed mixtures."""
        arms = [self.controller(), *fixed_arms(self.pools, self.bounds())]
        return [Run(self.study, arm, seed) for seed in self.seeds for arm in arms]

    def controls(self) -> list[Run]:
        """Random adjustments at the controller's times, and a fixed mixture of the amounts that it drew."""
        bounds, runs = self.bounds(), []
        for seed in self.seeds:
            controlled = Run(self.study, self.controller(), seed)
            even = controlled.arm.mixture
            times = change_times(controlled)
            changes = random_changes(times, even, bounds, seed, self.domains)
            words = "random adjustments, at the controller's times"
            runs.append(Run(self.study, Arm("random", "random", words, even), seed, tuple(changes)))
            drawn = samples_drawn(controlled)
            amounts = mixture({name: float(drawn[name]) for name in self.domains})
            words = "what the controller drew, mixed evenly"
            runs.append(Run(self.study, Arm("amounts", "amounts", words, amounts), seed))
        return runs

    def candidates(self) -> list[Run]:
        """The oracle's grid, with the first seed."""
        return [Run(self.study, arm, self.seeds[0]) for arm in grid_arms(self.domains, self.bounds())]

    def finalists(self) -> list[Run]:
        """The best of the grid with the other seeds; and with all, what its single doublings say together."""

        def loss(run: Run) -> float:
            return mean_loss(read_lines(run.directory.evaluations)[-1])

        first, candidates = self.seeds[0], self.candidates()
        even = next(run for run in self.compared() if run.arm.name == "even" and run.seed == first)
        helped = [
            name
            for name in self.domains
            for run in candidates
            if run.arm.name == f"more {name}" and loss(run) < loss(even)
        ]
        combined = combined_arm(helped, self.domains, self.bounds())
        best = min(candidates, key=loss).arm
        return [
            *(Run(self.study, combined, seed) for seed in self.seeds),
            *(Run(self.study, best, seed) for seed in self.seeds[1:]),
        ]

    def done(self) -> list[Run]:
        """The runs that were trained to their end; of a round none before those are done that say what it is."""
        compared = self.compared()
        found = [run for run in compared if run.is_done()]
        if all(run in found for run in compared if run.arm.kind == "controller"):
            found += [run for run in self.controls() if run.is_done()]
        if self.grid:
            candidates = self.candidates()
            found += [run for run in candidates if run.is_done()]
            even = [run for run in compared if run.arm.name == "even" and run.seed == self.seeds[0]]
            if all(run in found for run in [*candidates, *even]):
                found += [run for run in self.finalists() if run.is_done()]
        return found

    def total(self) -> int:
        """Runs in all."""
        grid = len(grid_arms(self.domains, self.bounds())) if self.grid else 0
        finals = 2 * len(self.seeds) - 1 if self.grid else 0
        return len(self.seeds) * 6 + grid + finals


def carry_out(design: Design, train: Trainer) -> list[Run]:
    """Train what is not done, round by round.

    Returns:
        Every run of the study.
    """
    runs: list[Run] = []
    for make in design.rounds():
        runs += (made := make())
        train_missing(made, train)
    return runs


def runs_that_are_done(design: Design) -> list[Run]:
    """Those of the study that were trained to their end.

    Raises:
        DavinciError: The controller's and a fixed mixture's are not among them, so that nothing can be compared.
    """
    done = design.done()
    seeds = [{run.seed for run in done if run.arm.kind == kind} for kind in ("controller", "fixed")]
    if not seeds[0] & seeds[1]:
        raise DavinciError(
            "There is nothing to compare yet.",
            where=design.study.out / "runs",
            found=", ".join(run.name for run in done) or "no run that is done",
            expected="at least the controller's and one fixed mixture's, with the same seed",
            do="start the study without --report",
        )
    return done


def report(
    design: Design, runs: Sequence[Run], facts: dict[str, Any], say: Callable[[str], None] = print
) -> tuple[Comparison, Path]:
    """Compare, and write `summary.json` and the page.

    Returns:
        The comparison, and where the page is.
    """
    comparison = compare([outcome(run) for run in runs])
    config = design.study.base()
    one = next(iter(comparison.arms["controller"].values()))
    everything = {
        "tokens": int(one.edges[-1]),
        "parameters": config.model.parameters(),
        "pools": design.pools,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        **facts,
    }
    out = design.study.out
    write_json(out / "summary.json", json.loads(json.dumps(summary(comparison, everything))))
    lacking = design.total() - len(runs)
    missing = (
        f"{lacking} of {design.total()} runs are not done; what is shown rests on the others."
        if lacking
        else ""
    )
    page = write_page(comparison, out, subtitle_of(comparison, config.model.parameters()), missing)
    say(f"page        {page}")
    say(f"figures     {out / 'summary.json'}")
    return comparison, page
