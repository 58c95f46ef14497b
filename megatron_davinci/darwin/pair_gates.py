"""The two gates of questions with answers: the question stands alone; the evidence states or yields the answer.

Both are rules that need no model; a model may judge besides (`pairs`). The report asks for both in words; its
protocol of evaluation items has the same two gates.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import product
from typing import NamedTuple

from megatron_davinci.darwin import facts_of

_THING = (
    r"passage|text(?! (?:file|editor|field|string|mode|box|message))|document(?! object)|excerpt|article"
    r"|paper(?! (?:of|size|industry))|stud(?:y|ies)(?! of)|authors?(?! of)|writers?(?! of)|book(?! of)"
    r"|chapter|section|paragraph|figure|diagram|graph|image|picture|table|snippet|abstract|introduction|appendix|context"
    r"|information (?:given|provided)"
)
_NUMBERED = (
    r"figure|fig\.|table|equation|eq\.|theorem|lemma|corollary|proposition|section|chapter|example|exercise|listing"
    r"|scheme|compound"
)
_SHOWN_BEFORE = r"mentioned|described|stated|shown|discussed|given|defined|listed|presented"
_POINTS = re.compile(
    rf"\b(?:(?:this|these|the)(?: (?:above|given|following|provided|present|same|previous))?|according to(?: the)?)"
    rf" (?:{_THING})\b"
    rf"|\b(?:{_NUMBERED}) \(?\d"
    rf"|\b(?:{_SHOWN_BEFORE}) (?:above|below|earlier|here|previously|before)\b"
    r"|\bthe (?:above|aforementioned|latter|former)\b|\bprevious question\b",
    re.IGNORECASE,
)
_NOT_POINTING = re.compile(
    r"\bthe (?:table|figure|graph|section|image|book) of \w+|\bperiodic table\b|\btruth table\b",
    re.IGNORECASE,
)
_PRONOUNS = {"it", "they", "he", "she", "him", "them", "its", "their", "his", "her"}
_EMPTY_IT = re.compile(
    r"\b(?:is|was|would|does|can) it (?:be )?(?:possible|important|necessary|true|better|harder|easier|matter|take"
    r"|safe|useful|easy|hard|difficult|common|wrong)",
    re.IGNORECASE,
)
_DEMONSTRATIVE = re.compile(
    r"\b(this|these|those|such)\b(?! (?:who|that|which|of|in|with|as|a|an)\b)(?: (\w+))?", re.IGNORECASE
)
# What a definite article before says only if something has been named: "the device", but not "the device that ...".
_VAGUE = (
    "experiments? devices? methods? results? researchers scientists patients? samples? algorithm reaction "
    "process system model team approach procedure observations? effect program problem proof compound product "
    "participants subjects findings data value equation function apparatus technique material mixture "
    "solution machine company war treaty"
).split()
_DEFINITE = re.compile(
    r"\bthe (?:proposed |new |main |final |first |described )?(" + "|".join(_VAGUE) + r")\b", re.IGNORECASE
)
_SPECIFIES = re.compile(
    r" (?:of|that|which|in|for|by|used|called|named|between|from|to|with|where|when|whose|who|on|at|behind|under)\b"
    r"| (?:\w+ed by|f|g)\b|\s*[($`\\]|'s\b"
)
_LITTLE = set(
    "the and for are was were has have had does did what which when where who whom whose why how many much "
    "that this these those with from into than then them they their there his her its one can could would "
    "should will shall may might must been being about over under also not but you your our out off any each "
    "some such only other more most very both either neither between because since while during".split()
)
# Verbs that a question may begin with before it has named anything.
_VERBS = set(
    "happen happens happened occur occurs occurred cause causes caused mean means become becomes change "
    "changes changed use used make makes made compare compared find found conclude show shows showed give "
    "gives work works".split()
)
_SHOWN = re.compile(
    r"[=+×*/÷−]|\d\s*-\s*\d"
    r"|\b(?:sum|difference|product|ratio|minus|plus|times|divided|total|multipl\w+|subtract\w*|add\w*)\b",
    re.IGNORECASE,
)
_BOXED = re.compile(r"\\boxed\{((?:[^{}]|\{[^{}]*\})*)\}")
_BLOCK = re.compile(r"^\s*BEGIN QA\s*$(.*?)^\s*END QA\s*$", re.MULTILINE | re.DOTALL)
_FIELDS = re.compile(r"\s*QUESTION:(.*?)^\s*ANSWER:(.*?)^\s*EVIDENCE:(.*)", re.DOTALL | re.MULTILINE)


class Pair(NamedTuple):
    """A question with its answer.

    Attributes:
        question: Standing alone, if it passes the first gate.
        answer: With the final answer in `\\boxed{}`, where there is one.
        evidence: What it quotes of its passage.
    """

    question: str
    answer: str
    evidence: str


def parsed(answer: str) -> tuple[list[Pair], int]:
    """The pairs in a model's answer, and how many others are malformed."""
    pairs, malformed = [], 0
    for block in _BLOCK.finditer(answer):
        fields = _FIELDS.fullmatch(block[1].rstrip() + "\n")
        found = [field.strip() for field in fields.groups()] if fields else []
        if found and all(found[:2]):
            pairs.append(Pair(found[0], found[1], found[2].strip("\"“”' \n")))
        else:
            malformed += 1
    malformed += max(0, len(re.findall(r"^\s*BEGIN QA\s*$", answer, re.MULTILINE)) - len(pairs) - malformed)
    if not pairs and not malformed and "NO QA" not in answer:
        malformed = 1
    return pairs, malformed


