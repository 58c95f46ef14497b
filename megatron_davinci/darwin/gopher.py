"""Level 2: the rules of Gopher (arXiv 2112.11446, appendix A.1.1), quality and repetition.

They decide as datatrove's filters of the same names do on the same words, which a test holds them to. They differ in
how words are found: as in the paper, white space parts them, while for datatrove (by spaCy) marks are words too.
And they differ in what they cost: runs of words are compared as 64-bit hashes in numpy, and the exact walk over them
is taken only in a text that repeats one at all.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from datatrove.data import Document
from numpy.typing import NDArray
from pydantic import Field

from megatron_davinci.darwin.step import Outcome, Step, StepParameters
from megatron_davinci.darwin.words import PUNCTUATION, rolling, word_hashes

STOP_WORDS = ("the", "be", "to", "of", "and", "that", "have", "with")
_LETTER = re.compile(r"[^\W\d_]")
_PARAGRAPH_ENDS, _LINE_ENDS = re.compile(r"\n{2,}"), re.compile(r"\n+")


class GopherQuality(Step):
    """Words, symbols and stop words as in prose."""

    name = "gopher_quality"
    level = 2
    about = "Gopher's quality rules: words, their length, symbols, bullets, ellipses, letters, stop words"

    class Parameters(StepParameters):
        """Parameters of `gopher_quality`; the paper's values. None switches a rule off.

        Attributes:
            min_words: Fewest words that are not punctuation.
            max_words: Most of them.
            min_word_length: Least mean characters a word.
            max_word_length: Most.
            max_symbol_ratio: Most `#`, and most ellipses, a word.
            max_bullet_lines: Largest share of lines that begin with a bullet.
            max_ellipsis_lines: Largest share of lines that end with an ellipsis.
            min_alphabetic: Least share of words with a letter.
            min_stop_words: Fewest different stop words.
            stop_words: What counts as one.
        """

        min_words: int | None = Field(default=50, ge=0)
        max_words: int | None = Field(default=100_000, gt=0)
        min_word_length: float | None = Field(default=3, ge=0)
        max_word_length: float | None = Field(default=10, gt=0)
        max_symbol_ratio: float | None = Field(default=0.1, ge=0)
        max_bullet_lines: float | None = Field(default=0.9, ge=0, le=1)
        max_ellipsis_lines: float | None = Field(default=0.3, ge=0, le=1)
        min_alphabetic: float | None = Field(default=0.8, ge=0, le=1)
        min_stop_words: int | None = Field(default=2, ge=0)
        stop_words: list[str] = Field(default=list(STOP_WORDS))

    parameters: Parameters

    def apply(self, document: Document) -> Outcome:
        """The first rule that is broken drops the document."""
        return Outcome(drop=_quality(document.text, document.text.split(), self.parameters))


def _quality(text: str, words: Sequence[str], rule: GopherQuality.Parameters) -> str | None:
    real = [word for word in words if word.isalnum() or not PUNCTUATION.issuperset(word)]
    if not words or (rule.min_words is not None and len(real) < rule.min_words):
        return "few_words"
    if rule.max_words is not None and len(real) > rule.max_words:
        return "many_words"
    mean = sum(map(len, real)) / len(real) if real else 0.0
    if rule.min_word_length is not None and mean < rule.min_word_length:
        return "short_words"
    if rule.max_word_length is not None and mean > rule.max_word_length:
        return "long_words"
    if rule.max_symbol_ratio is not None:
        if text.count("#") / len(words) > rule.max_symbol_ratio:
            return "hashes"
        if (text.count("...") + text.count("…")) / len(words) > rule.max_symbol_ratio:
            return "ellipses"
    lines = text.splitlines()
    if rule.max_bullet_lines is not None:
        bullets = sum(line.lstrip().startswith(("•", "-")) for line in lines)
        if bullets / len(lines) > rule.max_bullet_lines:
            return "bullet_lines"
    if rule.max_ellipsis_lines is not None:
        ends = sum(line.rstrip().endswith(("...", "…")) for line in lines)
        if ends / len(lines) > rule.max_ellipsis_lines:
            return "ellipsis_lines"
    if rule.min_alphabetic is not None:
        alphabetic = sum(1 for word in words if word.isalpha() or _LETTER.search(word))
        if alphabetic / len(words) < rule.min_alphabetic:
            return "few_letters"
    if rule.min_stop_words and len(set(rule.stop_words).intersection(words)) < rule.min_stop_words:
        return "no_stop_words"
    return None


class GopherRepetition(Step):
    """Lines, paragraphs and runs of words that repeat."""

    name = "gopher_repetition"
    level = 2
    version = 2
    about = "Gopher's repetition rules: lines, paragraphs and runs of 2 to 10 words that repeat"

    class Parameters(StepParameters):
        """Parameters of `gopher_repetition`; the paper's values, of table A1.

        Attributes:
            lines: Largest share of lines that were there before.
            paragraphs: Of paragraphs.
            line_characters: Of characters in such lines.
            paragraph_characters: In such paragraphs.
            top: By words in a run, the largest share of characters in the commonest run.
            repeated: By words in a run, the largest share of characters in runs that were there before.
        """

        lines: float = Field(default=0.3, ge=0, le=1)
        paragraphs: float = Field(default=0.3, ge=0, le=1)
        line_characters: float = Field(default=0.2, ge=0, le=1)
        paragraph_characters: float = Field(default=0.2, ge=0, le=1)
        top: dict[int, float] = Field(default={2: 0.2, 3: 0.18, 4: 0.16})
        repeated: dict[int, float] = Field(default={5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.1})

    parameters: Parameters

    def apply(self, document: Document) -> Outcome:
        """The first rule that is broken drops the document."""
        return Outcome(drop=_repetition(document.text, document.text.split(), self.parameters))


def duplicates(parts: Sequence[str]) -> tuple[int, int]:
    """Parts that were there before: how many, and their characters."""
    seen: set[str] = set()
    count = characters = 0
    for part in parts:
        if part in seen:
            count += 1
            characters += len(part)
        else:
            seen.add(part)
    return count, characters


def _repetition(text: str, words: Sequence[str], rule: GopherRepetition.Parameters) -> str | None:
    if not text.strip():
        return "empty"
    for ends, body, most, most_characters, name in (
        (_PARAGRAPH_ENDS, text.strip(), rule.paragraphs, rule.paragraph_characters, "paragraphs"),
        (_LINE_ENDS, text, rule.lines, rule.line_characters, "lines"),
    ):
        parts = ends.split(body)
        count, characters = duplicates(parts)
        if count / len(parts) > most:
            return f"repeated_{name}"
        if characters / len(text) > most_characters:
            return f"characters_in_repeated_{name}"
    if not words:
        return None
    hashes = word_hashes(list(words))
    lengths = np.fromiter(map(len, words), np.int64, len(words))
    ends_at = np.concatenate([[0], np.cumsum(lengths)])
    for n, most in sorted(rule.top.items()):
        if _top_run(rolling(hashes, n), ends_at, n) > most * len(text):
            return f"top_{n}_words"
    for n, most in sorted(rule.repeated.items()):
        runs = rolling(hashes, n)
        characters = _repeated(runs, ends_at, n)
        if characters > most * len(text):
            return f"repeated_{n}_words"
        if not characters:
            break  # what repeats no run of n words repeats no longer one
    return None


def _top_run(runs: NDArray[np.uint64], ends_at: NDArray[np.int64], n: int) -> int:
    """Characters of the commonest run, blanks between its words included, times how often it is there."""
    if not len(runs):
        return 0
    _, first, count = np.unique(runs, return_index=True, return_counts=True)
    most = count.max()
    # Of runs that are as common, the one that came first.
    at = int(first[count == most].min())
    return int(ends_at[at + n] - ends_at[at] + n - 1) * int(most)


def _repeated(runs: NDArray[np.uint64], ends_at: NDArray[np.int64], n: int) -> int:
    """Characters in runs that were there before; one that is found is passed over whole, so none counts twice."""
    if len(runs) < 2:
        return 0
    ordered = np.sort(runs)
    if not (ordered[1:] == ordered[:-1]).any():
        return 0
    values = runs.tolist()
    seen: set[int] = set()
    characters, at = 0, 0
    while at < len(values):
        if values[at] in seen:
            characters += int(ends_at[at + n] - ends_at[at])
            at += n
        else:
            seen.add(values[at])
            at += 1
    return characters
