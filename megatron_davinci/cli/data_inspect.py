"""`davinci data inspect TARGET`: what a source holds, or what a run takes of its sources. Only reads."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from megatron_davinci.errors import ConfigError, DataError, DavinciError

MOST = 1000  # samples at a time
_NAMED = 4  # problems that fit one screen


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "target",
        help="source (folder, or prefix without .bin; local or s3://...), or run configuration (YAML)",
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that win over the file")
    parser.add_argument(
        "--sequence-length",
        type=int,
        metavar="TOKENS",
        help="of a source: cut into windows of so many (4096)",
    )
    parser.add_argument(
        "--tokenizer", type=Path, help="of a source: folder with the tokenizer.json that made it"
    )
    parser.add_argument(
        "--sample",
        type=int,
        metavar="N",
        help="read the indexes and masks of N shards of each source, not of all",
    )
    parser.add_argument("--samples", type=int, metavar="K", help="show K samples, drawn by --seed")
    parser.add_argument(
        "--at", type=_number, metavar="N", help="show samples from N on instead (of a source: windows)"
    )
    parser.add_argument("--seed", type=int, default=0, help="draws the samples (default: 0)")
    parser.add_argument("--tokens", action="store_true", help="show where tokens end")
    parser.add_argument("--full-text", action="store_true", help="the whole text of samples")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write the same as a page")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the same as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Look, and show; then say what is wrong, if anything is."""
    from megatron_davinci.cli.data_inspect_answer import Asked, inspect_source
    from megatron_davinci.cli.data_inspect_run import inspect_run
    from megatron_davinci.cli.data_inspect_screen import show

    for name, value, most in (
        ("--sample", arguments.sample, 10**9),
        ("--samples", arguments.samples, MOST),
        ("--sequence-length", arguments.sequence_length, 10**9),
    ):
        if value is not None and not 1 <= value <= most:
            raise ConfigError(
                "This is no number to ask for.", where=name, found=f"{value:,}", expected=f"1 to {most:,}"
            )
    asked = Asked(
        sequence_length=arguments.sequence_length,
        shards=arguments.sample,
        samples=arguments.samples or (0 if arguments.at is None else 1),
        at=arguments.at,
        seed=arguments.seed,
        by_token=arguments.tokens,
        whole=arguments.full_text,
        tokenizer=arguments.tokenizer,
    )
    if Path(arguments.target).suffix in (".yaml", ".yml"):
        _refuse(
            "a run configuration says it itself",
            sequence_length=asked.sequence_length,
            tokenizer=asked.tokenizer,
        )
        answer, problems = inspect_run(arguments.target, arguments.overrides, asked)
    else:
        _refuse("a source has no settings", overrides=arguments.overrides)
        answer, problems = inspect_source(arguments.target, asked)
    _write(arguments, answer)
    try:
        show(answer)
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever reads has had enough (`| head`); Python would say so once more when it flushes at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if problems:
        raise _summary(arguments.target, problems)
    return 0


def _write(arguments: argparse.Namespace, answer: dict[str, object]) -> None:
    if arguments.json:
        from megatron_davinci.files import write_atomically

        write_atomically(arguments.json, json.dumps(answer, indent=2) + "\n")
    if arguments.html:
        from megatron_davinci.cli.data_inspect_page import page

        page(answer).write(arguments.html)


def _summary(target: str, problems: list[DavinciError]) -> DataError:
    from megatron_davinci.cli.data_files import in_a_paragraph

    named = [in_a_paragraph(problem) for problem in problems[:_NAMED]]
    rest = len(problems) - len(named)
    return DataError(
        "Something is wrong with the data; what is shown is the rest."
        if len(problems) == 1
        else f"{len(problems):,} things are wrong with the data; what is shown is the rest.",
        where=target,
        found="\n".join([*named, *([f"and {rest:,} more, all with --json"] if rest else [])]),
        do="restore the files that are named, or write the source again; `davinci data verify` looks at every byte",
    )


def _refuse(why: str, **given: object) -> None:
    for name, value in given.items():
        if value:
            raise ConfigError(
                "This does not go with what is inspected.",
                where="--" + name.replace("_", "-") if name != "overrides" else "key=value",
                found=" ".join(value) if isinstance(value, list) else value,
                expected=f"nothing: {why}",
            )


def _number(text: str) -> int:
    """A number as the tables write it: `1,234`."""
    return int(text.replace(",", ""))
