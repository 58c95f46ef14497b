"""Texts for the gates of completion, context and dialogues, drawn from a seed, and twins with a violation."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from typing import NamedTuple

from megatron_davinci.darwin.dialogue_gates import Turn
from tests.darwin.gate_plants import CLAIMS, NAMES, UNITS, facts, science

# A number with something that it counts or measures.
_VALUE = r"(?<![\w.^{$])\d{2,}(?:\.\d+)?(?=%| [a-zA-Z])"
SPEAKERS = ["Student", "Teacher"]
EXPLAINS = [
    "In other words, the quantity on the left follows from the one on the right.",
    "This matters because a small error in the first step grows in every later one.",
    "A reader may expect the opposite here, since everyday experience suggests it.",
    "To see why, think of a bucket that fills as fast as it leaks.",
    "The reason is that both parts act at the same place and in the same direction.",
]


class Completed(NamedTuple):
    """A completion to judge; `kind` is empty for a clean one."""

    kind: str
    source: str
    answer: str


class InContext(NamedTuple):
    """A text put into context; `kind` is empty for a clean one."""

    kind: str
    source: str
    answer: str
    related: list[str]


class Talk(NamedTuple):
    """A dialogue to judge; `kind` is empty for a clean one."""

    kind: str
    turns: list[Turn]
    document: str


def _replaced(pattern: str, new: str, text: str) -> str | None:
    made = re.sub(pattern, new, text, count=1)
    return None if made == text else made


def _prose(text: str) -> list[int]:
    """Where sentences of prose end, outside code and formulas."""
    hidden = [match.span() for match in re.finditer(r"```.*?```|\$\$?.*?\$\$?", text, re.DOTALL)]
    return [
        match.start() + 1
        for match in re.finditer(r"(?<=[a-z])\. ", text)
        if not any(begin <= match.start() < end for begin, end in hidden)
    ]


def _put(text: str, sentence: str, draw: random.Random) -> str:
    at = draw.choice(_prose(text))
    return f"{text[:at]} {sentence}{text[at:]}"


def completed_cases(seed: int, passages: int) -> Iterator[Completed]:
    """For each passage a clean completion, and one of each violation that it can have."""
    draw = random.Random(f"completion {seed}")
    for number in range(passages):
        code = re.compile(r"\n*```.*?```\n*", re.DOTALL)
        text = science(draw)
        if code.search(text) and code.search(text).end() == len(text):
            text = f"{text}\n\nThe listing shows how the whole area is summed step by step."
        source = f"## On {draw.choice(['columns', 'baths', 'slopes'])}\n\n{text} ({number + 11})"
        good = source
        for sentence in draw.sample(EXPLAINS, 3):
            good = _put(good, sentence, draw)
        yield Completed("", source, good)
        unit = "|".join(re.escape(unit) for unit in UNITS)
        value = draw.choice(re.findall(_VALUE, text))
        bad = {
            "dropped_number": _replaced(rf"(?<![\w.]){re.escape(value)}(?![\w.])", "some", good),
            "changed_number": _replaced(
                rf"(?<![\w.]){re.escape(value)}(?![\w.])", str(draw.randrange(2000, 9999)), good
            ),
            "changed_unit": _replaced(rf"(?<=\d )({unit})(?!\w)", "furlongs", good),
            "dropped_formula": _replaced(r"\$\$.*?\$\$|\$.*?\$", "a certain value", good),
            "changed_code": _replaced(r"(?<=```python\n)(.*)\d", r"\g<1>7 + 1", good),
            "dropped_heading": _replaced(r"## .*\n\n", "", good),
            "dropped_equation_number": _replaced(rf" \({number + 11}\)$", "", good),
            "changed_negation": _replaced("did not agree", "did agree", good),
            "added_number": _put(good, f"Some {draw.randrange(1000, 9999)} cases were seen.", draw),
            "stops_elsewhere": f"{good} " + " ".join(draw.sample(CLAIMS, 3)),
            "repetition": good.replace(EXPLAINS[0], "")
            + f"\n\n{EXPLAINS[0]} " * 6
            + source.split("\n\n")[-1],
            "speaks_of_the_task": f"Here is the rewritten text.\n\n{good}",
        }
        yield from (Completed(kind, source, answer) for kind, answer in bad.items() if answer is not None)


def context_cases(seed: int, passages: int) -> Iterator[InContext]:
    """For each passage a clean text in context, and one of each violation."""
    draw = random.Random(f"context {seed}")
    for _ in range(passages):
        source, rows = science(draw), list(facts(draw))
        draw.shuffle(rows)
        related = [" ".join([rows[0][0], rows[1][0]]), " ".join([rows[2][0], rows[3][0]])]
        if draw.random() < 0.5:
            related = [science(draw).split("\n\n")[0] + " " + related[0], related[1]]
        first, second = rows[draw.randrange(2)][0], rows[2][0]
        quote = " ".join(first.rstrip(".").split()[:9])
        added = [f"{first.rstrip('.')} [[1]].", f"It is also known that “{quote}” [[1]].", f"{second} [[2]]"]
        chosen = [added[draw.randrange(2)], added[2]]
        good = source
        for sentence in chosen:
            good = _put(good, sentence, draw)
        yield InContext("", source, good, related)
        quoted = _put(source, added[1], draw)
        yield InContext("", source, quoted, related)
        words = quote.split()
        words[draw.randrange(2, len(words))] = "purportedly"
        name = draw.choice([name for name in NAMES if name not in source + "".join(related)])
        value = draw.choice(re.findall(_VALUE, source))
        bad = {
            "cites_nothing": re.sub(r" ?\[\[\d\]\]", "", good),
            "unknown_citation": good.replace("[[2]]", f"[[{draw.randrange(3, 40)}]]"),
            "misquoted": quoted.replace(f"“{quote}”", f"“{' '.join(words)}”"),
            "wrong_citation": good.replace("[[1]]", "[[9]]")
            .replace("[[2]]", "[[1]]")
            .replace("[[9]]", "[[2]]"),
            "new_number": _put(good, f"The effect was seen {draw.randrange(3000, 9000)} times [[1]].", draw),
            "new_name": _put(good, f"The effect was first described by {name} [[2]].", draw),
            "uncited_name": _put(good, f"It is usually named after {name}.", draw),
            "uncited_number": _put(good, f"It was seen in {draw.randrange(3000, 9000)} samples.", draw),
            "unsupported": _put(good, f"{draw.choice(CLAIMS).rstrip('.')} [[1]].", draw),
            "dropped_number": _replaced(rf"(?<![\w.]){re.escape(value)}(?![\w.])", "some", good),
            "dropped_formula": _replaced(r"\$\$.*?\$\$|\$.*?\$", "a certain value", good),
        }
        yield from (
            InContext(kind, source, answer, related) for kind, answer in bad.items() if answer is not None
        )


def talk_cases(seed: int, passages: int) -> Iterator[Talk]:
    """For each document a clean dialogue, and one of each violation."""
    draw = random.Random(f"dialogue {seed}")
    for _ in range(passages):
        rows = list(facts(draw))
        document = " ".join(row[0] for row in rows) + "\n\n" + science(draw)
        turns: list[Turn] = []
        for sentence, question, *_ in draw.sample(rows, 3):
            opening = draw.choice(["", "Yes. ", "Good question. ", "That is right. "])
            turns += [Turn("Student", question), Turn("Teacher", f"{opening}{sentence}")]
        yield Talk("", turns, document)
        place = draw.randrange(len(turns))
        said = turns[place].text
        name = draw.choice([name for name in NAMES if name not in document])

        def with_(text: str, turns: list[Turn] = turns, place: int = place) -> list[Turn]:
            return [*turns[:place], Turn(turns[place].speaker, text), *turns[place + 1 :]]

        other = turns[(place + 2) % len(turns)].text
        formula = f"${draw.choice('xyz')}^{draw.randrange(11, 99)} = {draw.choice('uvw')}$"
        yield from (
            Talk("new_number", with_(f"{said} It was seen {draw.randrange(3000, 9000)} times."), document),
            Talk("new_name", with_(f"{said} As {name} has shown, this is so."), document),
            Talk("new_formula", with_(f"{said} So {formula} holds."), document),
            Talk("speaks_for_others", with_(f"{said}\nStudent: I see.\nTeacher: Good."), document),
            Talk("repeats_a_turn", with_(other), document),
            Talk("empty", with_(" "), document),
            Talk("speaks_of_the_text", with_(f"{said} The text says so."), document),
            Talk("repetition", with_(f"{said} " + "and so it goes on and on for ever more " * 8), document),
            Talk("turns_do_not_alternate", [turns[0], Turn("Student", turns[1].text), *turns[2:]], document),
            Talk("too_few_turns", turns[:3], document),
            Talk("about_something_else", _elsewhere(draw), document),
        )


def _elsewhere(draw: random.Random) -> list[Turn]:
    said = [
        ("Would you like some tea?", "Yes, with milk and honey please."),
        ("Shall we sit outside?", "Rather inside, it looks like rain."),
        ("Did your sister call?", "Not yet, perhaps tomorrow evening."),
    ]
    draw.shuffle(said)
    return [Turn(SPEAKERS[n % 2], text) for n, text in enumerate(text for pair in said for text in pair)]
