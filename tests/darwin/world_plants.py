"""Worlds for the gates of level 9, drawn from a seed: clean ones, and twins of each with one thing wrong.

Six kinds of world with drawn numbers, each with the passage that it goes by. What is wrong is written into the
program as an author, or a model, would get it wrong: a law that is nowhere in the passage, one that says nothing,
chance, something kept aside, an action that does nothing, a rule that is broken in one branch.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

NAMES = ["Marrow", "Ostwick", "Belfen", "Carrow", "Dunmore", "Elstree"]


class Case(NamedTuple):
    """A world to judge; `kind` is empty for a clean one."""

    kind: str
    passage: str
    program: str


class Kind(NamedTuple):
    """A kind of world, with its numbers drawn.

    Attributes:
        passage: What it goes by.
        program: It.
        wrong: What to exchange for what so that a law is broken somewhere.
        blind: Laws that hold and can fail, and that no fault of the world breaks, in place of its own.
    """

    passage: str
    program: str
    wrong: tuple[str, str]
    blind: str


def _laws(*laws: tuple[str, str]) -> str:
    return "\n\n".join(
        f'def law_{number}(before, action, after):\n    """{said}"""\n    {body}\n'
        for number, (said, body) in enumerate(laws)
    )


def tank(draw: random.Random) -> Kind:
    """Water that runs in and out."""
    full, flow, out = draw.randrange(40, 90), draw.randrange(4, 9), draw.randrange(3, 11)
    town = draw.choice(NAMES)
    passage = (
        f"The cistern of {town} holds at most {full} litres, and what comes beyond that runs over the rim. "
        f"While the pump is on, {flow} litres run in every minute. The tap lets out {out} litres at once, or what is "
        "left. The pump only changes when someone touches its switch. Old pipes were replaced by copper ones."
    )
    program = f"""
def start(number):
    return {{"litres": (7 * number + 3) % {full}, "pump": number % 2 == 1, "rim": {full}}}


def actions(state):
    return ["touch the switch", "open the tap", "wait"]


def step(state, action):
    new = dict(state)
    if action == "touch the switch":
        new["pump"] = not state["pump"]
    if action == "open the tap":
        new["litres"] = max(0, state["litres"] - {out})
    if new["pump"]:
        new["litres"] = min({full}, new["litres"] + {flow})
    return new, "The water stands at %d litres." % new["litres"]


""" + _laws(
        (f"The cistern of {town} holds at most {full} litres", f'return 0 <= after["litres"] <= {full}'),
        (
            "The pump only changes when someone touches its switch.",
            'return (before["pump"] != after["pump"]) == (action == "touch the switch")',
        ),
        (
            f"The tap lets out {out} litres at once, or what is left.",
            f"left = max(0, before['litres'] - {out}) if action == 'open the tap' else before['litres']\n"
            f"    return after['litres'] == min({full}, left + {flow} * after['pump'])",
        ),
    )
    blind = _laws(
        (f"The cistern of {town} holds at most {full} litres", f'return after["rim"] == {full}'),
        (
            f"The tap lets out {out} litres at once, or what is left.",
            'return after["rim"] == before["rim"]',
        ),
    )
    return Kind(passage, program, (f"min({full}, new", f"min({full + 5}, new"), blind)


def shop(draw: random.Random) -> Kind:
    """Goods against money."""
    price, cost = draw.randrange(7, 20), draw.randrange(2, 6)
    town = draw.choice(NAMES)
    passage = (
        f"A baker in {town} sells a loaf for {price} crowns and never sells what is not on the shelf. To bake a loaf "
        f"takes {cost} crowns of flour, which must be paid at once. The oven is closed at night. A baker never "
        "spends "
        "more than is in the till. At night no loaf is sold."
    )
    program = f"""
def start(number):
    return {{"loaves": number % 4, "crowns": 10 + 3 * number, "hour": 8, "sign": "open"}}


def actions(state):
    found = ["look at the clock"]
    if state["hour"] < 20 and state["loaves"] > 0:
        found.append("sell a loaf")
    if state["crowns"] >= {cost}:
        found.append("bake a loaf")
    return found


