"""What a run measures, written: metrics.jsonl, evals.jsonl, TensorBoard. Only rank 0 writes."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from megatron_davinci.config import RunConfig
from megatron_davinci.optim.schedule import StepPlan
from megatron_davinci.train.run_directory import RunDirectory, append_line
from megatron_davinci.train.seams import HeldOutLoss
from megatron_davinci.train.step import StepResult


class Records:
    """Writes a line for each step and evaluation.

    Args:
        directory: The run directory.
        config: The run configuration.
        peak: Matrix-product rate of all ranks together, FLOP/s.
        first_step: The first step of this start; TensorBoard hides what an earlier start wrote from there on.
    """

    def __init__(self, directory: RunDirectory, config: RunConfig, *, peak: float, first_step: int) -> None:
        self._directory, self._peak = directory, peak
        self._sequence_length = config.data.sequence_length
        self._flops_per_token = config.model.flops_per_token(config.data.sequence_length)
        self._writes = dist.get_rank() == 0
        self._board: Any = None
        if self._writes and config.logging.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            directory.tensorboard.mkdir(parents=True, exist_ok=True)
            self._board = SummaryWriter(str(directory.tensorboard), purge_step=first_step)

    def step(
        self, plan: StepPlan, result: StepResult, seconds: float, tokens_cut: int | None = None
    ) -> dict[str, Any]:
        """Write a step and return its record.

        Args:
            plan: The step.
            result: What it measured.
            seconds: How long it took.
            tokens_cut: Tokens of its samples that transforms moved past the end; None where none could.
        """
        consumed = plan.first_sample + plan.batch
        rate = plan.batch * self._sequence_length / seconds
        record = {
            "step": plan.step,
            "stage": plan.stage_name,
            "consumed_samples": consumed,
            "consumed_tokens": consumed * self._sequence_length,
            "loss": result.loss,
            "grad_norm": result.grad_norm,
            "learning_rate": plan.learning_rate,
            "global_batch_size": plan.batch,
            "tokens_per_second": round(rate, 1),
            "seconds": round(seconds, 6),
            "flops_utilization": round(rate * self._flops_per_token / self._peak, 4),
        }
        if tokens_cut is not None:
            record["transform_tokens_cut"] = tokens_cut
        if self._writes:
            append_line(self._directory.metrics, record)
            if self._board is not None:
                for name in ("loss", "grad_norm", "learning_rate", "global_batch_size", "tokens_per_second"):
                    self._board.add_scalar(f"train/{name}", record[name], plan.step)
        return record

    def evaluation(self, plan: StepPlan, heldout: HeldOutLoss) -> None:
        """Write an evaluation."""
        if not self._writes:
            return
        consumed = plan.first_sample + plan.batch
        append_line(
            self._directory.evaluations,
            {
                "step": plan.step,
                "stage": plan.stage_name,
                "consumed_samples": consumed,
                "consumed_tokens": consumed * self._sequence_length,
                "heldout_loss": heldout.loss,
                "heldout_tokens": heldout.tokens,
            },
        )
        if self._board is not None:
            for domain, loss in heldout.loss.items():
                self._board.add_scalar(f"heldout/{domain}", loss, plan.step)

    def close(self) -> None:
        """Flush what is buffered."""
        if self._board is not None:
            self._board.close()
