"""Gates of level 8: what agents say to each other about a document is grounded in it, and goes on."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from megatron_davinci.darwin import facts_of
from megatron_davinci.darwin.fidelity import content_stems, loops, new_names, speaks_of_the_task, turned

_SMALL = {str(number) for number in range(2, 11)}
_POINTS = re.compile(
    r"\b(?:the|this|that) (?:passage|text|excerpt|document|article|author|authors|dialogue|conversation)\b",
    re.IGNORECASE,
)
_ALIKE = 0.8  # of a turn's runs of words
_SHARED = 4  # content words of the document that a dialogue has at least


class Turn(NamedTuple):
    """What one agent said.

    Attributes:
        speaker: Its name.
        text: Its words.
    """

    speaker: str
    text: str


def written(turns: Sequence[Turn]) -> str:
    """A dialogue as text: a paragraph a turn, after the speaker's name."""
    return "\n\n".join(f"{turn.speaker}: {turn.text}" for turn in turns)


def turn_violations(
    text: str, document: str, before: Sequence[Turn], speakers: Sequence[str], longest: int = 1500
) -> list[str]:
    """What is wrong with a turn: names of broken rules, none for a good one.

    Args:
        text: The words.
        document: What is spoken about.
        before: The turns before it.
        speakers: Names of all agents.
        longest: Characters that it may have.
    """
    if not text.strip():
        return ["empty"]
    found = []
    said, known = facts_of.plain(text), facts_of.plain(document)
    if len(text) > longest:
        found.append("too_long")
    names = "|".join(re.escape(name) for name in speakers)
    if re.search(rf"(?m)^[ \t>*_]*(?:{names})[*_]*\s*:", text, re.IGNORECASE):
        found.append("speaks_for_others")
    if any(_alike(text, turn.text) for turn in before):
        found.append("repeats_a_turn")
    had, has = facts_of.numbers(known), facts_of.numbers(said)
    values = {value for value, _ in had}
    # "In two steps" is no fact; "two metres" is one.
    if {value for value, unit in has if unit is not None or value not in _SMALL} - values:
        found.append("ungrounded_number")
    if any(unit is not None and value in values and (value, unit) not in had for value, unit in has):
        found.append("changed_unit")
    words = set(facts_of.words(known)) | {word for name in speakers for word in facts_of.words(name)}
    if new_names(said, words):
        found.append("ungrounded_name")
    if set(facts_of.formulas(said)) - set(facts_of.formulas(known)):
        found.append("ungrounded_formula")
    if turned(known, said) and "?" not in said:
        found.append("contradicts")
    if loops(document, text):
        found.append("repetition")
    if speaks_of_the_task(document, text) or (_POINTS.search(said) and not _POINTS.search(known)):
        found.append("speaks_of_the_task")
    return found


def dialogue_violations(
    turns: Sequence[Turn], document: str, speakers: Sequence[str], least: int
) -> list[str]:
    """What is wrong with a dialogue as a whole.

    Args:
        turns: All of them.
        document: What is spoken about.
        speakers: Names of the agents, in their order.
        least: Turns that it has at least.
    """
    found = []
    if len(turns) < least:
        found.append("too_few_turns")
    if [turn.speaker for turn in turns] != [speakers[number % len(speakers)] for number in range(len(turns))]:
        found.append("turns_do_not_alternate")
    said = content_stems(" ".join(turn.text for turn in turns))
    if len(said & content_stems(document)) < _SHARED:
        found.append("about_something_else")
    return found


def _alike(one: str, other: str) -> bool:
    a, b = (facts_of.words(text) for text in (one, other))
    if a == b:
        return True
    runs = [{tuple(words[at : at + 3]) for at in range(len(words) - 2)} for words in (a, b)]
    return bool(runs[0]) and len(runs[0] & runs[1]) >= _ALIKE * min(len(runs[0]), len(runs[1]) or 1)
