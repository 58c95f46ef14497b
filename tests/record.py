"""What `--record FILE` writes: how many tests of each room passed, failed and were skipped, and when.

Rooms that were not run keep what the file says of them, so that a long run may be made a room at a time.
"""

from __future__ import annotations

import json
import platform
import time
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path

OUTCOMES = ("passed", "failed", "skipped")


class Record:
    """Counts outcomes by room; a test that broke in its set-up or tear-down has failed."""

    def __init__(self) -> None:
        self._outcomes: dict[str, dict[str, str]] = defaultdict(dict)

    def add(self, room: str, test: str, outcome: str) -> None:
        """Take one phase of one test."""
        before = self._outcomes[room].get(test)
        worst = max((o for o in (before, outcome) if o), key=("passed", "skipped", "failed").index)
        self._outcomes[room][test] = worst

    def write(self, path: Path, seconds: dict[str, float], long: bool) -> None:
        """Write, with what the file already says of other rooms."""
        rooms = json.loads(path.read_text())["rooms"] if path.exists() else {}
        for room, outcomes in self._outcomes.items():
            counts = Counter(outcomes.values())
            rooms[room] = {
                **{outcome: counts[outcome] for outcome in OUTCOMES},
                "seconds": round(seconds.get(room, 0.0), 1),
                "long": long,
                **({"failed_tests": worst} if (worst := _named(outcomes, "failed")) else {}),
                "date": time.strftime("%Y-%m-%d", time.gmtime()),
            }
        figures = {outcome: _sum(rooms.values(), outcome) for outcome in (*OUTCOMES, "seconds")}
        machine = {"python": platform.python_version(), "system": platform.system()}
        written = {"figures": figures, "rooms": dict(sorted(rooms.items())), "machine": machine}
        path.write_text(json.dumps(written, indent=2) + "\n")


def _named(outcomes: dict[str, str], outcome: str) -> list[str]:
    return sorted(test for test, its in outcomes.items() if its == outcome)


def _sum(rooms: Iterable[dict[str, float]], key: str) -> float:
    return round(sum(room[key] for room in rooms), 1)
