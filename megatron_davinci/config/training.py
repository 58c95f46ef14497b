"""The optimizer, the step, checkpoints, evaluation and what is logged."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from megatron_davinci.config.export import ExportConfig
from megatron_davinci.config.low_precision import LowPrecisionConfig
from megatron_davinci.config.recompute import RecomputeConfig
from megatron_davinci.config.section import LocalPath, Section


class MuonConfig(Section):
    """How hidden matrices move by `kind: muon`.

    The defaults are those of Moonlight (Liu et al. 2025, arXiv 2502.16982), with which AdamW's learning rate and
    weight decay may stay as they are.
    """

    momentum: float = Field(default=0.95, ge=0, lt=1, description="Decay of the momentum")
    nesterov: bool = Field(
        default=True, description="Nesterov's momentum: the step's gradient counts once more"
    )
    rounds: int = Field(default=5, gt=0, le=20, description="Of Newton and Schulz's iteration")
    update_rms: float = Field(
        default=0.2,
        gt=0,
        description="Root mean square of an update before the learning rate, as AdamW's has it",
    )


class OptimizerConfig(Section):
    """AdamW, or Muon with it. Norms and biases (one-dimensional parameters) get no weight decay.

    The report states beta1 0.9, beta2 0.95 and weight decay 0.1; epsilon and clipping are the field's
    ordinary values.
    """

    kind: Literal["adamw", "muon"] = Field(
        default="adamw",
        description="muon: matrices of the layers move by their momentum made orthogonal, everything else by AdamW",
    )
    muon: MuonConfig = MuonConfig()
    beta1: float = Field(default=0.9, ge=0, lt=1, description="Decay of the first moment")
    beta2: float = Field(default=0.95, ge=0, lt=1, description="Decay of the second moment")
    epsilon: float = Field(default=1e-8, gt=0, description="Added to the root of the second moment")
    weight_decay: float = Field(default=0.1, ge=0, description="Decoupled; not on norms and biases")
    no_weight_decay: list[Literal["embedding", "output"]] = Field(
        default=[], description="Matrices that are not decayed; the tied one is `embedding`"
    )
    moments: Literal["fp32", "fp8"] = Field(
        default="fp32",
        description="fp8: 2.1 bytes a parameter for both in place of 8, by backends.optimizer: davinci; a checkpoint "
        "of either goes on with the other",
    )
    cpu_offload: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="Part of the optimizer's state that is kept, and updated, in the CPU's memory",
    )
    clip_grad_norm: float = Field(default=1.0, ge=0, description="0 turns clipping off")


class TrainConfig(Section):
    """How a step is computed."""

    micro_batch_size: int = Field(default=1, gt=0, description="Sequences a rank computes at once")
    precision: Literal["auto", "fp32", "bf16"] = Field(
        default="auto",
        description="bf16 keeps fp32 main weights and sums gradients in fp32; auto: bf16 on GPUs and on CPUs that "
        "multiply it natively, else fp32",
    )
    low_precision: LowPrecisionConfig = Field(
        default=LowPrecisionConfig(), description="Products of 8 bits or fewer in the layers"
    )
    recompute: RecomputeConfig = Field(
        default=RecomputeConfig(), description="Activations that are computed again instead of kept"
    )
    cuda_graphs: bool = Field(
        default=False, description="Launch each layer as one CUDA graph, captured in the first step"
    )
    deterministic: bool = Field(
        default=False,
        description="Only kernels that add in a fixed order: the same run twice is equal to the bit",
    )
    z_loss: float = Field(
        default=0.0,
        ge=0,
        description="Weight of log(Z)^2 beside the loss of each label; 0 for none, 1e-4 in PaLM",
    )
    stop_after_steps: int | None = Field(default=None, gt=0, description="End early, with a checkpoint")
    threads: int | None = Field(
        default=None, gt=0, description="CPU threads a rank; default: cores / local ranks"
    )


class CheckpointConfig(Section):
    """When state is saved."""

    every_steps: int | None = Field(
        default=1000, gt=0, description="Besides the one at the end of the run; null for that one only"
    )
    async_save: bool = Field(
        default=True,
        description="Write in the background: training waits only until the state is copied to the host's memory",
    )
    keep: int = Field(default=2, ge=1, description="How many of the newest stay")
    keep_every: int | None = Field(
        default=None, gt=0, description="Those of steps that this divides stay forever"
    )
    keep_best: int = Field(
        default=0, ge=0, description="How many of those with the lowest held-out loss stay besides"
    )
    best_by: str = Field(
        default="mean", description="The held-out loss meant: a domain's, or the `mean` of all domains"
    )
    stop_after_failures: int = Field(
        default=3,
        ge=1,
        description="Saves that fail in a row, before the run stops; earlier ones are retried when due",
    )
    export_hf: ExportConfig | None = Field(
        default=None, description="Exports to Hugging Face in the background; null for none"
    )
    initial_weights: LocalPath | None = Field(
        default=None,
        description="A checkpoint's folder whose weights a new run begins with, instead of random ones",
    )

    @model_validator(mode="after")
    def _exports_what_is_saved(self) -> CheckpointConfig:
        every = None if self.export_hf is None else self.export_hf.every
        if every is not None and (self.every_steps is None or every % self.every_steps):
            raise ValueError(
                f"export_hf.every ({every}) is not a multiple of every_steps ({self.every_steps or 'null'}): only "
                "what is saved can be exported"
            )
        return self


class EvaluationConfig(Section):
    """Held-out loss by domain, and tasks, in the loop."""

    every_steps: int | None = Field(
        default=None, gt=0, description="Besides the one at the end of each stage"
    )
    sequences: int = Field(default=64, gt=0, description="Windows a domain, always the same ones")
    document_mask: bool = Field(
        default=False, description="Measure them under a document mask, as a stage may train"
    )
    tasks: int = Field(
        default=0,
        ge=0,
        description="Items of each kind and domain, made of held-out texts, that the model chooses an option of: "
        "multiple choice of `davinci eval --suite local`, and the geometry of the texts' states",
    )


class WandbConfig(Section):
    """Weights & Biases. Every start of a run directory is one W&B run; RUN/wandb.json has its id."""

    project: str = Field(min_length=1, description="The project that the run is in")
    name: str | None = Field(default=None, description="Name of the run; default: the run directory's")
    entity: str | None = Field(default=None, description="User or team; default: the one logged in")
    group: str | None = Field(default=None, description="Runs of one group are shown together")
    tags: list[str] = Field(default=[], description="Labels of the run")
    mode: Literal["online", "offline"] = Field(
        default="online", description="offline: into RUN/wandb, for `wandb sync` later"
    )


class LoggingConfig(Section):
    """What is written and shown while it runs."""

    tensorboard: bool = Field(default=True, description="Write event files to RUN/tensorboard")
    wandb: WandbConfig | None = Field(
        default=None, description="Send what is measured to Weights & Biases too"
    )
    phases: bool = Field(default=True, description="Time the phases of each step")
    progress: Literal["auto", "live", "lines", "none"] = Field(
        default="auto", description="live: a panel; lines: one line every `every_steps`; auto: by terminal"
    )
    every_steps: int = Field(default=10, gt=0, description="Distance of progress lines")
    token_digest: bool = Field(
        default=False, description="Write a digest of each step's tokens to metrics.jsonl, for audits"
    )
    sharpness_every_steps: int | None = Field(
        default=None,
        gt=0,
        description="Record how sharp the loss is in the last token's logits (arXiv 2405.18710); null: never",
    )
    sharpness_epsilon: float = Field(
        default=1e-3, gt=0, le=1, description="Half the width, relative, of the box that is looked at"
    )

    @model_validator(mode="after")
    def _only_what_acts(self) -> LoggingConfig:
        default = type(self).model_fields["sharpness_epsilon"].default
        if self.sharpness_every_steps is None and self.sharpness_epsilon != default:
            raise ValueError(
                "sharpness_epsilon acts with sharpness_every_steps; found sharpness_every_steps: null"
            )
        return self
