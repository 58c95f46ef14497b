"""`davinci data knowledge`: texts with made-up facts, to measure what a model comes to know of them."""

from __future__ import annotations

import argparse
from typing import Any


def add_actions(actions: Any) -> None:
    """Declare the action's arguments.

    Args:
        actions: The sub-parsers of `davinci data`.
    """
    knowledge = actions.add_parser(
        "knowledge", help="make up biographies and facts, to see what a model comes to know of them"
    )
    knowledge.add_argument("--people", type=int, default=0, help="persons with biographies (default: 0)")
    knowledge.add_argument(
        "--exposures",
        type=int,
        default=100,
        help="biographies of each, in other words each time (default: 100)",
    )
    knowledge.add_argument(
        "--facts", type=int, default=0, help="made-up things, of four conditions in turn (default: 0)"
    )
    knowledge.add_argument("--seed", type=int, default=0, help="of all that is drawn (default: 0)")
    knowledge.add_argument("--out", required=True, help="folder to make")


def run(arguments: argparse.Namespace) -> int:
    """Write the texts, and say what to do with them."""
    from megatron_davinci.cli.screen import Screen
    from megatron_davinci.data.knowledge.biographies import ATTRIBUTE_BITS, NAME_BITS
    from megatron_davinci.data.knowledge.corpus import Knowledge, write
    from megatron_davinci.data.places import local_path

    out = local_path(arguments.out)
    made = Knowledge(arguments.people, arguments.exposures, arguments.facts, arguments.seed)
    counts = write(made, out)
    rows = [(str(out / name), f"{count:,} documents") for name, count in counts.items()]
    if made.people:
        bits = NAME_BITS + ATTRIBUTE_BITS
        rows.append(("known of a person", f"{bits:.2f} bits, {bits * made.people:,.0f} in all"))
    rows.append(("next", "davinci data tokenize, mix it into a run, davinci eval RUN --suite knowledge"))
    Screen().facts(rows)
    return 0
