"""`davinci report RUN`: draw a run's page."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("run", type=Path, help="run directory")


def run(arguments: argparse.Namespace) -> int:
    """Write RUN/report.html and its plots."""
    from megatron_davinci.report.run import write_run_report
    from megatron_davinci.stats.trajectories import signal_to_noise

    print(write_run_report(arguments.run, signal_to_noise))
    return 0
