"""Level 9, world synthesis: a model writes a world that goes by a document, and what comes about in it is written.

The report names the level and leaves it open; this is our reading of it. A world is a program with states, actions
and laws, and each law quotes the document. What the model says is believed only as far as a program can see
(`worlds`): the world goes on by itself and always the same way, its laws hold wherever it was, and they can fail.
Then it is a document, and so are courses of things in it, and questions about courses that nobody took, whose
answers the world itself gives.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from datatrove.data import Document
from pydantic import Field

from megatron_davinci.darwin import forms, world_rules, world_texts, worlds
from megatron_davinci.darwin.asking import Asking, AskingParameters, Expected, between
from megatron_davinci.darwin.chunks import characters, cut
from megatron_davinci.darwin.converse import says_yes
from megatron_davinci.darwin.endpoint import Trouble
from megatron_davinci.darwin.prompts import Prompt, load_prompt, mark_for
from megatron_davinci.darwin.step import Outcome
from megatron_davinci.darwin.trials import LIMITS, Trying
from megatron_davinci.darwin.verify import program_of
from megatron_davinci.darwin.world_rules import World
from megatron_davinci.darwin.world_texts import Aim, Course
from megatron_davinci.darwin.worlds import Plan
from megatron_davinci.platform.sandbox import MIB

_ANSWER_SHARE = 1.0  # tokens of a world for one of the passage, where none is known; a supposition
_LAWS = 3.0  # of a world, that are judged; a supposition
_LIMITS = replace(LIMITS, output_bytes=64 * MIB)  # as much as many courses are
_NOT_RUN = '{"trouble": ["not_run", ""]}'


class Believed(NamedTuple):
    """A world that passed.

    Attributes:
        world: It.
        told: How it was played.
        courses: That questions are about.
        reached: Aims, with the courses by which a model reached them.
        notes: For the history of what is made of it.
    """

    world: World
    told: dict[str, Any]
    courses: list[Course]
    reached: list[tuple[Aim, dict[str, Any]]]
    notes: dict[str, Any]


class Simulate(Trying):
    """Worlds, what comes about in them, and questions, as documents that follow the one that they are of."""

    name = "simulate"
    level = 9
    about = "a model writes a world that goes by a document; played, its laws hold and can fail, or it is not written"
    tasks = frozenset({"world"})

    class Parameters(AskingParameters):
        """Parameters of `simulate`.

        Attributes:
            documents: What they are: `texts`, or `worlds` themselves, programs whose laws quote their own docstring,
                of which no model writes any.
            prompt: `world_python`, or a prompt file (`.yaml`).
            tries: Most worlds that are tried for a passage; each further one has another seed.
            passage: Most characters of a passage that one world is of.
            longest: Most characters of a world's program.
            least_laws: That it must have, each with a sentence of the passage.
            judge: Ask the model too whether each law says what its sentence says.
            starts: From which it is played, and courses that are written.
            steps: Most actions of a course.
            least_steps: That a course in the middle of all must have.
            faults: Most faults that are planted in the world, one at a time.
            min_noticed: Of those after which states are others, the least share that laws must notice; at least one.
            questions: Most questions about one world.
            question_steps: Most actions that one is about.
            agent: `act_in_world`, or a prompt file, of a model that acts in the world toward an aim; None for nobody.
            aims: That it has in one world, at most: values that came up when actions were drawn.
            keep_documents: Keep the document beside its worlds.
            as_source: Name of the source that all of it is written as; None for its document's.
        """

        documents: Literal["texts", "worlds"] = "texts"
        prompt: str = "world_python"
        passage: int = Field(default=4096, gt=0)
        longest: int = Field(default=6_000, gt=0)
        least_laws: int = Field(default=2, gt=0)
        judge: bool = True
        starts: int = Field(default=4, gt=0, le=64)
        steps: int = Field(default=12, gt=0, le=256)
        least_steps: int = Field(default=4, gt=0)
        faults: int = Field(default=12, gt=0)
        min_noticed: float = Field(default=0.1, ge=0, le=1)
        questions: int = Field(default=4, ge=0)
        question_steps: int = Field(default=3, gt=0)
        agent: str | None = None
        aims: int = Field(default=2, gt=0)
        keep_documents: bool = True
        as_source: str | None = Field(default=None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")

    parameters: Parameters
    _judge: Prompt | None = None
    _agent: Prompt | None = None

    @property
    def judge(self) -> Prompt:
        """The prompt of the judge of laws."""
        if self._judge is None:
            self._judge = load_prompt("judge_law", Path(), frozenset({"judge_law"}))
        return self._judge

    @property
    def agent(self) -> Prompt | None:
        """The prompt of who acts in worlds, read once."""
        if self._agent is None and self.parameters.agent is not None:
            self._agent = load_prompt(self.parameters.agent, self.base, frozenset({"act"}))
        return self._agent

    def check(self) -> None:
        """Also the agent's prompt."""
        super().check()
        _ = self.agent

    def files(self) -> dict[str, Any]:
        """Also the wording of the judge and of the agent, if they are asked."""
        judge = {"judge_prompt": self.judge.described} if self.parameters.judge else {}
        return super().files() | judge | ({"agent": self.agent.described} if self.agent else {})

    @classmethod
    def restored(cls, settings: dict[str, Any], whereabouts: dict[str, Any]) -> Asking:
        """Also with the other prompts of then."""
        agent = settings.get("agent")
        named = {**settings, "agent": agent["name"] if agent else None}
        step = super().restored(named, whereabouts)
        assert isinstance(step, Simulate)
        if "judge_prompt" in settings:
            step._judge = Prompt(**settings["judge_prompt"])
        if agent:
            step._agent = Prompt(**agent)
        return step

    def expected(self, document: Document) -> Iterator[Expected]:
        """A world of each passage, the judge of its laws, and who acts in it."""
        for passage in self._passages(document):
            if passage:
                if self.parameters.documents == "texts":
                    messages = self.prompt.messages(passage=passage, mark=mark_for(passage))
                    yield Expected(self.prompt.task, messages, passage, _ANSWER_SHARE, form=forms.PROGRAM)
                if self.parameters.judge:
                    slots = {"passage": "." * 200, "mark": "passage", "quotation": "." * 80}
                    messages = self.judge.messages(**slots)
                    yield Expected(self.judge.task, messages, "x", 1.0, times=_LAWS, supposed=True)
                if self.agent is not None:
                    slots = {"passage": "." * 900, "state": "." * 80, "mark": "passage", "aim": "." * 20,
                             "actions": "." * 60}  # fmt: skip
                    times = self.parameters.aims * self.parameters.steps / 2
                    messages = self.agent.messages(**slots)
                    yield Expected(self.agent.task, messages, "." * 40, 1.0, times=times, supposed=True)

    async def process(self, document: Document) -> Outcome:
        """A world of each passage, and what comes about in those that pass."""
        spent, unused, aims = Counter[str](), Counter[str](), Counter[str]()
        passages = self._passages(document)
        found = await asyncio.gather(*(self._world(passage, spent, unused, aims) for passage in passages))
        made = [
            each
            for number, one in enumerate(found)
            if one is not None
            for each in self._documents(document, one, number)
        ]
        accepted = sum(one is not None for one in found)
        results = dict(sorted((unused + Counter(accepted=accepted)).items()))
        counts = {f"worlds/{result}": count for result, count in results.items()} | dict(spent)
        counts |= {f"aims/{result}": count for result, count in aims.items()}
        notes: dict[str, Any] = {**self._wording(), "worlds": results, **spent}
        level = document.metadata["darwin"]["level"]
        if self.parameters.keep_documents:
            return Outcome(notes=notes, counts=counts, level=level, made=made)
        drop = "turned_into_worlds" if made else "no_world"
        return Outcome(drop=drop, notes=notes, counts=counts, level=level, made=made)

    def _wording(self) -> dict[str, str]:
        """The prompt, where one is asked for a world."""
        return {"prompt": self.prompt.mark} if self.parameters.documents == "texts" else {}

    def _passages(self, document: Document) -> list[str]:
        """What a world each is of."""
        if self.parameters.documents == "worlds":
            return [document.text]
        least = self.parameters.least_laws * world_rules.LEAST_WORDS
        chunks = cut(document.text, self.parameters.passage, characters)
        return [one.text for one in chunks if not one.verbatim and len(one.text.split()) >= least]

    async def _world(
        self, passage: str, spent: Counter[str], unused: Counter[str], aims: Counter[str]
    ) -> Believed | None:
        """A world of a passage that passes; None where no try gives one."""
        given = self.parameters.documents == "worlds"
        for attempt in range(1 if given else self.parameters.tries):
            program, why = (passage, "") if given else await self._asked(passage, attempt, spent)
            if program is None:
                unused[why] += 1
                continue
            about = world_rules.docstring_of(program) if given else passage
            found = await self.believed(program, about, spent)
            if isinstance(found, str):
                unused[found] += 1
                continue
            if not given:
                found.notes["try"] = attempt
            if self.agent is not None:
                for aim in world_texts.drawn_aims(found.told, program, self.parameters.aims):
                    reached = await self._toward(aim, found.world, spent, aims)
                    if isinstance(reached, str):  # no world after all
                        unused[reached] += 1
                        return None
                    found.reached.extend(reached)
            return found
        return None

    async def _asked(self, passage: str, attempt: int, spent: Counter[str]) -> tuple[str | None, str]:
        """A program that a model writes, or None and why there is none."""
        messages = self.prompt.messages(passage=passage, mark=mark_for(passage))
        try:
            answer = await self.answer(messages, attempt, spent, forms.PROGRAM)
        except Trouble as trouble:
            return None, trouble.kind
        if answer.finish == "length":
            return None, "cut_off"
        return program_of(f"{answer.text}\n"), "no_program"

    async def believed(self, program: str, passage: str, spent: Counter[str]) -> Believed | str:
        """A program as a world, or why it is none.

        Args:
            program: What the model wrote.
            passage: What its laws must quote.
            spent: Counts of tokens, which the judge's are added to.
        """
        given = self.parameters
        world = world_rules.world_of(program, passage, given.longest, given.least_laws)
        if isinstance(world, str):
            return world
        plan = Plan.drawn(given.starts, given.steps)
        told = await self._played(program, plan)
        if broken := worlds.violations(told, min(given.least_steps, given.steps)):
            return broken[0]
        by_outcome = await self._faults(world, plan, worlds.course_of(told))
        noticed, seen = by_outcome["noticed"], by_outcome["noticed"] + by_outcome["passes"]
        if noticed == 0 or noticed < given.min_noticed * seen:
            return "notice_too_little" if noticed else "cannot_notice"
        if given.judge and (why := await self._judged(world, spent)):
            return why
        courses = await self._courses(world, told)
        if isinstance(courses, str):
            return courses
        notes = {
            **self._wording(), "laws": [law.quotation for law in world.laws],
            "faults": dict(sorted(by_outcome.items())), "noticed": round(noticed / seen, 4),
        }  # fmt: skip
        return Believed(world, told, courses, [], notes)

    async def _played(self, program: str, plan: Plan) -> dict[str, Any]:
        asked = worlds.question(program, plan, _LIMITS)
        said = await self.ran(asked, lambda: worlds.played(program, plan, _LIMITS))
        told: dict[str, Any] = json.loads(_NOT_RUN if said == "not_run" else said)
        return told

    async def _faults(self, world: World, plan: Plan, course: str) -> Counter[str]:
        """What came of the world made wrong, by outcome."""

        async def one(fault: str) -> str:
            asked = {**worlds.question(fault, plan, _LIMITS), "course": course}
            return await self.ran(asked, lambda: worlds.fault_outcome(fault, plan, course, _LIMITS))

        outcomes = await asyncio.gather(*map(one, world_rules.faults_of(world, self.parameters.faults)))
        return Counter(outcomes)

    async def _judged(self, world: World, spent: Counter[str]) -> str:
        """Why the judge refuses; empty where it does not. An answer that is no YES refuses too."""
        for law in world.laws:
            mark = mark_for(law.source, law.quotation)
            slots = {"passage": law.source, "mark": mark, "quotation": law.quotation}
            try:
                said = (await self.answer(self.judge.messages(**slots), 0, spent, forms.YES_OR_NO)).text
            except Trouble as trouble:
                return f"judge_{trouble.kind}"
            if not says_yes(said):
                return "law_judged_wrong"
        return ""

    async def _toward(
        self, aim: Aim, world: World, spent: Counter[str], aims: Counter[str]
    ) -> list[tuple[Aim, dict[str, Any]]] | str:
        """A course that a model takes and that reaches an aim, or none; or what went wrong in the world meanwhile."""
        actions: list[str] = []
        for _ in range(self.parameters.steps + 1):
            told = await self._played(world.program, Plan([{"start": aim.start, "actions": actions}]))
            if why := worlds.trouble_of(told):
                return why
            episode = told["episodes"][0]
            if episode["states"][-1][aim.name] == aim.value:
                aims["accepted"] += 1
                return [(aim, episode)]
            possible = episode["possible"][-1]
            if not possible or len(actions) == self.parameters.steps:
                break
            action = await self._action(aim, world, episode, possible, spent)
            if action is None:
                aims["no_action"] += 1
                return []
            actions = [*actions, action]
        aims["not_reached"] += 1
        return []

    async def _action(
        self, aim: Aim, world: World, episode: dict[str, Any], possible: list[str], spent: Counter[str]
    ) -> str | None:
        """What a model does; None where it says nothing that can be done."""
        assert self.agent is not None
        so_far = world_texts.course_text(world, episode, None)
        listed = "\n".join(f"- {action}" for action in possible)
        state = world_texts.state_text(episode["states"][-1])
        mark = mark_for(so_far, state, aim.text, listed)
        slots = {"passage": so_far, "state": state, "mark": mark, "aim": aim.text, "actions": listed}
        messages = self.agent.messages(**slots)
        for attempt in range(self.parameters.tries):
            try:
                form = forms.within(mark, forms.one_of(possible))
                text, _ = between(await self.answer(messages, attempt, spent, form), mark)
            except Trouble:
                continue
            if text in possible:
                return text
        return None

    async def _courses(self, world: World, told: dict[str, Any]) -> list[Course] | str:
        """Courses that nobody took, with what they come to; or what went wrong on one."""
        given = self.parameters
        # Some change nothing that could be asked for.
        drawn = 2 * given.questions
        asked = world_texts.asked_courses(told, world.program, drawn, given.question_steps)
        if not asked:
            return []
        plan = Plan([{"state": course.start, "actions": course.actions} for course in asked])
        came = await self._played(world.program, plan)
        if "trouble" in came:
            return str(came["trouble"][0])
        draw = random.Random(len(world.program))
        found, known = list[Course](), world_texts.stretches(told, given.question_steps)
        for course, episode in zip(asked, came["episodes"], strict=True):
            if episode["trouble"] and episode["trouble"][0] != "impossible":
                return str(episode["trouble"][0])
            one = world_texts.answered(course, episode, draw)
            if one is not None and (name := world_texts.stretch(one.start, one.actions)) not in known:
                known.add(name)
                found.append(one)
        return found[: given.questions]

    def _documents(self, document: Document, found: Believed, number: int) -> Iterator[Document]:
        """The world, its courses and its questions."""
        world, name = found.world, f"world-{number}"
        yield self._document(document, name, world_texts.world_text(world), found, number)
        for at, episode in enumerate(found.told["episodes"]):
            text = world_texts.episode_text(world, episode)
            yield self._document(document, f"{name}/course-{at}", text, found, number)
        for at, (aim, episode) in enumerate(found.reached):
            text = world_texts.episode_text(world, episode, aim)
            asked = {"start": aim.start, "actions": episode["actions"], "aim": aim.text}
            yield self._document(document, f"{name}/aim-{at}", text, found, number, notes={"course": asked})
        for at, course in enumerate(found.courses):
            prompt, response = world_texts.question_text(world, course)
            fields = {"prompt": prompt, "response": response}
            asked = {"start": course.start, "actions": course.actions, "asked": course.name}
            yield self._document(
                document, f"{name}/question-{at}", prompt + response, found, number, fields, {"course": asked}
            )

    def _document(
        self,
        document: Document,
        name: str,
        text: str,
        found: Believed,
        number: int,
        fields: dict[str, str] | None = None,
        notes: dict[str, Any] | None = None,
    ) -> Document:
        said = {"passage": number, **found.notes, **(notes or {})}
        return self.derived(document, name, text, said, self.parameters.as_source, fields)
