"""`davinci import-megatron ARGS.sh`: a launch command of Megatron-LM as a run configuration."""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from megatron_davinci.errors import ConfigError

_STRICT = 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "script", type=Path, help="a script that starts Megatron-LM, or a file of its flags; it is not run"
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="where the YAML goes (default: standard output)"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a variable that the script does not set; 1=VALUE is its first argument",
    )
    parser.add_argument(
        "--called-with",
        metavar="TEXT",
        help="the script's arguments, as one text: --called-with 'dsw 7B 8 256'",
    )
    parser.add_argument(
        "--vocab-size", type=int, metavar="N", help="tokens of the tokenizer, if the command does not say"
    )
    parser.add_argument(
        "--strict", action="store_true", help="end with code 2 if anything is not carried over"
    )


def _called_with(text: str | None) -> dict[str, str]:
    """A script's arguments by their numbers."""
    try:
        words = shlex.split(text or "")
    except ValueError as error:
        raise ConfigError(
            "The script's arguments cannot be read.", where="--called-with", found=f"{text}: {error}"
        ) from error
    return {str(number): word for number, word in enumerate(words, start=1)}


def run(arguments: argparse.Namespace) -> int:
    """Translate; the YAML goes to standard output or a file, what became of the flags to standard error."""
    from megatron_davinci.convert.megatron_args import Imported, import_megatron, read_command
    from megatron_davinci.convert.megatron_ledger import lines_of
    from megatron_davinci.files import write_atomically

    given = _called_with(arguments.called_with)
    for pair in arguments.set:
        name, equals, value = pair.partition("=")
        if not name or not equals:
            raise ConfigError("A variable is not of the form NAME=VALUE.", where="--set", found=pair)
        given[name] = value
    if arguments.vocab_size is not None and arguments.vocab_size < 1:
        raise ConfigError(
            "A vocabulary has at least one token.", where="--vocab-size", found=arguments.vocab_size
        )
    result: Imported = import_megatron(
        read_command(arguments.script), str(arguments.script), given, arguments.vocab_size
    )

    def say(line: str) -> None:
        print("".join(c if c.isprintable() else "?" for c in line), file=sys.stderr)

    for title, entries in (("carried over", result.carried), ("no effect here", result.idle)):
        say(f"{title}: {len(entries)}")
        for line in lines_of(entries):
            say(f"  {line}")
    say(f"NOT CARRIED OVER: {len(result.lost)}")
    for entry in result.lost:
        place = f"line {entry.line}: " if entry.line else ""
        say(f"  {place}{entry.flag}")
        say(f"      why: {entry.what}")
        say(f"      do:  {entry.do}")
    model = result.config.model
    ranks = f", for {result.ranks} ranks" if result.ranks else ""
    say(f"{model.parameters():,} parameters{ranks}; `davinci plan` says what it costs")
    if arguments.out is None:
        print(result.as_yaml(), end="")
    else:
        write_atomically(arguments.out, result.as_yaml())
        say(f"written: {arguments.out}")
    return _STRICT if arguments.strict and result.lost else 0
