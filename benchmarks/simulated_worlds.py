"""Whether the gates of level 9 say no to worlds with one thing wrong, and to no others; and whether answers hold.

Worlds of six kinds are drawn from the seed by tests/darwin/world_plants.py, and of each a twin with one thing wrong:
a law that the passage does not have, or that cannot fail, chance, something kept aside, actions that do nothing, a
rule that is broken in one branch, and others. The step's own rules judge both, in the sandbox; no model is asked.
Then questions of accepted worlds are asked of the world's functions in this process, one action after another.

Who made the worlds made the gates, too: the figures say that the gates do what they are for, not how often a given
model errs in ways that nobody thought of.

figures: world_catch_fraction, world_false_alarm_fraction, clean_accepted_fraction, least_caught_fraction of any kind,
answers_right_fraction, answers, cases, seconds_a_world
"""

from __future__ import annotations

import asyncio
import math
import random
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))
import common

from megatron_davinci.darwin.simulate import Believed, Simulate
from megatron_davinci.darwin.world_texts import question_text, shown
from tests.darwin.world_plants import Case, cases


class ByRules(Simulate):
    """The step, without a model, keeping nothing."""

    async def ran(self, asked: dict[str, Any], run: Callable[[], str]) -> str:
        """Runs it."""
        return await asyncio.to_thread(run)


def answers_of(found: Believed, program: str) -> list[bool]:
    """Of each question of a world, whether its answer is what the functions give."""
    names: dict[str, Any] = {}
    exec(program, names)
    right = []
    for course in found.courses:
        state = course.start
        for action in course.actions:
            state, _ = names["step"](dict(state), action)
        _, response = question_text(found.world, course)
        said, value = response.rpartition("\\boxed{")[2][:-1], state[course.name]
        if isinstance(value, bool | str):
            right.append(said == shown(value))
        else:
            right.append(math.isclose(float(said), value, rel_tol=1e-11))
    return right


def main() -> None:
    """Judge, and write the figures."""
    parser = common.parser(__doc__ or "")
    parser.add_argument("--worlds", type=int, default=100)
    arguments = parser.parse_args()
    where = {"url": "http://127.0.0.1:1/v1", "model": "none"}
    step = ByRules(Simulate.Parameters.model_validate({"endpoint": where, "judge": False}))
    drawn: list[Case] = list(cases(arguments.seed, arguments.worlds))
    random.Random(arguments.seed).shuffle(drawn)
    all_, caught, why = Counter[str](), Counter[str](), Counter[str]()
    right: list[bool] = []
    begin = time.perf_counter()
    for case in drawn:
        found = asyncio.run(step.believed(case.program, case.passage, Counter()))
        all_[case.kind] += 1
        if isinstance(found, str):
            caught[case.kind] += 1
            why[f"{case.kind or 'clean'}: {found}"] += 1
        elif not case.kind:
            right += answers_of(found, case.program)
    seconds = (time.perf_counter() - begin) / len(drawn)
    kinds = sorted(kind for kind in all_ if kind)
    figures = {
        "world_catch_fraction": sum(caught[kind] for kind in kinds) / sum(all_[kind] for kind in kinds),
        "world_false_alarm_fraction": caught[""] / all_[""],
        "clean_accepted_fraction": 1 - caught[""] / all_[""],
        "least_caught_fraction": min(caught[kind] / all_[kind] for kind in kinds),
        "answers_right_fraction": sum(right) / len(right) if right else 0.0,
        "answers": len(right),
        "cases": len(drawn),
        "seconds_a_world": seconds,
    }
    by_kind = {kind: f"{caught[kind]} of {all_[kind]}" for kind in kinds}
    for kind in kinds:
        print(f"{kind:32} {by_kind[kind]}")
    common.write(arguments.json, figures, {"caught": by_kind, "why": dict(sorted(why.items()))})


if __name__ == "__main__":
    main()
