"""`davinci train` starts the ranks; `python -m megatron_davinci.train` is what each rank runs."""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
from typing import Any

from megatron_davinci.cli.main import guarded
from megatron_davinci.config import RunConfig, check_layout, load_config
from megatron_davinci.errors import LOST_PEER
from megatron_davinci.train.last_words import LAST_WORDS
from megatron_davinci.train.signals import WATCH


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("config", help="run configuration (YAML)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that win over the file")
    parser.add_argument(
        "--ranks", type=int, help="ranks on this machine (default: its GPUs; without, what the layout needs)"
    )
    parser.add_argument(
        "--branch",
        metavar="RUN[@STEP]",
        help="begin from a checkpoint of another run, whose past becomes this run's",
    )


def run(arguments: argparse.Namespace) -> int:
    """Check the configuration here, once, then start the ranks with torchrun."""
    from megatron_davinci.train.launch import Watched, inside_launcher, launch

    if inside_launcher():
        WATCH.install()
        return train_rank(arguments.config, arguments.overrides, arguments.branch)
    config = load_config(arguments.config, arguments.overrides)
    ranks = default_ranks(config) if arguments.ranks is None else arguments.ranks
    check_layout(config, ranks)
    check_exports(config)
    branch_off(config, arguments.branch)
    watched = Watched(config.run.directory, config.health.grace_seconds)
    return launch(arguments.config, arguments.overrides, ranks, watched)


def default_ranks(config: RunConfig) -> int:
    """As many ranks as this machine has GPUs; on a CPU as many as the layout needs."""
    needed = config.parallel.model_ranks
    if config.parallel.device == "cpu":
        return needed
    from megatron_davinci.platform.device import count_gpus

    return count_gpus() or needed


def check_exports(config: RunConfig) -> None:
    """Refuse a run whose exports beside training could not be made; see `train.export_check`."""
    if config.checkpoint.export_hf is not None:
        from megatron_davinci.train.export_check import check_export

        check_export(config)


def branch_off(config: RunConfig, origin: str | None) -> None:
    """Begin the run as a branch of another one, if that is asked for and was not done before."""
    if origin is None:
        return
    from megatron_davinci.train.branch import branch

    if said := branch(config, origin):
        print(said, flush=True)


def train_rank(config_path: str, overrides: list[str], origin: str | None = None) -> int:
    """What one rank does: choose the platform, wire the rooms, train."""
    config = load_config(config_path, overrides)
    LAST_WORDS.begin(config.run.directory)
    if os.environ.get("RANK", "0") == "0":
        branch_off(
            config, origin
        )  # rank 0 alone reads the run directory; the others hear of it when it is there
    from megatron_davinci.platform.device import choose

    platform = choose(config.parallel.device, config.train.threads)
    # From here on the configuration says what really happens.
    train = config.train.model_copy(update={"precision": platform.precision(config.train.precision)})
    config = config.model_copy(update={"train": train})
    from megatron_davinci.train.loop import run as run_training

    run_training(config, platform, make_evaluator)
    return 0


def make_evaluator(config: RunConfig) -> Any:
    """The in-loop evaluator: held-out loss, where the configuration names held-out sources."""
    if not config.data.validation:
        return None
    from megatron_davinci.evaluate.heldout import HeldOutEvaluator

    return HeldOutEvaluator(config)


def main() -> None:
    """Entry point of `torchrun -m megatron_davinci.train CONFIG.yaml key=value ...`."""
    parser = argparse.ArgumentParser(prog="torchrun -m megatron_davinci.train")
    add_arguments(parser)
    arguments = parser.parse_args()
    WATCH.on_leaving(LAST_WORDS.end)
    try:
        code = guarded(
            lambda: train_rank(arguments.config, arguments.overrides, arguments.branch),
            patience=_patience(),
            tell=lambda error: LAST_WORDS.end(error.code, str(error), type(error).__name__),
        )
        LAST_WORDS.end(
            code, "the run, or what it was asked to do, is complete" if code == 0 else "interrupted"
        )
    except Exception as error:
        code = _say_failure(error)
    WATCH.ignore()
    sys.stdout.flush()
    # After an error other ranks may be waiting in a collective; leaving without their consent ends them.
    os._exit(code) if code else sys.exit(0)


def _say_failure(error: Exception) -> int:
    """What no user could have mended: a traceback, or, when another rank went first, that alone.

    Returns:
        1, or 5 when another rank went first.
    """
    from megatron_davinci.platform.distributed import lost_peer

    lost = lost_peer(error)
    if lost is None:
        LAST_WORDS.end(1, "".join(traceback.format_exception(error)[-3:]), type(error).__name__)
        traceback.print_exc()
    else:
        LAST_WORDS.end(lost.code, str(lost), type(lost).__name__)
        # Every rank that is left has lost the same one; one a node says it.
        time.sleep(0.0 if os.environ.get("LOCAL_RANK", "0") == "0" else 3.0)
        print(f"error: {lost}", file=sys.stderr)
    sys.stderr.flush()
    return 1 if lost is None else LOST_PEER


def _patience() -> float:
    """Seconds to wait before saying an error: mostly every rank has the same one, and rank 0 says it.

    When rank 0 leaves, the launcher ends the others before they repeat it; what only another rank met, it says.
    """
    return 0.0 if os.environ.get("RANK", "0") == "0" else 3.0
