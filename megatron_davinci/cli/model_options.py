"""What commands that compute a checkpoint's model are told alike."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

from megatron_davinci.errors import ConfigError


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Declare `--tokenizer` and `--tokens-at-once`."""
    parser.add_argument("--tokenizer", type=Path, help="folder of the tokenizer (default: the run's)")
    parser.add_argument(
        "--tokens-at-once",
        type=int,
        default=4096,
        metavar="N",
        help="tokens of one forward pass (default: 4096)",
    )


def check_bounds(arguments: argparse.Namespace, bounds: Mapping[str, tuple[int, int]]) -> None:
    """Refuse whole numbers that cannot be; an option that was not given is none.

    Args:
        arguments: The command's.
        bounds: The least and the most, by the name of an option in `arguments`.

    Raises:
        ConfigError: An option, or `--tokens-at-once`, is out of its bounds.
    """
    for name, (least, most) in {**bounds, "tokens_at_once": (1, 1 << 30)}.items():
        value = getattr(arguments, name)
        if value is not None and not least <= value <= most:
            raise ConfigError(
                "An option is out of bounds.",
                where=f"--{name.replace('_', '-')}",
                found=value,
                expected=f"{least:,} to {most:,}",
            )
