"""`davinci compare RUN...`: what conclusions depend on, from what `davinci eval` has kept."""

from __future__ import annotations

import argparse
import json
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        help="run directory, RUN@STEP for one of its checkpoints, or a folder of results; all that are measured",
    )
    parser.add_argument(
        "--tasks", help="these only, with commas between; NAME (WAY) for one of several ways of asking"
    )
    parser.add_argument("--seed", type=int, default=0, help="of what is resampled (default: 0)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the same as JSON, with all pairs")


def run(arguments: argparse.Namespace) -> int:
    """Compare, print, and write the JSON file that was asked for."""
    from megatron_davinci.cli.compare_screen import show
    from megatron_davinci.cli.eval_plan import task_names
    from megatron_davinci.errors import ConfigError, DataError
    from megatron_davinci.evaluate.comparing import compare
    from megatron_davinci.evaluate.item_scores import read_item_scores
    from megatron_davinci.evaluate.naming import stem_of
    from megatron_davinci.files import write_atomically

    if arguments.seed < 0:
        raise ConfigError("This is no seed.", where="--seed", found=arguments.seed, expected="0 or more")
    tasks = read_item_scores(arguments.runs)
    known = sorted({stem_of(task.task) for task in tasks})
    if arguments.tasks is not None:
        asked = task_names(arguments.tasks)
        # A name alone is a task in all its ways; with a way behind it, in that one.
        ways = {name: {one for one in known if one == name or one.startswith(f"{name} (")} for name in asked}
        wanted = set().union(*ways.values())
        if missing := sorted(name for name, found in ways.items() if not found):
            raise DataError(
                "A task has no kept answers.",
                where=f"--tasks {arguments.tasks}",
                found=", ".join(missing),
                expected=f"of {', '.join(known)}" if known else "tasks with items that are right or wrong",
                do="ask it first: davinci eval RUN --tasks NAME",
            )
        tasks = [task for task in tasks if stem_of(task.task) in wanted]
    compared = compare(tasks, arguments.seed)
    show(compared)
    if arguments.json is not None:
        write_atomically(arguments.json, json.dumps(compared.record(), indent=1) + "\n")
    return 0
