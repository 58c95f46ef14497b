"""What a run measures, written: metrics.jsonl, evals.jsonl, TensorBoard, Weights & Biases. Only rank 0 writes."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any

import torch.distributed as dist

from megatron_davinci.config import RunConfig
from megatron_davinci.optim.schedule import StepPlan
from megatron_davinci.platform.device import Platform
from megatron_davinci.train.boards import Board, open_boards
from megatron_davinci.train.loss_band import LossBand
from megatron_davinci.train.phases import PhaseTimers
from megatron_davinci.train.rank_spread import RankSpread
from megatron_davinci.train.run_directory import RunDirectory, append_line
from megatron_davinci.train.seams import HeldOutLoss
from megatron_davinci.train.source_losses import SourceRecord, loss_by_domain
from megatron_davinci.train.step import StepResult

_CURVES = ("loss", "grad_norm", "learning_rate", "global_batch_size", "tokens_per_second")


_AT_TIMES = ("logit_sharpness", "reference_gap")


class Records:
    """Writes a line for each step and evaluation. Every rank calls its methods: they compare what ranks took.

    Args:
        directory: The run directory.
        config: The run configuration.
        platform: What the run computes on.
        peak: Matrix-product rate of all ranks together, FLOP/s.
        first_step: The first step of this start; TensorBoard hides what an earlier start wrote from there on.
        timers: Knows the phases of each step that has ended.

    Raises:
        DataError: The run that losses are to be compared with has none.
    """

    def __init__(
        self,
        directory: RunDirectory,
        config: RunConfig,
        platform: Platform,
        *,
        peak: float,
        first_step: int,
        timers: PhaseTimers,
    ) -> None:
        self._directory, self._peak, self._timers = directory, peak, timers
        self._sequence_length = config.data.sequence_length
        self._flops_per_token = config.model.flops_per_token(config.data.sequence_length)
        self._domains = {name: config.data.domain(name) for name in config.data.sources}
        band = config.train.low_precision.band
        self._band = None if band is None else LossBand(band)
        self._writes = dist.get_rank() == 0
        self._spread = RankSpread(platform, config.logging.every_steps)
        # Steps whose phases are not known yet: on CUDA, the last one.
        self._waiting: deque[dict[str, Any]] = deque()
        self._boards: list[Board] = []
        if self._writes:
            self._boards = open_boards(directory.path, directory.tensorboard, config, first_step)

    def step(
        self,
        plan: StepPlan,
        result: StepResult,
        seconds: float,
        sources: dict[str, SourceRecord],
        tokens_cut: int | None = None,
        token_digest: str | None = None,
    ) -> dict[str, Any]:
        """Write a step and return its record, to which its phases come when they are known.

        Args:
            plan: The step.
            result: What it measured.
            seconds: How long it took.
            sources: What it took of each source, and the loss there.
            tokens_cut: Tokens of its samples that transforms moved past the end; None where none could.
            token_digest: Of the tokens of its global batch; None unless it is asked for.
        """
        consumed = plan.first_sample + plan.batch
        rate = plan.batch * self._sequence_length / seconds
        record: dict[str, Any] = {
            "step": plan.step,
            "stage": plan.stage_name,
            "consumed_samples": consumed,
            "consumed_tokens": consumed * self._sequence_length,
            "loss": result.loss,
            "grad_norm": result.grad_norm,
            **({} if result.z_loss is None else {"z_loss": result.z_loss}),
            "learning_rate": plan.learning_rate,
            "global_batch_size": plan.batch,
            "tokens_per_second": round(rate, 1),
            "seconds": round(seconds, 6),
            "flops_utilization": round(rate * self._flops_per_token / self._peak, 4),
            "sources": sources,
        }
        if result.low_precision:
            record["low_precision"] = result.low_precision
        if result.sharpness is not None:
            record["logit_sharpness"] = result.sharpness
        if self._band is not None:
            gap = self._band.add(plan.step, consumed, result.loss)
            record |= {} if gap is None else {"reference_gap": gap}
        if tokens_cut is not None:
            record["transform_tokens_cut"] = tokens_cut
        if token_digest is not None:
            record["token_digest"] = token_digest
        self._waiting.append(record)
        self.flush(wait=False)
        return record

    def told(self) -> list[str]:
        """Lines for whoever watches the run, of what has come up since this was asked last."""
        return [] if self._band is None else self._band.told()

    def flush(self, *, wait: bool = True, together: bool = True) -> None:
        """Write the steps whose phases are known.

        Args:
            wait: Wait for those of all steps, so that a checkpoint never is newer than the record.
            together: Every rank is here, so that they can be compared.
        """
        if not self._timers.on:
            while self._waiting:
                self._write(self._waiting.popleft())
        for phases in self._timers.finished(wait=wait):
            record = self._waiting.popleft()
            record["phases"] = {name: round(seconds, 6) for name, seconds in phases.items()}
            spread = self._spread.add(phases) if together else None
            if spread is not None:
                record["phases_by_rank"] = spread
            self._write(record)

    def evaluation(
        self, plan: StepPlan, heldout: HeldOutLoss, tasks: Mapping[str, Mapping[str, Any]], seconds: float
    ) -> None:
        """Write an evaluation.

        Args:
            plan: The step before it.
            heldout: What it measured.
            tasks: Scores by task; empty where none were asked.
            seconds: How long it took.
        """
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
                "learning_rate": plan.learning_rate,
                "heldout_loss": heldout.loss,
                "heldout_tokens": heldout.tokens,
                "heldout_bits_per_byte": heldout.bits_per_byte,
                **({"tasks": tasks} if tasks else {}),
                "seconds": round(seconds, 6),
            },
        )
        for board in self._boards:
            board.add(
                plan.step,
                {f"heldout/{domain}": loss for domain, loss in heldout.loss.items()}
                | {f"heldout_bits_per_byte/{domain}": bits for domain, bits in heldout.bits_per_byte.items()}
                | {
                    f"tasks/{name}": scores[metric]
                    for name, scores in tasks.items()
                    for metric in ("acc_norm", "rank_me")
                    if metric in scores
                },
            )

    def close(self) -> None:
        """Write what is left, once. A rank may be alone here, after an error."""
        self.flush(together=False)
        boards, self._boards = self._boards, []
        for board in boards:
            board.close()

    def _write(self, record: dict[str, Any]) -> None:
        if not self._writes:
            return
        append_line(self._directory.metrics, record)
        numbers = {f"train/{name}": record[name] for name in _CURVES}
        numbers |= {f"train/{name}": record[name] for name in _AT_TIMES if name in record}
        numbers |= {
            f"loss_by_domain/{domain}": loss
            for domain, loss in loss_by_domain([record["sources"]], self._domains).items()
        }
        for name, source in record["sources"].items():
            numbers[f"epoch/{name}"] = source["epoch"]
            if source["loss"] is not None:
                numbers[f"loss_by_source/{name}"] = source["loss"]
        numbers |= {f"phases/{name}": seconds for name, seconds in record.get("phases", {}).items()}
        for linear, operands in record.get("low_precision", {}).items():
            for operand, one in operands.items():
                numbers |= {f"low_precision_{name}/{linear}.{operand}": value for name, value in one.items()}
        for board in self._boards:
            board.add(record["step"], numbers)
