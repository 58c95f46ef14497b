"""Plays a world inside the sandbox, where this file is a program's text; it imports nothing of ours.

A world is Python that defines `start(number)`, `actions(state)`, `step(state, action)` and laws, which are functions
`law_...(before, action, after)`. A state is a dictionary of plain values, and each function is given a copy: so what
comes next can depend on nothing but the state and the action, unless the program keeps something aside, which two
runs in another order show.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import io
import json
import random
import sys
from collections.abc import Callable, Iterator
from typing import Any

State = dict[str, Any]
Transition = tuple[State, str, State]  # before, action, after
Law = Callable[[State, str, State], object]

MODULE = "the_world"  # what the world's program is called, beside this one
MOST_NAMES = 24  # of a state
MOST_CHOICES = 24
LONGEST = 200  # characters of a text
_LARGEST = 10**15
_MOST_TRANSITIONS = 4000  # that laws are tried on with another state in place of what came


class Wrong(Exception):
    """What a world did that none may: a word for the kind, and a detail."""


def plain(state: Any) -> State:
    """A state, as a copy.

    Raises:
        Wrong: It is none.
    """
    if not isinstance(state, dict) or not 0 < len(state) <= MOST_NAMES:
        raise Wrong("no_state", type(state).__name__)
    for name, value in state.items():
        if not (isinstance(name, str) and name.strip() and len(name) <= 60 and name.isprintable()):
            raise Wrong("no_state", repr(name)[:LONGEST])
        if isinstance(value, str):
            good = len(value) <= LONGEST and (value == "" or value.isprintable())
        else:
            good = isinstance(value, bool | int | float) and abs(value) <= _LARGEST
        if not good:
            raise Wrong("no_state", name)
    if len({" ".join(name.replace("_", " ").casefold().split()) for name in state}) < len(state):
        raise Wrong("names_alike", "")
    copied: State = json.loads(json.dumps(state))
    return copied


def kind(value: Any) -> str:
    """What a value is, as far as a reader sees: `bool`, `number` or `text`."""
    return "bool" if isinstance(value, bool) else "text" if isinstance(value, str) else "number"


def chosen_from(actions: Any) -> list[str]:
    """What may be done, as a list.

    Raises:
        Wrong: It is none.
    """
    found = list(actions) if isinstance(actions, list | tuple) else [None]
    good = len(found) <= MOST_CHOICES and len(set(map(str, found))) == len(found)
    for one in found:
        good = good and isinstance(one, str) and 0 < len(one.strip()) == len(one) <= 100 and one.isprintable()
    if not good:
        raise Wrong("no_actions", repr(actions)[:LONGEST])
    return [str(one) for one in found]


class World:
    """A world, out of what its program defined."""

    def __init__(self, names: dict[str, Any]) -> None:
        self.names = names
        self.laws = {name: law for name, law in names.items() if name.startswith("law_") and callable(law)}
        self.transitions: dict[str, Transition] = {}

    def call(self, name: str, *given: Any) -> Any:
        """What a function of the world gives; what it is given is a copy.

        Raises:
            Wrong: It raised.
        """
        try:
            return self.names[name](*json.loads(json.dumps(given)))
        except Exception as error:
            raise Wrong("raises", f"{name}: {type(error).__name__}") from None

    def begin(self, number: int) -> State:
        """A start."""
        return plain(self.call("start", number))

    def possible(self, state: State) -> list[str]:
        """What may be done."""
        return chosen_from(self.call("actions", state))

    def next(self, state: State, action: str) -> tuple[State, str]:
        """The state after an action, and what is seen; all laws must hold."""
        said = self.call("step", state, action)
        if not (isinstance(said, tuple | list) and len(said) == 2 and isinstance(said[1], str)):
            raise Wrong("no_step", repr(said)[:LONGEST])
        after, seen = plain(said[0]), " ".join(said[1].split())
        if sorted(after) != sorted(state):
            raise Wrong("other_names", ", ".join(sorted(set(after) ^ set(state)))[:LONGEST])
        if {name: kind(value) for name, value in after.items()} != {
            name: kind(value) for name, value in state.items()
        }:
            raise Wrong("other_kinds", action)
        if not (0 < len(seen) <= 2 * LONGEST and seen.isprintable()):
            raise Wrong("says_nothing", action)
        for name, law in self.laws.items():
            if not holds(law, state, action, after):
                raise Wrong("law_broken", f"{name}: {action}")
        if len(self.transitions) < _MOST_TRANSITIONS:
            self.transitions.setdefault(json.dumps([state, action]), (state, action, after))
        return after, seen

    def episode(self, asked: dict[str, Any]) -> dict[str, Any]:
        """One course of things.

        Args:
            asked: `start`, its number, or `state`; `actions` that are taken, or `steps` that are drawn.

        Returns:
            Its `states`, one more than `actions`; what was `seen` of each; what was `possible` in each state, also
            the last; where `others` of it led, at most four a state; and `trouble`, a kind and a detail, or None.
        """
        told: dict[str, Any] = {
            "states": [],
            "actions": [],
            "seen": [],
            "possible": [],
            "others": [],
            "trouble": None,
        }
        draw = random.Random(f"world {asked.get('start')}")
        given = asked.get("actions")
        try:
            state = plain(asked["state"]) if "state" in asked else self.begin(asked["start"])
            told["states"].append(state)
            for place in range(len(given) if given is not None else asked["steps"]):
                possible = self.possible(state)
                told["possible"].append(possible)
                if not possible:
                    break
                action = draw.choice(possible) if given is None else given[place]
                if action not in possible:
                    raise Wrong("impossible", action)
                others = [one for one in possible if one != action]
                told["others"].append([[one, self.next(state, one)[0]] for one in others[:4]])
                state, seen = self.next(state, action)
                told["states"].append(state)
                told["actions"].append(action)
                told["seen"].append(seen)
            else:
                told["possible"].append(self.possible(state))
        except Wrong as wrong:
            told["trouble"] = list(wrong.args)
        return told

    def explored(self, asked: dict[str, int]) -> dict[str, Any]:
        """Longer courses from more starts, of which only the first trouble is told, and a digest of all."""
        digest = hashlib.blake2b(digest_size=16)
        for number in range(asked["from"], asked["to"]):
            told = self.episode({"start": number, "steps": asked["steps"]})
            digest.update(
                json.dumps([told["states"], told["possible"], told["others"]], sort_keys=True).encode()
            )
            if told["trouble"]:
                return {"trouble": told["trouble"], "digest": digest.hexdigest()}
        return {"trouble": None, "digest": digest.hexdigest()}

    def again(self, call: list[Any]) -> Any:
        """What a single call gives: a function's name, and what it is given."""
        try:
            said = self.call(*call)
            return [plain(said[0]), " ".join(said[1].split())] if call[0] == "step" else said
        except Exception:
            return None

    def empty_laws(self) -> list[str]:
        """Laws that say yes whatever comes of an action."""
        return [
            name
            for name, law in self.laws.items()
            if not any(refuses(law, *transition) for transition in self.spoilt())
        ]

    def spoilt(self) -> Iterator[Transition]:
        """Transitions to states that no step led to: a value that can change is another."""
        values: dict[str, set[Any]] = {}
        for before, _, after in self.transitions.values():
            for name, value in [*before.items(), *after.items()]:
                values.setdefault(name, set()).add(value)
        texts = {name: sorted(one for one in some if isinstance(one, str)) for name, some in values.items()}
        for before, action, after in self.transitions.values():
            for name, value in after.items():
                for other in spoilt_values(value, texts[name][:8]) if len(values[name]) > 1 else []:
                    yield before, action, {**after, name: other}


