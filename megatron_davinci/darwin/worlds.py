"""Worlds that a program makes: how one is played, and what is wrong with how it went.

A world is believed as far as a program can see: it goes on by itself, the same way each time; what is done in it
makes a difference; its laws, each a quotation of a document, hold of every step that was taken and of every other
that could have been; and they can fail, of states that nothing led to and of the world made wrong.
"""

from __future__ import annotations

import hashlib
import json
import random
import secrets
from collections.abc import Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from megatron_davinci.darwin.world_driver import MODULE
from megatron_davinci.platform.sandbox import Limits, run_python

VERSION = 1  # raised whenever the same program would be played or judged in another way
_MORE_STARTS, _MORE_STEPS = 12, 48  # that are explored beside the courses
_LEAST_DIFFERENT = 0.25  # of other actions, the share that must lead elsewhere than the one that was taken


class Plan(NamedTuple):
    """How a world is played.

    Attributes:
        episodes: Courses, each a `start` or a `state`, and `actions` or a number of `steps`.
        whole: Whether all is done that a world must stand: further starts are explored, laws are tried on states that
            nothing led to, and every call is made again, in another process and another order, with other hashes of
            texts, and must give the same.
    """

    episodes: list[dict[str, Any]]
    whole: bool = False

    @classmethod
    def drawn(cls, starts: int, steps: int) -> Plan:
        """Courses of so many steps, with actions drawn, from the first starts on; and all that a world must stand."""
        return cls([{"start": number, "steps": steps} for number in range(starts)], True)

    @property
    def explore(self) -> dict[str, int] | None:
        """What is explored beside the courses."""
        first = len(self.episodes)
        return {"from": first, "to": first + _MORE_STARTS, "steps": _MORE_STEPS} if self.whole else None


def question(program: str, plan: Plan, limits: Limits) -> dict[str, Any]:
    """All that decides what comes of playing a world."""
    return {"world": program, **plan._asdict(), "limits": asdict(limits), "version": VERSION}


def played(program: str, plan: Plan, limits: Limits) -> str:
    """What comes of playing a world, as JSON.

    Args:
        program: Of the world.
        plan: How.
        limits: What a run may use.

    Returns:
        `{"episodes": [...], "explored": ..., "empty_laws": [...]}` as `world_driver` has them, or
        `{"trouble": [kind, detail]}`.

    Raises:
        NoSandbox: This machine has none.
    """
    told = _run(program, plan.episodes, plan.explore, limits, laws=plan.whole)
    if plan.whole and not trouble_of(told):
        calls, gave = _calls(told, plan)
        again = _run(program, [], plan.explore, limits, again=calls, hashes="1")
        same = "trouble" not in again and again["explored"] == told["explored"]
        if not same or not all(map(_same, gave, again["again"])):
            return json.dumps({"trouble": ["differs", ""]})
    told.pop("again", None)
    return json.dumps(told)


def _calls(told: dict[str, Any], plan: Plan) -> tuple[list[Any], list[Any]]:
    """Every call that courses are made of, in another order, and what it gave."""
    made: list[tuple[list[Any], Any]] = []
    for asked, one in zip(plan.episodes, told["episodes"], strict=True):
        states = one["states"]
        made.append((["start", asked["start"]], states[0]))
        made += [
            (["actions", state], possible) for state, possible in zip(states, one["possible"], strict=True)
        ]
        for place, action in enumerate(one["actions"]):
            made.append((["step", states[place], action], [states[place + 1], one["seen"][place]]))
            made += [(["step", states[place], other], [after]) for other, after in one["others"][place]]
    random.Random(len(made)).shuffle(made)
    made += made[::-1]  # so that what is explored afterwards comes after another number of calls than before
    return [call for call, _ in made], [gave for _, gave in made]


def _same(gave: Any, again: Any) -> bool:
    """Whether a call gave the same; of actions that were not taken only the state is known."""
    return bool(gave == again or (isinstance(again, list) and len(gave) == 1 and again[:1] == gave))


@cache
def _driver() -> str:
    return Path(__file__).with_name("world_driver.py").read_text()


