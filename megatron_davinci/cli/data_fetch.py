"""`davinci data fetch`: pages of a list of addresses into WARC files, politely."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any


def add_actions(actions: Any) -> None:
    """Declare the action's arguments.

    Args:
        actions: The sub-parsers of `davinci data`.
    """
    fetch = actions.add_parser(
        "fetch", help="fetch the pages of a list of addresses into WARC files, politely"
    )
    fetch.add_argument("lists", nargs="+", type=Path, metavar="LIST", help="text file, one address a line")
    fetch.add_argument("--out", required=True, help="folder for the WARC files and the journal")
    fetch.add_argument(
        "--agent", required=True, help="what servers are told: a name, and a way to reach you in parentheses"
    )
    fetch.add_argument(
        "--delay", type=float, default=1.0, help="seconds between two requests to a host (default: 1)"
    )
    fetch.add_argument("--hosts", type=int, default=16, help="hosts that are asked at once (default: 16)")
    fetch.add_argument("--seconds", type=float, default=60.0, help="that a request may take (default: 60)")
    fetch.add_argument("--max-bytes", type=int, default=32_000_000, help="of a page (default: 32,000,000)")
    fetch.add_argument("--retries", type=int, default=2, help="of a request that fails (default: 2)")


def run(arguments: argparse.Namespace) -> int:
    """Fetch, and say what became of the addresses."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from megatron_davinci.cli.screen import Screen
    from megatron_davinci.darwin.fetch import JOURNAL, fetch, read_lists
    from megatron_davinci.darwin.manners import Manners
    from megatron_davinci.data.places import local_path

    out = local_path(arguments.out)
    _check(arguments)
    urls, again = read_lists(arguments.lists)
    manners = Manners(
        arguments.agent,
        delay=arguments.delay,
        seconds=arguments.seconds,
        retries=arguments.retries,
        hosts=arguments.hosts,
        max_bytes=arguments.max_bytes,
    )
    screen = Screen()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=screen.console, transient=True) as progress:
        bar = progress.add_task("pages", total=len(urls))
        counts = fetch(urls, out, manners, lambda done: progress.update(bar, completed=done))
    rows = [[f"{count:,}", why] for why, count in sorted(counts.items(), key=lambda item: -item[1])]
    screen.table(f"{len(urls):,} addresses", [("addresses", "right"), ("", "left")], rows)
    if again:
        screen.console.print(f"\n{again:,} lines name an address that another line names too.")
    screen.console.print(
        f"\n{arguments.out}: crawl-*.warc.gz, and {JOURNAL} says what became of each", soft_wrap=True
    )
    return 0


def _check(arguments: argparse.Namespace) -> None:
    from megatron_davinci.errors import ConfigError

    for name, least in (("delay", 0.0), ("hosts", 1), ("seconds", 0.1), ("max_bytes", 1), ("retries", 0)):
        if not least <= getattr(arguments, name) < math.inf:
            raise ConfigError(
                f"--{name.replace('_', '-')} is no number that a crawl could go by.",
                found=getattr(arguments, name),
                expected=f"at least {least}",
            )
    if not arguments.agent.isprintable() or not arguments.agent.isascii() or len(arguments.agent) < 3:
        raise ConfigError(
            "--agent is no name that a server can be told.",
            found=arguments.agent,
            expected="printable ASCII: example-crawl (mail@example.org)",
        )
