"""`davinci data`: text to tokenizer, text to datasets."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megatron_davinci.cli import data_files, data_order


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    train = actions.add_parser("train-tokenizer", help="train a byte-level BPE tokenizer on JSONL files")
    train.add_argument("files", nargs="+", type=Path, help="JSONL files with a text in each line")
    train.add_argument(
        "--vocab-size", type=int, required=True, help="ids, the end-of-document token included"
    )
    train.add_argument("--out", type=Path, required=True, help="folder to make")
    train.add_argument(
        "--text-field", default="text", help="field of a line that holds its text (default: text)"
    )
    tokenize = actions.add_parser(
        "tokenize", help="turn JSONL files into one source (.bin/.idx and a manifest)"
    )
    tokenize.add_argument("files", nargs="+", type=Path, help="JSONL files with a text in each line")
    tokenize.add_argument("--tokenizer", type=Path, required=True, help="folder with tokenizer.json")
    tokenize.add_argument("--out", type=Path, required=True, help="folder to make")
    tokenize.add_argument("--name", help="the source's name (default: the folder's)")
    tokenize.add_argument("--domain", help="reports group by it (default: the source's name)")
    tokenize.add_argument(
        "--text-field", default="text", help="field of a line that holds its text (default: text)"
    )
    data_files.add_actions(actions)
    order = actions.add_parser(
        "order", help="say what sample N is and why, and when a window or a document is seen"
    )
    data_order.add_arguments(order)


def run(arguments: argparse.Namespace) -> int:
    """Run the chosen action."""
    if arguments.action == "train-tokenizer":
        return train_tokenizer(arguments)
    if arguments.action == "order":
        return data_order.run(arguments)
    if arguments.action in data_files.ACTIONS:
        return data_files.run(arguments)
    return tokenize_files(arguments)


def train_tokenizer(arguments: argparse.Namespace) -> int:
    """Train and say where it lies."""
    from megatron_davinci.data.tokenizer import train_bpe

    print(train_bpe(arguments.files, arguments.vocab_size, arguments.out, arguments.text_field))
    return 0


def tokenize_files(arguments: argparse.Namespace) -> int:
    """Tokenize with a progress bar, and say what was made."""
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    from megatron_davinci.config.units import format_tokens
    from megatron_davinci.data.tokenize import tokenize_jsonl
    from megatron_davinci.data.tokenizer import Tokenizer

    name = arguments.name or arguments.out.name
    total = sum(path.stat().st_size for path in arguments.files if path.exists())
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        transient=True,
        disable=not sys.stdout.isatty(),
    )
    with bar:
        task = bar.add_task(f"tokenizing {name}", total=total)
        manifest = tokenize_jsonl(
            arguments.files,
            Tokenizer.load(arguments.tokenizer),
            arguments.out,
            name,
            arguments.domain or name,
            text_field=arguments.text_field,
            progress=lambda done: bar.update(task, completed=done),
        )
    print(
        f"{arguments.out}: {manifest.documents:,} documents, {format_tokens(manifest.tokens)} tokens, "
        f"{len(manifest.shards)} shard{'s' if len(manifest.shards) > 1 else ''}"
    )
    return 0