def _run(
    program: str,
    episodes: Sequence[dict[str, Any]],
    explore: dict[str, int] | None,
    limits: Limits,
    laws: bool = False,
    again: Sequence[Any] = (),
    hashes: str = "0",
) -> dict[str, Any]:
    word = secrets.token_hex(16)
    asked = {"episodes": list(episodes), "explore": explore, "again": list(again)}
    request = json.dumps({**asked, "empty_laws": laws, "word": word})
    ran = run_python(
        f"{_driver()}\n\nmain({request!r})\n",
        packages=False,
        files={f"{MODULE}.py": program},
        environment={"PYTHONHASHSEED": hashes},
        limits=limits,
    )
    begin = ran.stdout.rfind(word)
    if ran.status == "failed":
        return {"trouble": ["world_error", ran.stderr.strip().rsplit("\n", 1)[-1][:200]]}
    if ran.status != "ok" or begin < 0:
        return {"trouble": [f"world_{ran.status if ran.status != 'ok' else 'early'}", ""]}
    try:
        told = json.loads(ran.stdout[begin + len(word) :])
    except ValueError:
        return {"trouble": ["world_early", ""]}
    return told if _is_whole(told, asked) else {"trouble": ["world_early", ""]}


def _is_whole(told: Any, asked: dict[str, Any]) -> bool:
    """Whether a run said what was asked: a program may have changed what says it."""
    try:
        whole = len(told["episodes"]) == len(asked["episodes"]) and len(told["again"]) == len(asked["again"])
        whole = whole and (told["explored"] is None) == (asked["explore"] is None)
        for one in told["episodes"] if whole else ():
            counts = {len(one["states"]), len(one["possible"]), len(one["actions"]) + 1, len(one["seen"]) + 1}
            whole = whole and (one["trouble"] is not None or counts == {len(one["others"]) + 1})
        return whole and all(isinstance(name, str) for name in told["empty_laws"])
    except (TypeError, KeyError):
        return False


def course_of(told: dict[str, Any]) -> str:
    """Of what came of playing a world: its states and what could be done, so that courses can be compared."""
    seen = [[one["states"], one["possible"], one["others"]] for one in told.get("episodes", [])]
    written = json.dumps([seen, told.get("explored")], sort_keys=True)
    return hashlib.blake2b(written.encode(), digest_size=16).hexdigest()


def fault_outcome(fault: str, plan: Plan, course: str, limits: Limits) -> str:
    """What comes of a world made wrong.

    Args:
        fault: Its program.
        plan: How the world was played.
        course: Of the world as it was, by `course_of`.
        limits: What the run may use.

    Returns:
        `noticed`: a law says no; `unseen`: no state is another; `stops`: it is no world any more, which needs no law
        to see; `passes`: states are others, and all laws say yes.

    Raises:
        NoSandbox: This machine has none.
    """
    told = _run(fault, plan.episodes, plan.explore, limits)
    kind = trouble_of(told)
    if kind:
        return "noticed" if kind == "law_broken" else "stops"
    return "unseen" if course_of(told) == course else "passes"


def trouble_of(told: dict[str, Any]) -> str:
    """What went wrong while a world was played; empty where nothing did."""
    if "trouble" in told:
        return str(told["trouble"][0])
    courses = [*told["episodes"], *([told["explored"]] if told["explored"] else [])]
    return next((str(one["trouble"][0]) for one in courses if one["trouble"]), "")


def violations(told: dict[str, Any], least_steps: int) -> list[str]:
    """Gates that a world does not pass, by how it was played; none for a good one.

    Args:
        told: What `played` gave.
        least_steps: That a course in the middle of all has.
    """
    if wrong := trouble_of(told):
        return [wrong]
    episodes = told["episodes"]
    if median(len(one["actions"]) for one in episodes) < least_steps:
        return ["ends_too_soon"]
    if len(episodes) > 1 and len({json.dumps(one["states"][0], sort_keys=True) for one in episodes}) == 1:
        return ["starts_alike"]
    moves = [
        (before, after)
        for one in episodes
        for before, after in zip(one["states"], one["states"][1:], strict=False)
    ]
    if sum(before != after for before, after in moves) < len(moves) / 2:
        return ["nothing_changes"]
    pairs = [
        (state, other)
        for one in episodes
        for state, others in zip(one["states"][1:], one["others"], strict=False)
        for _, other in others
    ]
    if not pairs:
        return ["no_choice"]
    if sum(state != other for state, other in pairs) < _LEAST_DIFFERENT * len(pairs):
        return ["actions_alike"]
    return ["law_cannot_fail"] if told["empty_laws"] else []
