"""Do the documents of a source end with the token that its manifest says they do?"""

from __future__ import annotations

from megatron_davinci.data.documents import DocumentIndex
from megatron_davinci.data.indexed import bin_path
from megatron_davinci.data.source import Source
from megatron_davinci.errors import DataError


def check_first_document(source: Source, eod_id: int, setting: str) -> None:
    """Refuse a source whose manifest promises an end of documents that is not there.

    Its samples would be one document each, and attention go through them unseen. One document is looked at, so that a
    start stays quick; `davinci data verify` looks at all.

    Args:
        source: The source, open.
        eod_id: The token.
        setting: What needs it, for the message.

    Raises:
        DataError: The first document of the first shard that has windows ends with another token.
        EnvironmentProblem: The source cannot be read.
    """
    shard = source.locate(0).shard
    prefix = source.shard_place(shard)
    last = DocumentIndex(prefix).at(0).end_token - 1
    if source.packed is not None and (last + 1) % source.packed == 0:
        return  # packing may have cut it here, and then nothing is behind it in its sequence
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
            f"{setting} off",
        )
