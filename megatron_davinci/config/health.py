"""What a run does about trouble: signals, numbers that are not finite, spikes, ranks that stand still."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from megatron_davinci.config.section import Section


class SpikesConfig(Section):
    """Steps whose loss or gradient norm lies far above those before it."""

    policy: Literal["off", "report", "skip", "rollback", "stop"] = Field(
        default="report",
        description="report: say it and go on; skip: do not apply the step; rollback: go back to the newest good "
        "checkpoint before it, and pass over its samples",
    )
    window: int = Field(default=128, ge=16, description="Steps that are looked back on")
    least: int = Field(
        default=32,
        ge=8,
        description="Steps that must be known; counted anew where a stage, a mixture or a batch size begins",
    )
    deviations: float = Field(
        default=8.0, gt=0, description="How far above them, in robust deviations (1.4826 MAD)"
    )
    before: int = Field(default=1, ge=0, description="rollback: steps before it that are passed over too")

    @model_validator(mode="after")
    def _least_in_window(self) -> SpikesConfig:
        if self.least > self.window:
            raise ValueError(
                f"least ({self.least}) exceeds window ({self.window}): so many steps are never known at once"
            )
        return self


class HangConfig(Section):
    """When a rank stands still. The lengths are those of this start, on this machine."""

    times_longest_step: float = Field(
        default=10.0, gt=1, description="A step may take so many times the longest of the last 50"
    )
    least_seconds: float = Field(default=60.0, gt=0, description="And never less than this")
    unknown_seconds: float | None = Field(
        default=1800.0,
        gt=0,
        description="What the first steps of a start, an evaluation and a save may take; null for any time",
    )


class HealthConfig(Section):
    """Trouble, and what is done about it."""

    not_finite: Literal["skip", "stop"] = Field(
        default="skip",
        description="Of a step whose loss or gradient is not finite, also when it is taken again: pass over its "
        "samples, or end the run; it is never applied",
    )
    spikes: SpikesConfig = Field(default=SpikesConfig(), description="Spikes of loss and gradient norm")
    give_up_after: int = Field(
        default=4,
        ge=1,
        description="Steps that may be passed over, within the next number of steps; one more ends the run",
    )
    give_up_within_steps: int = Field(default=200, ge=1, description="The steps in which they are counted")
    hang: HangConfig | None = Field(
        default=HangConfig(),
        description="End the run when a rank makes no progress, and name it; null leaves that to "
        "parallel.timeout_seconds",
    )
    recompute_every_steps: int | None = Field(
        default=None,
        gt=0,
        description="Compute the gradient of such a step twice, and compare it bit for bit; null for never",
    )
    compare_replicas_every_steps: int | None = Field(
        default=None,
        gt=0,
        description="Compare the weights of data-parallel replicas after such a step; null for never",
    )
    grace_seconds: float = Field(
        default=100.0,
        gt=0,
        description="From a signal that asks the run to end (SIGTERM, SIGUSR1, SIGINT, SIGHUP) to the end of the "
        "checkpoint; a rank that is not done by then leaves without",
    )
