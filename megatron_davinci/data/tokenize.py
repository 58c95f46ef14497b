"""JSON-lines text to a source: shards of token ids and the manifest that names them."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import DTypeLike, NDArray

from megatron_davinci.data.indexed import dtype_for_vocab
from megatron_davinci.data.indexed_writer import IndexedDatasetWriter
from megatron_davinci.data.jsonl import read_texts
from megatron_davinci.data.manifest import Manifest, Shard
from megatron_davinci.data.tokenizer import Tokenizer
from megatron_davinci.errors import ConfigError, DataError
from megatron_davinci.files import disk_errors, fsync_folder

SHARD_TOKENS = 1_000_000_000
# What is encoded at once: enough for all cores to have work, little enough to forget about.
BATCH_DOCUMENTS = 1024
BATCH_CHARACTERS = 4_000_000


def tokenize_jsonl(
    inputs: Sequence[Path],
    tokenizer: Tokenizer,
    out_folder: Path,
    name: str,
    domain: str,
    text_field: str = "text",
    shard_tokens: int = SHARD_TOKENS,
    progress: Callable[[int], None] | None = None,
) -> Manifest:
    """Writes `out_folder/manifest.json` and `out_folder/shard-NNNNN.{bin,idx}` from JSONL files.

    Documents keep their order; each ends with the tokenizer's end-of-document id. A text without a character is
    no document. All is written into a folder beside `out_folder` that takes its name at the end, so that
    `out_folder` is never there in part. Memory is that of one batch, or of the longest document.

    Args:
        inputs: JSONL files, in order.
        tokenizer: What encodes the texts; its digest is in the manifest.
        out_folder: The folder to make. It may exist if it is empty.
        name: The source's name, for the manifest.
        domain: The domain that reports group it by, for the manifest.
        text_field: The field of each line that holds the text.
        shard_tokens: A shard is closed before the document that would make it longer. A document is never
            parted: one that is longer than this is a shard by itself.
        progress: Called with the bytes of input done so far, after each batch of about 4 MB.

    Returns:
        The manifest that was written.

    Raises:
        ConfigError: `shard_tokens` is not positive.
        DataError: A line is bad (the error names file and line), there is no document, or `out_folder` has
            something in it.
        EnvironmentProblem: The disk is full or failing. In every case nothing is left behind.
    """
    if shard_tokens < 1:
        raise ConfigError("A shard holds at least one token.", where="shard_tokens", found=shard_tokens)
    if out_folder.exists() and not (out_folder.is_dir() and not any(out_folder.iterdir())):
        raise DataError(
            "The place for a source is taken.",
            where=out_folder,
            expected="a path where nothing is, or an empty folder",
            do="choose another folder, or remove this one",
        )
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    dtype = dtype_for_vocab(tokenizer.vocab_size - 1)
    work = out_folder.with_name(f".{out_folder.name}.tmp-{uuid.uuid4().hex[:8]}")
    try:
        with disk_errors(work, "making a folder"):
            work.mkdir(parents=True)
        shards = _write_shards(_documents(inputs, tokenizer, text_field, progress), work, dtype, shard_tokens)
        if not shards:
            raise DataError(
                f"The domain {domain!r} has no documents.",
                where="\n".join(map(str, inputs)) or "no input files",
                found="no line with a text",
                expected="at least one document",
                do="check the input files and the field's name",
            )
        manifest = Manifest(
            name=name,
            domain=domain,
            dtype=dtype.name,
            vocab_size=tokenizer.vocab_size,
            eod_id=tokenizer.eod_id,
            tokenizer_sha256=tokenizer.sha256,
            shards=tuple(shards),
        )
        manifest.save(work)
        with disk_errors(out_folder, "naming a source"):
            os.replace(work, out_folder)
            fsync_folder(out_folder.parent)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return manifest


def _documents(
    inputs: Sequence[Path], tokenizer: Tokenizer, text_field: str, progress: Callable[[int], None] | None
) -> Iterator[NDArray[np.int32]]:
    """The ids of each document, end-of-document id included."""
    end = np.array([tokenizer.eod_id], np.int32)
    for texts, bytes_done in _batches(inputs, text_field):
        for ids in tokenizer.encode_batch(texts):
            yield np.concatenate([ids, end])
        if progress is not None:
            progress(bytes_done)


def _batches(inputs: Sequence[Path], text_field: str) -> Iterator[tuple[list[str], int]]:
    """Texts in batches, with the bytes of input that have been read after each."""
    done = 0
    for path in inputs:
        texts: list[str] = []
        characters = read = 0
        for line in read_texts(path, text_field):
            if line.text:
                texts.append(line.text)
            characters += len(line.text)
            read = line.bytes_read
            if len(texts) >= BATCH_DOCUMENTS or characters >= BATCH_CHARACTERS:
                yield texts, done + read
                texts, characters = [], 0
        # The file's own size: blank lines may follow its last document.
        done += path.stat().st_size
        yield texts, done


def _write_shards(
    documents: Iterator[NDArray[np.int32]], folder: Path, dtype: DTypeLike, shard_tokens: int
) -> list[Shard]:
    shards: list[Shard] = []
    waiting = next(documents, None)
    while waiting is not None:
        prefix = f"shard-{len(shards):05d}"
        tokens = 0
        with IndexedDatasetWriter(folder / prefix, dtype) as writer:
            while waiting is not None and (tokens == 0 or tokens + len(waiting) <= shard_tokens):
                writer.add_document(waiting)
                tokens += len(waiting)
                waiting = next(documents, None)
        shards.append(Shard.of(prefix, writer.written))
    return shards
