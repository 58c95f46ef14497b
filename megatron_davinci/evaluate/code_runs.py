"""Programs that a model wrote, run with their tests in the sandbox, and what share of them is right."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from megatron_davinci.platform.cores import usable_cores
from megatron_davinci.platform.sandbox import MIB, Limits
from megatron_davinci.platform.trial import EARLY, ERROR, PASSED, WRONG, Trial, run_with_tests

# EvalPlus runs hundreds of inputs an item. Processor time counts, so that a busy machine changes no score.
LIMITS = Limits(cpu_seconds=20, wall_seconds=120, memory_bytes=2048 * MIB)
# What an answer says about the model and is no trouble of the sandbox's.
_ORDINARY = (PASSED, WRONG, ERROR)
_SAID = {
    EARLY: "code that ended before its tests did",
    "timeout": "code that did not stop",
    "memory": "code that wanted too much memory",
    "processes": "code that started too many processes",
    "output": "code that printed without end",
    "disk": "code that filled its disk",
    "forbidden": "code that made a forbidden system call",
    "killed": "code that a signal ended",
}


def run_all(programs: Sequence[tuple[str, str]], limits: Limits = LIMITS) -> list[Trial]:
    """Run programs with their tests, as many at once as this process has cores; what came of each, in their order.

    Raises:
        NoSandbox: This machine has none.
    """
    with ThreadPoolExecutor(usable_cores()) as pool:
        return list(pool.map(lambda pair: run_with_tests(pair[0], pair[1], limits), programs))


def pass_at_k(tried: int, right: int, k: int) -> float:
    """The chance that one of `k` answers is right, estimated from more: without bias, and of less variance.

    1 - C(n - c, k) / C(n, k), as in Chen et al., Evaluating Large Language Models Trained on Code (arXiv 2107.03374),
    section 2.1.

    Args:
        tried: Answers, n.
        right: Of those, how many are right, c.
        k: At most `tried`.

    Raises:
        ValueError: `k` is more than was tried.
    """
    if not 0 <= right <= tried or not 1 <= k <= tried:
        raise ValueError(f"pass@{k} cannot be said of {right} right answers of {tried}")
    wrong = 1.0
    for number in range(k):
        wrong *= max(0, tried - right - number) / (tried - number)
    return 1.0 - wrong


def stopped(samples: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """Of lm-eval's samples of a code task, items with an answer that was stopped or left early, by how.

    Args:
        samples: With `filtered_resps`, answers as `code_tasks` makes them.
    """
    counts: Counter[str] = Counter()
    for sample in samples:
        answers = [one for of in sample["filtered_resps"] if isinstance(of, list) for one in of]
        kinds = {one["outcome"] for one in answers if isinstance(one, Mapping) and "outcome" in one}
        counts.update(_SAID[kind] for kind in kinds if kind not in _ORDINARY)
    return dict(counts)