def faults(pair: Pair, passage: str) -> list[str]:
    """Gates that a pair does not pass, by name; none for a good one."""
    return [*alone(pair.question), *supported(pair, passage)]


def alone(question: str) -> list[str]:
    """Why a question does not stand alone: it points at its passage, or at something that it has not named."""
    question = facts_of.plain(question)
    if len(question.split()) < 3:
        return ["no_question"]
    if _POINTS.search(_NOT_POINTING.sub(" ", question)):
        return ["points_at_the_passage"]
    return ["open_reference"] if any(_open_references(question)) else []


def _open_references(question: str) -> Iterator[bool]:
    """For each pronoun, demonstrative and definite word, whether nothing before it can be meant."""
    plain = _EMPTY_IT.sub(" ", question)
    for match in re.finditer(r"\b\w+\b", plain):
        if match[0].lower() in _PRONOUNS:
            yield not set(_content(plain[: match.start()])) - _VERBS
    for match in _DEMONSTRATIVE.finditer(question):
        said = question[: match.start()]
        named = match[2] is not None and _stem(match[2].lower()) in {_stem(word) for word in _content(said)}
        yield not named and not re.search(r"[.;:]\s", said)
    for match in _DEFINITE.finditer(question):
        before, after = question[: match.start()], question[match.end() :]
        named = _stem(match[1].lower()) in {_stem(word) for word in _content(before)}
        yield not named and not _SPECIFIES.match(after) and not re.search(r"[.;:]\s", before)


def supported(pair: Pair, passage: str) -> list[str]:
    """Why the evidence does not support the answer: it is none, is not the passage's, or says something else."""
    evidence = facts_of.plain(pair.evidence)
    parts = [part.strip(" .") for part in re.split(r"\.\.\.|…|\[\.\.\.\]", evidence) if part.strip(" .")]
    if sum(len(part.split()) for part in parts) < 3:
        return ["no_evidence"]
    passage = facts_of.plain(passage)
    if not all(quoted(part, passage) for part in parts):
        return ["evidence_not_in_the_passage"]
    return (
        []
        if _yields(evidence, facts_of.plain(pair.question), facts_of.plain(pair.answer), passage)
        else ["answer_not_supported"]
    )


def quoted(part: str, passage: str) -> bool:
    """Whether a passage has a stretch word for word; white space, marks and case do not matter."""
    there, here = _letters(passage), _letters(part)
    return bool(here) and f" {here} " in f" {there} "


def _letters(text: str) -> str:
    """Letters, digits and operators: white space, marks and case of a quotation do not matter."""
    return " ".join(re.findall(r"\w+|[-+*/^=<>%°]", facts_of.mended(text).casefold()))


def _yields(evidence: str, question: str, answer: str, passage: str) -> bool:
    boxed = _BOXED.findall(answer)
    final = boxed[-1] if boxed else answer
    given = {value for value, _ in (facts_of.numbers(evidence) | facts_of.numbers(question))}
    if not _numbers_follow(answer, final, given):
        return False
    known = {_stem(word) for word in facts_of.words(f"{evidence} {question}")}
    named = {word.casefold() for word, begins in facts_of.capitalised(final) if not begins}
    if named - set(facts_of.words(f"{passage} {question}")):
        return False
    content, asked = ([_stem(word) for word in _content(text)] for text in (final, question))
    stated = {_stem(word) for word in facts_of.words(evidence)}
    if sum(word in stated for word in asked) < 0.25 * len(asked):
        return False  # it speaks of something else
    if final.strip(" .").casefold() in ("yes", "no", "true", "false"):
        return True
    if not content:
        return bool(facts_of.numbers(final)) or _letters(final) in _letters(evidence)
    enough = 0.6 * len(content) if len(content) > 2 else len(content)
    return sum(word in known for word in content) >= enough and any(word in stated for word in content)


def _numbers_follow(answer: str, final: str, given: set[str]) -> bool:
    """Whether each number of an answer is given, or one step of arithmetic, that is shown, away from those before."""
    shown = _SHOWN.search(_BOXED.sub(" ", answer)) is not None
    have = {float(value) for value in given if _is_number(value)}
    for value, _ in [*facts_of.numbers(answer), *facts_of.numbers(final)]:
        if value in given:
            continue
        if not _is_number(value) or not shown or not _one_step(float(value), have):
            return False
        have.add(float(value))
    return True


def _one_step(wanted: float, have: set[float]) -> bool:
    if len(have) > 40:
        return False
    found = [each * 100 for each in have] + [each / 100 for each in have]
    found += [each**2 for each in have] + [abs(each) ** 0.5 for each in have]
    for one, other in product(have, have):
        found += [one + other, one - other, one * other, *([one / other] if other else [])]
    return any(abs(each - wanted) <= 5e-3 * abs(wanted) for each in found)


def _is_number(value: str) -> bool:
    return re.fullmatch(r"-?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?", value) is not None and len(value) < 30


def _content(text: str) -> list[str]:
    return [word for word in facts_of.words(text) if len(word) > 2 and word not in _LITTLE]


def _stem(word: str) -> str:
    return word[: max(4, len(word) - 3)] if len(word) > 4 else word
