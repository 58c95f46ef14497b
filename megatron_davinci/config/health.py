"""What a run does about trouble: signals."""

from __future__ import annotations

from pydantic import Field

from megatron_davinci.config.section import Section


class HealthConfig(Section):
    """Trouble, and what is done about it."""

    grace_seconds: float = Field(
        default=100.0,
        gt=0,
        description="From a signal that asks the run to end (SIGTERM, SIGUSR1, SIGINT, SIGHUP) to the end of the "
        "checkpoint; a rank that is not done by then leaves without",
    )
