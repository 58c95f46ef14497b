"""What a rank's products of few bits remember: the largest numbers of earlier steps, and what a step has lost."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing import ShardedTensor
from torch import Tensor

from megatron_davinci.config import RunConfig
from megatron_davinci.config.low_precision import LowPrecisionConfig, place_problems, size_problems
from megatron_davinci.errors import EnvironmentProblem
from megatron_davinci.model.context_parallel import SequencePart
from megatron_davinci.model.low_precision import (
    OPERANDS,
    PLACES,
    LowPrecisionProduct,
    Shared,
    attach,
    side_by_side,
)
from megatron_davinci.model.native_product import NativeProduct, fuse
from megatron_davinci.precision import formats, recipes
from megatron_davinci.precision.recipes import Recipe

_KEY = "low_precision"


def recipe_of(low: LowPrecisionConfig, seed: int) -> Recipe:
    """The recipe that a configuration asks for.

    Args:
        low: The section `train.low_precision`, with a recipe.
        seed: The run's.
    """
    if low.recipe in ("delayed", "current"):
        return recipes.tensor_scaled(delayed=low.recipe == "delayed")
    if low.recipe == "block":
        return recipes.block_scaled()
    if low.recipe == "mxfp8":
        return recipes.mxfp8()
    if low.recipe == "nvfp4":
        parts = low.nvfp4
        return recipes.nvfp4(
            seed=seed,
            hadamard=parts.hadamard,
            tiles=parts.tiles,
            stochastic=parts.stochastic_rounding,
        )
    bits = low.bits
    return recipes.bit_reduction(
        formats.parse(bits.format), truncate=bits.rounding == "truncate", scaled=bits.scaling == "tensor"
    )


class LowPrecision:
    """The products of few bits of all of a rank's model chunks.

    Args:
        chunks: The model chunks.
        config: The run configuration, with a recipe.
        native: Whether torch's own kernels multiply.
        fused_swiglu: Whether MLPs leave their activation to the second linear layer.

    Raises:
        EnvironmentProblem: Blocks do not divide a dimension, or the model has what these products are not in.
    """

    def __init__(self, chunks: Sequence[Any], config: RunConfig, *, native: bool, fused_swiglu: bool) -> None:
        low = config.train.low_precision
        _refuse(config, "native" if native else "emulate")
        self.config = low
        self.shared = Shared(recipe_of(low, config.run.seed), config.run.seed, config.data.sequence_length)
        self.shared.fp8_activations = low.activations == "fp8"
        self.shared.keep_codes = low.keep_codes and native
        part = SequencePart.here(config.data.sequence_length)
        if part.ranks > 1:
            self.shared.positions = part.take(torch.arange(part.length), 0)
        self.layers = config.model.num_layers
        inside = range(low.keep_first_layers, self.layers - low.keep_last_layers)
        kind = NativeProduct if native else LowPrecisionProduct
        self.products = attach(chunks, self.shared, layers=inside, fused_swiglu=fused_swiglu, kind=kind)
        if native:
            fuse(chunks, self.products)
        self._history = torch.zeros(
            low.amax_history if self.shared.recipe.delayed else 0, len(self.products), 3
        )
        self._device = next(chunks[0].parameters()).device
        self._amax, self._lost = side_by_side(self.products, self._device)
        self._batch: np.ndarray | None = None
        self._size = config.train.micro_batch_size
        self._begun: dict[int, int] = {}

    def begin_step(self, step: int, tokens_left: int) -> bool:
        """Say which step is next. Those that begin in the tail multiply as `train.precision` says.

        Args:
            step: Its number.
            tokens_left: Tokens from its first to the run's last.

        Returns:
            Whether what it loses is to be counted.
        """
        inside = tokens_left <= (self.config.tail_tokens or 0)
        self.shared.forward = not inside
        self.shared.backward = not (inside and self.config.tail == "all")
        every = self.config.watch_every_steps
        return every is not None and step % every == 0

    @contextmanager
    def step(self, numbers: np.ndarray | None, *, watching: bool) -> Iterator[None]:
        """A context in which the largest numbers of operands are noted, and what is lost where it is watched.

        Args:
            numbers: [samples of this rank] the global numbers of its samples, in the order of its micro-batches;
                None where nobody knows them.
            watching: Whether what is lost is counted.
        """
        shared = self.shared
        self._amax.zero_()
        self._lost.zero_()
        self._batch, self._begun = numbers, {}
        shared.learning, shared.watching = True, watching
        try:
            yield
        finally:
            shared.learning, self._batch, shared.samples = False, None, None
            self._forget_weights()  # they change

    def _forget_weights(self) -> None:
        for product in self.products:
            if isinstance(product, NativeProduct):
                product.weight_codes = None

    def begin_micro_batch(self, chunk: int) -> Tensor | None:
        """Say that a model chunk takes its next micro-batch.

        Args:
            chunk: Which.

        Returns:
            The global numbers of its samples, for `resume_micro_batch`.
        """
        number = self._begun.get(chunk, 0)
        self._begun[chunk] = number + 1
        if self._batch is not None:
            these = self._batch[number * self._size : (number + 1) * self._size]
            self.shared.samples = torch.from_numpy(np.asarray(these, np.int64))
        return self.shared.samples

    def resume_micro_batch(self, samples: Tensor | None) -> None:
        """Say that the backward pass of a micro-batch begins: what is computed again is of its samples."""
        self.shared.samples = samples

    def not_finite(self) -> list[str]:
        """Whose largest number of this step is infinite or none, as in `layers.3.linear_fc1's gradient`."""
        bad = (~self._amax.isfinite()).nonzero().tolist()
        return [f"{self.products[row].name}'s {OPERANDS[column]}" for row, column in bad]

    def commit(self) -> None:
        """The step is applied: its largest numbers, of all ranks that have the layers, make the next scales.

        Every rank calls this.
        """
        if not self.shared.recipe.delayed or not self.products:
            return
        amax = self._amax.clone()
        group = parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)
        dist.all_reduce(amax, op=dist.ReduceOp.MAX, group=group)
        self._history = torch.cat([amax.cpu()[None], self._history[:-1]])
        self._tell()

    def _tell(self) -> None:
        largest = self._history.amax(0)
        there = (largest > 0).tolist()
        for product, row, here in zip(self.products, largest.to(self._device), there, strict=True):
            product.remember(row, here)

    def report(self) -> dict[str, dict[str, dict[str, float]]]:
        """What this step's operands were and lost, of the whole model: by linear layer and operand.

        Every rank calls this.

        Returns:
            `{"layers.0.linear_qkv": {"input": {"amax": ..., "scale": ..., "underflow": ..., "overflow": ...}}}`;
            parts are of the numbers of all ranks and micro-batches, and `scale` is the smallest.
        """
        device = self._device
        shape = (self.layers, len(PLACES), len(OPERANDS))
        sums = torch.zeros(*shape, 3, device=device)
        # The largest of minus the scales is the smallest of them.
        tops = torch.full((*shape, 2), -torch.inf, device=device)
        for product in self.products:
            place = PLACES.index(product.place)
            sums[product.layer, place] = product.lost[:, :3]
            tops[product.layer, place, :, 0] = product.amax
            tops[product.layer, place, :, 1] = torch.where(
                product.lost[:, 2] > 0, -product.lost[:, 3], -torch.inf
            )
        dist.all_reduce(sums)
        dist.all_reduce(tops, op=dist.ReduceOp.MAX)
        found: dict[str, dict[str, dict[str, float]]] = {}
        for layer, place, operand in (sums[..., 2] > 0).nonzero().tolist():
            under, over, times = sums[layer, place, operand].tolist()
            amax, scale = tops[layer, place, operand].tolist()
            scale = 0.0 if scale == -torch.inf else -scale  # of nothing but zeros
            said = {"amax": amax, "scale": scale, "underflow": under / times, "overflow": over / times}
            found.setdefault(f"layers.{layer}.{PLACES[place]}", {})[OPERANDS[operand]] = said
        return found

    def sharded_state(self) -> dict[str, ShardedTensor]:
        """The largest numbers of earlier steps, as Megatron-Core stores them: by layer, the same on any layout."""
        if not self.shared.recipe.delayed:
            return {}
        replica = (
            0,
            parallel_state.get_tensor_model_parallel_rank(),
            parallel_state.get_data_parallel_rank(with_context_parallel=True),
        )
        return {
            product.name: ShardedTensor.from_rank_offsets(
                f"{_KEY}.{product.name}.amax", self._history[:, row].contiguous(), replica_id=replica
            )
            for row, product in enumerate(self.products)
        }

    def load(self, state: dict[str, Tensor]) -> None:
        """Go on from what `sharded_state` described."""
        if not self.shared.recipe.delayed or not self.products:
            return  # all layers of this pipeline stage may be kept as they are
        self._history = torch.stack([state[product.name].cpu() for product in self.products], 1)
        self._tell()


def _refuse(config: RunConfig, backend: str) -> None:
    """Refuse what the configuration could not know of: `auto` may come to other products than ours."""
    if problems := place_problems(config, f"train.low_precision.backend: {backend}"):
        raise EnvironmentProblem(
            "Products of few bits are not where they are asked for.",
            where="train.low_precision",
            found="\n".join(problems),
            do="take out what is named, or train by Transformer Engine's layers, on GPUs",
        )
    if problems := size_problems(config, own=True):
        raise EnvironmentProblem(
            "Dimensions are not of whole blocks.",
            where="train.low_precision",
            found="\n".join(problems),
            do="change the sizes that are named, or take recipe: current, which has no blocks",
        )


def low_precision_of(chunks: Sequence[Any]) -> LowPrecision | None:
    """Of a rank's model chunks, which share one; None where all multiply as they are.

    Args:
        chunks: The model chunks, wrapped or not.
    """
    chunk = getattr(chunks[0], "module", chunks[0])
    found: LowPrecision | None = getattr(chunk, "low_precision", None)
    return found
