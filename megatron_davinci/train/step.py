"""One training step: forward and backward over the micro-batches, the update, and what it measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import tee
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_davinci.config import RunConfig
from megatron_davinci.model.context_parallel import SequencePart
from megatron_davinci.model.documents import DocumentMask
from megatron_davinci.model.precision_state import low_precision_of
from megatron_davinci.model.router import routers
from megatron_davinci.model.sharpness import SharpnessMonitor
from megatron_davinci.platform.device import Platform
from megatron_davinci.platform.distributed import largest
from megatron_davinci.platform.weight_gradient import know_zeroed
from megatron_davinci.train import micro_batches as micro
from megatron_davinci.train.micro_batches import MicroBatch
from megatron_davinci.train.phases import PhaseTimers
from megatron_davinci.train.source_losses import add_by_source


class NotApplied(FloatingPointError):
    """A step's update was not applied, on any rank.

    Args:
        why: What was found.
        is_spike: Whether its numbers are finite, and were judged to be a spike.
        has_cause: Whether this rank has found it, and has not only heard of it.
    """

    def __init__(self, why: str, *, is_spike: bool = False, has_cause: bool = True) -> None:
        super().__init__(why)
        self.is_spike, self.has_cause = is_spike, has_cause


@dataclass(frozen=True)
class StepResult:
    """What a step measured, the same on every rank.

    Attributes:
        loss: Mean over the labels of the global batch, by their weights, nats a token.
        grad_norm: Norm of the gradient before clipping.
        z_loss: As the loss, and not part of it; None without one.
        low_precision: What products of few bits lost, by linear layer and operand; None unless watched.
        sharpness: How sharp the loss is in the last token's logits, the mean over sequences; None unless asked for.
        sources: By the place of each source: the loss of its labels, summed by their weights, nats, and the weights'
            sum. One entry where the samples' sources were not said.
    """

    loss: float
    grad_norm: float
    z_loss: float | None = None
    low_precision: dict[str, dict[str, dict[str, float]]] | None = None
    sources: tuple[tuple[float, float], ...] = ()
    sharpness: float | None = None


def wrap_model(chunks: Sequence[Any], config: RunConfig) -> list[DistributedDataParallel]:
    """Wrap a rank's model chunks for data parallelism; gradients are summed in fp32."""
    low = config.train.low_precision
    settings = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=config.parallel.overlap_gradient_reduce,
        overlap_param_gather=config.parallel.overlap_parameter_gather,
        num_distributed_optimizer_instances=config.parallel.optimizer_instances,
        fp8_param_gather=low.parameters,
        reuse_grad_buf_for_mxfp8_param_ag=low.parameters and low.recipe == "mxfp8",
        use_distributed_optimizer=config.cuts_optimizer,
    )
    wrapped = [
        # The backward pass of the first chunk is the last: the others have time for one message each.
        DistributedDataParallel(chunk.config, settings, chunk, disable_bucketing=number > 0)
        for number, chunk in enumerate(chunks)
    ]
    for one in wrapped:
        know_zeroed(one)
    mcore = chunks[0].config  # of all chunks
    mcore.finalize_model_grads_func = finalize_model_grads
    if config.parallel.overlap_gradient_reduce:
        mcore.no_sync_func = _one_or_all([chunk.no_sync for chunk in wrapped])
        # With several instances Megatron-Core does not know that a sum has begun, and what the schedule begins would
        # be added up again in finishing it. There the last micro-batch's hooks begin it, which they do once.
        if config.parallel.optimizer_instances == 1:
            mcore.grad_sync_func = _one_or_all([chunk.start_grad_sync for chunk in wrapped])
    return wrapped


def _one_or_all(functions: list[Any]) -> Any:
    """As Megatron-Core's schedules take it: the interleaved one a list, the others a function."""
    return functions[0] if len(functions) == 1 else functions


