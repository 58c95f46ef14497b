"""The controller in a run: at an evaluation its policy is asked; what it says is written, drawn, and maybe done.

A decision depends on nothing but evals.jsonl up to its step, the journal and the configuration. So a run that was
killed between an evaluation and its record makes the same decision again, and one whose journal has decided needs
none.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Mapping
from dataclasses import replace
from fractions import Fraction
from math import ceil
from pathlib import Path
from typing import Any

from megatron_davinci.config import RunConfig
from megatron_davinci.config.controller import UNITS
from megatron_davinci.config.mixture import exact_share
from megatron_davinci.config.source_weights import exact_text
from megatron_davinci.data.curriculum import Curriculum
from megatron_davinci.optim.schedule import StepPlan
from megatron_davinci.platform.distributed import on_rank_zero
from megatron_davinci.train.order import DataOrder
from megatron_davinci.train.policies import make_policy
from megatron_davinci.train.policies.bounded import Decision, as_text, decide
from megatron_davinci.train.policies.situation import Bounds, Evaluation, Situation
from megatron_davinci.train.repetition import cap_problems, most_shares
from megatron_davinci.train.run_directory import RunDirectory, append_line, read_lines
from megatron_davinci.train.source_losses import loss_by_domain

ORIGIN = "controller"
"""Who the journal says decided."""


class Controller:
    """Asks the policy, and hands what it says to the data order. Every rank calls its methods.

    Args:
        config: The run configuration.
        order: The run's data order.
        directory: The run directory.
    """

    def __init__(self, config: RunConfig, order: DataOrder, directory: RunDirectory) -> None:
        self._config, self._order, self._directory = config, order, directory
        self._settings = config.controller
        self._policy = make_policy(config.controller)
        by_domain = self._settings.unit == "domain"
        self._unit_of = {s: config.data.domain(s) if by_domain else s for s in config.data.sources}
        shares = {
            kind: {name: exact_share(name, text) for name, text in texts.items()}
            for kind, texts in (("floors", self._settings.floors), ("ceilings", self._settings.ceilings))
        }
        change = exact_share("maximum_change", self._settings.maximum_change)
        self._bounds = Bounds(shares["floors"], shares["ceilings"], change)

    def after_evaluation(self, plan: StepPlan) -> str | None:
        """Decide after the evaluation of a step, if it is due.

        Args:
            plan: The step; its evaluation is on record.

        Returns:
            What was decided, in words; None where nothing was to be decided.

        Raises:
            DataError: A loss is not finite; nothing is written.
        """
        end = plan.first_sample + plan.batch
        stages = self._settings.stages
        if self._settings.mode == "off" or plan.ends_stage or end >= self._order.schedule.total_samples:
            return None  # a stage begins with the mixture that it says
        if stages is not None and plan.stage_name not in stages:
            return None
        # Only rank 0 has the record.
        found: tuple[dict[str, str], str] | None = on_rank_zero(lambda: self._decide(plan, end))
        if found is None:
            return None
        weights, reason = found
        if self._settings.mode == "apply" and weights:
            self._order.propose(end, weights, origin=ORIGIN, reason=reason)
        verb = "Mixture" if self._settings.mode == "apply" else "Advice"
        return f"{verb} after step {plan.step:,}: {reason}"

    def _decide(self, plan: StepPlan, end: int) -> tuple[dict[str, str], str] | None:
        """The weights by source, empty where the mixture stays, and why; None if no decision is due."""
        evaluations = self._evaluations(plan.step)
        # A start whose configuration evaluates at other steps may go on from one that was not evaluated.
        if not evaluations or evaluations[-1].step != plan.step:
            return None
        if len(evaluations) % self._settings.every_evaluations:
            return None
        record = self._order.mixture_at(end - 1)
        sources = {name: exact_share(name, text) for name, text in record.weights.items()}
        present = dict.fromkeys(sorted(set(self._unit_of.values())), Fraction(0))
        pools = dict.fromkeys(present, 0)
        for name, unit in self._unit_of.items():
            present[unit] += sources.get(name, Fraction(0))
            pools[unit] += self._order.sources[name].num_tokens
        length = self._config.data.sequence_length
        parts = {unit: self._parts(unit, share, sources) for unit, share in present.items()}
        bounds = self._bounds_within_caps(end, present, parts)
        situation = Situation(
            evaluations, present, bounds, self._order.schedule.total_samples * length, pools
        )
        decision = decide(self._policy, situation)
        weights = _divided(decision.mixture, parts) if decision.changes else {}
        if weights and cap_problems(self._config, self._order.schedule, self._planned(end, weights)):
            said = f"{decision.reason}; it stays, since a source would be repeated more often than its cap allows"
            decision, weights = replace(decision, mixture=present, reason=said, changes=False), {}
        decision, weights = self._replayed(end, present, decision, weights)
        self._write(plan, end, present, decision, weights)
        return weights, f"{self._settings.policy}: {decision.reason}"

    def _evaluations(self, last_step: int) -> tuple[Evaluation, ...]:
        length = self._config.data.sequence_length
        found = []
        # Both are by rising steps, so that each step is looked at once.
        steps = deque(read_lines(self._directory.metrics) if self._policy.reads_training_loss else [])
        for line in read_lines(self._directory.evaluations):
            if line["step"] > last_step:
                continue
            between = []
            while steps and steps[0]["step"] <= line["step"]:
                between.append(steps.popleft().get("sources", {}))
            given = dict.fromkeys(self._unit_of.values(), 0)
            for source, samples in self._order.curriculum.consumed(line["consumed_samples"]).items():
                given[self._unit_of[source]] += samples * length
            found.append(
                Evaluation(
                    step=line["step"],
                    tokens=line["consumed_tokens"],
                    unit_tokens=given,
                    heldout={unit: loss for unit, loss in line["heldout_loss"].items() if unit in given},
                    learning_rate=line.get("learning_rate"),
                    training=loss_by_domain(between, self._unit_of),
                )
            )
        return tuple(found)

    def _parts(self, unit: str, present: Fraction, sources: Mapping[str, Fraction]) -> dict[str, Fraction]:
        """What each source has of its unit: as it is now, by windows where the unit has no share now."""
        members = [name for name, its in self._unit_of.items() if its == unit]
        if present:
            return {name: sources.get(name, Fraction(0)) / present for name in members}
        windows = {name: self._order.sources[name].num_windows for name in members}
        total = max(sum(windows.values()), 1)
        return {name: Fraction(count, total) for name, count in windows.items()}

    def _bounds_within_caps(
        self, end: int, present: Mapping[str, Fraction], parts: Mapping[str, Mapping[str, Fraction]]
    ) -> Bounds:
        """The bounds, with lower ceilings where a cap on repetition would not hold else.

        What a unit has now it may keep: that is planned, and a plan that breaks a cap does not start.
        """
        most: dict[str, Fraction] = {}
        if any(stage.max_epochs for stage in self._config.curriculum):
            planned = self._planned(end)
            total = self._order.schedule.total_samples
            until = next((first for first in planned.first_samples if first > end), total)
            most = most_shares(self._config, self._order.schedule, planned, end, until)
        ceilings = dict(self._bounds.ceilings)
        for unit, share in present.items():
            limits = [most[name] / part for name, part in parts[unit].items() if part and name in most]
            if limits:
                kept = max(min(limits), Fraction(ceil(share * UNITS), UNITS))
                ceilings[unit] = min(ceilings.get(unit, Fraction(1)), kept)
        return replace(self._bounds, ceilings=ceilings)

    def _planned(self, end: int, weights: Mapping[str, str] | None = None) -> Curriculum:
        """The data order to the run's end, as it was planned before a decision, or with other weights from it on."""
        order = self._order
        records = [one for one in order.records if one.first_sample < end or one.origin != ORIGIN]
        if weights:
            others = [one for one in records if one.first_sample != end]
            changed = replace(order.mixture_at(end), first_sample=end, weights=weights)
            records = sorted([*others, changed], key=lambda one: one.first_sample)
        windows = {name: source.num_windows for name, source in order.sources.items()}
        return Curriculum(windows, self._config.run.seed, records)

    def _replayed(
        self, end: int, present: Mapping[str, Fraction], decision: Decision, weights: dict[str, str]
    ) -> tuple[Decision, dict[str, str]]:
        """What the journal has decided already, in place of another decision that would come to nothing.

        A run that turned back, or goes on with another policy or layout, may measure or decide otherwise than before.
        """
        mixes = self._order.journal.mixes
        if self._settings.mode != "apply" or not mixes or mixes[-1].first_sample < end:
            return decision, weights
        record = next((mix for mix in mixes if mix.first_sample == end), None)
        had = {} if record is None else dict(record.weights)
        if had == weights or (record is not None and record.origin != ORIGIN):
            return decision, weights
        mixture = dict(present) if not had else dict.fromkeys(present, Fraction(0))
        for name, text in had.items():
            mixture[self._unit_of[name]] += exact_share(name, text)
        said = f"as the journal has it, which is replayed; now it would be otherwise: {decision.reason}"
        return replace(decision, mixture=mixture, reason=said, changes=bool(had)), had

    def _write(
        self,
        plan: StepPlan,
        end: int,
        present: Mapping[str, Fraction],
        decision: Decision,
        weights: Mapping[str, str],
    ) -> None:
        path: Path = self._directory.proposals
        if any(line["step"] == plan.step for line in read_lines(path)):
            return  # a resumed run says again what it said
        length = self._config.data.sequence_length
        record: dict[str, Any] = {
            "step": plan.step,
            "stage": plan.stage_name,
            "consumed_samples": end,
            "consumed_tokens": end * length,
            "mode": self._settings.mode,
            "policy": self._settings.policy,
            "present": {unit: as_text(share) for unit, share in present.items()},
            "mixture": {unit: as_text(share) for unit, share in decision.mixture.items()},
            "weights": dict(weights),
            "reason": decision.reason,
            "details": json.loads(json.dumps(decision.details)),
        }
        append_line(path, record)


def _divided(mixture: Mapping[str, Fraction], parts: Mapping[str, Mapping[str, Fraction]]) -> dict[str, str]:
    """The weight of each source that has one."""
    shares = {name: share * part for unit, share in mixture.items() for name, part in parts[unit].items()}
    return {name: exact_text(share) for name, share in sorted(shares.items()) if share}
