"""Gates of level 4: a refined text may say nothing that its source does not, and must keep what may not be touched.

The report asks models for this in words. Here every answer is held against its source by rules that need no model,
and one that breaks a rule is not used. The rules are strict where they cannot tell a repair from an invention: a
digit that a model "repaired" is an added number. They compare forms, not meaning: two names of the source that
changed places, or a claim put together from its words, they do not see.
"""

from __future__ import annotations

import re
from collections import Counter
from itertools import pairwise
from typing import NamedTuple

from megatron_davinci.darwin import facts_of

_NEGATIONS = {
    "not",
    "no",
    "never",
    "none",
    "neither",
    "nor",
    "cannot",
    "without",
    "hardly",
    "nothing",
    "nobody",
    "n't",
}
_STARTERS = set(
    "a an the this that these those there it its he she they we you i his her their our your one some many "
    "most all each both if when while where as because since although though however thus therefore hence "
    "then so but and or for from in on at by to with of after before during under over between among also "
    "further furthermore moreover finally first second third next instead otherwise indeed note let given "
    "assume suppose consider here now what which who how why see such other another every any no not is are "
    "was were can may must do does yes".split()
)
_META = re.compile(
    r"\b(?:here is|here's|below is) (?:the|a|your) (?:clean|refin|revis|correct|rewrit|edit)\w*"
    r"|\bas an ai\b|\bas a language model\b"
    r"|\bi (?:have|'ve) (?:clean|remov|correct|rewrit|kept|refin)\w*|\bi (?:cannot|can't) (?:help|assist|comply)\b"
    r"|\bthe (?:passage|input|provided text) (?:was|has been|is) (?:clean|empty|refin)\w*",
    re.IGNORECASE,
)
_NOISE_LINE = re.compile(
    r"©|\bcopyright\b|all rights reserved|\bcookies?\b|\bsubscribe\b|\bclick\b", re.IGNORECASE
)
_PAGE_NUMBER = re.compile(r"(?:[Pp]age|PAGE|p\.)?\s*[-–]?\s*\d+\s*[-–]?")
_CAPITALS, _SMALL_LETTER, _DIGIT = re.compile(r"[A-Z]{3}"), re.compile(r"[a-z]"), re.compile(r"\d")


class Bounds(NamedTuple):
    """How far an answer may be from its source.

    Attributes:
        shortest: Least length, as a share of the source's; an empty answer is judged by what it deletes.
        longest: Most.
        contained: Least share of runs of words that are the source's.
        run: Words of a run.
        new_words: Most share of a sentence's content words that the source lacks.
        kept_prose: Least share of the source's prose sentences that are still there.
        kept_numbers: Least share of the source's numbers.
    """

    shortest: float
    longest: float
    contained: float
    run: int
    new_words: float
    kept_prose: float
    kept_numbers: float


BOUNDS = {
    "purify": Bounds(0.1, 1.1, 0.7, 3, 0.34, 0.65, 0.0),
    "reorganise": Bounds(0.4, 1.3, 0.4, 2, 0.6, 0.0, 0.7),
}


def violations(source: str, answer: str, task: str) -> list[str]:
    """What is wrong with a refined text: names of broken rules, none for one that is faithful.

    Args:
        source: The text before.
        answer: The text after.
        task: `purify` or `reorganise`.
    """
    bounds = BOUNDS[task]
    source, answer = facts_of.plain(source), facts_of.plain(answer)
    found = [*_lengths(source, answer, bounds)]
    had_code, source_text = facts_of.code(source)
    has_code, answer_text = facts_of.code(answer)
    if had_code != has_code:
        found.append("changed_code")
    source_text, answer_text = facts_of.mended(source_text), facts_of.mended(answer_text)
    had, has = facts_of.formulas(source_text), facts_of.formulas(answer_text)
    if set(has) - set(had):
        found.append("added_formula")
    if any(has[formula] < 1 for formula in had):
        found.append("dropped_formula")
    found += _numbers(source, answer_text, bounds)
    known = _known_words(source)
    found += ["new_name"] if new_names(answer_text, known, strict=task == "purify") else []
    found += _claims(source_text, answer_text, bounds, known)
    if loops(source, answer):
        found.append("repetition")
    if speaks_of_the_task(source, answer):
        found.append("speaks_of_the_task")
    return found


def speaks_of_the_task(source: str, answer: str) -> bool:
    """Whether an answer says "here is the cleaned text" or the like, and its source does not."""
    return any(match[0].casefold() not in source.casefold() for match in _META.finditer(answer))


def turned(source: str, answer: str) -> bool:
    """Whether the answer has a sentence of the source with the other sign."""
    before = _signed(source)
    rows = map(facts_of.words, facts_of.sentences(answer))
    return bool(before) and any(len(row) >= 4 and _turned(row, before) for row in rows)


def content_stems(text: str) -> set[str]:
    """Stems of words that carry content."""
    return {_stem(word) for word in facts_of.words(text) if len(word) > 3 and word not in _STARTERS}


def _signed(text: str) -> list[tuple[set[str], bool]]:
    return [(set(row), _negated(row)) for row in map(facts_of.words, facts_of.sentences(text)) if row]