class Stepper:
    """Runs steps of a wrapped model.

    Args:
        wrapped: The model chunks of this rank.
        optimizer: Megatron-Core's optimizer; None where only losses are wanted.
        config: The run configuration.
        platform: What the run computes on.
        timers: Are told the phases of a step; None for nobody.

    Attributes:
        judge: Is asked before an update, with the loss and the gradient's norm, both finite: says why it must not be
            applied, or None.
        compute: Is given what computes a step's gradient from the beginning, and returns its answer; it may call it
            more than once.
        reports: What was reported of each micro-batch of the last step, [rows, 3]; empty but on the last pipeline
            stage.
    """

    def __init__(
        self,
        wrapped: Sequence[Any],
        optimizer: Any,
        config: RunConfig,
        platform: Platform,
        timers: PhaseTimers | None = None,
    ) -> None:
        self.wrapped, self.optimizer, self.platform = list(wrapped), optimizer, platform
        self.timers = timers or PhaseTimers(None)
        self.timers.attach(self.wrapped, optimizer)
        self.sequence_length = config.data.sequence_length
        self.micro_batch_size = config.train.micro_batch_size
        self.has_z_loss = config.train.z_loss > 0
        self._schedule = get_forward_backward_func()
        self._routers = routers(self.wrapped)
        self.low_precision = low_precision_of(self.wrapped)
        self._sharpness = sharpness_of(self.wrapped, config, platform)
        self.judge: Callable[[float, float], str | None] = _no_spike
        self.compute: Callable[[Callable[[], list[Tensor]]], list[Tensor]] = once
        self.reports: list[Tensor] = []
        self._loss_now = math.nan
        # Without the distributed optimizer each replica measures its own sum of the gradient, and may find another.
        self._replicas_measure = (
            not config.parallel.distributed_optimizer and parallel_state.get_data_parallel_world_size() > 1
        )
        if optimizer is not None:
            self._look_before_updates(optimizer)

    def train(
        self,
        tokens: Tensor | None,
        micro_batches: int,
        loss_mask: Tensor | None = None,
        document_mask: DocumentMask | None = None,
        source: Tensor | None = None,
        sources: int = 1,
        numbers: np.ndarray | None = None,
        watch: bool = False,
        sharpness: bool = False,
    ) -> StepResult:
        """Take one step.

        Args:
            tokens: [micro_batches * micro_batch_size, sequence_length + 1] integers, this rank's samples in the
                order of the micro-batches; None on pipeline ranks that read no tokens.
            micro_batches: Micro-batches on each data-parallel rank.
            loss_mask: [micro_batches * micro_batch_size, sequence_length] integers, what each label weighs, 0 where
                it carries no loss; None where all weigh 1. The loss is the weighted mean over all ranks' labels.
            document_mask: Confines attention to documents; None for plain causal attention. A label that is in
                another document than its input then carries no loss. Every pipeline rank needs tokens.
            source: [micro_batches * micro_batch_size] int64, the place of each sample's source; None where all are
                of one. The last pipeline stage reads it.
            sources: How many sources there are.
            numbers: [micro_batches * micro_batch_size] the samples' global numbers, of which stochastic rounding is
                a function; None where nobody knows them.
            watch: Whether to count what products of few bits lose.
            sharpness: Whether to measure how sharp the loss is in the last token's logits.

        Raises:
            NotApplied: The loss or the gradient is not finite, no label carries loss, or `judge` has refused.
        """
        if self._routers:
            self._tell_routers(tokens, loss_mask, document_mask)

        def gradient() -> list[Tensor]:
            with self.timers.phase("optimizer"):
                for chunk in self.wrapped:
                    chunk.zero_grad_buffer()
                self.optimizer.zero_grad()
            if self._sharpness is not None:
                self._sharpness.begin(sharpness)
            batches = micro.split(
                tokens, loss_mask, document_mask, self.micro_batch_size, self.platform.device
            )
            if self.low_precision is None:
                return self._run(batches, micro_batches, self.micro_batch_size, forward_only=False)
            with self.low_precision.step(numbers, watching=watch):
                return self._run(batches, micro_batches, self.micro_batch_size, forward_only=False)

        self.reports = reports = self.compute(gradient)
        by_source = self._gather(reports, source, sources)
        total, count, z_loss = (sum(column) for column in zip(*by_source, strict=True))
        if count == 0:
            raise NotApplied("no label of the global batch carries loss")
        loss = total / count
        if not math.isfinite(loss):
            raise NotApplied(f"loss {loss}")
        self._loss_now = loss
        with self.timers.phase("optimizer"):
            _, grad_norm, _ = self.optimizer.step()
            if self.low_precision is not None:
                self.low_precision.commit()
        return StepResult(
            loss,
            float(grad_norm),
            z_loss / count if self.has_z_loss else None,
            self.low_precision.report() if watch and self.low_precision is not None else None,
            tuple((of_source, weight) for of_source, weight, _ in by_source),
            self._mean_sharpness() if sharpness else None,
        )

    def _mean_sharpness(self) -> float | None:
        if self._sharpness is None:
            return None
        total, count = self._from_last_stage(self._sharpness.total.clone()).tolist()
        return total / count

    @torch.no_grad()
    def loss(
        self,
        tokens: Tensor | None,
        micro_batches: int,
        micro_batch_size: int,
        loss_mask: Tensor | None = None,
        document_mask: DocumentMask | None = None,
    ) -> tuple[float, float]:
        """Sum the loss over held-out samples, without an update.

        Args:
            tokens: As in `train`, with `micro_batch_size` rows a micro-batch.
            micro_batches: Micro-batches on each data-parallel rank.
            micro_batch_size: Rows of each.
            loss_mask: As in `train`.
            document_mask: As in `train`.

        Returns:
            Sum of the loss over all ranks' labels by their weights, in nats, and the weights' sum: the labels' number
            where each weighs 0 or 1.
        """
        self.gather_weights()
        for chunk in self.wrapped:
            chunk.eval()
        try:
            least = self._fewest_micro_batches
            if micro_batches < least:
                missing = (least - micro_batches) * micro_batch_size
                tokens, loss_mask = micro.fill_up(tokens, loss_mask, missing)
                micro_batches = least
            batches = micro.split(tokens, loss_mask, document_mask, micro_batch_size, self.platform.device)
            reports = self._run(batches, micro_batches, micro_batch_size, forward_only=True)
            return self._gather(reports)[0][:2]
        finally:
            for chunk in self.wrapped:
                chunk.train()

    def gather_weights(self) -> None:
        """Complete the weights of the last update, where the next forward pass of a step would have gathered them."""
        if self.optimizer is not None:
            for chunk in self.wrapped:
                if chunk.ddp_config.overlap_param_gather:
                    chunk.start_param_sync(force_sync=True)

    def _run(
        self, batches: Iterator[MicroBatch], micro_batches: int, micro_batch_size: int, *, forward_only: bool
    ) -> list[Tensor]:
        """What `_loss` reported of each micro-batch, on ranks of the last pipeline stage."""
        chunks = len(self.wrapped)
        if chunks > 1:
            self.wrapped[0].config.microbatch_group_size_per_vp_stage = interleaved_group(
                micro_batches, parallel_state.get_pipeline_model_parallel_world_size()
            )
        reports: list[Tensor] = self._schedule(
            forward_step_func=_forward
            if forward_only or self.low_precision is None
            else self._forward_numbered,
            # Each chunk takes the micro-batches in their order; one that is behind finds them kept.
            data_iterator=list(tee(batches, chunks)) if chunks > 1 else batches,
            model=self.wrapped,
            num_microbatches=micro_batches,
            seq_length=self.sequence_length,
            micro_batch_size=micro_batch_size,
            forward_only=forward_only,
        )
        return reports

    def _forward_numbered(self, batches: Iterator[MicroBatch], model: Any) -> tuple[Tensor, Any]:
        """`_forward`, having said of which samples it is; and again when its backward pass begins."""
        assert self.low_precision is not None
        resume = self.low_precision.resume_micro_batch
        samples = self.low_precision.begin_micro_batch(self.wrapped.index(model))
        output, loss = _forward(batches, model)
        if output.requires_grad:
            output.register_hook(lambda _: resume(samples))
        return output, loss

    @property
    def _fewest_micro_batches(self) -> int:
        """Below this the schedule cannot run."""
        return parallel_state.get_pipeline_model_parallel_world_size() if len(self.wrapped) > 1 else 1

    def _gather(
        self, reports: list[Tensor], source: Tensor | None = None, sources: int = 1
    ) -> list[tuple[float, float, float]]:
        """Add up the rows' (sum, weight, sum of the z-loss) by source over the ranks that have them, and tell all."""
        # float64: the sum over a global batch of millions of tokens keeps its digits.
        total = add_by_source(reports, source, sources, self.platform.device)
        return [(loss, weight, z_loss) for loss, weight, z_loss in self._from_last_stage(total).tolist()]

    def _look_before_updates(self, optimizer: Any) -> None:
        """Have the optimizer's step raise `NotApplied` between measuring the gradient and using it.

        Without a loss scale Megatron-Core looks for no infinities, and a gradient whose norm is NaN is not even
        clipped: one bad element would be in every weight after the step.
        """
        measure = optimizer.get_grad_norm

        def checked() -> float:
            norm = float(measure())
            finite = math.isfinite(norm)
            why = self.judge(self._loss_now, norm) if finite else f"gradient norm {norm}"
            if self.low_precision is not None and (bad := self.low_precision.not_finite()):
                # A scale from earlier steps makes the format's largest number of an infinite one.
                finite, why = False, f"{why or 'the largest number'}: not finite is {bad[0]}"
            worst = 0 if why is None else 1 if finite else 2
            if self._replicas_measure or self.low_precision is not None:
                worst = largest([worst])[0]
            if worst:
                heard = "the gradient of another replica"
                raise NotApplied(why or heard, is_spike=worst == 1, has_cause=why is not None)
            return norm

        optimizer.get_grad_norm = checked

    def _tell_routers(
        self, tokens: Tensor | None, loss_mask: Tensor | None, document_mask: DocumentMask | None
    ) -> None:
        """Say what the labels of the global batch weigh, a token."""
        mine = torch.zeros(2, dtype=torch.float64, device=self.platform.device)
        if tokens is not None:
            mine += torch.tensor(micro.label_weight(tokens, loss_mask, document_mask)).to(mine)
        weight, labels = self._from_last_stage(mine).tolist()
        for router in self._routers:
            router.label_weight = weight / labels

    def _from_last_stage(self, total: Tensor) -> Tensor:
        """Add up what the last pipeline ranks have, and tell the others."""
        if parallel_state.is_pipeline_last_stage():
            dist.all_reduce(total, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
        if parallel_state.get_pipeline_model_parallel_world_size() > 1:
            dist.broadcast(
                total,
                src=parallel_state.get_pipeline_model_parallel_last_rank(),
                group=parallel_state.get_pipeline_model_parallel_group(),
            )
        return total


def sharpness_of(wrapped: Sequence[Any], config: RunConfig, platform: Platform) -> SharpnessMonitor | None:
    """A monitor of the logits' sharpness in a rank's last chunk; None unless the configuration asks for one."""
    if config.logging.sharpness_every_steps is None:
        return None
    part = SequencePart.here(config.data.sequence_length)
    last = part.chunks[-1][1] == part.length
    monitor = SharpnessMonitor(config.logging.sharpness_epsilon, last=last, device=platform.device)
    wrapped[-1].module.sharpness = monitor
    return monitor


def interleaved_group(micro_batches: int, pipeline: int) -> int:
    """How many micro-batches a chunk of an interleaved pipeline takes before the next chunk's turn.

    Megatron-Core wants at least as many as there are pipeline ranks, and as many or none left over. The smallest such
    number keeps the fewest activations. It is there for any number of micro-batches from `pipeline` on, where
    Megatron-LM asks for multiples of `pipeline`; so a batch may grow by any step.
    """
    return next(
        size
        for size in range(pipeline, micro_batches + 1)
        if micro_batches % size == 0 or micro_batches % size >= pipeline
    )


def once(gradient: Callable[[], list[Tensor]]) -> list[Tensor]:
    """Compute it."""
    return gradient()


def _no_spike(loss: float, grad_norm: float) -> str | None:
    """Nothing is a spike."""
    return None


def _forward(batches: Iterator[MicroBatch], model: Any) -> tuple[Tensor, Any]:
    """Megatron-Core's forward step: run one micro-batch, and say how to get a loss from what comes out."""
    batch = next(batches, MicroBatch())
    # RoPE takes positions from the sequence axis, and attention is causal without a mask.
    output = model(batch.tokens, None, None, labels=batch.labels, packed_seq_params=batch.documents)
    return output, partial(_loss, loss_mask=batch.loss_mask)


def _loss(losses: Tensor, loss_mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Sum the labels' losses by their weights, sum the weights, and report both and the z-loss by row: [batch, 3].

    Weights are whole numbers, since Megatron-Core adds them up in an int32 to divide by; which whole numbers is
    nothing to the mean. Megatron-Core divides the first sum in place; the report is not touched.

    Args:
        losses: [batch, sequence], or [2, batch, sequence] with the z-loss of each label beside its loss.
        loss_mask: [batch, sequence], or None where all weigh 1.
    """
    losses = losses.float()
    losses = losses if losses.ndim == 3 else losses.unsqueeze(0)
    rows, length = losses.shape[1:]
    if loss_mask is None:
        weights = torch.full((rows,), length, dtype=torch.float64, device=losses.device)
        count = torch.tensor(rows * length, dtype=torch.int, device=losses.device)
    else:
        # A label without loss may have an infinite one: 0 * inf is not 0.
        losses = torch.where(loss_mask.bool(), losses * loss_mask, 0.0)
        weights = loss_mask.sum(1, dtype=torch.float64)
        count = weights.sum().int()
    of_row = losses.detach().sum(2, dtype=torch.float64)
    report = torch.stack([of_row[0], weights, of_row[1:].sum(0)], 1)
    return losses.sum(), count, report
