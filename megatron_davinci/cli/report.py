"""`davinci report RUN`: draw a run's page."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_davinci.report.run_tasks import Finding


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("run", type=Path, help="run directory")


def run(arguments: argparse.Namespace) -> int:
    """Write RUN/report.html and its plots."""
    from megatron_davinci.report.run import write_run_report
    from megatron_davinci.stats.trajectories import signal_to_noise

    print(write_run_report(arguments.run, signal_to_noise, findings(arguments.run)))
    return 0


def findings(run: Path) -> list[Finding]:
    """What `davinci compare` says of a run's checkpoints; nothing where none were kept."""
    from megatron_davinci.cli.compare_screen import tables
    from megatron_davinci.errors import DataError
    from megatron_davinci.evaluate.comparing import compare
    from megatron_davinci.evaluate.item_scores import read_item_scores
    from megatron_davinci.report.run_tasks import Finding

    if not (run / "evals" / "results.jsonl").is_file():
        return []
    try:
        compared = compare(read_item_scores([str(run)]))
    except DataError as error:
        return [Finding("What conclusions depend on", f"The kept answers could not be read. {error}", [], [])]
    return [
        Finding(
            table.title, table.text, [name[:1].upper() + name[1:] for name, _ in table.columns], table.rows
        )
        for table in tables(compared)
    ]
