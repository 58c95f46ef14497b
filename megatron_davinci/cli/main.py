"""The `davinci` command. Sub-commands import what they need when they run, so that `--help` is instant."""

from __future__ import annotations

import argparse
import errno
import importlib
import io
import os
import select
import signal
import sys
import time
from collections.abc import Callable, Sequence

from megatron_davinci.errors import DavinciError, EnvironmentProblem, Stopped
from megatron_davinci.version import __version__

# name -> (module with `add_arguments` and `run`, one line of help)
COMMANDS = {
    "data": ("megatron_davinci.cli.data", "make, merge, verify, inspect and order datasets"),
    "plan": ("megatron_davinci.cli.plan", "what a configuration will cost, without starting anything"),
    "curriculum": ("megatron_davinci.cli.curriculum", "look at a run's mixture, and change what lies ahead"),
    "train": ("megatron_davinci.cli.train", "train, or go on from the newest checkpoint"),
    "import-megatron": (
        "megatron_davinci.cli.import_megatron",
        "turn a launch command of Megatron-LM into a configuration",
    ),
    "convert": ("megatron_davinci.cli.convert", "checkpoints to and from Hugging Face, and from Megatron-LM"),
    "eval": ("megatron_davinci.cli.eval", "run lm-eval's tasks on a checkpoint, without conversion"),
    "serve": ("megatron_davinci.cli.serve", "a checkpoint or an export behind an OpenAI-compatible API"),
    "doctor": ("megatron_davinci.cli.doctor", "why a run has ended, what is left of it, and what to do"),
    "lab": ("megatron_davinci.cli.lab", "ask a question by runs that differ in one thing"),
    "compare": (
        "megatron_davinci.cli.compare",
        "what conclusions depend on: protocols, formats, checkpoints",
    ),
    "report": ("megatron_davinci.cli.report", "draw a run's page"),
}

_OUT_OF_REACH = (errno.EACCES, errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EROFS)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Returns:
        0; the code of an error that the user can mend, with one screen on stderr that says it; 130 after Ctrl-C; 141
        where nobody reads what is printed.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        # As stderr is: a terminal without a character of a table or a name is shown its number, not a traceback.
        sys.stdout.reconfigure(errors="backslashreplace")
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="davinci",
        description="The daVinci-LLM pretraining recipe on Megatron-Core: data, training, evaluation, release.",
        epilog="davinci COMMAND --help says what a command takes. Documentation: docs/, or `mkdocs serve`.",
    )
    parser.add_argument("--version", action="version", version=f"megatron-davinci {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    chosen = next((word for word in argv if not word.startswith("-")), None)
    for name, (module, help_text) in COMMANDS.items():
        command = commands.add_parser(
            name, help=help_text, description=help_text[0].upper() + help_text[1:] + "."
        )
        if name == chosen:
            importlib.import_module(module).add_arguments(command)
    # Overrides may stand before and after options; argparse alone gives up on the second group.
    arguments, rest = parser.parse_known_args(argv)
    if any(word.startswith("-") or "=" not in word for word in rest) or not hasattr(arguments, "overrides"):
        arguments = parser.parse_args(argv)
    else:
        arguments.overrides += rest
    try:
        code = guarded(lambda: importlib.import_module(COMMANDS[arguments.command][0]).run(arguments))
        sys.stdout.flush()
    except BrokenPipeError:
        if not _nobody_reads():
            raise
        # Python would say so once more when it flushes at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    return code


def _nobody_reads() -> bool:
    """Whether who reads what is printed has had enough, as `head` has after its lines."""
    look = select.poll()
    look.register(sys.stdout.fileno(), 0)
    return any(found & select.POLLERR for _, found in look.poll(0))


def guarded(
    action: Callable[[], int | None],
    patience: float = 0.0,
    tell: Callable[[DavinciError], None] = lambda error: None,
) -> int:
    """Run `action`; say errors that the user can mend on one screen, without a traceback.

    Args:
        action: Returns an exit code.
        patience: Seconds to wait before saying an error.
        tell: Is told of it before that.
    """
    try:
        return _reaching(action) or 0
    except DavinciError as error:
        tell(error)
        if isinstance(error, Stopped):
            patience = 0.0  # all ranks have agreed on it, and leave together
            if os.environ.get("RANK", "0") != "0":
                return error.code
        time.sleep(patience)
        print(f"{error.label}: {error}", file=sys.stderr, flush=True)
        return error.code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _reaching(action: Callable[[], int | None]) -> int | None:
    """Run `action`; a path may be out of reach wherever one is looked at, which is the same error everywhere."""
    try:
        return action()
    except OSError as error:
        if error.filename is None or error.errno not in _OUT_OF_REACH:
            raise
        raise EnvironmentProblem(
            "A path cannot be reached.",
            where=os.fsdecode(error.filename),
            found=error.strerror,
            do="check how it is spelt, and that each name above it is a folder with permissions for it",
        ) from error


if __name__ == "__main__":
    sys.exit(main())
