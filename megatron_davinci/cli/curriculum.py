"""`davinci curriculum`: look at a run's mixture, past and planned, and change what lies ahead."""

from __future__ import annotations

import argparse
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_davinci.errors import ConfigError

if TYPE_CHECKING:
    from megatron_davinci.train.course import Course
    from megatron_davinci.train.edits import Point


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    show = actions.add_parser("show", help="draw past and planned mixture, epochs and what is left")
    show.add_argument("run", type=Path, help="run directory")
    how = show.add_mutually_exclusive_group()
    how.add_argument("--json", action="store_true", help="the same as JSON")
    how.add_argument("--plot", type=Path, metavar="FILE", help="draw it: .png a picture, .html a page")
    edit = actions.add_parser("edit", help="change the mixture of a run from a point ahead on")
    edit.add_argument("run", type=Path, help="run directory; the run may be at work")
    edit.add_argument(
        "--mixture", metavar="NAME=SHARE,...", help="shares by source or domain: general=0.5,code=0.3,qa=0.2"
    )
    edit.add_argument("--reason", help="why, for whoever reads the journal")
    where = edit.add_mutually_exclusive_group()
    where.add_argument("--next", action="store_true", help="from the next step on")
    where.add_argument("--at", metavar="30%", help="from where this part of the run is over")
    where.add_argument("--at-step", metavar="N", help="from step N on")
    where.add_argument("--at-tokens", metavar="2B", help="from the first step after so many tokens")
    where.add_argument(
        "--stage", metavar="NAME", help="from the beginning of a stage, wherever it comes to lie"
    )
    where.add_argument("--withdraw", metavar="EDIT", help="take back an edit that has not taken effect")
    edit.add_argument("--dry-run", action="store_true", help="show what would change, and write nothing")


def run(arguments: argparse.Namespace) -> int:
    """Show or edit."""
    from megatron_davinci.train.course import Course

    course = Course.read(arguments.run)
    return _show(arguments, course) if arguments.action == "show" else _edit(arguments, course)


def _show(arguments: argparse.Namespace, course: Course) -> int:
    from megatron_davinci.cli import curriculum_screen
    from megatron_davinci.train.course import as_json

    if arguments.plot is not None:
        from megatron_davinci.cli.curriculum_plot import write_plot

        print(write_plot(course, arguments.plot))
    elif arguments.json:
        import json

        print(json.dumps(as_json(course), indent=2))
    else:
        curriculum_screen.show(course)
    return 0


def _edit(arguments: argparse.Namespace, course: Course) -> int:
    from megatron_davinci.cli import curriculum_screen
    from megatron_davinci.train.editing import ask, withdraw

    if not (arguments.reason or "").strip():
        raise ConfigError(
            "A change needs a reason.",
            where="--reason",
            found="none",
            do='say why, in a sentence: --reason "held-out loss of code has stopped falling"',
        )
    if arguments.withdraw is not None:
        if arguments.mixture is not None:
            raise ConfigError("An edit is withdrawn or made, not both.", where="--withdraw and --mixture")
        if arguments.dry_run:
            raise ConfigError("There is nothing to try about --withdraw.", where="--dry-run")
        withdraw(course, arguments.withdraw, arguments.reason)
        print(f"{arguments.withdraw} is withdrawn.")
        return 0
    if arguments.mixture is None:
        raise ConfigError(
            "An edit needs a mixture.", where="--mixture", expected="NAME=SHARE,...: general=0.5,code=0.5"
        )
    point, asked = _point(arguments, course)
    found = ask(course, point, _mixture(arguments.mixture), arguments.reason, asked=asked)
    edit = found.edit if arguments.dry_run else found.write()
    curriculum_screen.show_edit(found, edit, written=not arguments.dry_run)
    return 0


def _mixture(text: str) -> dict[str, str]:
    """`general=0.5,code=0.5` as a mapping."""
    found: dict[str, str] = {}
    for part in text.split(","):
        name, equals, share = (piece.strip() for piece in part.partition("="))
        if not name or not equals or not share:
            raise ConfigError(
                "A mixture is written NAME=SHARE,NAME=SHARE.",
                where="--mixture",
                found=repr(part),
                expected="general=0.5,code=0.3,qa=0.2",
            )
        if name in found:
            raise ConfigError("A mixture names something twice.", where="--mixture", found=name)
        found[name] = share
    return found


def _point(arguments: argparse.Namespace, course: Course) -> tuple[Point, str]:
    """Where an edit is to take effect, and how that was said."""
    from megatron_davinci.config.units import parse_tokens
    from megatron_davinci.train.editing import percent_point, step_point
    from megatron_davinci.train.edits import Point

    if arguments.at is not None:
        return percent_point(course, _percent(arguments.at)), f"--at {arguments.at}"
    if arguments.at_step is not None:
        step = arguments.at_step.replace(",", "")
        if not step.isdecimal():
            raise ConfigError(
                "This is no step.", where="--at-step", found=arguments.at_step, expected="a number"
            )
        return step_point(course, int(step)), f"--at-step {arguments.at_step}"
    if arguments.at_tokens is not None:
        try:
            tokens = parse_tokens(arguments.at_tokens)
        except ValueError as error:
            raise ConfigError("This is no token count.", where="--at-tokens", found=error) from None
        return Point(
            sample=-(-tokens // course.schedule.sequence_length)
        ), f"--at-tokens {arguments.at_tokens}"
    if arguments.stage is not None:
        return Point(stage=arguments.stage), f"--stage {arguments.stage}"
    if arguments.next:
        return Point(), "--next"
    raise ConfigError(
        "An edit needs a point where it takes effect.",
        expected="one of --next, --at 30%, --at-step N, --at-tokens 2B, --stage NAME",
    )


def _percent(text: str) -> Fraction:
    try:
        percent = Fraction(text.removesuffix("%")) if text.endswith("%") and len(text) < 40 else Fraction(-1)
    except (ValueError, ZeroDivisionError):
        percent = Fraction(-1)
    if not 0 <= percent <= 100:
        raise ConfigError("This is no part of a run.", where="--at", found=text, expected="0% to 100%")
    return percent
