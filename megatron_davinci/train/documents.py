"""Which token divides a run's samples into documents."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction

from megatron_davinci.config import RunConfig
from megatron_davinci.data.documents import DocumentIndex
from megatron_davinci.data.indexed import bin_path
from megatron_davinci.data.source import Source
from megatron_davinci.errors import DataError
from megatron_davinci.model.documents import DocumentMask


def uses_documents(config: RunConfig) -> bool:
    """Whether any stage confines attention to documents; every pipeline rank then needs its tokens."""
    return any(stage.transforms.document_mask for stage in config.curriculum)


def document_masks(config: RunConfig, sources: Mapping[str, Source]) -> list[DocumentMask | None]:
    """The document mask of every stage; None for plain causal attention.

    Args:
        config: The run configuration.
        sources: The training sources, open.

    Raises:
        DataError: A source of such a stage does not say what token ends a document, or they say different ones, or
            its first document does not end with it.
        EnvironmentProblem: A source cannot be read.
    """
    ends: dict[str, int | None] = {}
    for stage in config.curriculum:
        if stage.transforms.document_mask:
            mixed = (name for name, weight in stage.mixture.items() if Fraction(weight))
            ends |= {name: sources[name].eod_id for name in mixed}
    if not ends:
        return [None] * len(config.curriculum)
    eod_id = common_end(ends)
    for name in ends:
        check_first_document(sources[name], eod_id)
    return [
        DocumentMask(eod_id, stage.transforms.reset_positions) if stage.transforms.document_mask else None
        for stage in config.curriculum
    ]


def common_end(ends: Mapping[str, int | None]) -> int:
    """The token that ends documents.

    Args:
        ends: What each source says of itself; at least one.

    Raises:
        DataError: A source does not say, or they do not agree.
    """
    silent = sorted(name for name, end in ends.items() if end is None)
    if silent:
        raise DataError(
            "A document mask needs to know which token ends a document, and a source does not say.",
            where="curriculum.N.transforms.document_mask",
            found=f"no eod_id in the manifest of {', '.join(silent)}, or no manifest",
            do="write the manifest with `davinci data manifest --eod-id ID`, or switch document_mask off",
        )
    if len(set(ends.values())) > 1:
        raise DataError(
            "A document mask needs one token that ends documents, and the sources have several.",
            where="curriculum.N.transforms.document_mask",
            found=", ".join(f"{name}: {end}" for name, end in sorted(ends.items())),
            expected="one eod_id in the manifests of all sources",
            do="tokenise them with one tokenizer, or switch document_mask off",
        )
    return next(end for end in ends.values() if end is not None)


def check_first_document(source: Source, eod_id: int) -> None:
    """Refuse a source whose manifest promises an end of documents that is not there.

    Its samples would be one document each, and attention go through them unseen. One document is looked at, so that a
    start stays quick; `davinci data verify` looks at all.

    Raises:
        DataError: The first document of the first shard that has windows ends with another token.
        EnvironmentProblem: The source cannot be read.
    """
    shard = source.locate(0).shard
    prefix = source.shard_place(shard)
    last = DocumentIndex(prefix).at(0).end_token - 1
    # The shard's windows are the source's first.
    window, offset = divmod(last, source.sequence_length)
    if window >= source.num_windows or source.locate(window).shard != shard:
        return
    found = int(source.read(window)[offset])
    if found != eod_id:
        raise DataError(
            f"The documents of source {source.name} do not end with the token that its manifest says they do.",
            where=f"{bin_path(prefix)}, token {last:,}",
            found=found,
            expected=eod_id,
            do="write the manifest with the token that ends documents, tokenise the source with one, or switch "
            "document_mask off",
        )
