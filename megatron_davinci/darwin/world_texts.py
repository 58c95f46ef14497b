"""What is written of a world: courses of things in words, and questions that its program answers."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from typing import Any, NamedTuple

from megatron_davinci.darwin.world_rules import World


class Course(NamedTuple):
    """Actions, one after another, whose end is asked for.

    Attributes:
        start: State that they begin in.
        actions: They.
        states: After each of them.
        name: Of the value that is asked for.
    """

    start: dict[str, Any]
    actions: list[str]
    states: list[dict[str, Any]]
    name: str


class Aim(NamedTuple):
    """What is to be reached from a start.

    Attributes:
        start: Its number.
        name: Of a value.
        value: That it is to have.
    """

    start: int
    name: str
    value: Any

    @property
    def text(self) -> str:
        """In words."""
        return state_text({self.name: self.value})


def shown(value: Any) -> str:
    """A value in words."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value + 0.0:.12g}"
    return str(value) if value != "" else "(empty)"


def state_text(state: dict[str, Any]) -> str:
    """A state on one line."""
    return ", ".join(f"{name.replace('_', ' ')}: {shown(value)}" for name, value in state.items())


def laws_text(world: World) -> str:
    """What holds, in the words of the document."""
    return "What holds here:\n" + "\n".join(f"- {law.quotation}" for law in world.laws)


def world_text(world: World) -> str:
    """A world as a document: what holds, and the program that goes by it."""
    fence = "```"
    while fence in world.program:
        fence += "`"
    program = f"{fence}python\n{world.program.strip()}\n{fence}"
    return f"{laws_text(world)}\n\nA program that goes by this:\n\n{program}\n"


def episode_text(world: World, episode: dict[str, Any], aim: Aim | None = None) -> str:
    """A course of things, in words; with an aim, where it was taken for one that it reached."""
    lines = [course_text(world, episode, aim)]
    if aim is not None:
        lines += ["", f"That was the aim: {aim.text}."]
    elif len(episode["possible"]) > len(episode["actions"]) and not episode["possible"][-1]:
        lines += ["", "Nothing more can be done."]
    return "\n".join(lines) + "\n"


def course_text(world: World, episode: dict[str, Any], aim: Aim | None) -> str:
    """A course as far as it went."""
    states, lines = episode["states"], [laws_text(world), ""]
    if aim is not None:
        lines.append(f"The aim: {aim.text}.")
    lines.append(f"At first: {state_text(states[0])}.")
    rows = zip(episode["possible"], episode["actions"], episode["seen"], states[1:], strict=False)
    for number, (possible, action, seen, state) in enumerate(rows, start=1):
        lines += ["", f"{number}. What can be done: {'; '.join(possible)}.", f"Done: {action}. {seen}"]
        lines.append(f"Now: {state_text(state)}.")
    return "\n".join(lines)


def drawn_aims(told: dict[str, Any], program: str, most: int) -> list[Aim]:
    """Aims that can be reached, since drawn actions have: a value that came up late in a course and not before, and
    that another action would not have brought about, too.

    Args:
        told: What `played` gave of the world.
        program: Its program, by which they are drawn.
        most: How many.
    """
    draw = random.Random(f"aims {_digest(program)}")
    found = []
    for number, one in enumerate(told["episodes"]):
        known = {(name, repr(value)) for name, value in one["states"][0].items()}
        late: list[Aim] = []
        for place, state in enumerate(one["states"][1:], start=1):
            new = [name for name, value in state.items() if (name, repr(value)) not in known]
            others = [after for _, after in one["others"][place - 1]]
            chosen = [name for name in new if any(after[name] != state[name] for after in others)]
            late += [Aim(number, name, state[name]) for name in chosen if place > 1]
            known |= {(name, repr(state[name])) for name in new}
        if late:
            found.append(draw.choice(late))
    draw.shuffle(found)
    return found[:most]


def asked_courses(told: dict[str, Any], program: str, most: int, longest: int) -> list[Course]:
    """Courses to ask for: of each a state that came up, an action that was not taken there, and those after it.

    What they come to nobody has seen yet: `played` says. Which ones, is drawn by the program.

    Args:
        told: What `played` gave of the world.
        program: Its program.
        most: How many.
        longest: Most actions of one.
    """
    draw = random.Random(_digest(program))
    places = [
        (number, at) for number, one in enumerate(told["episodes"]) for at in range(len(one["actions"]))
    ]
    draw.shuffle(places)
    courses = []
    for number, at in places:
        one = told["episodes"][number]
        if others := one["others"][at]:
            other, _ = draw.choice(others)
            follow = one["actions"][at + 1 : at + draw.randint(1, longest)]
            courses.append(Course(one["states"][at], [other, *follow], [], ""))
        if len(courses) == most:
            break
    return courses


def stretch(start: dict[str, Any], actions: Sequence[str]) -> str:
    """Names actions that are taken from a state on."""
    return json.dumps([start, list(actions)], sort_keys=True)


def stretches(told: dict[str, Any], longest: int) -> set[str]:
    """Those that the courses of a world have, of up to so many actions."""
    return {
        stretch(one["states"][at], one["actions"][at : at + length])
        for one in told["episodes"]
        for at in range(len(one["actions"]))
        for length in range(1, longest + 1)
    }


def _digest(program: str) -> str:
    return hashlib.blake2b(program.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


def answered(course: Course, episode: dict[str, Any], draw: random.Random) -> Course | None:
    """A course with what it came to, and a value that it changed; None where it changed none.

    Args:
        course: It.
        episode: What came of it, as far as its actions were possible.
        draw: Chooses the value.
    """
    states = episode["states"][1:]
    if not states:
        return None
    changed = [
        name for name, value in states[-1].items() if value != course.start[name] and _can_be_boxed(value)
    ]
    if not changed:
        return None
    return course._replace(actions=course.actions[: len(states)], states=states, name=draw.choice(changed))


def _can_be_boxed(value: Any) -> bool:
    return not (isinstance(value, str) and set(value) & set("{}\\"))


def question_text(world: World, course: Course) -> tuple[str, str]:
    """A question and its answer: a course step by step, and the value at its end."""
    doing: Sequence[str] = [f'"{action}"' for action in course.actions]
    prompt = (
        f"{world_text(world)}\nQuestion: It begins with {state_text(course.start)}. "
        f"Then this is done: {', then '.join(doing)}. "
        f"What is the value of {course.name.replace('_', ' ')} after that?\n\nAnswer: "
    )
    steps = [
        f"After {action}: {state_text(state)}." for action, state in zip(doing, course.states, strict=True)
    ]
    final = shown(course.states[-1][course.name])
    return prompt, "\n".join(steps) + f"\n\\boxed{{{final}}}"
