"""Synthetic biographies, as in Allen-Zhu and Li's capacity laws (arXiv 2404.05405): bits of knowledge, known exactly.

Each person has a name and six attributes, drawn alike from lists of known length; the city of the work follows from
the employer. So a person is worth `log2` of the number of names and of the number of attributes in bits, and nothing
that a model has read elsewhere helps it. A biography says the six attributes in an order and in words that are drawn
anew at each exposure. The paper has fifty sentences for an attribute, and a pronoun worth a bit; here there are eight
sentences and no pronoun that differs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import log2

import numpy as np

from megatron_davinci.data.knowledge import names

ATTRIBUTES = ("birth", "birthplace", "university", "major", "employer", "workplace")
NAMES = len(names.FIRST) * len(names.MIDDLE) * len(names.LAST)
VALUES = len(names.BIRTH) * len(names.CITY) * len(names.UNIVERSITY) * len(names.MAJOR) * len(names.EMPLOYER)
NAME_BITS, ATTRIBUTE_BITS = log2(NAMES), log2(VALUES)

_SENTENCES = {
    "birth": (
        "{s} came into the world on {v}", "{s} began life on {v}", "{s} had a birth certificate dated {v}",
        "{s} first saw daylight on {v}", "{s} gave a date of birth of {v}", "{s} arrived in this world on {v}",
        "{s} celebrated the first of all birthdays on {v}", "{s} entered life on {v}",
    ),
    "birthplace": (
        "{s} spent the earliest years in {v}", "{s} came from {v}", "{s} called {v} a birthplace",
        "{s} drew a first breath in {v}", "{s} hailed from {v}", "{s} had roots in {v}",
        "{s} grew up as a child of {v}", "{s} started out in {v}",
    ),
    "university": (
        "{s} studied at {v}", "{s} earned a degree from {v}", "{s} received an education at {v}",
        "{s} graduated from {v}", "{s} attended lectures at {v}", "{s} took every exam at {v}",
        "{s} completed a course of study at {v}", "{s} gained a diploma at {v}",
    ),
    "major": (
        "{s} chose a major in {v}", "{s} focused on {v}", "{s} specialized in {v}", "{s} read {v}",
        "{s} pursued a degree in {v}", "{s} wrote a thesis in {v}", "{s} concentrated on {v}",
        "{s} took up the field of {v}",
    ),
    "employer": (
        "{s} worked for {v}", "{s} had a position at {v}", "{s} joined {v}", "{s} built a career at {v}",
        "{s} served at {v}", "{s} found employment with {v}", "{s} held a job at {v}", "{s} drew a salary from {v}",
    ),
    "workplace": (
        "{s} worked in {v}", "{s} had an office in {v}", "{s} commuted to {v}", "{s} pursued a profession in {v}",
        "{s} spent working days in {v}", "{s} earned a living in {v}", "{s} had a desk in {v}",
        "{s} did business in {v}",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Person:
    """Somebody who does not exist.

    Attributes:
        name: First, middle and last.
        values: By attribute.
    """

    name: str
    values: dict[str, str]


def people(count: int, seed: int) -> list[Person]:
    """Persons with different names.

    Args:
        count: How many.
        seed: Of all that is drawn.
    """
    generator = np.random.default_rng([seed, 0])
    found: dict[int, Person] = {}
    while len(found) < count:
        number = int(generator.integers(NAMES))
        picked = {
            "birth": names.BIRTH[int(generator.integers(len(names.BIRTH)))],
            "birthplace": names.CITY[int(generator.integers(len(names.CITY)))],
            "university": names.UNIVERSITY[int(generator.integers(len(names.UNIVERSITY)))],
            "major": names.MAJOR[int(generator.integers(len(names.MAJOR)))],
        }
        employer = int(generator.integers(len(names.EMPLOYER)))
        # The same city for all who work there, spread over the list.
        workplace = names.CITY[employer * 7 % len(names.CITY)]
        picked |= {"employer": names.EMPLOYER[employer], "workplace": workplace}
        rest, last = divmod(number, len(names.LAST))
        first, middle = divmod(rest, len(names.MIDDLE))
        name = f"{names.FIRST[first]} {names.MIDDLE[middle]} {names.LAST[last]}"
        found.setdefault(number, Person(name, picked))
    return list(found.values())


def biography(person: Person, generator: np.random.Generator) -> tuple[str, dict[str, int]]:
    """A person's six attributes, in an order and in words that are drawn.

    Returns:
        The text, and where in it each attribute's value begins.
    """
    text, begins, subject = "", {}, person.name
    for place in generator.permutation(len(ATTRIBUTES)).tolist():
        attribute = ATTRIBUTES[place]
        sentences = _SENTENCES[attribute]
        before, _, after = sentences[int(generator.integers(len(sentences)))].partition("{v}")
        text += (" " if text else "") + before.format(s=subject)
        begins[attribute] = len(text)
        text += person.values[attribute] + after + "."
        subject = "They"
    return text, begins


def exposures(persons: list[Person], times: int, seed: int) -> Iterator[str]:
    """Every person's biographies, each person once before any is met again."""
    for time in range(times):
        generator = np.random.default_rng([seed, 1, time])
        for place in generator.permutation(len(persons)).tolist():
            yield biography(persons[place], generator)[0]
