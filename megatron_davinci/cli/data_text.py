"""`davinci data train-tokenizer | tokenize`: text to tokenizer, text to datasets."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_SECONDS = 30  # between two lines where there is no screen to draw a bar on


def add_actions(actions: Any) -> None:
    """Declare the actions' arguments.

    Args:
        actions: The sub-parsers of `davinci data`.
    """
    train = actions.add_parser("train-tokenizer", help="train a byte-level BPE tokenizer on text files")
    train.add_argument("files", nargs="+", help="JSONL files (.gz, .zst) or Parquet")
    train.add_argument(
        "--vocab-size", type=int, required=True, help="ids, the end-of-document token included"
    )
    train.add_argument("--out", required=True, help="folder to make")
    train.add_argument(
        "--text-field", default="text", help="field of a line that holds its text (default: text)"
    )
    tokenize = actions.add_parser(
        "tokenize", help="turn text files into one source (.bin/.idx and a manifest)"
    )
    tokenize.add_argument(
        "files", nargs="+", help="JSONL files (.gz, .zst) or Parquet, or patterns in quotes; kept in order"
    )
    tokenize.add_argument("--tokenizer", type=Path, required=True, help="folder with tokenizer.json")
    tokenize.add_argument("--eod", help="the token that ends a document (default: the tokenizer's)")
    tokenize.add_argument("--out", required=True, help="folder to make")
    tokenize.add_argument("--name", help="the source's name (default: the folder's)")
    tokenize.add_argument("--domain", help="reports group by it (default: the source's name)")
    tokenize.add_argument(
        "--text-field", default="text", help="field or column that holds the text (default: text)"
    )
    tokenize.add_argument(
        "--prompt-field", help="field of a question, whose tokens carry no loss (writes a .mask)"
    )
    tokenize.add_argument("--response-field", help="field of its answer")
    tokenize.add_argument(
        "--shard-tokens",
        type=_tokens,
        default="1B",
        help="a shard is closed before it gets longer (default: 1B)",
    )
    tokenize.add_argument(
        "--shuffle", type=int, metavar="SEED", help="shuffle all documents (default: keep order)"
    )
    tokenize.add_argument(
        "--pack", type=int, metavar="LENGTH", help="best-fit packing into sequences of so many tokens"
    )
    tokenize.add_argument("--workers", type=int, help="processes (default: one for each core)")
    tokenize.add_argument(
        "--backend",
        choices=("auto", "gigatoken", "tokenizers"),
        default="auto",
        help="what encodes; auto takes gigatoken where its ids are those of tokenizers (default: auto)",
    )
    tokenize.add_argument(
        "--on-error",
        choices=("stop", "skip"),
        default="stop",
        help="at a bad record stop, or skip it and keep it in quarantine.jsonl (default: stop)",
    )
    tokenize.add_argument(
        "--restart", action="store_true", help="do away with what an unfinished job has left"
    )


def run(arguments: argparse.Namespace) -> int:
    """Run the chosen action."""
    return {"train-tokenizer": train_tokenizer, "tokenize": tokenize_files}[arguments.action](arguments)


def train_tokenizer(arguments: argparse.Namespace) -> int:
    """Train and say where it lies."""
    from megatron_davinci.data.places import local_path
    from megatron_davinci.data.text_inputs import find
    from megatron_davinci.data.tokenizer import train_bpe

    print(
        train_bpe(
            find(arguments.files), arguments.vocab_size, local_path(arguments.out), arguments.text_field
        )
    )
    return 0


def tokenize_files(arguments: argparse.Namespace) -> int:
    """Tokenize with a progress bar, and say what was made."""
    from megatron_davinci.config.units import format_tokens
    from megatron_davinci.data.jsonl import Fields
    from megatron_davinci.data.places import local_path
    from megatron_davinci.data.tokenize import Options, tokenize
    from megatron_davinci.data.tokenizer import Tokenizer

    out = local_path(arguments.out)
    name = arguments.name or out.name
    options = Options(
        fields=Fields(arguments.text_field, arguments.prompt_field, arguments.response_field),
        shard_tokens=arguments.shard_tokens,
        shuffle=arguments.shuffle,
        pack=arguments.pack,
    )
    with shown(f"tokenizing {name}") as progress:
        made = tokenize(
            arguments.files,
            Tokenizer.load(arguments.tokenizer, arguments.eod),
            out,
            name,
            arguments.domain or name,
            options,
            workers=arguments.workers,
            backend=arguments.backend,
            on_error=arguments.on_error,
            restart=arguments.restart,
            progress=progress,
        )
    manifest = made.manifest
    print(
        f"{out}: {manifest.documents:,} documents, {format_tokens(manifest.tokens)} tokens, "
        f"{len(manifest.shards)} shard{'s' if len(manifest.shards) > 1 else ''}, by {made.encoder}"
    )
    if made.empty:
        print(f"{made.empty:,} empty texts are no documents")
    if made.bad:
        print(f"{made.bad:,} bad records were skipped: see {out / 'quarantine.jsonl'}")
    if made.cut:
        print(
            f"{made.cut:,} {'file or row group ends' if made.cut == 1 else 'files or row groups end'} early, and "
            "what follows there is not in the source: see rest_of_file and rest_of_row_group in "
            f"{out / 'quarantine.jsonl'}"
        )
    return 0


def _tokens(value: str) -> int:
    from megatron_davinci.config.units import parse_tokens

    try:
        return parse_tokens(value)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


@contextmanager
def shown(title: str) -> Iterator[Callable[[int, int], None]]:
    """Progress with MB/s and the time left: a bar on a screen, else a line now and then."""
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    if not sys.stdout.isatty():
        yield _Lines(title)
        return
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(TextColumn("{task.description}"), *columns, transient=True) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


class _Lines:
    """Says on standard error how far a job is, at most twice a minute."""

    def __init__(self, title: str) -> None:
        self._title, self._begun = title, time.monotonic()
        self._said = self._begun

    def __call__(self, done: int, total: int) -> None:
        """So many bytes of so many are done."""
        now = time.monotonic()
        if now - self._said < _SECONDS or not done:
            return
        self._said = now
        speed = done / (now - self._begun)
        left = int((total - done) / speed)
        print(
            f"{self._title}: {done / 1e6:,.0f} of {total / 1e6:,.0f} MB, {speed / 1e6:.1f} MB/s, "
            f"{left // 3600}:{left // 60 % 60:02d}:{left % 60:02d} left",
            file=sys.stderr,
            flush=True,
        )
