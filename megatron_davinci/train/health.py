"""Steps that must not be applied: what is looked at before an update, and what is done instead of it.

A step whose loss or gradient is not finite, or is a spike, is taken once more. If it comes out well, a machine has
miscomputed: the second answer is applied, and the run is the one that would have been. If it comes out the same, the
data or the model are to blame. Then its samples are passed over by a `skip` record of the journal, so that a run that
is resumed or replayed passes over them too, or the run goes back to the newest good checkpoint, or it ends.

Every rank decides alike: the loss and the gradient's norm are the same on all of them, and so is the journal.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch.distributed as dist

from megatron_davinci.config import RunConfig
from megatron_davinci.errors import Unhealthy
from megatron_davinci.optim.schedule import StepPlan
from megatron_davinci.platform.distributed import gather_objects, on_rank_zero
from megatron_davinci.stats.spikes import Spike, SpikeWindow
from megatron_davinci.train.feed import Samples
from megatron_davinci.train.order import DataOrder
from megatron_davinci.train.probe import Finding, Probe, bad_gradients
from megatron_davinci.train.run_directory import RunDirectory, append_line, last_lines
from megatron_davinci.train.step import NotApplied, Stepper, StepResult

MARK = "health: "
"""How the reason of a skip begins that the trainer has written."""
_LATEST = 5  # events of a report


class RollBack(Exception):
    """The run is to go on from the newest good checkpoint at or before a sample.

    Args:
        sample: Of it.
    """

    def __init__(self, sample: int) -> None:
        super().__init__(f"to sample {sample}")
        self.sample = sample

    def without_checkpoint(self) -> Unhealthy:
        """What is said where there is none."""
        return Unhealthy(
            "The run is to go back, and has no good checkpoint to go back to.",
            where=f"sample {self.sample:,}",
            do="start the same command again: it begins anew, and passes over what the journal says; set "
            "checkpoint.every_steps lower",
        )


class Health:
    """Looks at each step before it is applied.

    Args:
        config: The run configuration.
        order: The run's data order.
        directory: The run's.
        stepper: Takes the steps; it asks here before an update.
    """

    def __init__(
        self, config: RunConfig, order: DataOrder, directory: RunDirectory, stepper: Stepper
    ) -> None:
        self.config, self._order, self._directory, self._stepper = config.health, order, directory, stepper
        self._micro_batch_size = config.train.micro_batch_size
        self._is_main = dist.get_rank() == 0
        spikes = config.health.spikes
        self._window = SpikeWindow(spikes.window, spikes.least, spikes.deviations)
        self._regime: tuple[Any, ...] = ()
        self._restored = False
        self._messages: list[str] = []
        if spikes.policy in ("skip", "rollback", "stop"):
            stepper.judge = self._judge

    def begin(self) -> None:
        """Look back on the steps on record, which are those up to the present one. Every rank calls this."""

        def lines() -> list[tuple[Any, ...]]:
            return [
                (
                    line["stage"],
                    line["global_batch_size"],
                    line["consumed_samples"] - line["global_batch_size"],
                    line["loss"],
                    line["grad_norm"],
                )
                for line in last_lines(self._directory.metrics, self.config.spikes.window)
            ]

        spikes = self.config.spikes
        self._window = SpikeWindow(spikes.window, spikes.least, spikes.deviations)
        for stage, batch, first_sample, loss, grad_norm in on_rank_zero(lines):
            self._window.add(loss, grad_norm, self._regime_of(stage, batch, first_sample))

    def take(
        self, plan: StepPlan, samples: Samples, numbers: np.ndarray, attempt: Callable[[], StepResult]
    ) -> StepResult | None:
        """Take a step, unless it must not be applied.

        Args:
            plan: The step.
            samples: This rank's rows of it.
            numbers: Their global numbers.
            attempt: Takes the step, again where it is called again.

        Returns:
            What it measured; None where it was not applied and its samples are passed over.

        Raises:
            Unhealthy: The run is to end.
            RollBack: It is to go back.
        """
        self._regime = self._regime_of(plan.stage_name, plan.batch, plan.first_sample)
        try:
            result = attempt()
        except NotApplied as refused:
            return self._again(plan, samples, numbers, attempt, refused)
        self._accept(plan, result)
        return result

    def messages(self) -> list[str]:
        """What there is to say since the last time."""
        said, self._messages = self._messages, []
        return said

    def _judge(self, loss: float, grad_norm: float) -> str | None:
        """Why a step must not be applied, its numbers being finite; None where it may be."""
        spike = self._window.judge(loss, grad_norm, self._regime)
        return None if spike is None else str(spike)

    def _accept(self, plan: StepPlan, result: StepResult) -> None:
        if self.config.spikes.policy == "report":
            spike: Spike | None = self._window.judge(result.loss, result.grad_norm, self._regime)
            if spike is not None:
                self._record(plan, "spike", str(spike), [], "applied")
                self._messages.append(f"Step {plan.step:,}: {spike}.")
        self._window.add(result.loss, result.grad_norm, self._regime)

    def _again(
        self,
        plan: StepPlan,
        samples: Samples,
        numbers: np.ndarray,
        attempt: Callable[[], StepResult],
        refused: NotApplied,
    ) -> StepResult | None:
        gradients = [] if refused.is_spike else bad_gradients(self._stepper.wrapped)
        result = None
        with Probe(self._stepper.wrapped) as probe:
            try:
                result = attempt()
            except NotApplied as error:
                refused = error
        mine = probe.finding(
            self._stepper.reports,
            numbers,
            self._micro_batch_size,
            samples.source,
            list(self._order.sources),
            gradients,
        )
        told = gather_objects((mine, str(refused), refused.has_cause))
        findings = [finding for finding, *_ in told if finding]
        # Where replicas measure for themselves, one may have refused for all.
        why = next((why for _, why, has_cause in told if has_cause), str(refused))
        kind = "spike" if refused.is_spike else "not finite"
        found = f"{kind}: {why}"
        where = f" Where: {findings[0]}." if findings else ""
        if result is not None:
            self._record(plan, kind, why, findings, "taken again")
            self._messages.append(
                f"Step {plan.step:,} was not applied at first ({found}); taken again, it came out well, and was "
                f"applied: a rank has miscomputed.{where}"
            )
            self._accept(plan, result)
            return result
        self._refuse(plan, kind, why, findings)
        begins = self._begins(plan)
        policy = self.config.spikes.policy if refused.is_spike else self.config.not_finite
        if any(finding.weights for finding in findings):
            # No samples are to blame, and none will do.
            self._record(plan, kind, why, findings, "rolled back")
            self._restored = True
            self._messages.append(
                f"Step {plan.step:,} was not applied ({found}): weights are damaged.{where}"
            )
            raise RollBack(plan.first_sample)
        reason = f"{MARK}step {plan.step}, {found}"
        back = policy == "rollback"
        self._order.pass_over(begins if back else plan.first_sample, plan.first_sample + plan.batch, reason)
        self._record(plan, kind, why, findings, "rolled back" if back else "passed over")
        first = begins if back else plan.first_sample
        self._messages.append(
            f"Step {plan.step:,} was not applied ({found}); samples {first:,} to "
            f"{plan.first_sample + plan.batch - 1:,} are passed over.{where}"
        )
        if back:
            raise RollBack(begins)
        return None

    def _refuse(self, plan: StepPlan, kind: str, found: str, findings: list[Finding]) -> None:
        """End the run where the policy says so, or where it has passed over too much."""
        policy = self.config.spikes.policy if kind == "spike" else self.config.not_finite
        recent = self._recent(plan)
        damaged = self._restored and any(finding.weights for finding in findings)
        if policy != "stop" and len(recent) < self.config.give_up_after and not damaged:
            return
        self._record(plan, kind, found, findings, "stopped")
        if damaged:
            what = "Weights are not finite again, after going back to a good checkpoint."
            do = "look at the rank that is named: its memory or its kernels may be at fault"
        elif policy == "stop":
            what = "A step was not applied: " + (
                "its loss or gradient is not finite." if kind != "spike" else "it is a spike."
            )
            key = "health.spikes.policy" if kind == "spike" else "health.not_finite"
            do = f"look at these samples, or lower the learning rate; {key}=skip passes over them"
        else:
            what = (
                f"Steps are passed over again and again: {len(recent)} within "
                f"{self.config.give_up_within_steps:,} steps, and now one more."
            )
            do = (
                "look at health.jsonl in the run directory: samples of one source are its data, one rank is its "
                "machine, all of it is the learning rate or the model; health.give_up_after bears more"
            )
        raise Unhealthy(
            what,
            where=f"step {plan.step:,}, stage {plan.stage_name}, samples {plan.first_sample:,} to "
            f"{plan.first_sample + plan.batch - 1:,}",
            found="\n".join([f"{kind}: {found}", *map(str, findings[:_LATEST]), *recent[-_LATEST:]]),
            do=f"{do}; the newest checkpoint is whole",
        )

    def _recent(self, plan: StepPlan) -> list[str]:
        """Why steps of late are passed over, by the journal: a run that was resumed counts the same."""
        reasons: dict[str, None] = {}
        for skip in self._order.journal.skips:
            if not skip.reason.startswith(MARK) or skip.from_sample > plan.first_sample:
                continue
            if plan.step - self._step_of(skip.from_sample)[0] < self.config.give_up_within_steps:
                reasons[skip.reason.removeprefix(MARK)] = None
        return list(reasons)

    def _begins(self, plan: StepPlan) -> int:
        """The first sample of the steps that a rollback passes over."""
        first = plan.first_sample
        for _ in range(self.config.spikes.before):
            if first == 0:
                break
            first = self._step_of(first - 1)[1]
        return first

    def _step_of(self, sample: int) -> tuple[int, int]:
        """The number of the step that takes a sample, and the step's first."""
        segments = self._order.schedule.segments
        segment = [one for one in segments if one.first_sample <= sample][-1]
        first = sample - (sample - segment.first_sample) % segment.batch
        return self._order.schedule.at(first).step, first

    def _regime_of(self, stage: str, batch: int, first_sample: int) -> tuple[Any, ...]:
        return stage, batch, self._order.mixture_at(first_sample).first_sample

    def _record(self, plan: StepPlan, kind: str, found: str, findings: list[Finding], action: str) -> None:
        if not self._is_main:
            return
        append_line(
            self._directory.health,
            {
                "step": plan.step,
                "stage": plan.stage_name,
                "samples": [plan.first_sample, plan.first_sample + plan.batch - 1],
                "kind": kind,
                "found": found,
                "action": action,
                "ranks": [
                    {name: value for name, value in vars(finding).items() if value or name == "rank"}
                    for finding in findings
                ],
                "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            },
        )
