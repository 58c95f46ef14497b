"""Whether the gates of levels 4, 5, 6 and 8 say no to what they should, and to nothing else.

Violations are planted in clean refinements (a number added or changed, a unit changed, a formula dropped or
changed, code altered, a name or a claim added, a sentence turned into its opposite), in clean questions with answers
(a question that leans on its passage, a wrong answer, evidence that is invented or says something else), in clean
completions (a heading lost, an end elsewhere), in texts put into context (a citation of nothing or of another
passage, a quotation that is none, an addition without a citation) and in dialogues. Each is judged beside its clean
twin, with the rules alone: no model is asked.

The texts and violations are drawn from the seed by tests/darwin/gate_plants.py and higher_plants.py, whose author
also wrote the gates: the figures say that the gates do what they are for, not how often a given model errs in ways
that nobody thought of.

figures: gate_catch_fraction, gate_false_alarm_fraction (the worst of all), and for each
violations_caught_fraction, clean_accepted_fraction; least_caught_fraction of any kind; cases
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))
import common

from megatron_davinci.darwin.complete import completion_violations
from megatron_davinci.darwin.context_gates import context_violations
from megatron_davinci.darwin.dialogue_gates import dialogue_violations, turn_violations
from megatron_davinci.darwin.fidelity import violations
from megatron_davinci.darwin.pair_gates import faults
from tests.darwin.gate_plants import fidelity_cases, pair_cases
from tests.darwin.higher_plants import SPEAKERS, Talk, completed_cases, context_cases, talk_cases


def measure(judged: list[tuple[str, list[str]]]) -> tuple[float, float, dict[str, str]]:
    """Of violations the share that is caught, of clean cases the share that passes, and the former by kind."""
    all_, caught = Counter(kind for kind, _ in judged), Counter(kind for kind, found in judged if found)
    planted = sum(count for kind, count in all_.items() if kind)
    by_kind = {kind: f"{caught[kind]} of {all_[kind]}" for kind in sorted(all_) if kind}
    return sum(caught[kind] for kind in all_ if kind) / planted, 1 - caught[""] / all_[""], by_kind


def judged_talk(talk: Talk) -> list[str]:
    """What is wrong with a dialogue, turn by turn as it came about and as a whole."""
    found = [
        name
        for number, turn in enumerate(talk.turns)
        for name in turn_violations(turn.text, talk.document, talk.turns[:number], SPEAKERS)
    ]
    return found + dialogue_violations(talk.turns, talk.document, SPEAKERS, 4)


def main() -> None:
    """Judge, and write the figures."""
    parser = common.parser(__doc__ or "")
    parser.add_argument("--passages", type=int, default=300)
    arguments = parser.parse_args()
    cases = list(fidelity_cases(arguments.seed, arguments.passages))
    level_4 = [(case.kind, violations(case.source, case.answer, case.task)) for case in cases]
    pairs = list(pair_cases(arguments.seed, arguments.passages // 6))
    level_5 = [(case.kind, faults(case.pair, case.passage)) for case in pairs]
    completed = list(completed_cases(arguments.seed, arguments.passages))
    completion = [(case.kind, completion_violations(case.source, case.answer)) for case in completed]
    in_context = list(context_cases(arguments.seed, arguments.passages // 2))
    context = [(case.kind, context_violations(case.source, case.answer, case.related)) for case in in_context]
    talks = list(talk_cases(arguments.seed, arguments.passages // 2))
    dialogues = [(case.kind, judged_talk(case)) for case in talks]
    figures: dict[str, float] = {}
    peer: dict[str, Any] = {}
    rates = []
    levels = {
        "refinement": level_4,
        "pairs": level_5,
        "completion": completion,
        "context": context,
        "dialogues": dialogues,
    }
    for name, judged in levels.items():
        caught, accepted, by_kind = measure(judged)
        rates.append((caught, accepted))
        figures[f"{name}_violations_caught_fraction"] = caught
        figures[f"{name}_clean_accepted_fraction"] = accepted
        shares = [int(row.split()[0]) / int(row.split()[2]) for row in by_kind.values()]
        figures[f"{name}_least_caught_fraction"] = min(shares)
        figures[f"{name}_cases"] = len(judged)
        peer[f"{name}_caught"] = by_kind
    caught, accepted, _ = measure([one for judged in levels.values() for one in judged])
    figures = {
        "gate_catch_fraction": min(rate for rate, _ in rates),
        "gate_false_alarm_fraction": max(1 - rate for _, rate in rates),
        "violations_caught_fraction": caught,
        "clean_accepted_fraction": accepted,
        **figures,
    }
    for level, rows in peer.items():
        print(level, rows)
    common.write(arguments.json, figures, peer)


if __name__ == "__main__":
    main()