def step(state, action):
    new = dict(state)
    new["hour"] = (state["hour"] + 1) % 24
    if action == "sell a loaf":
        new["loaves"] -= 1
        new["crowns"] += {price}
    elif action == "bake a loaf":
        new["loaves"] += 1
        new["crowns"] -= {cost}
    return new, "There are %d loaves on the shelf." % new["loaves"]


""" + _laws(
        (
            f"A baker in {town} sells a loaf for {price} crowns",
            'sold = before["loaves"] - after["loaves"]\n'
            f'    return sold <= 0 or (sold == 1 and after["crowns"] - before["crowns"] == {price})',
        ),
        (
            f"To bake a loaf takes {cost} crowns of flour, which must be paid at once.",
            'made = after["loaves"] - before["loaves"]\n'
            f'    return made <= 0 or after["crowns"] == before["crowns"] - {cost} * made',
        ),
        (
            "A baker never spends more than is in the till.",
            'return after["crowns"] >= 0 and (after["loaves"] != before["loaves"] or after["crowns"] == '
            'before["crowns"])',
        ),
    )
    blind = _laws(
        ("A baker never spends more than is in the till.", 'return after["sign"] == "open"'),
        ("At night no loaf is sold.", 'return after["sign"] == before["sign"]'),
    )
    return Kind(passage, program, (f'new["crowns"] += {price}', f'new["crowns"] += {price - 1}'), blind)


def fever(draw: random.Random) -> Kind:
    """Those who are well, ill, and over it."""
    people, days = draw.randrange(60, 200), draw.randrange(2, 5)
    town = draw.choice(NAMES)
    passage = (
        f"On the island of {town} live {people} people, and nobody comes or leaves. Each day one in {days} of "
        "the ill "
        "gets over the fever, at least one of them. Those who got over it never fall ill again. On a market day "
        "the ill "
        "pass the fever on to twice as many others as on other days, each to one, as long as there are any. When "
        "nobody "
        "is ill the fever is over."
    )
    program = f'''
def start(number):
    ill = 2 + number % 7
    return {{"well": {people} - ill, "ill": ill, "over it": 0, "island": "{town}"}}


def actions(state):
    return ["hold a market", "stay at home", "work"] if state["ill"] else []


def step(state, action):
    caught = {{"hold a market": 2, "work": 1, "stay at home": 0}}[action] * state["ill"]
    caught = min(caught, state["well"])
    healed = max(1, state["ill"] // {days})
    new = dict(state)
    new["well"] = state["well"] - caught
    new["ill"] = state["ill"] + caught - healed
    new["over it"] = state["over it"] + healed
    return new, "%d have caught it, %d have got over it." % (caught, healed)


''' + _laws(
        (
            f"live {people} people, and nobody comes or leaves",
            f'return after["well"] + after["ill"] + after["over it"] == {people}',
        ),
        (
            "Those who got over it never fall ill again.",
            'return after["over it"] >= before["over it"] and min(after["well"], after["ill"]) >= 0',
        ),
        (
            f"Each day one in {days} of the ill gets over the fever, at least one of them.",
            f'return after["over it"] - before["over it"] == max(1, before["ill"] // {days})',
        ),
    )
    blind = _laws(
        ("Those who got over it never fall ill again.", f'return after["island"] == "{town}"'),
        ("When nobody is ill the fever is over.", 'return after["island"] == before["island"]'),
    )
    wrong = (
        'new["well"] = state["well"] - caught',
        'new["well"] = state["well"] - (caught if caught < 4 else 4)',
    )
    return Kind(passage, program, wrong, blind)


def robot(draw: random.Random) -> Kind:
    """A robot on a board."""
    wide, high, charge = draw.randrange(4, 8), draw.randrange(4, 8), draw.randrange(9, 15)
    passage = (
        f"The board is {wide} squares wide and {high} squares high, and the robot never leaves it: at an edge it "
        "stays "
        f"where it is. A move takes it one square in one direction. Each move costs one unit of charge of "
        f"{charge}, also "
        "at an edge, and without charge it stands still. Resting costs nothing and brings one unit back, up to the "
        "whole charge. It was painted yellow."
    )
    program = f"""
