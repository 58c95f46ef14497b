"""A run's tokenizer, with the end of documents that its model was trained on."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from megatron_davinci.config.data import DataConfig
from megatron_davinci.data.manifest import Manifest
from megatron_davinci.data.places import S3Options, place
from megatron_davinci.data.tokenizer import Tokenizer
from megatron_davinci.errors import DataError, DavinciError


def manifests(data: DataConfig | None, *, remote: bool = True) -> dict[str, Manifest]:
    """What the manifests of a run's sources say, by source; of one that is gone since, or has none, nothing.

    Args:
        data: The run's; None for a checkpoint by itself.
        remote: Whether sources in S3 are asked too.
    """
    found: dict[str, Manifest] = {}
    if data is None:
        return found
    for name, source in data.sources.items():
        if remote or "://" not in str(source.path):
            with suppress(DavinciError):
                found[name] = Manifest.load(place(source.path, S3Options(**dict(data.s3))))
    return found


def end_of_documents(sources: Iterable[Manifest]) -> int | None:
    """The token that ended the documents of a run's sources, which its model ends a text with.

    Sources may have been written with another end than the tokenizer's own (`davinci data tokenize --eod`).

    Args:
        sources: What is known of them.

    Returns:
        None where none of them says it, or they say different ones.
    """
    said = {one.eod_id for one in sources} - {None}
    return said.pop() if len(said) == 1 else None


def run_tokenizer(path: Path, sources: Iterable[Manifest]) -> Tokenizer:
    """Load a tokenizer that ends documents as a run's sources do.

    Args:
        path: Its folder or file.
        sources: What is known of them.

    Raises:
        DataError: It cannot be read; or no source says an end that it can have, and it has none of its own.
    """
    end = end_of_documents(sources)
    try:
        own = Tokenizer.load(path)
    except DataError:
        if end is None:
            raise
        return Tokenizer.load(path, eod_id=end)
    if end not in (None, own.eod_id):
        with suppress(DataError):  # a manifest that was written by hand may name what cannot be one
            return Tokenizer.load(path, eod_id=end)
    return own
