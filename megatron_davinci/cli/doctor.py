"""`davinci doctor`: why a run has ended, what is left of it, and what to do; or what this machine has for kernels and
for code that nobody trusts."""

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
    parser.add_argument(
        "--sandbox",
        action="store_true",
        help="say instead what keeps code that a model wrote in on this machine",
    )
    parser.add_argument("--json", action="store_true", help="the same as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Look, say, and return what is to be done: 0 nothing, 75 start it again, 2 mend something first."""
    asked = [
        name
        for name, given in (
            (str(arguments.run), arguments.run is not None),
            ("--kernels", arguments.kernels),
            ("--sandbox", arguments.sandbox),
        )
        if given
    ]
    if len(asked) != 1:
        raise ConfigError(
            "The doctor looks at a run, at this machine's kernels, or at its sandbox: one of them.",
            where="davinci doctor",
            found=" and ".join(asked) or "none of them",
            do="give a run directory, or --kernels, or --sandbox",
        )
    if arguments.sandbox:
        return _sandbox(arguments)
    return _kernels(arguments) if arguments.kernels else _run(arguments)


def _sandbox(arguments: argparse.Namespace) -> int:
    from megatron_davinci.cli.screen import Screen
    from megatron_davinci.platform.sandbox import available_ways, run_python

    ways = available_ways()
    chosen = next((way for way, why in ways.items() if why is None), None)
    facts = {} if chosen is None else run_python("", packages=False, way=chosen).isolation
    if arguments.json:
        print(json.dumps({"ways": ways, "chosen": chosen, "isolation": facts}, indent=2))
    else:
        screen = Screen()
        rows = [[way, "yes" if why is None else "no", why or ""] for way, why in ways.items()]
        columns = ["way", "here", "why not"]
        screen.table("What keeps untrusted code in", [(name, "left") for name in columns], rows)
        screen.console.print()
        screen.facts(list(facts.items()) or [("code that a model wrote", "is not run on this machine")])
    return MEND if chosen is None else 0


def _run(arguments: argparse.Namespace) -> int:
    from megatron_davinci.cli import doctor_screen
    from megatron_davinci.train.post_mortem import examine

    found = examine(arguments.run, verify=not arguments.no_verify)
    if arguments.json:
        print(json.dumps(doctor_screen.as_json(found), indent=2))
    else:
        doctor_screen.show(found)
    return found.code


def _kernels(arguments: argparse.Namespace) -> int:
    from megatron_davinci.cli.screen import Screen
    from megatron_davinci.kernels.report import kernel_report

    found = kernel_report()
    if arguments.json:
        print(json.dumps(found.as_json(), indent=2))
    else:
        screen = Screen()
        rows = [[op.device, op.op, op.way or "none", ", ".join(op.dtypes), op.why] for op in found.ops]
        columns = ["device", "op", "way", "kernels for", "why"]
        screen.table("Kernels", [(name, "left") for name in columns], rows)
        screen.console.print()
        screen.facts(list(found.tools.items()))
    return MEND if found.refused else 0