def _lengths(source: str, answer: str, bounds: Bounds) -> list[str]:
    before, after = len("".join(source.split())), len("".join(answer.split()))
    if after > bounds.longest * before + 20:
        return ["too_long"]
    return ["too_short"] if 0 < after < bounds.shortest * before else []


def _numbers(source: str, answer: str, bounds: Bounds) -> list[str]:
    had = facts_of.numbers(source) | facts_of.numbers(facts_of.mended(source))
    has = facts_of.numbers(answer)
    values = {value for value, _ in had}
    found = []
    if any(value not in values for value, _ in has):
        found.append("added_number")
    if any(value in values and (value, unit) not in had for value, unit in has):
        found.append("changed_unit")
    if bounds.kept_numbers:
        matter = [line for line in source.split("\n") if not _NOISE_LINE.search(line) and not _is_head(line)]
        wanted = {value for value, _ in facts_of.numbers("\n".join(matter))}
        if len(wanted & {value for value, _ in has}) < bounds.kept_numbers * len(wanted):
            found.append("dropped_numbers")
    return found


def _is_head(line: str) -> bool:
    """Whether a line is a page number, or a running head in capitals with one."""
    if _PAGE_NUMBER.fullmatch(line.strip()):
        return True
    capitals = None if _SMALL_LETTER.search(line) else _CAPITALS.search(line)
    return capitals is not None and _DIGIT.search(line, capitals.end()) is not None


def _known_words(source: str) -> set[str]:
    """Words of the source, torn ones also put together, and those with a blank too much, two by two."""
    row = facts_of.words(source)
    known = {*row, *facts_of.words(facts_of.mended(source))}
    known |= {word.split("'")[0] for word in known}
    return known | {one + two for one, two in pairwise(row)}


def new_names(text: str, known: set[str], strict: bool = False) -> list[str]:
    """Words with a capital that are not known.

    Args:
        text: The text.
        known: Words, case folded.
        strict: Whether a word that begins a sentence must be known too, if it is none of grammar's.
    """
    found = []
    for word, begins in facts_of.capitalised(text):
        lower = word.casefold()
        if lower in known or all(part in known for part in re.split(r"['_]", lower) if part):
            continue
        if any(mark.isdigit() for mark in word) or re.search(r"[\W_]", word.strip("'")):
            continue  # judged as a number
        if begins and (lower in _STARTERS or (not strict and _is_ordinary(lower, known))):
            continue
        found.append(word)
    return found


def _is_ordinary(word: str, known: set[str]) -> bool:
    """Whether a word that begins a sentence is a form of one in the source, or looks like no name."""
    return _stem(word) in {_stem(each) for each in known} or word.endswith(
        ("ly", "ing", "ed", "tion", "ions", "ments", "ness")
    )


def _claims(source: str, answer: str, bounds: Bounds, known: set[str]) -> list[str]:
    found = []
    stems = {_stem(word) for word in known}
    for sentence in facts_of.sentences(answer):
        row = facts_of.words(sentence)
        content = [word for word in row if len(word) > 3 and word not in _STARTERS]
        new = [word for word in content if word not in known and _stem(word) not in stems]
        if len(content) >= 3 and len(new) > bounds.new_words * len(content):
            found.append("added_claim")
    if turned(source, answer):
        found.append("changed_negation")
    if _contained(facts_of.words(source), facts_of.words(answer), bounds.run) < bounds.contained:
        found.append("added_text")
    prose = [
        set(facts_of.words(sentence))
        for sentence in facts_of.sentences(source)
        if len(sentence.split()) >= 8 and sentence.rstrip()[-1] in ".!?" and not _NOISE_LINE.search(sentence)
    ]
    if len(prose) >= 2 and bounds.kept_prose:
        left = set(facts_of.words(answer))
        kept = sum(len(each & left) >= 0.8 * len(each) for each in prose)
        if kept < bounds.kept_prose * len(prose):
            found.append("dropped_prose")
    return sorted(set(found))


def _negated(row: list[str]) -> bool:
    return sum(word in _NEGATIONS or word.endswith("n't") for word in row) % 2 == 1


def _turned(row: list[str], before: list[tuple[set[str], bool]]) -> bool:
    """Whether the source has almost this sentence, and only with the other sign."""
    here = set(row) - _NEGATIONS
    alike = {
        negated for there, negated in before if len(here & there) >= 0.8 * len(here | (there - _NEGATIONS))
    }
    return bool(alike) and _negated(row) not in alike


def _contained(before: list[str], after: list[str], run: int) -> float:
    had = {tuple(before[at : at + run]) for at in range(len(before) - run + 1)}
    has = [tuple(after[at : at + run]) for at in range(len(after) - run + 1)]
    # What was torn apart and is put together makes new runs around it.
    return sum(each in had for each in has) / len(has) if len(has) >= 8 else 1.0


def loops(source: str, answer: str) -> bool:
    """Whether a run of eight words comes far more often than in the source, or one mark follows itself on and on."""

    def most(text: str) -> int:
        row = text.split()
        counts = Counter(tuple(row[at : at + 8]) for at in range(len(row) - 7))
        return max(counts.values(), default=0)

    found = re.search(r"([^\s\-=_.*#~])\1{30,}", answer)
    return most(answer) > max(3, 2 * most(source)) or (found is not None and found[0] not in source)


def _stem(word: str) -> str:
    return word[: max(4, len(word) - 3)] if len(word) > 4 else word
