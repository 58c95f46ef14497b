"""Gates of level 6: what is added from other documents is cited, and stands there; quotations do so word for word.

A statement that is taken from another document has its mark behind it, `[[2]]` for the second of those shown. What a
text said itself must all be there still, by the gates of completion.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from megatron_davinci.darwin import facts_of
from megatron_davinci.darwin.complete import completion_violations
from megatron_davinci.darwin.edits import Edit, calls_of
from megatron_davinci.darwin.fidelity import content_stems, new_names
from megatron_davinci.darwin.pair_gates import quoted

CITATION = re.compile(r"[ \t]?\[\[(\d{1,3})\]\]")
_ANY_MARK = re.compile(r"\[\[|\]\]")
_QUOTE = re.compile(r"[“\"]([^“”\"\n]{8,800})[”\"](?=[^“”\"\n]{0,40}?\[\[(\d{1,3})\]\])")
_SUPPORTED = 0.5  # of a cited sentence's content words
_SMALL = {str(number) for number in range(2, 11)}
_MOST_QUOTES = 6
_TELLS = 3  # content words, and words between blanks, of a sentence that may be quoted


def context_violations(source: str, answer: str, related: Sequence[str]) -> list[str]:
    """What is wrong with a text that was put into context: names of broken rules, none for a good one.

    Args:
        source: The text before.
        answer: The text after, with citations `[[1]]`, ….
        related: The passages that may be cited, from 1 on.
    """
    if _ANY_MARK.search(source):
        return ["marks_in_the_text"]
    if answer == source:
        return []
    found = []
    cited = [int(number) for number in CITATION.findall(answer)]
    if not cited:
        found.append("cites_nothing")
    if any(not 1 <= number <= len(related) for number in cited) or _ANY_MARK.search(CITATION.sub("", answer)):
        found.append("unknown_citation")
        return found
    bare = CITATION.sub("", answer)
    # What is cited may bring numbers, and units, of its own; `_statements` looks at those.
    broken = completion_violations(source, bare)
    found += [name for name in broken if name not in ("added_number", "changed_unit")]
    had, has = (facts_of.numbers(facts_of.plain(text)) for text in (source, bare))
    if any(unit is not None and (value, unit) not in has for value, unit in had):
        found.append("changed_unit")
    if any(not quoted(said, related[int(number) - 1]) for said, number in _QUOTE.findall(answer)):
        found.append("misquoted")
    found += _statements(source, answer, related)
    return list(dict.fromkeys(found))


def _statements(source: str, answer: str, related: Sequence[str]) -> list[str]:
    """Whether each sentence's new numbers and names, and its words where it cites, are those of what it cites."""
    plain = facts_of.plain(source)
    had = facts_of.numbers(plain)
    values = {value for value, _ in had}
    own, words = content_stems(plain), set(facts_of.words(plain))
    found = []
    for sentence in _sentences(answer):
        numbers = {int(number) for number in CITATION.findall(sentence)}
        said = facts_of.plain(CITATION.sub("", sentence))
        passages = facts_of.plain("\n".join(related[number - 1] for number in sorted(numbers)))
        cited = facts_of.numbers(passages)
        there = {value for value, _ in cited}
        # "In two steps" adds no fact; "two metres" does.
        counted = facts_of.numbers(said)
        added = {value for value, unit in counted if unit is not None or value not in _SMALL} - values
        if any(
            unit and value in values | there and (value, unit) not in had | cited for value, unit in counted
        ):
            found.append("changed_unit")
        names_ = new_names(said, words)
        if added - there or (names_ and new_names(said, words | set(facts_of.words(passages)))):
            found.append("fact_not_in_citation" if numbers else "uncited_fact")
        stems = content_stems(said) - own
        if numbers and len(stems & content_stems(passages)) < _SUPPORTED * len(stems):
            found.append("citation_does_not_say_it")
    return found


def _sentences(text: str) -> list[str]:
    """Sentences, each with the citations that stand behind its end mark."""
    moved = re.sub(r"([.!?][\"”')]*)((?:[ \t]?\[\[\d{1,3}\]\])+)", lambda m: f"{m[2]}{m[1]}", text)
    return facts_of.sentences(moved)


def sentences_of(related: Sequence[str]) -> str:
    """Passages with a number before each sentence, `1.2` for the second of the first."""
    return "\n".join(
        f"[{number}.{place}] {' '.join(sentence.split())}"
        for number, passage in enumerate(related, start=1)
        for place, sentence in enumerate(_telling(passage), start=1)
    )


def sentence_counts(related: Sequence[str]) -> list[int]:
    """How many sentences each passage has."""
    return [len(_telling(passage)) for passage in related]


def _telling(passage: str) -> list[str]:
    """The sentences of a passage that say something: to a reader of another text a heading says nothing, nor does a
    name with dots in it.
    """
    return [
        each
        for each in facts_of.sentences(passage)
        if len(content_stems(each)) >= _TELLS and len(each.split()) >= _TELLS
    ]


def with_quotations(source: str, program: str, related: Sequence[str]) -> str | None:
    """The text with sentences of other passages before it; None where the program is none, or names none.

    Args:
        source: The text.
        program: Calls of `quote(passage, sentence)`, one a line, or `nothing()` alone.
        related: The passages.
    """
    lines = []
    calls = calls_of(program)
    if not calls or len(calls) > _MOST_QUOTES:
        return None
    for call in calls:
        match call:
            case Edit("nothing", ()) if len(calls) == 1:
                return source
            case Edit("quote", (int() as number, int() as place)) if 1 <= number <= len(related):
                sentences = _telling(related[number - 1])
                if not 1 <= place <= len(sentences):
                    return None
                sentence = " ".join(sentences[place - 1].split())
                lines.append(f"{sentence} [[{number}]]")
            case _:
                return None
    return "\n".join(dict.fromkeys(lines)) + f"\n\n{source}"
