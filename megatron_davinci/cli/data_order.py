"""`davinci data order CONFIG`: what sample N is and why, and when a window or a document is seen. Only reads."""

from __future__ import annotations

import argparse
import json
import os
import sys

from megatron_davinci.errors import ConfigError

MOST = 10_000  # samples at a time: whoever wants more wants the library


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("config", help="run configuration (YAML)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that win over the file")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--at", type=_number, metavar="N", help="what sample N is, from 0 on")
    what.add_argument("--step", type=_number, metavar="STEP", help="the samples of a step, from 1 on")
    what.add_argument("--find", metavar="SOURCE:WINDOW", help="when a window is seen, in every epoch")
    what.add_argument(
        "--find-document",
        metavar="SOURCE:SHARD:DOCUMENT",
        help="when a document's windows are seen; the shard by number or name",
    )
    parser.add_argument("--count", type=int, metavar="K", help="a table of K samples, or of K findings")
    parser.add_argument("--full-text", action="store_true", help="the whole text of a window, not its ends")
    parser.add_argument(
        "--lineage",
        action="store_true",
        help="each document's raw file and bytes, where its source knows them",
    )
    parser.add_argument("--json", action="store_true", help="the same as JSON")
    parser.add_argument(
        "--ranks", type=int, help="to lay batches over (default: as the run's last start, or the fewest)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Answer."""
    from megatron_davinci.cli.data_order_answer import Teller
    from megatron_davinci.config import load_config
    from megatron_davinci.train.forecast import Forecast

    if arguments.count is not None and not 1 <= arguments.count <= MOST:
        raise ConfigError(
            "So many cannot be shown.",
            where="--count",
            found=f"{arguments.count:,}",
            expected=f"1 to {MOST:,}",
            do="ask for the next ones with another --at, or use megatron_davinci.data.Curriculum.locate_many",
        )
    config = load_config(arguments.config, arguments.overrides)
    teller = Teller(Forecast.read(config, arguments.ranks), arguments.full_text, arguments.lineage)
    if arguments.find is not None or arguments.find_document is not None:
        answer = teller.finding(arguments.find, arguments.find_document, arguments.count or 20)
    else:
        answer = teller.samples(
            arguments.at, arguments.step, arguments.count or (1 if arguments.step is None else MOST)
        )
    try:
        if arguments.json:
            print(json.dumps(answer, indent=2))
        else:
            from megatron_davinci.cli.data_order_screen import show

            show(answer, one=arguments.step is None and arguments.count is None)
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever reads has had enough (`| head`); Python would say so once more when it flushes at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _number(text: str) -> int:
    """A number as the tables write it: `1,234`."""
    return int(text.replace(",", ""))
