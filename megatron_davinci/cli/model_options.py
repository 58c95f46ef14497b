"""What commands that compute a checkpoint's model are told alike."""

from __future__ import annotations

import argparse
from pathlib import Path


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
