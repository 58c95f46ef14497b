"""Long texts in chunks that a model can take: cut where the text has a seam, and put together again to the byte.

A chunk holds the white space around its text apart, so that a model that strips its answer does not glue
paragraphs. Code blocks, displayed formulas and tables are not cut where they fit; one that is longer than a chunk
is a chunk of its own that no model is asked about.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

# Blocks that have no seam inside. Bounds keep an opening without an end from being looked for through a whole book.
BLOCKS = re.compile(
    r"^(?P<fence>```+|~~~+)[^\n]*\n(?:.{0,20000}?\n)??(?P=fence)[ \t]*$"
    r"|\$\$.{1,5000}?\$\$"
    r"|\\\[.{1,5000}?\\\]"
    r"|\\begin\{(?P<env>(?:equation|align|gather|multline|eqnarray|displaymath|verbatim|lstlisting|tabular)\*?)\}"
    r".{0,20000}?\\end\{(?P=env)\}",
    re.MULTILINE | re.DOTALL,
)
# From the best seam to the worst. Each piece keeps the white space that follows it.
_SEAMS = (
    re.compile(r"\n[ \t]*\n\s*"),
    re.compile(r"\n+"),
    re.compile(r"(?<=[.!?。！？])[\"'”’)\]]*\s+"),
    re.compile(r"\s+"),
)
Measure = Callable[[Sequence[str]], Sequence[int]]


class Chunk(NamedTuple):
    """A chunk of a text.

    Attributes:
        before: White space before its text.
        text: Without white space at its ends.
        after: White space after it.
        verbatim: Whether it stays as it is: it is empty, or one block that is longer than a chunk may be.
    """

    before: str
    text: str
    after: str
    verbatim: bool


def characters(texts: Sequence[str]) -> Sequence[int]:
    """The length of texts in characters (code points)."""
    return [len(text) for text in texts]


def cut(text: str, size: int, measure: Measure = characters) -> list[Chunk]:
    """Cut a text into chunks. `join` of their texts is the text.

    Args:
        text: Any.
        size: Most that a chunk may measure; only a block that stays as it is may measure more.
        measure: Of several texts at once; that of two joined should not be more than the sum.
    """
    chunks: list[Chunk] = []
    open_, room = "", size
    for piece, length, verbatim in _pieces(text, size, measure):
        if open_ and (verbatim or length > room):
            chunks.append(_chunk(open_, False))
            open_, room = "", size
        if verbatim:
            chunks.append(_chunk(piece, True))
        else:
            open_, room = open_ + piece, room - length
    if open_:
        chunks.append(_chunk(open_, False))
    return chunks


def join(chunks: Sequence[Chunk], texts: Sequence[str | None]) -> str:
    """Put chunks together again.

    Args:
        chunks: Of `cut`.
        texts: New ones; None for a chunk that stays. A chunk that became empty takes its white space along, but for
            what parts its neighbours.
    """
    parts: list[str] = []
    for chunk, new in zip(chunks, texts, strict=True):
        if new is None:
            parts += [chunk.before, chunk.text, chunk.after]
        elif new:
            parts += [chunk.before, new, chunk.after]
        elif parts and not parts[-1].endswith("\n"):
            parts.append(chunk.after)
    return "".join(parts)


def _chunk(piece: str, verbatim: bool) -> Chunk:
    body = piece.strip()
    if not body:
        return Chunk(piece, "", "", True)
    begin = piece.index(body)
    return Chunk(piece[:begin], body, piece[begin + len(body) :], verbatim)


def _pieces(text: str, size: int, measure: Measure) -> Iterator[tuple[str, int, bool]]:
    """Pieces that fit, in order, with their measure, and whether each stays as it is."""
    at = 0
    for found in BLOCKS.finditer(text):
        end = found.end()
        while end < len(text) and text[end].isspace():
            end += 1
        yield from _fitting(text[at : found.start()], size, measure, 0)
        block = text[found.start() : end]
        [length] = measure([block])
        yield block, length, length > size
        at = end
    yield from _fitting(text[at:], size, measure, 0)


def _fitting(text: str, size: int, measure: Measure, seam: int) -> Iterator[tuple[str, int, bool]]:
    if not text:
        return
    parts = list(_split(text, _SEAMS[seam])) if seam < len(_SEAMS) else _halves(text)
    for part, length in zip(parts, measure(parts), strict=True):
        if length <= size or len(part) == 1:
            yield part, length, False
        else:
            yield from _fitting(part, size, measure, min(seam + 1, len(_SEAMS)))


def _split(text: str, seam: re.Pattern[str]) -> Iterator[str]:
    at = 0
    for found in seam.finditer(text):
        if found.end() > at:
            yield text[at : found.end()]
            at = found.end()
    if at < len(text):
        yield text[at:]


def _halves(text: str) -> list[str]:
    middle = max(1, len(text) // 2)
    return [text[:middle], text[middle:]] if len(text) > 1 else [text]
