"""Does the controller beat a fixed mixture? One command from text to a page with the answer.

Trains small models on six domains of real text at equal tokens: the controller (`saturation`, in `apply`), random
adjustments within the same bounds at the same times, three fixed mixtures, and a grid whose best is the oracle.
Starting again is safe: runs that are done are kept, those that were interrupted begin again.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from conclude import conclusion, figures, reasons
from rich.console import Console
from rich.table import Table
from study import Design, carry_out, report, runs_that_are_done
from study_runs import Processes, Study
from texts import prepare

from megatron_davinci.cli.main import guarded
from megatron_davinci.files import write_atomically

HERE = Path(__file__).resolve().parent
QUICK = ("curriculum.0.tokens=40k", "curriculum.1.tokens=80k", "curriculum.1.learning_rate.decay_tokens=20k",
         "curriculum.0.evaluate_every_steps=4", "curriculum.1.evaluate_every_steps=8",
         "curriculum.0.learning_rate.warmup_steps=10", "evaluation.sequences=16")  # fmt: skip


def main() -> int:
    """Read the command line.

    Returns:
        The exit code.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="default: runs/curriculum-study, with --quick …-quick")
    parser.add_argument("--seeds", type=int, default=3, help="how many, from 1 on (default: 3)")
    parser.add_argument("--parallel", type=int, help="runs at a time, a core each (default: the cores)")
    parser.add_argument("--no-grid", action="store_true", help="without the oracle's further candidates")
    parser.add_argument("--quick", action="store_true", help="a quarter of the tokens: to see how it works")
    parser.add_argument("--report", action="store_true", help="train nothing, draw what is there")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write summary.json there too")
    parser.add_argument("--config", type=Path, default=HERE / "config.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of every run")
    arguments = parser.parse_args()
    if arguments.seeds < 1 or (arguments.parallel or 1) < 1:
        parser.error("--seeds and --parallel are 1 or more")
    return guarded(lambda: curriculum_study(arguments))


def curriculum_study(arguments: argparse.Namespace) -> int:
    """Prepare, train, compare, draw."""
    say = Console(highlight=False, soft_wrap=True)
    quick = QUICK if arguments.quick else ()
    out = arguments.out or Path("runs/curriculum-study-quick" if quick else "runs/curriculum-study")
    study = Study(arguments.config, out, (*quick, *arguments.overrides))
    pools = prepare(out / "data", study.base().model.vocab_size, say.print)
    say.print("tokens to train on: " + ", ".join(f"{name} {count:,}" for name, count in pools.items()))
    design = Design(study, pools, range(1, arguments.seeds + 1), not arguments.no_grid)
    if arguments.report:
        runs = runs_that_are_done(design)
    else:
        done = len(design.done())
        cores = len(os.sched_getaffinity(0))
        runs = carry_out(design, Processes(arguments.parallel or cores, design.total(), done, say.print))
    comparison, _ = report(design, runs, {"machine": machine()}, say.print)
    if arguments.json is not None:
        write_atomically(arguments.json, (out / "summary.json").read_text(encoding="utf-8"))
    table = Table(header_style="bold")
    for column in ("figure", "value"):
        table.add_column(column, justify="left" if column == "figure" else "right")
    for name, value in figures(comparison).items():
        table.add_row(name, f"{value:.4f}")
    say.print(table)
    for sentence in (*conclusion(comparison), *reasons(comparison)):
        say.print(sentence)
    return 0


def machine() -> dict[str, object]:
    """What the figures were measured on."""
    import platform

    import torch

    cpu = platform.processor()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), cpu)
    except OSError:
        pass
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


if __name__ == "__main__":
    sys.exit(main())
