"""A battery of 12 volts feeds two lamps side by side, each with a switch of its own. Each lamp that burns draws
half an ampere, and a heater of 3 amperes may be plugged in beside them. A fuse melts as soon as more than 3.5
amperes flow, and then nothing flows until it is replaced. While current flows the battery loses as many ampere
hours an hour, and when it is empty nothing flows at all. A fuse can only be replaced while the heater is
unplugged.
"""


def start(number):
    """How it begins."""
    return {
        "first lamp on": number % 2 == 0,
        "second lamp on": False,
        "heater plugged in": False,
        "fuse whole": True,
        "amperes": 0.5 * (number % 2 == 0),
        "ampere hours": 6.0 + number % 7,
    }


def actions(state):
    """What can be done."""
    found = ["turn the first switch", "turn the second switch", "wait an hour"]
    if state["heater plugged in"]:
        found.append("unplug the heater")
    else:
        found.append("plug in the heater")
        if not state["fuse whole"]:
            found.append("replace the fuse")
    return found


def step(state, action):
    """What comes of it."""
    new = dict(state)
    if action == "turn the first switch":
        new["first lamp on"] = not state["first lamp on"]
    elif action == "turn the second switch":
        new["second lamp on"] = not state["second lamp on"]
    elif action == "plug in the heater":
        new["heater plugged in"] = True
    elif action == "unplug the heater":
        new["heater plugged in"] = False
    elif action == "replace the fuse":
        new["fuse whole"] = True
    else:
        new["ampere hours"] = max(0.0, state["ampere hours"] - state["amperes"])
    wanted = 0.5 * new["first lamp on"] + 0.5 * new["second lamp on"] + 3 * new["heater plugged in"]
    if wanted > 3.5 and new["fuse whole"] and new["ampere hours"] > 0:
        new["fuse whole"] = False
    new["amperes"] = wanted if new["fuse whole"] and new["ampere hours"] > 0 else 0.0
    if state["fuse whole"] and not new["fuse whole"]:
        return new, "The fuse melts."
    return new, f"The meter shows {new['amperes']:.1f} amperes."


def law_lamps(before, action, after):
    """Each lamp that burns draws half an ampere, and a heater of 3 amperes may be plugged in beside them."""
    wanted = (after["first lamp on"] + after["second lamp on"]) / 2 + 3 * after["heater plugged in"]
    return after["amperes"] in (0.0, wanted)


def law_melts(before, action, after):
    """A fuse melts as soon as more than 3.5 amperes flow, and then nothing flows until it is replaced."""
    return after["amperes"] <= 3.5 and (after["fuse whole"] or after["amperes"] == 0)


def law_loses(before, action, after):
    """While current flows the battery loses as many ampere hours an hour, and when it is empty nothing
    flows at all.
    """
    lost = before["amperes"] if action == "wait an hour" else 0
    left = max(0.0, before["ampere hours"] - lost)
    return after["ampere hours"] == left and (left > 0 or after["amperes"] == 0)


def law_replaced(before, action, after):
    """A fuse can only be replaced while the heater is unplugged."""
    return before["fuse whole"] or not after["fuse whole"] or not before["heater plugged in"]
