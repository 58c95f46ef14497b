"""An orchard is kept through the months of the year, from 1 to 12, and after the twelfth comes the first. Trees
are planted in March or October and at no other time, ten at most, and a tree that has been felled does not grow
again. In August every tree bears four baskets of apples. What is sold is paid with 5 crowns a basket; a young
tree costs 8. Nobody owes anything: what cannot be paid is not bought. Baskets that are still there in February
are spoilt.
"""


def start(number):
    """How it begins."""
    return {"month": 1 + 5 * number % 12, "trees": 2 + number % 3, "baskets": 0, "crowns": 20 + number}


def actions(state):
    """What can be done."""
    found = ["wait a month"]
    if state["month"] in (3, 10) and state["trees"] < 10 and state["crowns"] >= 8:
        found.append("plant a tree")
    if state["baskets"] > 0:
        found.append("sell a basket")
    if state["trees"] > 0:
        found.append("fell a tree")
    return found


def step(state, action):
    """What comes of it."""
    new = dict(state)
    if action == "plant a tree":
        new["trees"], new["crowns"] = state["trees"] + 1, state["crowns"] - 8
        return new, "A young tree stands in the orchard."
    if action == "sell a basket":
        new["baskets"], new["crowns"] = state["baskets"] - 1, state["crowns"] + 5
        return new, "A basket is sold."
    if action == "fell a tree":
        new["trees"] = state["trees"] - 1
        return new, "A tree falls."
    new["month"] = state["month"] % 12 + 1
    if new["month"] == 8:
        new["baskets"] = state["baskets"] + 4 * state["trees"]
    if new["month"] == 2:
        new["baskets"] = 0
    return new, f"It is month {new['month']}."


def law_months(before, action, after):
    """An orchard is kept through the months of the year, from 1 to 12, and after the twelfth comes the first."""
    return after["month"] in (before["month"], before["month"] % 12 + 1)


def law_planted(before, action, after):
    """Trees are planted in March or October and at no other time, ten at most"""
    return after["trees"] <= before["trees"] or (before["month"] in (3, 10) and after["trees"] <= 10)


def law_bears(before, action, after):
    """In August every tree bears four baskets of apples."""
    more = after["baskets"] - before["baskets"]
    return more <= 0 or (after["month"] == 8 and more == 4 * before["trees"])


def law_paid(before, action, after):
    """What is sold is paid with 5 crowns a basket; a young tree costs 8."""
    sold = before["baskets"] - after["baskets"] if action == "sell a basket" else 0
    return after["crowns"] - before["crowns"] == 5 * sold - 8 * max(0, after["trees"] - before["trees"])


def law_owes(before, action, after):
    """Nobody owes anything: what cannot be paid is not bought."""
    return after["crowns"] >= 0


def law_spoilt(before, action, after):
    """Baskets that are still there in February are spoilt."""
    return after["month"] != 2 or before["month"] == 2 or after["baskets"] == 0
