"""A sample as people read it: its text with the loss mask, the ends of documents and, if asked for, of tokens.

`spans` takes tokens and flags from wherever they come, `coloured` and `bracketed` show what it makes of them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from rich.text import Text

from megatron_davinci.data.explain import printable

FIRST, LAST = 64, 24  # tokens shown of a long stretch without a mark
LEAST = 32  # tokens that are worth leaving out
_LONGEST_CHARACTER = 4  # tokens that a character of UTF-8 may be parted into
_BROKEN = "\N{REPLACEMENT CHARACTER}"

Decode = Callable[[np.ndarray], str]


class Span(NamedTuple):
    """A stretch of a sample that is shown in one manner.

    Attributes:
        kind: `text`; `end`, a token that ends a document; `bound`, where a document ends without such a token;
            `edge`, between two tokens; `gap`, tokens that are not shown.
        text: What is shown of it, safe for a terminal.
        loss: Whether its tokens carry loss, that is, are learnt to be predicted.
        document: Which of the sample's documents it is in, from 0 on.
        tokens: How many it has.
    """

    kind: Literal["text", "end", "bound", "edge", "gap"]
    text: str
    loss: bool
    document: int
    tokens: int


def spans(
    tokens: np.ndarray,
    mask: np.ndarray,
    eod_id: int | None,
    decode: Decode,
    *,
    starts: Sequence[int] | None = None,
    by_token: bool = False,
    whole: bool = False,
) -> list[Span]:
    """Divide a sample where its loss mask or its document changes.

    Args:
        tokens: [n] integers.
        mask: [n] booleans, or 0 and 1: whether the token carries loss.
        eod_id: The token that ends a document; None if there is none.
        decode: Text of some tokens.
        starts: Positions at which documents begin; by default after each `eod_id`.
        by_token: Show where tokens end, too.
        whole: Show all of a long stretch, and not its ends.
    """
    ends = np.zeros(len(tokens), bool) if eod_id is None else np.asarray(tokens) == eod_id
    begins = np.zeros(len(tokens), bool)
    begins[np.flatnonzero(ends[:-1]) + 1 if starts is None else [at for at in starts if at < len(tokens)]] = (
        True
    )
    if len(begins):
        begins[0] = False
    document, loss = np.cumsum(begins), np.asarray(mask, bool)
    marks = np.stack([document, loss, ends])
    changes = [0, *(np.flatnonzero(np.any(np.diff(marks), axis=0)) + 1).tolist(), len(tokens)]
    found: list[Span] = []
    for first, end in itertools.pairwise(changes):
        if first == end:
            continue
        which, learnt = int(document[first]), bool(loss[first])
        if begins[first] and not ends[first - 1]:
            found.append(Span("bound", "", bool(loss[first - 1]), which - 1, 0))
        elif by_token and found and found[-1].kind == "text":
            found.append(Span("edge", "", learnt, which, 0))
        if ends[first]:
            found += [Span("end", "EOD", learnt, which, 1)] * (end - first)
        elif whole or end - first < FIRST + LAST + LEAST:
            found += _texts(tokens[first:end], learnt, which, decode, by_token)
        else:
            found += _texts(tokens[first : first + FIRST], learnt, which, decode, by_token)
            found.append(Span("gap", "", learnt, which, end - first - FIRST - LAST))
            found += _texts(tokens[end - LAST : end], learnt, which, decode, by_token)
    return found


def _texts(tokens: np.ndarray, loss: bool, document: int, decode: Decode, by_token: bool) -> list[Span]:
    if not by_token:
        return [Span("text", printable(decode(tokens), lines=True), loss, document, len(tokens))]
    found: list[Span] = []
    for part, count in _characters(tokens, decode):
        if found:
            found.append(Span("edge", "", loss, document, 0))
        found.append(Span("text", printable(part), loss, document, count))
    return found


def _characters(tokens: np.ndarray, decode: Decode) -> list[tuple[str, int]]:
    """The text of each token; of several together where a character is parted between them."""
    found, first = [], 0
    while first < len(tokens):
        count = 1
        while (
            _BROKEN in (text := decode(tokens[first : first + count]))
            and count < _LONGEST_CHARACTER
            and first + count < len(tokens)
        ):
            count += 1
        if _BROKEN in text:
            count, text = 1, decode(tokens[first : first + 1])
        found.append((text, count))
        first += count
    return found


def coloured(parts: Sequence[Span]) -> Text:
    """For a terminal: grey where there is no loss, every other document in another colour, ends marked."""
    text = Text(tab_size=4)
    for span in parts:
        text.append(shown(span), style=_style(span))
    if text.plain.endswith("\n"):
        text.right_crop()  # the line break after the last mark
    return text


def shown(span: Span) -> str:
    """What stands for a span where colours say the rest."""
    return {
        "text": span.text,
        "end": "⏎EOD\n",
        "bound": "⏎\n",
        "edge": "│",
        "gap": f" [… {span.tokens:,} tokens …] ",
    }[span.kind]


def bracketed(parts: Sequence[Span]) -> str:
    """For a file: `[-no loss-]`, `[EOD]` (`[-EOD-]` without loss), `[|]` where a document ends without one."""
    text, quiet = [], False
    for span in parts:
        inside = span.kind in ("text", "edge", "gap") and not span.loss
        if quiet and not inside:
            text.append("-]")
        if inside and not quiet:
            text.append("[-")
        quiet = inside
        text.append(
            {
                "text": span.text,
                "end": "[EOD]\n" if span.loss else "[-EOD-]\n",
                "bound": "[|]\n",
                "edge": "|",
                "gap": f" [... {span.tokens:,} tokens ...] ",
            }[span.kind]
        )
    return "".join([*text, "-]" if quiet else ""]).rstrip("\n")


def legend(colours: bool) -> Text:
    """What the marks mean, in one line."""
    if not colours:
        return Text("[-no loss-]  [EOD] ends a document  [|] ends one without it  [...] not shown")
    return Text.assemble(
        ("loss", _style(Span("text", "", True, 0, 1))),
        " · ",
        ("no loss", _style(Span("text", "", False, 0, 1))),
        " · ",
        ("the next document", _style(Span("text", "", True, 1, 1))),
        ", ",
        ("no loss", _style(Span("text", "", False, 1, 1))),
        " · ",
        ("⏎EOD", _style(Span("end", "", True, 0, 1))),
        " ends a document, ",
        ("without loss", _style(Span("end", "", False, 0, 1))),
    )


def _style(span: Span) -> str:
    if span.kind in ("end", "bound"):
        return "bold magenta" if span.loss else "dim magenta"
    if span.kind == "edge":
        return "dim yellow"
    if span.kind == "gap":
        return "dim italic"
    if span.document % 2:
        return "cyan" if span.loss else "dim cyan"
    return "" if span.loss else "bright_black"


def as_values(parts: Sequence[Span]) -> list[dict[str, Any]]:
    """For JSON."""
    return [span._asdict() for span in parts]


def from_values(values: Sequence[dict[str, Any]]) -> list[Span]:
    """What `as_values` made."""
    return [Span(**value) for value in values]
