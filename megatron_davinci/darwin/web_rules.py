"""Level 2: the rules of C4 (JMLR 21, 20-074) and of FineWeb (arXiv 2406.17557) for pages from the web."""

from __future__ import annotations

import re

from datatrove.data import Document
from pydantic import Field

from megatron_davinci.darwin.gopher import duplicates
from megatron_davinci.darwin.step import KEEP, Outcome, Step, StepParameters
from megatron_davinci.darwin.words import TERMINAL, words_of

_SENTENCE_END = re.compile(r"[.!?][\"')\]]*(?:\s+|$)")
_CITATION = re.compile(r"\[\d*]|\[edit]|\[citation needed]")
_POLICY = ("terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies")


class C4(Step):
    """C4's rules. They take lines out, as C4 did, and drop what is no prose afterwards."""

    name = "c4"
    level = 2
    edits = True
    about = "C4's rules: lines without an end mark or on policies go; pages that are no prose are dropped"

    class Parameters(StepParameters):
        """Parameters of `c4`; the paper's values.

        Attributes:
            end_marks: Only lines that end in one stay.
            min_sentences: Fewest that are left.
            min_words_per_line: Shorter lines go.
            max_word_length: Lines with a longer word go.
            curly_brackets: Whether a page with one is dropped.
            citations: Whether `[1]` and `[edit]` are taken out.
        """

        end_marks: bool = True
        min_sentences: int = Field(default=5, ge=0)
        min_words_per_line: int = Field(default=3, ge=0)
        max_word_length: int = Field(default=1000, gt=0)
        curly_brackets: bool = True
        citations: bool = True

    parameters: Parameters

    def apply(self, document: Document) -> Outcome:
        """Take lines out, then judge what is left."""
        rule, kept, sentences = self.parameters, [], 0
        for line in document.text.splitlines():
            line = line.strip()
            words = line.split()
            if any(len(word) > rule.max_word_length for word in words):
                continue
            if rule.citations:
                line = _CITATION.sub("", line)
            if rule.end_marks and (not line.endswith((".", "?", "!", '"', "'")) or line.endswith("...")):
                continue
            if len(words) < rule.min_words_per_line:
                continue
            lowered = line.lower()
            if "lorem ipsum" in lowered:
                return Outcome(drop="lorem_ipsum")
            if "javascript" in lowered:
                continue
            if rule.curly_brackets and "{" in line:
                return Outcome(drop="curly_bracket")
            if any(phrase in lowered for phrase in _POLICY):
                continue
            sentences += max(1, len(_SENTENCE_END.findall(line)))
            kept.append(line)
        if sentences < rule.min_sentences:
            return Outcome(drop="few_sentences")
        text = "\n".join(kept).strip()
        return KEEP if text == document.text else Outcome(text=text)


class FineWeb(Step):
    """FineWeb's own rules, beside Gopher's and C4's."""

    name = "fineweb_quality"
    level = 2
    about = "FineWeb's rules: lines that end in a mark, short lines, repeated lines, lists"

    class Parameters(StepParameters):
        """Parameters of `fineweb_quality`; the paper's values.

        Attributes:
            min_end_marks: Least share of lines that end in a mark.
            max_short_lines: Largest share of lines of at most `short_line` characters.
            short_line: Characters.
            max_repeated: Largest share of characters in lines that were there before.
            max_line_ends: Most line ends a word.
        """

        min_end_marks: float = Field(default=0.12, ge=0, le=1)
        max_short_lines: float = Field(default=0.67, ge=0, le=1)
        short_line: int = Field(default=30, ge=0)
        max_repeated: float = Field(default=0.01, ge=0, le=1)
        max_line_ends: float = Field(default=0.3, ge=0)

    parameters: Parameters

    def apply(self, document: Document) -> Outcome:
        """The first rule that is broken drops the document."""
        rule = self.parameters
        lines = [line for line in document.text.split("\n") if line.strip()]
        if not lines:
            return Outcome(drop="empty")
        marks = sum(line[-1] in TERMINAL for line in lines) / len(lines)
        if marks < rule.min_end_marks:
            return Outcome(drop="few_end_marks")
        if sum(len(line) <= rule.short_line for line in lines) / len(lines) > rule.max_short_lines:
            return Outcome(drop="short_lines")
        characters = len(document.text) - document.text.count("\n")
        if duplicates(lines)[1] / characters > rule.max_repeated:
            return Outcome(drop="repeated_lines")
        if document.text.count("\n") / max(1, len(words_of(document.text))) > rule.max_line_ends:
            return Outcome(drop="list")
        return KEEP
