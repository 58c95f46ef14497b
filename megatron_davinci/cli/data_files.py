"""`davinci data manifest | merge | verify`: datasets that are there already."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ACTIONS = ("manifest", "merge", "verify")


def add_actions(actions: Any) -> None:
    """Declare the actions' arguments.

    Args:
        actions: The sub-parsers of `davinci data`.
    """
    manifest = actions.add_parser("manifest", help="make a source of .bin/.idx pairs that are there")
    manifest.add_argument("folder", help="folder with the datasets, where manifest.json is written")
    manifest.add_argument(
        "prefixes",
        nargs="*",
        help="shards in their order, relative to the folder and without an ending (default: all in it, by name)",
    )
    manifest.add_argument("--name", help="the source's name (default: the folder's)")
    manifest.add_argument("--domain", help="reports group by it (default: the source's name)")
    vocabulary = manifest.add_mutually_exclusive_group()
    vocabulary.add_argument(
        "--vocab-size", type=int, help="ids of the tokenizer (default: the largest id found, plus 1)"
    )
    vocabulary.add_argument("--tokenizer", type=Path, help="folder with the tokenizer.json that made the ids")
    manifest.add_argument(
        "--eod-id",
        type=_token_or_none,
        metavar="ID",
        help="the token that ends each document, or `none` (default: the tokenizer's, else none)",
    )
    manifest.add_argument("--replace", action="store_true", help="replace a manifest.json that is there")
    merge = actions.add_parser(
        "merge", help="make one .bin/.idx pair of several, byte for byte as Megatron's"
    )
    merge.add_argument("out", help="dataset to make, without an ending")
    merge.add_argument("prefixes", nargs="+", help="datasets in their order, without an ending")
    verify = actions.add_parser("verify", help="hold a source's files against its manifest")
    verify.add_argument("source", help="folder with a manifest.json; local, or s3://BUCKET/KEY")
    verify.add_argument(
        "--deep", action="store_true", help="check every token too: the vocabulary, the documents' ends"
    )


def run(arguments: argparse.Namespace) -> int:
    """Run the chosen action."""
    return {"manifest": write_manifest, "merge": merge, "verify": verify}[arguments.action](arguments)


def write_manifest(arguments: argparse.Namespace) -> int:
    """Survey the datasets, write the manifest, and say what is in it."""
    from megatron_davinci.config.units import format_tokens
    from megatron_davinci.data.manifest import FILE_NAME
    from megatron_davinci.data.places import local_path
    from megatron_davinci.data.survey import make_manifest
    from megatron_davinci.data.tokenizer import Tokenizer
    from megatron_davinci.errors import DataError

    folder = local_path(arguments.folder)
    path = folder / FILE_NAME
    if path.exists() and not arguments.replace:
        raise DataError(
            "A manifest is there already.",
            where=path,
            do="see with `davinci data verify` whether it is right; --replace writes it again",
        )
    tokenizer = Tokenizer.load(arguments.tokenizer) if arguments.tokenizer else None
    eod_id = arguments.eod_id
    if eod_id is None and tokenizer:
        eod_id = tokenizer.eod_id
    with bar(f"reading {arguments.folder}") as progress:
        manifest = make_manifest(
            folder,
            arguments.prefixes or None,
            name=arguments.name,
            domain=arguments.domain,
            vocab_size=tokenizer.vocab_size if tokenizer else arguments.vocab_size,
            eod_id=None if eod_id == "none" else eod_id,
            tokenizer_sha256=tokenizer.sha256 if tokenizer else None,
            progress=progress,
        )
    manifest.save(folder)
    print(
        f"{path}: {_shards(len(manifest.shards))}, {manifest.documents:,} documents, "
        f"{format_tokens(manifest.tokens)} tokens of {manifest.dtype}, ids below {manifest.vocab_size:,}"
        f"{', with masks' if manifest.has_mask else ''}"
    )
    return 0


def merge(arguments: argparse.Namespace) -> int:
    """Merge, and say what came of it."""
    from megatron_davinci.config.units import format_tokens
    from megatron_davinci.data.indexed import bin_path
    from megatron_davinci.data.merge import merge_datasets
    from megatron_davinci.data.places import local_path

    prefixes, out = [local_path(prefix) for prefix in arguments.prefixes], local_path(arguments.out)
    total = sum(bin_path(p).stat().st_size for p in prefixes if bin_path(p).is_file())
    with bar(f"merging into {out}") as progress:
        merged = merge_datasets(prefixes, out, progress=lambda done: progress(done, total))
    print(
        f"{out}: {len(prefixes)} datasets, {merged.documents:,} documents, "
        f"{format_tokens(merged.tokens)} tokens{', with a mask' if merged.has_mask else ''}"
    )
    return 0


def verify(arguments: argparse.Namespace) -> int:
    """Print a table of a source that is whole, or say everything that is wrong with it."""
    from megatron_davinci.data.verify import verify_source
    from megatron_davinci.errors import DataError

    with bar(f"reading {arguments.source}") as progress:
        found = verify_source(arguments.source, deep=arguments.deep, progress=progress)
    problems = [problem for shard in found.problems for problem in shard]
    if problems:
        bad = sum(map(bool, found.problems))
        raise DataError(
            f"A source is not what its manifest says: {len(problems)} problem{'s'[: len(problems) > 1]} "
            f"in {bad} of {_shards(len(found.problems))}.",
            where=arguments.source,
            found="\n".join(map(in_a_paragraph, problems)),
            do="restore the files that are named, or write the source again",
        )
    _show(found, arguments.deep)
    return 0


def _show(found: Any, deep: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    manifest = found.manifest
    # As wide as what it says: rich would cut names in a pipe.
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 160)
    table = Table(title=f"{manifest.name}: {_shards(len(manifest.shards))}, all as the manifest says",
                  title_justify="left", header_style="bold")  # fmt: skip
    table.add_column("shard", overflow="fold")
    for column in ("tokens", "documents", "bytes"):
        table.add_column(column, justify="right")
    table.add_column("mask")
    table.add_column("sha256 of .bin")
    for shard in manifest.shards:
        table.add_row(
            shard.prefix, f"{shard.tokens:,}", f"{shard.documents:,}", f"{shard.bin_bytes:,}",
            "yes" if shard.mask_sha256 else "no", shard.bin_sha256[:16],
        )  # fmt: skip
    console.print(table)
    checked = "sizes, dtype, index, counts, digests" + (", every token" if deep else "")
    console.print(f"{manifest.tokens:,} tokens of {manifest.dtype}; checked: {checked}")
    if found.unlisted:
        console.print(
            f"not part of the source, since the manifest does not name them: {', '.join(found.unlisted)}"
        )


def in_a_paragraph(problem: Any) -> str:
    """A problem for a list of several."""
    lines = [str(problem.what)]
    for label, value in (("where", problem.where), ("found", problem.found), ("expected", problem.expected)):
        if value is not None:
            lines += [f"  {label} {line}" for line in str(value).splitlines()]
    return "\n".join(lines)


def _shards(count: int) -> str:
    return f"{count:,} shard{'s' if count != 1 else ''}"


def _token_or_none(text: str) -> int | str:
    if text != "none" and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"a token id, or none; found {text}")
    return text if text == "none" else int(text)


@contextmanager
def bar(description: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar over bytes; draws nothing where the output is no terminal."""
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

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
        task = bar.add_task(description, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