MOVES = {{"go north": (0, 1), "go south": (0, -1), "go east": (1, 0), "go west": (-1, 0)}}


def start(number):
    return {{"column": number % {wide}, "row": number // {wide} % {high}, "charge": {charge}, "paint": "yellow"}}


def actions(state):
    return ["rest", *MOVES] if state["charge"] > 0 else ["rest"]


def step(state, action):
    new = dict(state)
    if action == "rest":
        new["charge"] = min({charge}, state["charge"] + 1)
        return new, "The robot rests."
    right, up = MOVES[action]
    new["column"] = min(max(state["column"] + right, 0), {wide} - 1)
    new["row"] = min(max(state["row"] + up, 0), {high} - 1)
    new["charge"] = state["charge"] - 1
    moved = (new["column"], new["row"]) != (state["column"], state["row"])
    return new, "The robot moves." if moved else "The robot stands at the edge."


""" + _laws(
        (
            f"The board is {wide} squares wide and {high} squares high, and the robot never leaves it",
            f'return 0 <= after["column"] < {wide} and 0 <= after["row"] < {high}',
        ),
        (
            "A move takes it one square in one direction.",
            'return abs(after["column"] - before["column"]) + abs(after["row"] - before["row"]) <= (action != '
            '"rest")',
        ),
        (
            f"Each move costs one unit of charge of {charge}, also at an edge",
            f'return 0 <= after["charge"] <= {charge} and (action == "rest" or after["charge"] == '
            'before["charge"] - 1)',
        ),
    )
    blind = _laws(
        ("A move takes it one square in one direction.", 'return after["paint"] == "yellow"'),
        ("Resting costs nothing and brings one unit back", 'return after["paint"] == before["paint"]'),
    )
    wrong = (
        f'min(max(state["column"] + right, 0), {wide} - 1)',
        f'min(max(state["column"] + right, 0), {wide})',
    )
    return Kind(passage, program, wrong, blind)


def kettle(draw: random.Random) -> Kind:
    """Something that is heated and cools."""
    room, boil, heat = draw.randrange(15, 25), draw.choice([100, 96, 92]), draw.randrange(9, 18)
    passage = (
        f"The room is at {room} degrees, and water in it never becomes colder than that by standing. On the fire "
        "it gains "
        f"{heat} degrees a minute until it boils at {boil} degrees, and gets no hotter. Off the fire it loses a "
        "tenth of "
        "what it is above the room each minute. Putting a lid on halves what is lost. The kettle is made of tin."
    )
    program = f"""
def start(number):
    return {{"degrees": {room} + 10.0 * (number % 4), "on the fire": False, "lid": number % 2 == 0, "metal": "tin"}}


def actions(state):
    return ["take it off" if state["on the fire"] else "put it on", "move the lid", "wait"]


def step(state, action):
    new = dict(state)
    if action in ("take it off", "put it on"):
        new["on the fire"] = not state["on the fire"]
    elif action == "move the lid":
        new["lid"] = not state["lid"]
    if new["on the fire"]:
        new["degrees"] = min({boil}.0, state["degrees"] + {heat})
    else:
        lost = (state["degrees"] - {room}) / (20 if new["lid"] else 10)
        new["degrees"] = round(state["degrees"] - lost, 6)
    return new, "The thermometer shows %.1f degrees." % new["degrees"]


""" + _laws(
        (
            f"The room is at {room} degrees, and water in it never becomes colder than that by standing.",
            f'return after["degrees"] >= {room} - 1e-6',
        ),
        (
            f"until it boils at {boil} degrees, and gets no hotter",
            f'return after["degrees"] <= {boil}',
        ),
        (
            f"On the fire it gains {heat} degrees a minute",
            f'gained = after["degrees"] - before["degrees"]\n'
            f'    return abs(gained - min({heat}, {boil} - before["degrees"])) < 1e-4 if after["on the fire"] '
            "else gained <= 0",
        ),
    )
    blind = _laws(
        ("Putting a lid on halves what is lost.", 'return after["metal"] == "tin"'),
        ("The kettle is made of tin.", 'return after["metal"] == before["metal"]'),
    )
    return Kind(passage, program, (f"min({boil}.0,", f"min({boil + 9}.0,"), blind)


def ferry(draw: random.Random) -> Kind:
    """A boat with places."""
    places, total = draw.randrange(2, 5), draw.randrange(9, 16)
    river = draw.choice(NAMES)
    passage = (
        f"The ferry over the {river} carries {places} travellers at most. It crosses whenever the bell is rung, "
        "also empty. "
        f"On a day {total} travellers wish to cross to the east, and none comes back. One traveller boards at a "
        "time, and "
        "only where the boat lies. Its hull is green."
    )
    program = f"""
def start(number):
    return {{"west": {total} - number % 5, "aboard": 0, "east": number % 5, "side": "west", "hull": "green"}}


def actions(state):
    found = ["ring the bell", "wait"]
    if state["side"] == "west" and state["west"] > 0 and state["aboard"] < {places}:
        found.append("let one board")
    if state["side"] == "east" and state["aboard"] > 0:
        found.append("let all leave")
    return found


def step(state, action):
    new = dict(state)
    if action == "ring the bell":
        new["side"] = "east" if state["side"] == "west" else "west"
    elif action == "let one board":
        new["west"] -= 1
        new["aboard"] += 1
    elif action == "let all leave":
        new["east"] += state["aboard"]
        new["aboard"] = 0
    elif state["side"] == "west" and state["west"] > 0:
        return new, "%d are waiting." % state["west"]
    return new, "The boat lies in the %s." % new["side"]


""" + _laws(
        (
            f"The ferry over the {river} carries {places} travellers at most.",
            f'return 0 <= after["aboard"] <= {places}',
        ),
        (
            f"On a day {total} travellers wish to cross to the east, and none comes back.",
            f'return after["west"] + after["aboard"] + after["east"] == {total} and after["east"] >= before["east"]',
        ),
        (
            "One traveller boards at a time, and only where the boat lies.",
            'boarded = before["west"] - after["west"]\n    return boarded == 0 or (boarded == 1 and '
            'before["side"] == after["side"] == "west")',
        ),
        (
            "It crosses whenever the bell is rung, also empty.",
            'return (after["side"] != before["side"]) == (action == "ring the bell")',
        ),
    )
    blind = _laws(
        ("One traveller boards at a time", 'return after["hull"] == "green"'),
        ("none comes back. One traveller boards", 'return after["hull"] == before["hull"]'),
    )
    return Kind(passage, program, (f'state["aboard"] < {places}', f'state["aboard"] < {places + 1}'), blind)


KINDS: list[Callable[[random.Random], Kind]] = [tank, shop, fever, robot, kettle, ferry]
_BODY = r"def step\(state, action\):\n"
_STATE = r"return \{"


def _law_1(program: str, said: str | None = None, body: str | None = None) -> str:
    """With another sentence, or another body, of the second law."""
    found = re.search(r'(?s)(def law_1.*?""")(.*?)(""")(.*?)(?=\n\ndef|\Z)', program)
    assert found is not None
    head, old_said, close, old_body = found.groups()
    new = (
        head
        + (old_said if said is None else said)
        + close
        + (old_body if body is None else f"\n    {body}\n")
    )
    return program[: found.start()] + new + program[found.end() :]


def _in_step(program: str, lines: str) -> str:
    return re.sub(_BODY, lambda found: found[0] + lines, program, count=1)


def _actions_by(program: str, expression: str) -> str:
    """With what may be done as an expression of what might."""
    begin = "def actions(state):\n"
    return program.replace(begin, f"{begin}    return {expression}\n\n\ndef _actions(state):\n", 1)


def _split(program: str) -> tuple[str, str]:
    at = program.index("def law_0")
    return program[:at], program[at:]


def _aside(kind: Kind, draw: random.Random) -> str:
    """The sentence that is seen depends on what was done in other courses."""
    return "KEPT = []\n" + _in_step(
        kind.program,
        "    KEPT.append(action)\n    if len(KEPT) % 5 == 0:\n"
        "        return step({**state}, actions(state)[len(KEPT) // 5 % len(actions(state))])\n",
    )


PLANTS: dict[str, Callable[[Kind, random.Random], str]] = {
    "law_invented": lambda kind, draw: _law_1(kind.program, "Nothing of this kind was ever seen by anybody."),
    "law_is_one_word": lambda kind, draw: _law_1(kind.program, said="It holds."),
    "law_says_nothing": lambda kind, draw: _law_1(kind.program, body="return True"),
    "law_says_nothing_in_many_words": lambda kind, draw: _law_1(
        kind.program, body="return len(after) == len(before) and action != ''"
    ),
    "law_asks_the_world": lambda kind, draw: _law_1(kind.program, body="return step(before, action)[0] == after"),
    "laws_are_blind": lambda kind, draw: _split(kind.program)[0] + kind.blind,
    "one_law": lambda kind, draw: kind.program[: kind.program.index("def law_1")],
    "rule_is_broken": lambda kind, draw: kind.program.replace(*kind.wrong),
    "chance": lambda kind, draw: "import random\n"
    + _in_step(
        kind.program,
        "    if random.random() < 0.3:\n        return step(state, random.choice(actions(state)))\n",
    ),
    "order_of_a_set": lambda kind, draw: _actions_by(kind.program, "list(set(_actions(state)))"),
    "clock": lambda kind, draw: "import time\n" + kind.program,
    "kept_aside": _aside,
    "nothing_changes": lambda kind, draw: _in_step(kind.program, '    return state, "Nothing is to be seen."\n'),
    "actions_do_nothing": lambda kind, draw: _in_step(kind.program, "    action = actions(state)[0]\n"),
    "raises": lambda kind, draw: _in_step(
        kind.program, f"    if action == actions(state)[-1]:\n        state['a{draw.randrange(99)}']\n"
    ),
    "is_over_at_once": lambda kind, draw: kind.program.replace(
        "def actions(state):\n", "def actions(state):\n    return []\n"
    ),
    "one_action": lambda kind, draw: _actions_by(kind.program, "_actions(state)[:1]"),
    "starts_alike": lambda kind, draw: kind.program.replace(
        "def start(number):\n", "def start(number):\n    number = 1\n"
    ),
    "no_plain_value": lambda kind, draw: re.sub(_STATE, 'return {"kept": [1, 2], ', kind.program, count=1),
    "no_number": lambda kind, draw: re.sub(
        _STATE, 'return {"share": float("nan"), ', kind.program, count=1
    ),
    "other_names": lambda kind, draw: _in_step(kind.program, "    state = {**state, action: 1}\n"),
    "says_nothing": lambda kind, draw: re.sub(r"return new, .*", 'return new, ""', kind.program),
    "leaves_early": lambda kind, draw: _in_step(kind.program, "    raise SystemExit(0)\n"),
    "opens_files": lambda kind, draw: _in_step(kind.program, "    open('kept', 'a').write(action)\n"),
    "never_ends": lambda kind, draw: _in_step(
        kind.program, "    while action == actions(state)[-1]:\n        pass\n"
    ),
}  # fmt: skip


def cases(seed: int, count: int) -> Iterator[Case]:
    """So many clean worlds, and of each a twin with one thing wrong, all kinds of which come in turn."""
    draw = random.Random(f"worlds {seed}")
    order: list[str] = []
    for number in range(count):
        kind = KINDS[(number + seed) % len(KINDS)](draw)
        yield Case("", kind.passage, kind.program)
        if not order:
            order = draw.sample(sorted(PLANTS), len(PLANTS))
        name = order.pop()
        program = PLANTS[name](kind, draw)
        assert program != kind.program, name
        yield Case(name, kind.passage, program)
