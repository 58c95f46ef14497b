"""`davinci doctor`: why a run has ended, what is left of it, and what to do."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("run", type=Path, help="run directory; the run may be at work")
    parser.add_argument(
        "--no-verify", action="store_true", help="do not read the bytes of the newest checkpoint"
    )
    parser.add_argument("--json", action="store_true", help="the same as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Look, say, and return what is to be done: 0 nothing, 75 start it again, 2 mend something first."""
    from megatron_davinci.cli import doctor_screen
    from megatron_davinci.train.post_mortem import examine

    found = examine(arguments.run, verify=not arguments.no_verify)
    if arguments.json:
        import json

        print(json.dumps(doctor_screen.as_json(found), indent=2, ensure_ascii=False))
    else:
        doctor_screen.show(found)
    return found.code
