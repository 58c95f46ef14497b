"""Level 5: what a text leaves unsaid is written out by a model, chunk by chunk; facts, formulas and headings stay.

The report's rules for it: facts are unchanged, structure is unchanged, and the text stops exactly where the chunk
stops. An explanation is new words by design, so the gates check that nothing got lost or other, and count no novelty.
"""

from __future__ import annotations

import re
from pathlib import Path

from datatrove.data import Document
from pydantic import Field

from megatron_davinci.darwin import facts_of
from megatron_davinci.darwin.fidelity import content_stems, loops, speaks_of_the_task, turned
from megatron_davinci.darwin.refine import Chunked, ChunkedParameters

_LONGEST = 8.0  # times the source
_SMALL = {str(number) for number in range(2, 11)}  # "in two steps", "the first three terms"
_HEADING = re.compile(
    r"^[ \t]*(#{1,6} \S.*|(?:\d+\.)+\d*[ \t]+[A-Z].{0,80}"
    r"|(?:Theorem|Lemma|Corollary|Proposition|Definition|Example|Exercise|Remark)[ \t]+\d+(?:\.\d+)*\b.{0,40})$",
    re.MULTILINE,
)
_EQUATION_NUMBER = re.compile(r"\\tag\{[^}]+\}|(?<=\s)\(\d+(?:\.\d+)*\)[ \t]*$", re.MULTILINE)
_POINTS = re.compile(
    r"\b(?:the|this) (?:passage|text|excerpt|author|original|piece)\b"
    r" (?:says|states|explains|means|tells|writes|describes|begins|ends)",
    re.IGNORECASE,
)


def completion_violations(source: str, answer: str) -> list[str]:
    """What is wrong with a completed text: names of broken rules, none for one that says all that its source says.

    Args:
        source: The text before.
        answer: The text after.
    """
    source, answer = facts_of.plain(source), facts_of.plain(answer)
    found = []
    before, after = len("".join(source.split())), len("".join(answer.split()))
    if after < before:
        found.append("too_short")
    if after > _LONGEST * before + 200:
        found.append("too_long")
    had_code, source_text = facts_of.code(source)
    has_code, answer_text = facts_of.code(answer)
    if had_code - has_code:
        found.append("dropped_code")
    source_text, answer_text = facts_of.mended(source_text), facts_of.mended(answer_text)
    if set(facts_of.formulas(source_text)) - set(facts_of.formulas(answer_text)):
        found.append("dropped_formula")
    found += _numbers(source_text, answer_text)
    if not _in_order(_HEADING.findall(source), answer):
        found.append("dropped_heading")
    if not _in_order([label.strip() for label in _EQUATION_NUMBER.findall(source)], answer):
        found.append("dropped_equation_number")
    if turned(source_text, answer_text):
        found.append("changed_negation")
    if not _stops_with(source_text, answer_text):
        found.append("stops_elsewhere")
    if loops(source, answer):
        found.append("repetition")
    if speaks_of_the_task(source, answer) or (_POINTS.search(answer) and not _POINTS.search(source)):
        found.append("speaks_of_the_task")
    return found


def _numbers(source: str, answer: str) -> list[str]:
    had, has = facts_of.numbers(source), facts_of.numbers(answer)
    values, shown = {value for value, _ in had}, {value for value, _ in has}
    found = []
    if values - shown:
        found.append("dropped_number")
    if any(value not in values and value not in _SMALL for value in shown):
        found.append("added_number")
    # A quantity may be spoken of again without its unit, and never with another.
    if any(unit is not None and value in values - _SMALL and (value, unit) not in had for value, unit in has):
        found.append("changed_unit")
    if any(unit is not None and (value, unit) not in has for value, unit in had):
        found.append("changed_unit")
    return sorted(set(found))


def _in_order(labels: list[str], answer: str) -> bool:
    at = 0
    for label in labels:
        at = answer.find(label.strip(), at)
        if at < 0:
            return False
        at += len(label.strip())
    return True


def _stops_with(source: str, answer: str) -> bool:
    """Whether the end of the answer is about what the end of its source is about."""
    # Those that say something: an equation's number at the end does not.
    before, after = (
        [stems for stems in map(content_stems, facts_of.sentences(text)) if stems]
        for text in (source, answer)
    )
    wanted = before[-1] if before else set()
    left = set().union(*after[-3:])
    return len(wanted & left) >= 0.5 * len(wanted)


class Complete(Chunked):
    """Level 5 by a model."""

    name = "complete"
    level = 5
    version = 2
    about = "a model writes out what is left unsaid; what loses a fact, a formula or a heading is not used"
    tasks = frozenset({"complete"})
    done = "completed"

    class Parameters(ChunkedParameters):
        """Parameters of `complete`.

        Attributes:
            prompt: `complete_science`, or a prompt file (`.yaml`).
            chunk: Most tokens of a chunk.
            tokenizer: Folder of a tokenizer to measure chunks by.
        """

        prompt: str = "complete_science"
        chunk: int = Field(default=1024, gt=0)
        tokenizer: Path

    parameters: Parameters

    def judge(self, document: Document, source: str, answer: str) -> list[str]:
        """The gates of completion."""
        return completion_violations(source, answer)
