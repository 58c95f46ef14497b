"""Holding what was converted against transformers, by default."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_davinci.errors import DataError

if TYPE_CHECKING:
    import torch

    from megatron_davinci.convert.family import Family
    from megatron_davinci.convert.verify import Verification

TEXT = (
    "The tokens of this text go through both models, layer by layer. A conversion is right when nothing that either "
    "of them computes is further from the other than rounding: def f(n): return 1 if n < 2 else n * f(n - 1)\n"
)


def verified(
    folder: Path,
    state: Path,
    family: Family,
    model: dict[str, Any],
    *,
    tokenizer: Path | None = None,
    dtype: torch.dtype | None = None,
    tokens: int | None = None,
    threads: int | None = None,
) -> Verification:
    """Hold a Hugging Face folder and a checkpoint's `state` against each other; say so on stderr.

    Args:
        folder: The Hugging Face folder.
        state: The checkpoint's `state`.
        family: The folder's family.
        model: The `model` section of the checkpoint's configuration.
        tokenizer: Where a tokenizer is, if anywhere.
        dtype: What was converted to, if not kept.
        tokens: How many of the vocabulary both have; default: all.
        threads: CPU threads; default: one a core.
    """
    from megatron_davinci.cli.convert_progress import layers
    from megatron_davinci.convert.stored import StoredTensors
    from megatron_davinci.convert.verify import verify
    from megatron_davinci.model.layerwise import alone

    with (
        alone(model, threads) as ours,
        layers(f"verifying {folder.name.strip('.').removesuffix('.partial')}") as progress,
    ):
        found = verify(
            folder,
            StoredTensors(state),
            family,
            model,
            ours,
            text=_text(tokenizer),
            dtype=dtype,
            tokens=tokens,
            progress=progress,
        )
    print(f"verified: {found}", file=sys.stderr)
    return found


def _text(tokenizer: Path | None) -> list[int]:
    from megatron_davinci.data.tokenizer import Tokenizer

    if tokenizer is None:
        return []
    try:
        ids: list[int] = Tokenizer.load(tokenizer).encode_batch([TEXT])[0].tolist()
    except DataError:  # a tokenizer that we cannot read is no reason not to compare
        return []
    return ids
