"""Documents of a run's held-out sources as text again, and where a text is cut in two."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np

from megatron_davinci.data.indexed import IndexedDataset
from megatron_davinci.data.places import place
from megatron_davinci.data.source import Source
from megatron_davinci.data.tokenizer import Tokenizer

# More of a document is not read: items are short.
LONGEST = 8192


def held_out_texts(
    validation: Mapping[str, Any],
    s3: Any,
    tokenizer: Tokenizer,
    sequence_length: int,
    documents: int,
) -> dict[str, list[str]]:
    """The first documents of each domain.

    Args:
        validation: Where each domain's source is, as `data.validation` says.
        s3: How objects in S3 are read.
        tokenizer: What made the sources.
        sequence_length: The run's.
        documents: At most so many of each domain.
    """
    texts = {}
    for domain, path in validation.items():
        source = Source.open(domain, place(path, s3), sequence_length)
        end = tokenizer.eod_id if source.eod_id is None else source.eod_id
        decoded = (tokenizer.decode(ids[:LONGEST], special=False) for ids in _documents(source, end))
        texts[domain] = list(islice((text for text in decoded if text.strip()), documents))
    return texts


def _documents(source: Source, eod_id: int) -> Iterator[np.ndarray]:
    for shard in range(source.num_shards):
        dataset = IndexedDataset(source.shard_place(shard))
        for sequence in range(len(dataset)):
            tokens = dataset[sequence]
            for part in np.split(tokens, np.flatnonzero(tokens == eod_id) + 1):
                if len(part):
                    yield part


def spaces_moved(context: str, continuation: str) -> tuple[str, str]:
    """Spaces at a context's end belong to the continuation's first word."""
    spaces = len(context) - len(context.rstrip())
    if context and spaces:
        return context[:-spaces], context[-spaces:] + continuation
    return context, continuation


def pairs_of(tokenizer: Tokenizer, moved: Sequence[tuple[str, str]]) -> Iterator[tuple[list[int], list[int]]]:
    """Tokens of each context and of what follows it: what the whole text has behind the context's tokens.

    A text is encoded once, however many options it is the context of. Before a text without a context stands the
    token that ends a document.

    Args:
        tokenizer: The model's.
        moved: (context, continuation) as `spaces_moved` gives them.
    """
    wanted = {text for context, rest in moved for text in ((context, context + rest) if context else (rest,))}
    order = sorted(wanted)
    encoded = (ids.tolist() for ids in tokenizer.encode_batch(order))
    tokens: dict[str, list[int]] = dict(zip(order, encoded, strict=True))
    for context, rest in moved:
        if context:
            before = tokens[context]
            yield before, tokens[context + rest][len(before) :]
        else:  # text cannot hold the token itself
            yield [tokenizer.eod_id], tokens[rest]
