"""Texts for the gates, drawn from a seed: clean refinements and pairs, and twins of each with a planted violation.

Half of the passages are put together from sentences about science with numbers, units, formulas and names drawn
at random, half are Python's own documentation. Their dirt (running heads, page numbers, torn words, ligatures,
banners) is what the clean answer takes away.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from typing import NamedTuple

from megatron_davinci.darwin.chunks import cut
from megatron_davinci.darwin.pair_gates import Pair
from tests.darwin.making import prose

NAMES = "Okafor Lindqvist Haruki Benedetti Moreau Castellan Novak Whitford Ibarra Sandoval Thackeray Oyelaran".split()
SUBSTANCES = [
    "gallium",
    "copper sulphate",
    "naphthalene",
    "silver nitrate",
    "ethylene glycol",
    "tungsten carbide",
]
UNITS = {"km": "m", "kg": "g", "°C": "°F", "kPa": "MPa", "mL": "L", "Hz": "kHz", "mm": "cm", "kJ": "J"}
CODE = [
    "def area(r):\n    return 3.14 * r ** 2",
    "for step in range(10):\n    total += step * 2",
    "x = [n for n in data if n > 4]",
]
CLAIMS = [
    "Later work attributed the whole phenomenon to hidden magnetic impurities.",
    "Patients should therefore avoid strenuous exercise during treatment.",
    "Economists consider inflation the dominant cause behind unemployment.",
    "Ancient astronomers already suspected planetary orbits were elliptical.",
]


class Case(NamedTuple):
    """One answer to judge.

    Attributes:
        kind: The violation; empty for a clean one.
        source: The chunk.
        answer: Its refinement.
        task: Of the prompt.
    """

    kind: str
    source: str
    answer: str
    task: str


def science(draw: random.Random) -> str:
    """A passage about science that has all that can be violated."""
    number = lambda low, high: f"{draw.uniform(low, high):.{draw.randrange(3)}f}"  # noqa: E731
    unit, name, substance = draw.choice(list(UNITS)), draw.choice(NAMES), draw.choice(SUBSTANCES)
    a, b = draw.sample("abcdkmnpqrt", 2)
    sentences = [
        f"In {draw.randrange(1890, 2020)} {name} measured {number(2, 90)} {unit} in a column of {substance}, "
        "which did not agree with the older theory.",
        f"The relation ${a}^{draw.randrange(2, 6)} + {b} = {draw.randrange(11, 99)}$ holds at constant pressure.",
        f"About {number(5, 60)}% of the {substance} had dissolved after {draw.randrange(20, 59)} minutes.",
        "The curve is smooth near the origin, and its slope never changes sign inside the interval.",
        f"A sample of {number(100, 900)} g was kept at {number(20, 80)} °C, because warmer baths had cracked it.",
        f"One finds $$\\int_0^{{{draw.randrange(2, 9)}}} {a}\\,d{a} = {b}$$ by elementary means, "
        "and the remainder is not zero.",
        f"The amplitude decays slowly, so {a} = {draw.randrange(2, 9)} is a good choice for most instruments.",
    ]
    draw.shuffle(sentences)
    text = [" ".join(sentences[:3]), " ".join(sentences[3:])]
    text.insert(draw.randrange(3), f"```python\n{draw.choice(CODE)}\n```")
    return "\n\n".join(text)


def soiled(text: str, draw: random.Random) -> str:
    """A text as a scan or a web page has it."""
    parts = text.split("\n\n")
    tear = lambda found: f"{found[1]}-\n{found[2]}" if draw.random() < 0.08 else found[0]  # noqa: E731
    parts = [
        part
        if part.startswith("```")
        else re.sub(r"\b([a-z]{4})([a-z]{4,})\b", tear, part).replace("fi", draw.choice(["fi", "ﬁ"]))
        for part in parts
    ]
    dirt = [
        f"Page {draw.randrange(3, 400)}",
        f"CHAPTER {draw.randrange(1, 20)}. SELECTED TOPICS {draw.randrange(20, 300)}",
        "Home | About | Contact",
        "Visit https://www.example.org/more?id=7 for more!",
        "We use cookies to give you a better experience. Click here to accept all cookies.",
        "Copyright 2011 by the publisher. All rights reserved.",
    ]
    for line in draw.sample(dirt, draw.randrange(1, 4)):
        parts.insert(draw.randrange(len(parts) + 1), line)
    return "\n\n".join(parts)


def clean(text: str, draw: random.Random, task: str) -> str:
    """What a faithful model makes of it."""
    if draw.random() < 0.3:
        text = re.sub(r"\$ ?(\w+)\^(\d) \+ (\w) = (\d+)\$", r"$\1^\2+\3=\4$", text)
    if draw.random() < 0.3:
        text = re.sub(r"(\d) km\b", r"\1 kilometres", text).replace(" minutes", " min")
    if draw.random() < 0.3:
        text = (
            re.sub(r"(?<![\n`])\n(?![\n`])", " ", text) if "```" not in text and "    " not in text else text
        )
    if task == "reorganise":
        parts = text.split("\n\n")
        at = draw.randrange(len(parts))
        rows = re.split(r"(?<=[a-z]\.) (?=[A-Z])", parts[at])
        if len(rows) > 1 and not parts[at].startswith("```"):
            draw.shuffle(rows)
            rows[-1] = draw.choice(["Moreover, ", "In addition, ", ""]) + rows[-1]
            parts[at] = " ".join(rows)
        text = "\n\n".join(parts)
    return text


def _outside_code(pattern: str, text: str, draw: random.Random) -> re.Match[str] | None:
    code = [match.span() for match in re.finditer(r"```.*?```|\$\$?.*?\$\$?", text, re.DOTALL)]
    found = [
        match
        for match in re.finditer(pattern, text)
        if not any(begin <= match.start() < end for begin, end in code)
    ]
    return draw.choice(found) if found else None


def violated(kind: str, text: str, draw: random.Random) -> str | None:
    """A clean text with a violation; None where it has nothing to violate."""

    def put(match: re.Match[str] | None, new: str | None) -> str | None:
        return None if match is None or new is None else text[: match.start()] + new + text[match.end() :]

    other = str(draw.randrange(1000, 9999))
    end = _outside_code(r"(?<=[a-z])\.(?= [A-Z]|\n\n|$)", text, draw)
    match kind:
        case "added_number":
            return put(end, f", in {other} cases.")
        case "changed_number":
            found = _outside_code(r"(?<![\w.^])\d+(?:\.\d+)?(?![\w.])", text, draw)
            return put(found, found and f"{float(found[0]) * 10 + 3:g}")
        case "changed_unit":
            units = "|".join(re.escape(unit) for unit in UNITS)
            found = _outside_code(rf"(?<=\d )(?:{units})(?!\w)", text, draw)
            return put(found, found and UNITS[found[0]])
        case "dropped_formula":
            found = draw.choice([*re.finditer(r"\$\$.*?\$\$|\$.*?\$", text)] or [None])
            return put(found, "a certain value")
        case "changed_formula":
            found = draw.choice([*re.finditer(r"(?<=\^)\d(?=[ +])|(?<=\\int_0\^\{)\d", text)] or [None])
            return put(found, found and str(int(found[0]) + 1))
        case "changed_code":
            found = draw.choice([*re.finditer(r"```python\n.*?\n```", text, re.DOTALL)] or [None])
            new = found and re.sub(r"\d+", lambda digits: str(int(digits[0]) + 1), found[0], count=1)
            return put(found, draw.choice([new, ""]) if found else None)
        case "new_name":
            name = draw.choice([name for name in NAMES if name not in text])
            return put(
                end,
                draw.choice(
                    [f", as {name} has shown.", f". {name} has shown the same.", f" ({name} and others)."]
                ),
            )
        case "added_claim":
            return put(end, f". {draw.choice(CLAIMS)}")
        case "changed_negation":
            found = _outside_code(r"\bdid not agree|\bis not zero", text, draw)
            return put(found, found and {"did not agree": "did agree", "is not zero": "is zero"}[found[0]])
    raise ValueError(kind)


KINDS = [
    "added_number",
    "changed_number",
    "changed_unit",
    "dropped_formula",
    "changed_formula",
    "changed_code",
    "new_name",
    "added_claim",
    "changed_negation",
]


def fidelity_cases(seed: int, passages: int) -> Iterator[Case]:
    """For each passage a clean answer, and one of each violation that it can have."""
    draw = random.Random(seed)
    real = [chunk.text for text in prose() for chunk in cut(text, 1000) if len(chunk.text) > 400]
    draw.shuffle(real)
    for number in range(passages):
        text = science(draw) if number % 2 else real[number % len(real)]
        task = "purify" if number % 4 < 2 else "reorganise"
        source, good = soiled(text, draw), clean(text, draw, task)
        yield Case("", source, good, task)
        for kind in KINDS:
            bad = violated(kind, good, draw)
            if bad is not None:
                yield Case(kind, source, bad, task)


class PairCase(NamedTuple):
    """One pair to judge.

    Attributes:
        kind: The violation; empty for a clean one.
        pair: The pair.
        passage: Its passage.
    """

    kind: str
    pair: Pair
    passage: str


def facts(draw: random.Random) -> Iterator[tuple[str, str, str, str]]:
    """Sentences, each with a question, its answer, and a wrong answer."""
    name, substance = draw.choice(NAMES), draw.choice(SUBSTANCES)
    degrees, pressure, year = draw.randrange(210, 900), draw.randrange(20, 99), draw.randrange(1850, 1990)
    mass, speed = draw.randrange(2, 40), draw.randrange(3, 30)
    yield (
        f"The melting point of {substance} is {degrees} K at a pressure of {pressure} kPa.",
        f"What is the melting point of {substance} at a pressure of {pressure} kPa?",
        f"It melts at \\boxed{{{degrees} K}}.",
        f"It melts at \\boxed{{{degrees + 37} K}}.",
    )
    yield (
        f"The effect was discovered by {name} in {year} while cleaning a prism with {substance}.",
        f"Who discovered the effect of cleaning a prism with {substance} in {year}?",
        f"\\boxed{{{name}}}",
        f"\\boxed{{{draw.choice([other for other in NAMES if other != name])}}}",
    )
    yield (
        f"A cart of mass {mass} kg moves along a rail at a constant speed of {speed} m/s without friction.",
        f"A cart of mass {mass} kg moves at {speed} m/s. What is the momentum of the cart, in kg m/s?",
        f"Momentum is mass times speed: {mass} × {speed} = {mass * speed}, so \\boxed{{{mass * speed}}}.",
        f"Momentum is mass times speed: {mass} × {speed} = {mass * speed + 11}, so \\boxed{{{mass * speed + 11}}}.",
    )
    yield (
        "Osmosis moves water through a membrane toward the side with a higher concentration of dissolved salt.",
        "Toward which side of a membrane does osmosis move water?",
        "Toward the side with a higher concentration of dissolved salt.",
        "Toward whichever compartment currently shows stronger electrical charge.",
    )
    yield (
        "A list comprehension builds a new list by evaluating an expression for every element of an iterable.",
        "How does a list comprehension in Python build a new list?",
        "By evaluating an expression for every element of an iterable.",
        "By allocating a fixed buffer and copying memory pages into it.",
    )
    yield (
        "Because warm air holds more water vapour than cold air, cooling a closed room raises its relative humidity.",
        "Why does cooling a closed room raise its relative humidity?",
        "Because warm air holds more water vapour than cold air.",
        "Because furniture releases trapped moisture when daylight fades.",
    )


def leaning(question: str, draw: random.Random) -> str:
    """A question made to lean on its passage."""
    lower = question[0].lower() + question[1:]
    return draw.choice(
        [
            f"According to the passage, {lower}",
            f"As described above, {lower}",
            f"In Table {draw.randrange(1, 9)}, {lower}",
            "What did the authors conclude about it?",
            "What is its value under these conditions?",
            f"In this study, {lower}",
            "How does the method work?",
            "Which value does the text give?",
            "Why does this happen?",
            "What happens when they are compared?",
            "What was the result of the experiment?",
        ]
    )


PAIR_KINDS = ["leaning_question", "wrong_answer", "invented_evidence", "other_evidence"]


def pair_cases(seed: int, passages: int) -> Iterator[PairCase]:
    """For each passage its pairs, and one of each violation of each."""
    draw = random.Random(seed)
    for _ in range(passages):
        rows = list(facts(draw))
        filler = science(draw)
        passage = (
            " ".join(row[0] for row in rows[:3])
            + "\n\n"
            + filler
            + "\n\n"
            + " ".join(row[0] for row in rows[3:])
        )
        for number, (sentence, question, answer, wrong) in enumerate(rows):
            evidence = sentence if draw.random() < 0.5 else sentence.lower().replace(" ", "  ", 2).rstrip(".")
            yield PairCase("", Pair(question, answer, evidence), passage)
            yield PairCase("leaning_question", Pair(leaning(question, draw), answer, evidence), passage)
            yield PairCase("wrong_answer", Pair(question, wrong, evidence), passage)
            invented = re.sub(r"\b(is|was|moves|builds|raises|holds)\b", "probably never", sentence, count=1)
            yield PairCase("invented_evidence", Pair(question, answer, invented), passage)
            other = rows[(number + 3) % len(rows)][0]
            yield PairCase("other_evidence", Pair(question, answer, other), passage)
