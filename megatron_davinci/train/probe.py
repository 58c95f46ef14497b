"""Where a number that is not finite comes from, on this rank: looked for while a step is taken once more."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

_SHOWN = 3  # names and samples that a message has


@dataclass(frozen=True)
class Finding:
    """What one rank found.

    Attributes:
        rank: Its number.
        host: Its node.
        samples: Global numbers of samples whose loss or gradient is not finite.
        source: Of these samples, all of them where they are of several; empty where that is not known.
        module: The first module whose output is not finite.
        gradients: Parameters whose gradient is not finite, the one that was computed first before the others.
        weights: Parameters that are not finite themselves.
    """

    rank: int
    host: str
    samples: tuple[int, ...] = ()
    source: str = ""
    module: str = ""
    gradients: tuple[str, ...] = ()
    weights: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.samples or self.module or self.gradients or self.weights)

    def __str__(self) -> str:
        parts = []
        if self.samples:
            of = f" of {_counted(self.source.count(', ') + 1, 'source')} {self.source}" if self.source else ""
            parts.append(f"{_counted(len(self.samples), 'sample')} {_some(self.samples)}{of}")
        if self.weights:
            parts.append(f"weights of {_some(self.weights)}")
        if self.module:
            parts.append(f"output of {self.module}")
        if self.gradients:
            parts.append(f"gradient of {_some(self.gradients)}")
        return f"rank {self.rank} ({self.host}): " + "; ".join(parts)


class Probe:
    """Watches one attempt at a step. A context manager.

    Args:
        chunks: The wrapped model chunks of this rank.
    """

    def __init__(self, chunks: Sequence[Any]) -> None:
        self._chunks, self._handles = chunks, []  # type: tuple[Sequence[Any], list[Any]]
        self.module = ""
        self.gradients: list[str] = []
        self.micro_batches: list[int] = []  # those whose gradient is not finite
        self._backward: dict[int, int] = {}

    def __enter__(self) -> Probe:
        for name, module in named_modules(self._chunks):
            self._handles.append(module.register_forward_hook(partial(self._after, name)))
        for name, parameter in named_parameters(self._chunks):
            if parameter.requires_grad:
                self._handles.append(parameter.register_hook(partial(self._gradient, name)))
        return self

    def __exit__(self, *exc: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _after(self, name: str, module: Any, inputs: Any, output: Any) -> None:
        # Modules inside one come before it, so the first is the innermost.
        if not self.module and any(not _finite(tensor) for tensor in _tensors(output)):
            self.module = name

    def _gradient(self, name: str, gradient: Tensor) -> None:
        # Each parameter has one gradient a micro-batch.
        key = hash(name)
        number = self._backward[key] = self._backward.get(key, -1) + 1
        if not _finite(gradient):
            if name not in self.gradients:
                self.gradients.append(name)
            if number not in self.micro_batches:
                self.micro_batches.append(number)

    def finding(
        self,
        reports: Sequence[Tensor],
        numbers: np.ndarray,
        micro_batch_size: int,
        source: Tensor | None,
        sources: Sequence[str],
        gradients: Sequence[str] = (),
    ) -> Finding:
        """What was found.

        Args:
            reports: Of each micro-batch, [rows, 3]: the loss of each row first; empty but on the last pipeline stage.
            numbers: [rows of all micro-batches]: this rank's sample numbers.
            micro_batch_size: Rows of a micro-batch.
            source: [rows]: the place of each row's source.
            sources: Their names.
            gradients: Parameters whose gradient was not finite in the attempt before.
        """
        rows: list[int] = []
        if reports:
            losses = torch.cat([report[:, 0] for report in reports])
            rows = torch.nonzero(~torch.isfinite(losses)).flatten().tolist()
        if not rows:
            # The loss is fine and the gradient is not: the micro-batch is known, its samples are not told apart.
            rows = [
                row
                for number in self.micro_batches
                for row in range(number * micro_batch_size, (number + 1) * micro_batch_size)
            ]
        rows = [row for row in rows if row < len(numbers)]
        places = source[rows].tolist() if rows and source is not None else []
        return Finding(
            rank=int(os.environ.get("RANK", "0")),
            host=socket.gethostname(),
            samples=tuple(int(numbers[row]) for row in rows),
            source=", ".join(dict.fromkeys(sources[place] for place in places)),
            module=self.module,
            gradients=tuple(dict.fromkeys([*self.gradients, *gradients])),
            weights=tuple(name for name, one in named_parameters(self._chunks) if not _finite(one)),
        )


def bad_gradients(chunks: Sequence[Any]) -> list[str]:
    """Parameters whose summed gradient is not finite, after a step that was not applied."""
    return [
        name
        for name, parameter in named_parameters(chunks)
        if (gradient := getattr(parameter, "main_grad", None)) is not None and not _finite(gradient)
    ]


def named_modules(chunks: Sequence[Any]) -> Iterator[tuple[str, Any]]:
    """Modules of all chunks by their names in the whole model, layers counted over all pipeline stages."""
    for chunk in chunks:
        inner = unwrapped(chunk)
        shift = {
            f"decoder.layers.{number}": f"decoder.layers.{layer.layer_number - 1}"
            for number, layer in enumerate(getattr(getattr(inner, "decoder", None), "layers", ()))
            if hasattr(layer, "layer_number")
        }
        for name, module in inner.named_modules():
            if name:
                yield _renamed(name, shift), module


def named_parameters(chunks: Sequence[Any]) -> Iterator[tuple[str, Any]]:
    """As `named_modules`, for parameters; one that two modules share comes once."""
    seen: set[int] = set()
    for name, module in named_modules(chunks):
        for own, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                yield f"{name}.{own}", parameter


def unwrapped(chunk: Any) -> Any:
    """The model in a chunk's wrappers."""
    while hasattr(chunk, "module"):
        chunk = chunk.module
    return chunk


def _renamed(name: str, shift: dict[str, str]) -> str:
    parts = name.split(".")
    layer = ".".join(parts[:3])
    return ".".join([shift.get(layer, layer), *parts[3:]])


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, tuple | list):
        for one in output:
            yield from _tensors(one)


def _finite(tensor: Tensor) -> bool:
    if not tensor.is_floating_point():
        return True
    with suppress(RuntimeError):  # a kind of tensor that knows no such question, as FP8 weights
        return bool(torch.isfinite(tensor.detach()).all())
    return True


def _counted(count: int, noun: str) -> str:
    return noun if count == 1 else f"{noun}s"


def _some(items: Sequence[object]) -> str:
    rest = len(items) - _SHOWN
    return ", ".join(map(str, items[:_SHOWN])) + (f" and {rest} more" if rest > 0 else "")
