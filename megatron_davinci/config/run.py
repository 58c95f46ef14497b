"""The whole run configuration, and the checks that need more than one section."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, model_validator

from megatron_davinci.config.curriculum import Stage
from megatron_davinci.config.data import DataConfig
from megatron_davinci.config.levers import lever_problems
from megatron_davinci.config.model import ModelConfig
from megatron_davinci.config.parallel import ParallelConfig
from megatron_davinci.config.section import Section
from megatron_davinci.config.training import (
    CheckpointConfig,
    EvaluationConfig,
    LoggingConfig,
    OptimizerConfig,
    TrainConfig,
)
from megatron_davinci.config.transform_checks import transform_problems


class RunSection(Section):
    """Where the run is recorded, and the one seed that everything random derives from."""

    directory: Path = Field(description="The run directory; an existing run in it goes on")
    seed: int = Field(
        default=1234, ge=0, lt=2**63, description="Weights, data order and dropout follow from it"
    )


class RunConfig(Section):
    """Everything that decides a run."""

    run: RunSection
    model: ModelConfig
    parallel: ParallelConfig = ParallelConfig()
    data: DataConfig
    curriculum: list[Stage] = Field(min_length=1)
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    logging: LoggingConfig = LoggingConfig()

    @model_validator(mode="after")
    def _names_agree(self) -> RunConfig:
        problems = []
        for stage in self.curriculum:
            unknown = sorted(set(stage.mixture) - set(self.data.sources))
            if unknown:
                problems.append(
                    f"curriculum stage {stage.name} mixes {', '.join(unknown)}; data.sources has "
                    f"{', '.join(self.data.sources)}"
                )
        if not problems:
            for number, stage in enumerate(self.curriculum):
                problems += transform_problems(
                    number, stage, self.data, self.model.vocab_size, self.data.sequence_length
                )
        names = [stage.name for stage in self.curriculum]
        if len(set(names)) < len(names):
            problems.append(f"two stages of the curriculum have one name: {', '.join(names)}")
        if self.data.sequence_length > self.model.max_sequence_length:
            problems.append(
                f"data.sequence_length ({self.data.sequence_length}) exceeds model.max_sequence_length "
                f"({self.model.max_sequence_length})"
            )
        problems += lever_problems(self)
        if problems:
            raise ValueError("\n".join(problems))
        return self
