"""Whether the sandbox stops hostile programs, and nothing else.

Hostile programs (fork bomb, network, write outside, symlink escape, endless loop, memory, signals, daemon, huge
output, full disk, secrets, rights, forbidden system calls, ...) run beside honest ones that look alike, on every way
that this machine has. A hostile one counts as stopped when it has not managed what it tried, the host (a file, a
secret, servers, this process) has noticed nothing, and nothing of it is left. An honest one is accepted when it ends
well and says what it should.

The programs are drawn from the seed by tests/platform/sandbox_cases.py, whose author also wrote the sandbox: the
figures say that it does what it is for, not that nobody can get out of it.

figures: hostile_stopped_fraction, honest_accepted_fraction (the strongest way), the same of each way that is here;
cases
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))
import common

from megatron_davinci.platform.sandbox import available_ways
from tests.platform.sandbox_cases import Host, honest, hostile, judged

# By design, of the weakest way: docs/concepts/sandbox.md.
_NOT_OF_SECCOMP = ("secrets", "a process of its own that it stops")


def main() -> None:
    """Run all cases on all ways, and write the figures."""
    parser = common.parser(__doc__ or "")
    parser.add_argument("--draws", type=int, default=3, help="times that every kind is drawn")
    arguments = parser.parse_args()
    ways = [way for way, why in available_ways().items() if why is None]
    figures: dict[str, float] = {}
    peer: dict[str, Any] = {"ways": available_ways(), "wrong": {}, "statuses": {}}
    total = 0
    with Host() as host:
        for way in ways:
            counts = {True: [0, 0], False: [0, 0]}
            for draw in range(arguments.draws):
                seed = 1000 * arguments.seed + draw
                for case in [*hostile(seed, host), *honest(seed)]:
                    good = case.says is not None
                    if way == "seccomp" and (case.kind in _NOT_OF_SECCOMP or (good and case.writes)):
                        continue
                    ran, wrong = judged(case, host, way)
                    total += 1
                    counts[good][0] += not wrong
                    counts[good][1] += 1
                    if not good:
                        seen = peer["statuses"].setdefault(f"{way}: {case.kind}", {})
                        seen[ran.status] = seen.get(ran.status, 0) + 1
                    if wrong:
                        peer["wrong"].setdefault(f"{way}: {case.kind}", []).append(wrong)
                        print(way, case.kind, wrong)
            for good, name in ((False, "hostile_stopped_fraction"), (True, "honest_accepted_fraction")):
                figures[f"{way}_{name}"] = counts[good][0] / counts[good][1]
                if way == ways[0]:
                    figures[name] = counts[good][0] / counts[good][1]
    figures["cases"] = total
    common.write(arguments.json, dict(sorted(figures.items())), peer)


if __name__ == "__main__":
    main()
