"""One sample as the model sees it, for whoever shows samples: what the trainer's batches are, told step by step."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from megatron_davinci.config.transforms import Transforms
from megatron_davinci.data.transforms.pipeline import SampleTransforms


class Seen(NamedTuple):
    """A sample after its stage's transforms.

    Attributes:
        tokens: [sequence_length + 1 and what is cut]: the window itself if nothing changed it.
        labels: [sequence_length] uint8, what each label weighs in the loss.
        applied: What was done, a line each.
    """

    tokens: np.ndarray
    labels: np.ndarray
    applied: list[str]


def as_seen(
    n: int,
    source: str,
    window: int,
    tokens: np.ndarray,
    labels: np.ndarray,
    transforms: SampleTransforms | None,
    settings: Transforms,
    eod_id: int | None,
) -> Seen:
    """Transform a sample as the trainer does, its document mask included.

    Args:
        n: Its number.
        source: Name of its source.
        window: Its window.
        tokens: [sequence_length + 1], as read.
        labels: [sequence_length] uint8, 1 where the source lets a label carry loss.
        transforms: The stage's; None if it has none.
        settings: The stage's, which say whether it has a document mask.
        eod_id: The token that ends the source's documents.
    """
    length, labels = len(tokens), labels.copy()
    applied: list[str] = []
    if transforms is not None:
        found = transforms.one(n, source, window, tokens.astype(transforms.dtype(tokens.dtype)), labels)
        applied += found.applied
        labels = found.weights[1:length].copy()
        if not np.array_equal(found.tokens, tokens):
            tokens = found.tokens
    if settings.document_mask:
        applied.append("document mask" + (", positions reset" if settings.reset_positions else ""))
        labels[tokens[: length - 1] == eod_id] = 0
    return Seen(tokens, labels, applied)
