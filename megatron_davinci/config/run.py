"""The whole run configuration, and the checks that need more than one section."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import Field, model_validator

from megatron_davinci.config.backends import BackendsConfig
from megatron_davinci.config.controller import ControllerConfig, controller_problems
from megatron_davinci.config.curriculum import Stage
from megatron_davinci.config.data import DataConfig
from megatron_davinci.config.health import HealthConfig
from megatron_davinci.config.levers import lever_needs, lever_problems
from megatron_davinci.config.model import ModelConfig
from megatron_davinci.config.parallel import ParallelConfig
from megatron_davinci.config.problems import Problem, Problems, placed
from megatron_davinci.config.profile import ProfileConfig
from megatron_davinci.config.repetition import repetition_problems
from megatron_davinci.config.section import LocalPath, Section
from megatron_davinci.config.snapshots import SnapshotsConfig
from megatron_davinci.config.source_weights import mixture_problems
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

    directory: LocalPath = Field(description="The run directory; an existing run in it goes on")
    seed: int = Field(
        default=1234, ge=0, lt=2**63, description="Weights, data order and dropout follow from it"
    )


class RunConfig(Section):
    """Everything that decides a run."""

    run: RunSection
    model: ModelConfig
    parallel: ParallelConfig = ParallelConfig()
    backends: BackendsConfig = BackendsConfig()
    data: DataConfig
    curriculum: list[Stage] = Field(min_length=1)
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    snapshots: SnapshotsConfig = SnapshotsConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    health: HealthConfig = HealthConfig()
    logging: LoggingConfig = LoggingConfig()
    controller: ControllerConfig = ControllerConfig()
    profile: ProfileConfig = ProfileConfig()

    def weight_decay(self, stage: int) -> float:
        """Of a stage's updates."""
        own = self.curriculum[stage].weight_decay
        return self.optimizer.weight_decay if own is None else own

    @property
    def cuts_optimizer(self) -> bool:
        """Whether Megatron-Core's distributed optimizer cuts the state; Muon's is dealt by whole parameters."""
        return self.parallel.distributed_optimizer and self.optimizer.kind == "adamw"

    def evaluate_every_steps(self, stage: int) -> int | None:
        """In a stage; None for its end only."""
        own = self.curriculum[stage].evaluate_every_steps
        return self.evaluation.every_steps if own is None else own or None

    @model_validator(mode="after")
    def _sections_agree(self) -> RunConfig:
        problems = list(cross_problems(self.curriculum, self.data, self.model))
        problems += (placed(said) for said in lever_problems(self))
        problems += (placed(said) for said in self._retention_problems())
        if not problems:
            problems += (
                placed(said)
                for said in controller_problems(
                    self.controller, self.curriculum, self.data, self.evaluation.every_steps
                )
            )
        if problems:
            raise Problems(problems)
        return self

    def _retention_problems(self) -> Iterator[str]:
        kept, domains = self.checkpoint, list(self.data.validation)
        if not kept.keep_best and kept.best_by != "mean":
            yield f"checkpoint.best_by: {kept.best_by} acts with keep_best; found keep_best: 0"
        elif kept.keep_best and not domains:
            yield "checkpoint.keep_best: which is best is not measured, since data.validation is empty"
        elif kept.keep_best and kept.best_by not in ("mean", *domains):
            yield (
                f"checkpoint.best_by: {kept.best_by} is neither `mean` nor in data.validation "
                f"({', '.join(domains)})"
            )

    def backend_arguments(self) -> dict[str, Any]:
        """What `platform.backends.choose_backends` is asked, but for the platform."""
        documents = any(stage.transforms.document_mask for stage in self.curriculum)
        backends = self.backends.model_dump(exclude={"loss_chunk_tokens"})
        return {
            **backends,
            # Muon's other half is torch's AdamW.
            "optimizer": "torch" if self.optimizer.kind == "muon" else backends["optimizer"],
            # What follows branches is confined too.
            "documents": documents or self.evaluation.document_mask or self.evaluation.tasks > 0,
            "half": self.train.precision == "bf16",
            "recipe": self.train.low_precision.recipe,
            "low_precision": self.train.low_precision.backend,
            **lever_needs(self),
        }


def cross_problems(
    curriculum: Sequence[Stage | None], data: DataConfig | None, model: ModelConfig | None
) -> Iterator[Problem]:
    """What is wrong between sections. A section that is no valid one itself is None, and nothing is said of it.

    Args:
        curriculum: The stages.
        data: The data section.
        model: The model section.
    """
    known = True
    for number, stage in enumerate(curriculum):
        if stage is None or data is None:
            continue
        problems = list(mixture_problems(number, stage, data))
        known = known and not problems
        yield from problems
        if not problems and model is not None:
            yield from transform_problems(number, stage, data, model.tokens, data.sequence_length)
    whole = [stage for stage in curriculum if stage is not None]
    if data is not None and known and len(whole) == len(curriculum):
        yield from repetition_problems(whole, data)
    names = [stage.name for stage in whole]
    for number, stage in enumerate(curriculum):
        if stage is not None and stage.name in (one.name for one in curriculum[:number] if one is not None):
            yield (
                ("curriculum", number, "name"),
                f"two stages of the curriculum have one name: {', '.join(names)}",
            )
            break
    if data is not None and model is not None and data.sequence_length > model.max_sequence_length:
        yield (
            ("data", "sequence_length"),
            f"data.sequence_length ({data.sequence_length}) exceeds model.max_sequence_length "
            f"({model.max_sequence_length})",
        )