def holds(law: Law, before: State, action: str, after: State) -> bool:
    """Whether a law holds of a transition; one that raises does not."""
    try:
        return bool(law(dict(before), action, dict(after)))
    except Exception:
        return False


def refuses(law: Law, before: State, action: str, after: State) -> bool:
    """Whether a law says no, and does not only raise."""
    try:
        return not law(dict(before), action, dict(after))
    except Exception:
        return False


def spoilt_values(value: Any, texts: list[str]) -> list[Any]:
    """Other values in place of one."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, str):
        return [*(text for text in texts if text != value), value + "'"]
    return [value + 1, value - 1, 2 * value + 10, -value - 1]


def main(request: str) -> None:
    """Play all that is asked for, and say what came of it behind a word that nobody else knows."""
    asked = json.loads(request)
    out = sys.__stdout__
    assert out is not None
    with contextlib.redirect_stdout(io.StringIO()):
        world = World(vars(importlib.import_module(MODULE)))
        told = {
            "again": [world.again(call) for call in asked["again"]],
            "episodes": [world.episode(one) for one in asked["episodes"]],
            "explored": world.explored(asked["explore"]) if asked["explore"] else None,
        }
        told["empty_laws"] = world.empty_laws() if asked["empty_laws"] else []
    out.write("\n" + asked["word"] + json.dumps(told) + "\n")
