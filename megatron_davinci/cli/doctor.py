"""`davinci doctor`: why a run has ended, what is left of it, and what to do; or how kernels run on this machine."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from megatron_davinci.errors import MEND, ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("run", type=Path, nargs="?", help="run directory; the run may be at work")
    parser.add_argument(
        "--no-verify", action="store_true", help="do not read the bytes of the newest checkpoint"
    )
    parser.add_argument(
        "--kernels",
        action="store_true",
        help="say instead by which way each op runs on this machine, and why",
    )
    parser.add_argument("--json", action="store_true", help="the same as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Look, say, and return what is to be done: 0 nothing, 75 start it again, 2 mend something first."""
    if (arguments.run is None) != arguments.kernels:
        raise ConfigError(
            "The doctor looks at a run, or at this machine's kernels.",
            where="davinci doctor",
            found="neither" if arguments.run is None else f"both {arguments.run} and --kernels",
            do="give a run directory, or --kernels without one",
        )
    return _kernels(arguments) if arguments.kernels else _run(arguments)


def _run(arguments: argparse.Namespace) -> int:
    from megatron_davinci.cli import doctor_screen
    from megatron_davinci.train.post_mortem import examine

    found = examine(arguments.run, verify=not arguments.no_verify)
    if arguments.json:
        print(json.dumps(doctor_screen.as_json(found), indent=2, ensure_ascii=False))
    else:
        doctor_screen.show(found)
    return found.code


def _kernels(arguments: argparse.Namespace) -> int:
    from megatron_davinci.cli.screen import Screen
    from megatron_davinci.kernels.report import kernel_report

    found = kernel_report()
    if arguments.json:
        print(json.dumps(found.as_json(), indent=2, ensure_ascii=False))
    else:
        screen = Screen()
        rows = [[op.device, op.op, op.way or "none", ", ".join(op.dtypes), op.why] for op in found.ops]
        columns = ["device", "op", "way", "kernels for", "why"]
        screen.table("Kernels", [(name, "left") for name in columns], rows)
        screen.console.print()
        screen.facts(list(found.tools.items()))
    return MEND if found.refused else 0
