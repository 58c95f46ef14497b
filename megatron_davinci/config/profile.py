"""Which steps are profiled."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, field_validator

from megatron_davinci.config.section import Section


class ProfileConfig(Section):
    """Steps that torch's profiler looks into. They take longer, and so do their lines in metrics.jsonl."""

    steps: list[Annotated[int, Field(ge=1)]] = Field(
        default=[], description="Numbers of steps; those that follow each other are in one trace"
    )
    ranks: list[Annotated[int, Field(ge=0)]] = Field(
        default=[0], description="Ranks that write a trace", min_length=1
    )
    shapes: bool = Field(default=False, description="Record the shapes of each operation's inputs")
    memory: bool = Field(default=False, description="Record what is allocated and freed")
    stacks: bool = Field(default=False, description="Record where in Python each operation was called")

    @field_validator("steps", "ranks")
    @classmethod
    def _each_once(cls, numbers: list[int]) -> list[int]:
        twice = sorted({number for number in numbers if numbers.count(number) > 1})
        if twice:
            raise ValueError(f"should name each once; found {', '.join(map(str, twice))} more than once")
        return sorted(numbers)

    def traces(self) -> list[tuple[int, int]]:
        """The first and the last step of each trace."""
        found: list[tuple[int, int]] = []
        for step in self.steps:
            if found and found[-1][1] == step - 1:
                found[-1] = found[-1][0], step
            else:
                found.append((step, step))
        return found
