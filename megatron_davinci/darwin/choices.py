"""Turns of a dialogue that are composed of what an agent chooses: a sentence of the passage, a form, words to copy.

As at level 6 (`quote_related`) and level 7 (`calls_python`) the model chooses, and a program writes: what is said is
the passage's own sentence, or a form of the prompt's with the passage's own words in it. A small model can do that,
and a large one makes dialogues so in which every answer is a quotation. Which sentence answers which question is the
model's choice. Gates and judge are those of turns that models write themselves.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from itertools import pairwise
from typing import Annotated, NamedTuple

from pydantic import AfterValidator, Field

from megatron_davinci.config.section import Section
from megatron_davinci.darwin import facts_of, forms
from megatron_davinci.darwin.dialogue_gates import Turn, turn_violations
from megatron_davinci.darwin.edits import Edit, calls_of
from megatron_davinci.darwin.fidelity import content_stems
from megatron_davinci.darwin.pair_gates import quoted

SLOT = re.compile(r"\{\{\s*(\w+)\s*\}\}")
_SLOTS = {"sentence", "words"}
_WORD = re.compile(r"[^\W\d_](?:[\w'’.-]*\w)?")
_ENDS = re.compile(r"[.!?][)\"'”’]*$")
# Words that link others or help them, and are no end of what is spoken of.
_LINKS = set(
    "about above according across after again against along already also although always among another around away "
    "back because been before behind being below beneath beside besides between beyond both could does doing done "
    "during each either else even ever except have having here however inside instead into just like made make makes "
    "many might more most much must near neither never often once only onto other others outside over perhaps quite "
    "rather same several shall should since some still such than them then there these they this those through "
    "throughout thus together toward towards under unless until upon used uses using very well were what when where "
    "whether which while will with within without would your".split()
)
_TELLS = 2  # content words of a sentence that may be spoken of
_NEAR = 0.75  # of the words that the sentence nearest to the turn before shares with it


def _sound(form: str) -> str:
    slots = SLOT.findall(form)
    if not slots or len(slots) != len(set(slots)) or not set(slots) <= _SLOTS:
        raise ValueError(
            f"should have {{{{sentence}}}} or {{{{words}}}}, or each of them once; found {form!r}"
        )
    if "\n" in form or not form.rstrip().endswith((".", "?", "!", "}}")):
        raise ValueError(f"should be one line that ends with . or ? or ! or a slot; found {form!r}")
    if broken := turn_violations(SLOT.sub("it", form), "", [], []):
        raise ValueError(
            f"says something that no passage backs, so every turn of it would be refused ({broken[0]}): {form!r}"
        )
    return form.strip()


class Choice(Section):
    """What an agent's turns are composed of.

    Attributes:
        forms: Of turns, each a line with the slot `{{sentence}}` for a sentence of the passage as it stands there,
            `{{words}}` for words copied out of it, or both.
        words: Most words that are copied.
        sentences: Most sentences that one turn speaks of.
        answers: Whether an agent is offered only the sentences that share the most with what was said last.
    """

    forms: list[Annotated[str, AfterValidator(_sound)]] = Field(min_length=1, max_length=40)
    words: int = Field(default=4, ge=1, le=20)
    sentences: int = Field(default=1, ge=1, le=6)
    answers: bool = False

    @property
    def stems(self) -> set[str]:
        """Content words of the forms, which say nothing of what is asked."""
        return content_stems(" ".join(SLOT.sub(" ", form) for form in self.forms))


class Offer(NamedTuple):
    """What an agent may choose from at one turn.

    Attributes:
        choice: Of its prompt.
        passage: The passage as it is shown: a sentence a line, with a number before each that may be chosen.
        sentences: These sentences by their numbers.
    """

    choice: Choice
    passage: str
    sentences: Mapping[int, str]

    @property
    def forms(self) -> str:
        """The forms as they are shown: a call a line, and what is said by it."""
        calls = [
            f'say({number}, N, "WORDS")' if takes else f"say({number}, N)"
            for number, takes in self._numbered()
        ]
        shown = [
            SLOT.sub(lambda slot: {"sentence": "[sentence N]"}.get(slot[1], "WORDS"), form)
            for form in self.choice.forms
        ]
        return "\n".join(f"{call}    {form}" for call, form in zip(calls, shown, strict=True))

    @property
    def form(self) -> str:
        """What a program looks like that can be carried out, as a regular expression; empty where there is none."""
        plain = [number for number, takes in self._numbered() if not takes]
        worded = [number for number, takes in self._numbered() if takes]
        terms = {number: terms_of(text, self.choice.words) for number, text in self.sentences.items()}
        return forms.says(plain, worded, terms, self.choice.sentences)

    def chosen(self, program: str) -> list[str]:
        """The calls of a program, words as the passage has them; none where one of them cannot be carried out."""
        calls = calls_of(program)
        known = [self._known(call) for call in calls]
        if len(calls) > self.choice.sentences or not all(known):
            return []
        return list(dict.fromkeys(filter(None, known)))

    def _known(self, call: Edit) -> str | None:
        takes = dict(self._numbered())
        match call:
            case Edit("say", (int() as form, int() as number)) if takes.get(form) is False:
                return f"say({form}, {number})" if number in self.sentences else None
            case Edit("say", (int() as form, int() as number, str() as words)) if takes.get(form):
                found = _as_it_stands(self.sentences.get(number, ""), words, self.choice.words)
                return f'say({form}, {number}, "{found}")' if found else None
        return None

    def _numbered(self) -> list[tuple[int, bool]]:
        """Numbers of forms, from 1 on, and whether each takes words."""
        return [(number, "words" in SLOT.findall(form)) for number, form in enumerate(self.choice.forms, 1)]


def offer(choice: Choice, passage: str, said: Sequence[Turn], idle: Collection[str] = ()) -> Offer:
    """What an agent may choose from: sentences that nobody has said.

    Args:
        choice: Of its prompt.
        passage: What is talked about.
        said: The turns so far.
        idle: Stems of words of forms, that say nothing of what is asked.
    """
    pieces = facts_of.sentences(passage)
    may = {
        number: text
        for number, text in numbered(passage).items()
        if not any(quoted(text, turn.text) for turn in said)
    }
    if choice.answers and said:
        asked = content_stems(said[-1].text) - set(idle)
        shared = {number: len(asked & content_stems(text)) for number, text in may.items()}
        most = max(shared.values(), default=0)
        may = {number: text for number, text in may.items() if shared[number] >= max(1, _NEAR * most)}
    lines = [
        f"[{number}] {may[number]}" if number in may else piece.strip()
        for number, piece in enumerate(pieces, start=1)
    ]
    return Offer(choice, "\n".join(lines), may)


def numbered(passage: str) -> dict[int, str]:
    """Sentences of a passage that may be spoken of, by their numbers in it, each on one line.

    They end, have two content words or more, and open nothing that they do not close; one that begins the passage
    with a small letter may be the end of another.
    """
    found = {}
    for number, piece in enumerate(facts_of.sentences(passage), start=1):
        text = " ".join(piece.split())
        cut = number == 1 and text[0].islower()
        whole = _ENDS.search(text) and text.count("(") == text.count(")") and text.count('"') % 2 == 0
        if whole and not cut and len(content_stems(text)) >= _TELLS:
            found[number] = text
    return found


def composed(choice: Choice, passage: str, calls: Sequence[str]) -> str:
    """The words of a turn: each call's form, filled, one behind another.

    Args:
        choice: Of the agent's prompt.
        passage: What is talked about.
        calls: As `Offer.chosen` gives them, and a dialogue's history has them.
    """
    sentences, said = numbered(passage), []
    for call in calls_of("\n".join(calls)):
        form, number, *words = call.given
        filled = {"sentence": sentences[int(str(number))], "words": str(words[0]) if words else ""}
        said.append(SLOT.sub(lambda slot, f=filled: f[slot[1]], choice.forms[int(str(form)) - 1]))  # type: ignore[misc]
    return " ".join(said)


def terms_of(sentence: str, most: int) -> list[str]:
    """Runs of at most `most` words of a sentence that begin and end with a word of content, as they stand there."""
    words = list(_WORD.finditer(sentence))
    tells = [word[0].casefold() not in _LINKS and bool(content_stems(word[0])) for word in words]
    found = [
        sentence[words[first].start() : words[last].end()]
        for first in range(len(words))
        for last in range(first, min(first + most, len(words)))
        if tells[first] and tells[last] and _unbroken(sentence, words[first : last + 1])
    ]
    return list(dict.fromkeys(found))


def _as_it_stands(sentence: str, said: str, most: int) -> str:
    """Words as a sentence has them, whatever their case; empty where it has not, or they say nothing."""
    wanted = [word.casefold() for word in said.split()]
    words = list(_WORD.finditer(sentence))
    for first in range(len(words) - len(wanted) + 1):
        run = words[first : first + len(wanted)]
        if [word[0].casefold() for word in run] == wanted and _unbroken(sentence, run):
            text = sentence[run[0].start() : run[-1].end()] if run else ""
            return text if len(run) <= most and content_stems(text) else ""
    return ""


def _unbroken(sentence: str, run: Sequence[re.Match[str]]) -> bool:
    """Whether nothing but blanks stands between words."""
    return all(sentence[a.end() : b.start()] == " " for a, b in pairwise(run))
