"""Level 8: two or more agents talk about a document, turn by turn, each held against it; another judges the whole.

The report names the level and leaves it open; this is our reading of it. Agents are prompts: each sees the passage
and what was said so far, and says one turn. A turn that breaks a gate is said again with another seed; where none
passes the dialogue ends. What is long enough, is about the document and passes the judge is a document of its own.
Or an agent only chooses what its turn is composed of (`choices`), and the turn is written here.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator
from typing import Any

from datatrove.data import Document
from pydantic import Field, model_validator

from megatron_davinci.darwin import forms
from megatron_davinci.darwin.asking import Asking, AskingParameters, Expected, between
from megatron_davinci.darwin.choices import Offer, composed, offer
from megatron_davinci.darwin.chunks import characters, cut
from megatron_davinci.darwin.dialogue_gates import Turn, dialogue_violations, turn_violations, written
from megatron_davinci.darwin.endpoint import Trouble
from megatron_davinci.darwin.prompts import Prompt, load_prompt, mark_for
from megatron_davinci.darwin.step import Outcome

_NOTHING = "(nothing yet: you begin)"
# Turns, and of each the calls that it is composed of, or None where the model wrote it.
Talk = list[tuple[Turn, list[str] | None]]


class Converse(Asking):
    """Dialogues, as documents of their own that follow the one that they are about."""

    name = "converse"
    level = 8
    version = 3
    about = (
        "agents talk about a document, every number and name grounded in it; another judges what came of it"
    )
    tasks = frozenset({"judge_dialogue"})

    class Parameters(AskingParameters):
        """Parameters of `converse`.

        Attributes:
            prompt: `judge_dialogue`, or a prompt file (`.yaml`) of the judge.
            tries: Most answers for one turn that are judged; each further one has another seed.
            agents: Prompts of those who talk, in the order that they speak in, or prompt files. One whose task is
                `choose` only chooses what its turns are composed of.
            speakers: Their names in the dialogue.
            turns: That they say in all.
            least_turns: Of a dialogue that is kept, where not all turns passed. A question at its end that then
                nobody answers is left out.
            longest_turn: Most characters of a turn.
            passage: Most characters of a passage that one dialogue is about.
            keep_documents: Keep the document beside its dialogues.
            as_source: Name of the source that dialogues are written as; None for their document's.
        """

        prompt: str = "judge_dialogue"
        agents: list[str] = Field(default=["dialogue_student", "dialogue_teacher"], min_length=2)
        speakers: list[str] = Field(default=["Student", "Teacher"], min_length=2)
        turns: int = Field(default=6, ge=2)
        least_turns: int = Field(default=4, ge=2)
        longest_turn: int = Field(default=1500, ge=20)
        passage: int = Field(default=4096, gt=0)
        keep_documents: bool = True
        as_source: str | None = Field(default=None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")

        @model_validator(mode="after")
        def _fit(self) -> Converse.Parameters:
            if len(self.speakers) != len(self.agents) or len(set(self.speakers)) != len(self.speakers):
                raise ValueError("speakers should be as many different names as there are agents")
            if self.least_turns > self.turns:
                raise ValueError("least_turns should be at most turns")
            return self

    parameters: Parameters
    _agents: list[Prompt] | None = None

    @property
    def agents(self) -> list[Prompt]:
        """The prompts of those who talk, read once."""
        if self._agents is None:
            self._agents = [
                load_prompt(name, self.base, frozenset({"agent", "choose"}))
                for name in self.parameters.agents
            ]
        return self._agents

    def check(self) -> None:
        """Also the agents' prompts."""
        super().check()
        _ = self.agents

    def files(self) -> dict[str, Any]:
        """Also the agents' wording."""
        return super().files() | {"agents": [agent.described for agent in self.agents]}

    @classmethod
    def restored(cls, settings: dict[str, Any], whereabouts: dict[str, Any]) -> Asking:
        """Also with the agents' prompts of then."""
        described = settings["agents"]
        step = super().restored({**settings, "agents": [each["name"] for each in described]}, whereabouts)
        assert isinstance(step, Converse)
        step._agents = [Prompt(**each) for each in described]
        return step

    def expected(self, document: Document) -> Iterator[Expected]:
        """The turns of each passage, as long as the passage's sixth, and the judge."""
        for chunk in cut(document.text, self.parameters.passage, characters):
            if not chunk.text:
                continue
            said: list[Turn] = []
            for number in range(self.parameters.turns):
                agent, speaker = self._who(number)
                offered = self._offer(agent, chunk.text, said)
                messages = self._messages(agent, chunk.text, said, speaker, offered)
                about = chunk.text[: 600 if offered is None else 60]  # a choice is some twenty tokens
                _, form = self._form(offered, chunk.text, said)
                yield Expected(agent.task, messages, about, 0.4, supposed=number > 0, form=form)
                said.append(Turn(speaker, "." * 240))
            slots = {"passage": chunk.text, "mark": mark_for(chunk.text), "dialogue": written(said)}
            yield Expected("judge", self.prompt.messages(**slots), "x", 1.0, supposed=True)

    async def process(self, document: Document) -> Outcome:
        """A dialogue about each passage, and documents of those that pass."""
        spent, results, unused = Counter[str](), Counter[str](), Counter[str]()
        passages = [chunk.text for chunk in cut(document.text, self.parameters.passage) if chunk.text]
        found = await asyncio.gather(*(self._dialogue(each, spent, results, unused) for each in passages))
        level = document.metadata["darwin"]["level"]
        made = [
            self._document(document, talk, number) for number, talk in enumerate(found) if talk is not None
        ]
        notes: dict[str, Any] = {
            "prompt": self.prompt.mark,
            "agents": [agent.mark for agent in self.agents],
            "dialogues": dict(sorted(results.items())),
            **spent,
        }
        counts = {f"dialogues/{result}": count for result, count in results.items()} | dict(spent)
        counts |= {f"unused answers/{reason}": count for reason, count in unused.items()}
        if self.parameters.keep_documents:
            return Outcome(notes=notes, counts=counts, level=level, made=made)
        drop = "turned_into_dialogues" if made else "no_dialogue"
        return Outcome(drop=drop, notes=notes, counts=counts, level=level, made=made)

    async def _dialogue(
        self, passage: str, spent: Counter[str], results: Counter[str], unused: Counter[str]
    ) -> Talk | None:
        """The turns of a dialogue that passes; None for one that does not."""
        talk: Talk = []
        for number in range(self.parameters.turns):
            agent, speaker = self._who(number)
            turns = [turn for turn, _ in talk]
            said = await self._turn(agent, passage, turns, speaker, spent, unused)
            if said is None:
                break
            talk.append(said)
        if 0 < len(talk) < self.parameters.turns and talk[-1][0].text.endswith("?"):
            talk.pop()  # nobody answers it
        turns = [turn for turn, _ in talk]
        broken = dialogue_violations(turns, passage, self.parameters.speakers, self.parameters.least_turns)
        result = broken[0] if broken else await self._judged(passage, turns, spent)
        results[result or "accepted"] += 1
        return None if result else talk

    async def _turn(
        self,
        agent: Prompt,
        passage: str,
        turns: list[Turn],
        speaker: str,
        spent: Counter[str],
        unused: Counter[str],
    ) -> tuple[Turn, list[str] | None] | None:
        """A turn that passes its gates, with what it is composed of; None where no try gives one."""
        offered = self._offer(agent, passage, turns)
        messages = self._messages(agent, passage, turns, speaker, offered)
        longest, speakers = self.parameters.longest_turn, self.parameters.speakers
        if offered is not None and not offered.form:
            unused["nothing_to_choose"] += 1
            return None
        mark, form = self._form(offered, passage, turns)
        for attempt in range(self.parameters.tries):
            try:
                answer = await self.answer(messages, attempt, spent, form)
            except Trouble as trouble:
                unused[trouble.kind] += 1
                continue
            text, why = between(answer, mark)
            calls = None
            if text is not None and offered is not None:
                calls = offered.chosen(text)
                text = composed(offered.choice, passage, calls) if calls else None
                why = "no_choice"
            broken = [why] if text is None else turn_violations(text, passage, turns, speakers, longest)
            if text is not None and not broken:
                return Turn(speaker, " ".join(text.split()) if "```" not in text else text), calls
            unused[broken[0]] += 1
        return None

    async def _judged(self, passage: str, turns: list[Turn], spent: Counter[str]) -> str:
        """Why the judge refuses; empty where it does not. An answer that is no YES refuses too."""
        dialogue = written(turns)
        messages = self.prompt.messages(passage=passage, mark=mark_for(passage, dialogue), dialogue=dialogue)
        try:
            said = (await self.answer(messages, 0, spent, forms.YES_OR_NO)).text
        except Trouble as trouble:
            return f"judge_{trouble.kind}"
        return "" if says_yes(said) else "judged_bad"

    def _who(self, number: int) -> tuple[Prompt, str]:
        place = number % len(self.agents)
        return self.agents[place], self.parameters.speakers[place]

    def _offer(self, agent: Prompt, passage: str, turns: list[Turn]) -> Offer | None:
        """What an agent may choose from; None for one that writes its turns."""
        if agent.choice is None:
            return None
        idle = {stem for each in self.agents if each.choice is not None for stem in each.choice.stems}
        return offer(agent.choice, passage, turns, idle)

    def _form(self, offered: Offer | None, passage: str, turns: list[Turn]) -> tuple[str, str]:
        """The tag around a turn, or a choice of one, and what an answer with it looks like."""
        if offered is None:
            return "turn", forms.turn(self.parameters.longest_turn)
        mark = mark_for(passage, written(turns))
        return mark, forms.within(mark, offered.form)

    def _messages(
        self, agent: Prompt, passage: str, turns: list[Turn], speaker: str, offered: Offer | None
    ) -> list[dict[str, str]]:
        dialogue = written(turns) or _NOTHING
        slots = {"mark": mark_for(passage, dialogue), "dialogue": dialogue, "speaker": speaker}
        if offered is None:
            return agent.messages(passage=passage, **slots)
        return agent.messages(passage=offered.passage, forms=offered.forms, **slots)

    def _document(self, document: Document, talk: Talk, number: int) -> Document:
        """A dialogue as a document."""
        turns = [turn for turn, _ in talk]
        notes: dict[str, Any] = {"agents": [agent.mark for agent in self.agents],
                                 "judge": self.prompt.mark, "passage": number}  # fmt: skip
        if any(calls is not None for _, calls in talk):
            notes["composed_of"] = [calls for _, calls in talk]
        fields = {"turns": [turn._asdict() for turn in turns]}
        source = self.parameters.as_source
        return self.derived(document, f"dialogue-{number}", written(turns), notes, source, fields)


def says_yes(answer: str) -> bool:
    """Whether a judge's last word is YES."""
    return (answer.strip().upper().split() or [""])[-1].strip(".!*\"'") == "YES"
