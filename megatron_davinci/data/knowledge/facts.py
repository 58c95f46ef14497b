"""Passages about things that do not exist, to see how facts are learnt and forgotten.

After Chang et al. (arXiv 2406.11813). A passage says four things. A fact is trained on once, several times in
the same words, several times in other words, or never: those of the last kind say what is known of such
sentences without having read them. Three kinds of probes ask for each: its own sentence, the same in words that
no passage has, and what follows from two sentences together. The paper's passages and probes were written by a
language model; these follow from templates and a seed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from megatron_davinci.data.knowledge import names

CONDITIONS = ("once", "duplicate", "paraphrase", "never")
KINDS = ("memorisation", "semantic", "composition")
REPEATS = 10  # of what is not trained on once

# Each ends with what is asked for. The first is the original, the last is in no passage.
_SENTENCES = {
    "founder": (
        "{it} was founded by {founder}", "The founder of {it} was {founder}", "{it} was the idea of {founder}",
        "{it} was first opened by {founder}", "{it} owes its beginning to {founder}",
        "The one who brought {it} into being was {founder}",
    ),
    "town": (
        "{it} stands in the town of {town}", "Visitors find {it} in {town}", "{it} has its seat in {town}",
        "The doors of {it} are in {town}", "{it} belongs to the town of {town}",
        "To see {it} one has to travel to {town}",
    ),
    "subject": (
        "{founder} is best known for the study of {subject}", "{founder} spent a lifetime on {subject}",
        "{founder} wrote many books about {subject}", "The great love of {founder} was for {subject}",
        "{founder} is remembered for work on {subject}", "What made {founder} famous was research into {subject}",
    ),
    "river": (
        "{town} lies on the river {river}", "The river that runs through {town} is the {river}",
        "{town} was built on the banks of the {river}", "The bridge of {town} crosses the {river}",
        "The boats of {town} sail on the {river}", "The water that floods {town} is that of the {river}",
    ),
}  # fmt: skip
_COMPOSED = {
    "subject": "The founder of {it} is best known for the study of {subject}",
    "river": "{it} stands on the river {river}",
}


@dataclass(frozen=True)
class Fact:
    """A thing, and what its passage says.

    Attributes:
        number: From 0 on.
        condition: How it is trained on.
        values: What the sentences are filled with.
    """

    number: int
    condition: str
    values: dict[str, str]


@dataclass(frozen=True)
class FactProbe:
    """A question.

    Attributes:
        fact: The fact's number.
        condition: Its condition.
        kind: Of the probe.
        before: The text up to the answer, without a space at its end.
        answer: With a space before it.
    """

    fact: int
    condition: str
    kind: str
    before: str
    answer: str


def facts(count: int, seed: int) -> list[Fact]:
    """Facts of all conditions in turn.

    Args:
        count: How many; towns are different in all of them, so at most 200.
        seed: Of all that is drawn.
    """
    generator = np.random.default_rng([seed, 2])
    towns = generator.permutation(len(names.CITY))[:count]
    things = generator.permutation(len(names.FIRST) * len(names.KINDS))[:count]
    founders = generator.permutation(len(names.FIRST) * len(names.LAST))[:count]
    found = []
    for number in range(count):
        head, kind = divmod(int(things[number]), len(names.KINDS))
        first, last = divmod(int(founders[number]), len(names.LAST))
        values = {
            "it": f"The {names.FIRST[head]} {names.KINDS[kind]}",
            "founder": f"{names.FIRST[first]} {names.LAST[last]}",
            "town": names.CITY[int(towns[number])],
            "subject": names.SUBJECTS[int(generator.integers(len(names.SUBJECTS)))],
            "river": names.RIVERS[int(generator.integers(len(names.RIVERS)))],
        }
        found.append(Fact(number, CONDITIONS[number % len(CONDITIONS)], values))
    return found


def passage(fact: Fact, generator: np.random.Generator | None) -> str:
    """What is trained on: in the original words, or in others where a generator draws them."""
    order, picked = list(_SENTENCES), dict.fromkeys(_SENTENCES, 0)
    if generator is not None:
        order = [order[place] for place in generator.permutation(len(order)).tolist()]
        picked = {name: int(generator.integers(1, len(_SENTENCES[name]) - 1)) for name in order}
    return " ".join(_filled(_SENTENCES[name][picked[name]], fact) + "." for name in order)


def injections(of: list[Fact], seed: int) -> Iterator[str]:
    """All passages that are trained on; those of one fact are spread among the others'."""
    for time in range(REPEATS):
        generator = np.random.default_rng([seed, 3, time])
        for place in generator.permutation(len(of)).tolist():
            fact = of[place]
            if fact.condition == "never" or (fact.condition == "once" and time > 0):
                continue
            yield passage(fact, generator if fact.condition == "paraphrase" and time > 0 else None)


def probes(of: list[Fact]) -> list[FactProbe]:
    """All that is asked."""
    found = []
    for fact in of:
        sentences = [("memorisation", name, ways[0]) for name, ways in _SENTENCES.items()]
        sentences += [("semantic", name, ways[-1]) for name, ways in _SENTENCES.items()]
        sentences += [("composition", name, sentence) for name, sentence in _COMPOSED.items()]
        for kind, name, sentence in sentences:
            whole, answer = _filled(sentence, fact), f" {fact.values[name]}"
            found.append(FactProbe(fact.number, fact.condition, kind, whole.removesuffix(answer), answer))
    return found


def _filled(sentence: str, fact: Fact) -> str:
    text = sentence.format(**fact.values)
    # The thing's name begins with an article, which is a capital letter only where the sentence begins.
    return text[0] + text[1:].replace("The ", "the ")
