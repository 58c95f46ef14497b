"""Which token divides a run's samples into documents."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from megatron_davinci.config import RunConfig
from megatron_davinci.config.curriculum import Stage
from megatron_davinci.config.data import DataConfig
from megatron_davinci.config.source_weights import mixed_sources
from megatron_davinci.data.document_ends import check_first_document
from megatron_davinci.data.source import Source
from megatron_davinci.errors import DataError, DavinciError
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
            ends |= {name: sources[name].eod_id for name in mixed_sources(stage, config.data)}
    if not ends:
        return [None] * len(config.curriculum)
    eod_id = common_end(ends)
    for name in ends:
        check_first_document(sources[name], eod_id, "document_mask")
    return [
        DocumentMask(eod_id, stage.transforms.reset_positions) if stage.transforms.document_mask else None
        for stage in config.curriculum
    ]


def mask_problem(
    stage: Stage, data: DataConfig, others: Iterable[str], sources: Mapping[str, Source]
) -> str | None:
    """Why a stage's document mask cannot take sources in that others bring; None where it can, or there is none.

    Args:
        stage: The stage.
        data: Its sources' settings.
        others: Names of the sources.
        sources: The training sources, open.
    """
    if not stage.transforms.document_mask:
        return None
    names = [*mixed_sources(stage, data), *others]
    try:
        end = common_end({name: sources[name].eod_id for name in names})
        for name in names:
            check_first_document(sources[name], end, "document_mask")
    except DavinciError as error:
        return f"the document mask of stage {stage.name} does not allow it: {error.found}"
    return None


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
