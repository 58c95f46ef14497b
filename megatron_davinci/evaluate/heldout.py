"""Held-out loss by domain, always on the same windows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from megatron.core import parallel_state
from torch import Tensor

from megatron_davinci.config import RunConfig
from megatron_davinci.data.manifest import tokenizer_of
from megatron_davinci.data.permutation import Permutation, round_keys
from megatron_davinci.data.places import S3Options, place
from megatron_davinci.data.run_tokenizer import manifests, run_tokenizer
from megatron_davinci.data.source import Source
from megatron_davinci.errors import DataError
from megatron_davinci.evaluate.in_loop import InLoopTasks
from megatron_davinci.evaluate.text_bytes import bits_per_byte, bytes_of_tokens
from megatron_davinci.model.documents import DocumentMask


class HeldOut(NamedTuple):
    """What was measured, by domain.

    Attributes:
        loss: Nats a token.
        tokens: The labels that it is the mean of.
        bits_per_byte: The same nats over the bytes of text that those labels stand for. The end of a document is
            predicted too and stands for no text, so its nats count. On rank 0 only, and without domains whose bytes
            are not known: no byte-level `data.tokenizer`, or another one than made the source.
    """

    loss: dict[str, float]
    tokens: dict[str, int]
    bits_per_byte: dict[str, float]


class HeldOutEvaluator:
    """Evaluates on fixed windows of each domain's held-out source.

    The windows are drawn once, by a permutation keyed with the domain's name and not with the run's seed, so that
    runs with different seeds are measured on the same text. Their number is a multiple of the data-parallel ranks:
    layouts whose ranks divide `evaluation.sequences` measure the same windows.

    Args:
        config: The run configuration.
    """

    def __init__(self, config: RunConfig) -> None:
        ranks = parallel_state.get_data_parallel_world_size()
        self._rank = parallel_state.get_data_parallel_rank()
        at_an_end = parallel_state.is_pipeline_first_stage() or parallel_state.is_pipeline_last_stage()
        self._reads = at_an_end or config.evaluation.document_mask
        self._domains: dict[str, tuple[Source, np.ndarray, int]] = {}
        self._document_masks: dict[str, DocumentMask | None] = {}
        s3 = S3Options(**dict(config.data.s3))
        for domain, path in config.data.validation.items():
            source = Source.open(
                domain, place(path, s3), config.data.sequence_length, vocab_size=config.model.tokens
            )
            windows = choose_windows(source.num_windows, config.evaluation.sequences, ranks, domain)
            size = largest_divisor(len(windows) // ranks, config.train.micro_batch_size)
            self._domains[domain] = (source, windows.reshape(-1, ranks), size)
            self._document_masks[domain] = (
                _document_mask(domain, source) if config.evaluation.document_mask else None
            )
        self._bytes = self._text_bytes(config, s3)
        self._tasks = InLoopTasks(config) if config.evaluation.tasks else None

    def evaluate(
        self,
        loss: Callable[[Tensor | None, int, int, Tensor | None, DocumentMask | None], tuple[float, float]],
    ) -> HeldOut:
        """Measure every domain; every rank calls this.

        Args:
            loss: Sums the loss over samples on all ranks together: (tokens [rows, sequence_length + 1] or None,
                micro-batches, rows of each, mask [rows, sequence_length] of the labels that carry loss or None, how
                attention is confined to documents or None) -> (nats, labels).
        """
        losses, counts, bits = {}, {}, {}
        for domain, (source, windows, size) in self._domains.items():
            mine = windows[:, self._rank]
            tokens = mask = None
            if self._reads:
                tokens = torch.from_numpy(np.stack([source.read(int(w)) for w in mine]).astype(np.int64))
                mask = _loss_mask(source, mine)
            total, count = loss(tokens, len(mine) // size, size, mask, self._document_masks[domain])
            if count == 0:
                raise DataError(
                    f"The held-out source of {domain} has no label that carries loss in its windows.",
                    where=f"data.validation.{domain}",
                    found=f"a mask that leaves out all of {windows.size:,} windows",
                    do="take another source, or raise evaluation.sequences",
                )
            losses[domain], counts[domain] = total / count, int(count)
            if self._bytes.get(domain):
                bits[domain] = bits_per_byte(total, self._bytes[domain])
        return HeldOut(losses, counts, bits)

    def ask(self, chunks: Sequence[Any]) -> dict[str, dict[str, Any]]:
        """Scores of `evaluation.tasks` by name, as `InLoopTasks.ask` gives them; every rank calls this."""
        return self._tasks.ask(chunks[0]) if self._tasks is not None else {}

    def _text_bytes(self, config: RunConfig, s3: S3Options) -> dict[str, int]:
        """Bytes of text of the labels that carry loss, in all ranks' windows, on the rank that writes the record."""
        if config.data.tokenizer is None or torch.distributed.get_rank() != 0:
            return {}
        tokenizer = run_tokenizer(config.data.tokenizer, manifests(config.data).values())
        sizes = bytes_of_tokens(tokenizer)
        if sizes is None:
            return {}
        found = {}
        for domain, (source, windows, _) in self._domains.items():
            made_by = tokenizer_of(place(config.data.validation[domain], s3))
            if made_by == tokenizer.sha256:
                found[domain] = _label_bytes(source, windows.ravel(), sizes, self._document_masks[domain])
        return found


def _label_bytes(
    source: Source, windows: np.ndarray, sizes: np.ndarray, document_mask: DocumentMask | None
) -> int:
    total = 0
    for window in windows:
        tokens = source.read(int(window))
        size = sizes[tokens[1:]]
        if (mask := _loss_mask(source, np.array([window]))) is not None:
            size = np.where(mask[0].numpy() > 0, size, 0)
        if document_mask is not None:
            size = np.where(tokens[:-1] == document_mask.eod_id, 0, size)
        total += int(size.sum())
    return total


def _document_mask(domain: str, source: Source) -> DocumentMask:
    if source.eod_id is None:
        raise DataError(
            f"The held-out source of {domain} does not say which token ends a document.",
            where=f"data.validation.{domain}",
            found="no eod_id in its manifest, or no manifest",
            do="write the manifest with `davinci data manifest --eod-id ID`, or switch evaluation.document_mask off",
        )
    return DocumentMask(source.eod_id)


def _loss_mask(source: Source, windows: np.ndarray) -> Tensor | None:
    if not source.has_mask:
        return None
    rows = np.empty((len(windows), source.sequence_length), np.uint8)
    for row, window in zip(rows, windows.tolist(), strict=True):
        source.read_mask_into(window, row)
    return torch.from_numpy(rows)


def choose_windows(available: int, wanted: int, ranks: int, domain: str) -> np.ndarray:
    """The windows that a domain is measured on.

    Args:
        available: Windows of the source.
        wanted: How many are asked for.
        ranks: Data-parallel ranks; the number is rounded to a multiple, down if it can be, by repetition if the
            source is smaller than that.
        domain: Keys the choice.

    Returns:
        Window numbers, int64.
    """
    count = min(available, wanted)
    count = count - count % ranks or ranks
    order = Permutation(available, round_keys(0, f"heldout/{domain}", 0))
    return order.many(np.arange(count, dtype=np.int64) % available)


def largest_divisor(number: int, at_most: int) -> int:
    """The largest divisor of `number` that is not above `at_most`."""
    return max(d for d in range(1, min(number, at_most) + 1) if number % d == 0)
