"""The weighted mean of several checkpoints' weights, as a checkpoint.

Of one run's checkpoints, at a learning rate that does not fall, it stands for what a decay would have made of it
(Sanyal et al. 2023, arXiv 2306.03241; Li et al. 2025, arXiv 2505.12082; Tian et al. 2025, arXiv 2507.17634). Of runs
that began alike and read other data or another order, it is the soup that OLMo 2 ends with (arXiv 2501.00656).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import IO, NamedTuple

import torch
from torch import Tensor

from megatron_davinci.convert.resumable import Progress
from megatron_davinci.convert.stored import StoredTensors
from megatron_davinci.convert.tensor_files import cast
from megatron_davinci.convert.write_state import Source, write_state
from megatron_davinci.errors import CheckpointError


class Part(NamedTuple):
    """One of the checkpoints that a mean is made of.

    Attributes:
        folder: The checkpoint's, which errors name.
        state: The folder with its tensors.
        share: Its weight in the mean; all shares sum to 1.
    """

    folder: Path
    state: Path
    share: float


def write_mean(
    parts: Sequence[Part],
    folder: Path,
    opened: Callable[[str, str], IO[bytes]] = open,
    *,
    dtype: torch.dtype = torch.float32,
    progress: Progress = lambda done, total: None,
) -> None:
    """Write the mean of checkpoints' weights as a checkpoint's `state`, a layer of a tensor in memory at a time.

    Sums are in float64, and rounded once.

    Args:
        parts: What it is the mean of, of any layouts and dtypes.
        folder: The folder, which exists and is empty.
        opened: Opens the large files, given name and mode.
        dtype: Of what is written.
        progress: Is told bytes read, and bytes in all.

    Raises:
        CheckpointError: The checkpoints hold other tensors, or of other shapes; one cannot be read, or has a number
            that is not finite; or the mean is beyond the range of `dtype`.
        EnvironmentProblem: The disk is full or failing.
    """
    stored = {part: StoredTensors(part.state) for part in parts}
    try:
        _check_alike(stored)
        first = stored[parts[0]]
        total = sum(one.nbytes(key) for one in stored.values() for key in one.keys())  # noqa: SIM118
        done = 0

        def read(key: str, layer: int | None) -> Tensor:
            nonlocal done
            mean: Tensor | None = None
            for part, one in stored.items():
                tensor = one.read(key) if layer is None else one.layer(key, layer)
                done += tensor.numel() * tensor.itemsize
                _check_finite(tensor, part, key, layer)
                tensor = tensor.to(torch.float64)
                mean = tensor.mul_(part.share) if mean is None else mean.add_(tensor, alpha=part.share)
            assert mean is not None
            progress(done, total)
            return cast(mean, dtype, _named(key, layer), f"the mean of {len(parts)} checkpoints")

        sources = {}
        for key in sorted(first.keys()):
            layer = partial(read, key) if _is_of_layers(key) else None
            sources[key] = Source(dtype, first.shape(key), partial(read, key, None), layer)
        write_state(folder, sources, opened)
    finally:
        for one in stored.values():
            one.close()


def _is_of_layers(key: str) -> bool:
    """Whether the first axis of a stored weight is that of layers."""
    return ".layers." in key


def _named(key: str, layer: int | None) -> str:
    return key if layer is None else f"{key}, layer {layer}"


def _check_alike(stored: Mapping[Part, StoredTensors]) -> None:
    (first, expected), *rest = stored.items()
    for part, one in rest:
        missing, more = expected.keys() - one.keys(), one.keys() - expected.keys()
        lines = [f"missing: {', '.join(sorted(missing))}"] if missing else []
        lines += [f"only here: {', '.join(sorted(more))}"] if more else []
        lines += [
            f"{key}: shape {list(one.shape(key))}, not {list(expected.shape(key))}"
            for key in sorted(expected.keys() & one.keys())
            if one.shape(key) != expected.shape(key)
        ]
        if lines:
            raise CheckpointError(
                "The checkpoints are not of one model: they hold other weights.",
                where=part.folder,
                found="\n".join(lines),
                expected=f"the weights of {first.folder}",
                do="name checkpoints of one model",
            )


def _check_finite(tensor: Tensor, part: Part, key: str, layer: int | None) -> None:
    wrong = int((~tensor.isfinite()).sum())
    if wrong:
        raise CheckpointError(
            "A checkpoint has numbers that are not finite, and a mean would have them too.",
            where=part.folder,
            found=f"{_named(key, layer)}: {wrong:,} of {tensor.numel():,}",
            do="leave this checkpoint out; `davinci doctor RUN` says what happened to its run",
        )
