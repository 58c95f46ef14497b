"""Our kernels: whether they compile for every target and are right, and on a GPU how fast they are beside others.

With --compile-only nothing needs a GPU. Figures:

- `ops_compiled`: ops of which every kernel compiles for every target, and `ops`, how many there are;
- `register_spills`: bytes, over all kernels and targets; `registers_OP_sm_NN`, the most that a kernel of an op takes;
- `worst_error_over_bound_OP`: emulated, over fresh random shapes against float64, by what rounding explains. Each
  case is run with products and sums apart; where this CPU can (`fused` is then 1), with both fused, as on a GPU; and
  where there is nvcc (`ptx` is then 1), of what that makes for compute capability 9.0, with approximations that are
  off by as much as they may be.

Without it, on a GPU besides: `copy_gb_s`, the bandwidth of a copy; `OP_fraction_of_copy`, an op's bytes by its time,
over that; of AdamW at 3.09 billion parameters `adamw_ms`, `adamw_fp8_ms` and `adamw_fp8_state_bytes_per_parameter`;
and times of rivals: torch eager, torch.compile, and Liger's where it is installed.
"""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import common, kernel_trials
from megatron_davinci.kernels import compilers, ways
from megatron_davinci.kernels.table import OPS

TRIALS = 40  # random cases of each op


def compiled() -> tuple[dict[str, float], list[str]]:
    """Figures of ptxas, and a line for each kernel and target; nothing without nvcc."""
    nvcc = compilers.find_nvcc()
    if nvcc is None:
        return {}, ["nvcc was not found: nothing was compiled for a GPU"]
    found = [one for target in compilers.TARGETS for one in compilers.ptxas(target, nvcc)]
    lines = [
        f"{one.kernel:<34}sm_{one.target:<5}{one.registers:>4} registers{one.spills:>6} bytes spilled"
        for one in found
    ]
    there = {(one.kernel, one.target) for one in found}
    figures: dict[str, float] = {
        "ops": len(OPS),
        "ops_compiled": sum(
            all((s, t) in there for k in kernels for s in k.symbols for t in compilers.TARGETS)
            for kernels in OPS.values()
        ),
        "register_spills": sum(one.spills for one in found),
    }
    for op, kernels in OPS.items():
        symbols = {symbol for kernel in kernels for symbol in kernel.symbols}
        for target in compilers.TARGETS:
            of_op = [one.registers for one in found if one.kernel in symbols and one.target == target]
            figures[f"registers_{op}_sm_{target}"] = max(of_op, default=0)
    return figures, lines


def emulated(seed: int, trials: int) -> dict[str, float]:
    """The worst error over bound of each op."""
    import torch

    can = {"plain": True, "fused": compilers.can_fuse(), "ptx": compilers.find_nvcc() is not None}
    figures = {name: float(possible) for name, possible in can.items() if name != "plain"}

    def ratio(trial: Callable[..., Any], case: int) -> float:
        with mock.patch.dict(os.environ, {"DAVINCI_EMULATOR_APPROXIMATE": str(case)}):
            return float(trial(case, torch.device("cpu")).ratio)

    for emulator in (name for name, possible in can.items() if possible):
        draw = random.Random(seed)
        with ways.emulating(emulator):
            for op, trial in kernel_trials.TRIALS.items():
                name = f"worst_error_over_bound_{op}"
                found = [ratio(trial, draw.randrange(1, 2**31)) for _ in range(trials)]
                figures[name] = max(figures.get(name, 0.0), *found)
    return figures


def main() -> None:
    """Run the benchmark."""
    made = common.parser(__doc__)
    made.add_argument("--compile-only", action="store_true", help="what needs no GPU")
    made.add_argument(
        "--trials", type=int, default=TRIALS, help="random cases of each op that are emulated; 0: none"
    )
    arguments = made.parse_args()
    figures, lines = compiled()
    print("\n".join(lines), end="\n\n")
    if arguments.trials:
        figures |= emulated(arguments.seed, arguments.trials)
    peer: dict[str, Any] = {"never_run_on_a_gpu": sorted(OPS)}
    if not arguments.compile_only:
        from benchmarks import kernel_speed

        timed, peer = kernel_speed.measure(arguments.seed)
        figures |= timed
    common.write(arguments.json, figures, peer)


if __name__ == "__main__":
    main()
