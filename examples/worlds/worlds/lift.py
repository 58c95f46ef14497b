"""A lift serves five floors, the lowest of which is floor 0 and the highest floor 4. It moves only while its
doors are shut, and always by one floor at a time. The doors open only when somebody asks for it, and shut again
when the lift is told to. At most three persons fit in; a fourth stays where she is. Persons get in and out
through open doors only. Whoever gets out stays out.
"""


def start(number):
    """How it begins."""
    return {
        "floor": number % 5,
        "doors open": False,
        "in the lift": number % 3,
        "served": 0,
        "waiting": 3 + number % 2,
    }


def actions(state):
    """What can be done."""
    if state["doors open"]:
        return ["shut the doors", "let one in", "let one out"]
    return ["open the doors", "go up", "go down"]


def step(state, action):
    """What comes of it."""
    new = dict(state)
    seen = "Nothing happens."
    if action == "open the doors":
        new["doors open"], seen = True, "The doors open."
    elif action == "shut the doors":
        new["doors open"], seen = False, "The doors shut."
    elif action == "go up" and state["floor"] < 4:
        new["floor"], seen = state["floor"] + 1, "The lift goes up."
    elif action == "go down" and state["floor"] > 0:
        new["floor"], seen = state["floor"] - 1, "The lift goes down."
    elif action == "let one in" and state["waiting"] > 0 and state["in the lift"] < 3:
        new["waiting"], new["in the lift"] = state["waiting"] - 1, state["in the lift"] + 1
        seen = "Somebody gets in."
    elif action == "let one out" and state["in the lift"] > 0:
        new["in the lift"], new["served"] = state["in the lift"] - 1, state["served"] + 1
        seen = "Somebody gets out."
    return new, seen


def law_floors(before, action, after):
    """A lift serves five floors, the lowest of which is floor 0 and the highest floor 4."""
    return 0 <= after["floor"] <= 4


def law_moves(before, action, after):
    """It moves only while its doors are shut, and always by one floor at a time."""
    moved = abs(after["floor"] - before["floor"])
    return moved == 0 or (moved == 1 and not before["doors open"] and not after["doors open"])


def law_doors(before, action, after):
    """The doors open only when somebody asks for it, and shut again when the lift is told to."""
    told = {"open the doors": True, "shut the doors": False}
    return after["doors open"] == told.get(action, before["doors open"])


def law_three(before, action, after):
    """At most three persons fit in; a fourth stays where she is."""
    return 0 <= after["in the lift"] <= 3


def law_through_doors(before, action, after):
    """Persons get in and out through open doors only."""
    return after["in the lift"] == before["in the lift"] or before["doors open"]


def law_stays_out(before, action, after):
    """Whoever gets out stays out."""
    persons = [state["in the lift"] + state["waiting"] + state["served"] for state in (before, after)]
    return after["served"] >= before["served"] and persons[0] == persons[1]
