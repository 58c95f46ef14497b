"""A run's tokenizer, with the end of documents that its model was trained on."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from megatron_davinci.config.data import DataConfig
from megatron_davinci.data.manifest import Manifest
from megatron_davinci.data.places import S3Options, place
from megatron_davinci.data.tokenizer import Tokenizer
from megatron_davinci.errors import DataError, DavinciError


def end_of_documents(data: DataConfig | None, *, remote: bool = True) -> int | None:
    """The token that ended the documents of a run's sources, which its model ends a text with.

    Sources may have been written with another end than the tokenizer's own (`davinci data tokenize --eod`).

    Args:
        data: The run's; None for a checkpoint by itself.
        remote: Whether sources in S3 are asked too.

    Returns:
        None where no source that is there says it, or sources say different ones.
    """
    if data is None:
        return None
    said: set[int | None] = set()
    for source in data.sources.values():
        if remote or "://" not in str(source.path):
            # Of a source that is gone since, or that has no manifest, nothing is known.
            with suppress(DavinciError):
                said.add(Manifest.load(place(source.path, S3Options(**dict(data.s3)))).eod_id)
    said.discard(None)
    return said.pop() if len(said) == 1 else None


def run_tokenizer(path: Path, data: DataConfig | None) -> Tokenizer:
    """Load a tokenizer that ends documents as a run's sources do.

    Args:
        path: Its folder or file.
        data: The run's; None for a checkpoint by itself.

    Raises:
        DataError: It cannot be read; or no source says an end that it can have, and it has none of its own.
    """
    end = end_of_documents(data)
    if end is not None:
        with suppress(DataError):  # a manifest that was written by hand may name what cannot be one
            return Tokenizer.load(path, eod_id=end)
    return Tokenizer.load(path)
