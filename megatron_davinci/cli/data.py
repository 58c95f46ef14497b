"""`davinci data`: text to tokenizer, text to datasets."""

from __future__ import annotations

import argparse

from megatron_davinci.cli import (
    data_arrange,
    data_classifier,
    data_fetch,
    data_files,
    data_inspect,
    data_knowledge,
    data_lineage,
    data_order,
    data_run,
    data_text,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    data_text.add_actions(actions)
    data_files.add_actions(actions)
    data_fetch.add_actions(actions)
    data_arrange.add_actions(actions)
    data_run.add_actions(actions)
    data_lineage.add_actions(actions)
    data_classifier.add_actions(actions)
    data_knowledge.add_actions(actions)
    order = actions.add_parser(
        "order", help="say what sample N is and why, and when a window or a document is seen"
    )
    data_order.add_arguments(order)
    inspect = actions.add_parser(
        "inspect", help="say what a source holds, or what a run takes of its sources, and show samples"
    )
    data_inspect.add_arguments(inspect)


def run(arguments: argparse.Namespace) -> int:
    """Run the chosen action."""
    if arguments.action == "order":
        return data_order.run(arguments)
    if arguments.action == "inspect":
        return data_inspect.run(arguments)
    if arguments.action in data_files.ACTIONS:
        return data_files.run(arguments)
    if arguments.action in data_classifier.ACTIONS:
        return data_classifier.run(arguments)
    if arguments.action in data_arrange.ACTIONS:
        return data_arrange.run(arguments)
    if arguments.action == "fetch":
        return data_fetch.run(arguments)
    if arguments.action == "knowledge":
        return data_knowledge.run(arguments)
    if arguments.action in data_lineage.ACTIONS:
        return data_lineage.run(arguments)
    if arguments.action in data_run.ACTIONS:
        return data_run.run(arguments)
    return data_text.run(arguments)
