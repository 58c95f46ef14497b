"""Whether the verifier of rejection sampling says no to wrong answers, and to nothing else.

Right answers in another form than the reference (fractions, decimals, units, formulas, sets, letters), beside wrong
ones that look alike, and programs with tests, right and wrong, run in the sandbox. Drawn from the seed by
tests/darwin/answer_plants.py, whose author also wrote the verifier: the figures say that it does what it is for, not
how often a given model's answers are in a form that nobody thought of.

figures: verifier_catch_fraction (wrong answers that are refused), verifier_false_alarm_fraction (right ones that
are), the worse of answers and programs, and of each; cases
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))
import common

from megatron_davinci.darwin.trials import LIMITS
from megatron_davinci.darwin.verify import equal, final_answer
from megatron_davinci.platform.trial import run_with_tests
from tests.darwin.answer_plants import answer_cases, code_cases


def main() -> None:
    """Judge, and write the figures."""
    parser = common.parser(__doc__ or "")
    parser.add_argument("--answers", type=int, default=200, help="times that each kind of answer is drawn")
    parser.add_argument("--programs", type=int, default=8, help="times that each kind of program is drawn")
    arguments = parser.parse_args()
    judged = {
        "answers": [
            (case.kind, case.right, equal(final_answer(case.said) or "", case.reference))
            for case in answer_cases(arguments.seed, arguments.answers)
        ],
        "programs": [
            (kind, right, run_with_tests(program, tests, LIMITS).outcome == "passed")
            for kind, right, program, tests in code_cases(arguments.seed, arguments.programs)
        ],
    }
    figures: dict[str, float] = {}
    errors: dict[str, dict[str, int]] = {}
    for name, rows in judged.items():
        wrong = [accepted for _, right, accepted in rows if not right]
        good = [accepted for _, right, accepted in rows if right]
        figures[f"{name}_catch_fraction"] = 1 - sum(wrong) / len(wrong)
        figures[f"{name}_false_alarm_fraction"] = 1 - sum(good) / len(good)
        figures[f"{name}_cases"] = len(rows)
        errors[name] = dict(Counter(kind for kind, right, accepted in rows if right != accepted))
    print(errors)
    figures = {
        "verifier_catch_fraction": min(figures[f"{name}_catch_fraction"] for name in judged),
        "verifier_false_alarm_fraction": max(figures[f"{name}_false_alarm_fraction"] for name in judged),
        **figures,
    }
    common.write(arguments.json, figures, {"errors": errors})


if __name__ == "__main__":
    main()
