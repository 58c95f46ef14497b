"""JSON lines to `<prefix>_<key>_document.{bin,idx}`, by the flags of Megatron-LM's script of this name.

It runs the same job as `davinci data tokenize`: many processes, constant memory, goes on after a kill. What differs
from Megatron-LM's script, and why, is in docs/recipes/your-own-data.md.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from pathlib import Path

from megatron_davinci.cli.data_text import shown
from megatron_davinci.data.indexed import bin_path, idx_path
from megatron_davinci.data.indexed_writer import give_names, refuse_existing
from megatron_davinci.data.jsonl import Fields
from megatron_davinci.data.tokenize import Options, Tokenized, tokenize
from megatron_davinci.data.tokenizer import Tokenizer, from_gpt2_files
from megatron_davinci.errors import ConfigError, DavinciError

# Megatron-LM stores ids in 16 bits below this many, and not below 65,536.
SIXTEEN_BITS = 65_500
ONE_SHARD = 1 << 62


def main() -> int:
    """Tokenize each key; errors of the user are printed without a traceback."""
    try:
        run(parser().parse_args())
    except DavinciError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def parser() -> argparse.ArgumentParser:
    """Megatron-LM's flags, and those of ours that it lacks."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    data = made.add_argument_group("input")
    data.add_argument(
        "--input", required=True, help="JSONL (.gz, .zst) or Parquet; a file, or a pattern in quotes"
    )
    data.add_argument("--json-keys", nargs="+", default=["text"], help="fields; a dataset is made of each")
    tokenizer = made.add_argument_group("tokenizer")
    tokenizer.add_argument(
        "--tokenizer-type", required=True, choices=("HuggingFaceTokenizer", "GPT2BPETokenizer")
    )
    tokenizer.add_argument("--tokenizer-model", type=Path, help="folder with a tokenizer.json, or that file")
    tokenizer.add_argument("--vocab-file", type=Path, help="GPT2BPETokenizer: vocab.json")
    tokenizer.add_argument("--merge-file", type=Path, help="GPT2BPETokenizer: merges.txt")
    tokenizer.add_argument("--append-eod", action="store_true", help="end each document with the end token")
    output = made.add_argument_group("output")
    output.add_argument("--output-prefix", type=Path, required=True, help="path without _KEY_document.bin")
    how = made.add_argument_group("how")
    how.add_argument("--workers", type=int, help="processes (default: one for each core)")
    how.add_argument("--partitions", type=int, default=1, help="accepted; inputs are parted without it")
    how.add_argument("--keep-sequential-samples", action="store_true", help="accepted; order is always kept")
    how.add_argument("--log-interval", type=int, help="accepted; progress is shown by time")
    how.add_argument(
        "--on-error", choices=("stop", "skip"), default="stop", help="what to do at a bad record"
    )
    how.add_argument("--backend", choices=("auto", "gigatoken", "tokenizers"), default="auto")
    how.add_argument("--restart", action="store_true", help="do away with what an unfinished job has left")
    for flag in ("--split-sentences", "--keep-newlines", "--find-optimal-num-workers"):
        how.add_argument(flag, action="store_true", help="refused: there is no such thing here")
    return made


def run(arguments: argparse.Namespace) -> None:
    """Make a dataset of each key.

    Raises:
        DavinciError: Something is wrong with the flags, the inputs, the tokenizer or the disk.
    """
    for name in ("split_sentences", "keep_newlines", "find_optimal_num_workers"):
        if getattr(arguments, name):
            raise ConfigError(
                "This flag of Megatron-LM's script has no counterpart.",
                where=f"--{name.replace('_', '-')}",
                do="leave it away; documents are one sequence each, and workers need no tuning",
            )
    tokenizer = load(arguments)
    prefixes = {key: Path(f"{arguments.output_prefix}_{key}_document") for key in arguments.json_keys}
    for prefix in prefixes.values():
        refuse_existing(prefix)
    for key, prefix in prefixes.items():
        made = tokenize_key(arguments, tokenizer, key, prefix)
        manifest = made.manifest
        print(f"{prefix}: {manifest.documents:,} documents, {manifest.tokens:,} tokens, by {made.encoder}")
        if made.bad:
            print(f"{made.bad:,} bad records were skipped: see {prefix}.quarantine.jsonl")


def load(arguments: argparse.Namespace) -> Tokenizer:
    """The tokenizer that the flags name.

    Raises:
        ConfigError: A flag that its type needs is missing.
        DataError: It cannot be read.
    """
    if arguments.tokenizer_type == "GPT2BPETokenizer":
        if arguments.vocab_file is None or arguments.merge_file is None:
            raise ConfigError("GPT2BPETokenizer is read from two files.", where="--vocab-file, --merge-file")
        return from_gpt2_files(arguments.vocab_file, arguments.merge_file)
    if arguments.tokenizer_model is None:
        raise ConfigError("HuggingFaceTokenizer needs a path.", where="--tokenizer-model")
    return Tokenizer.load(arguments.tokenizer_model)


def tokenize_key(arguments: argparse.Namespace, tokenizer: Tokenizer, key: str, prefix: Path) -> Tokenized:
    """Make one dataset.

    Raises:
        DavinciError: As `tokenize`.
    """
    folder = prefix.with_name(f".{prefix.name}.source")
    options = Options(
        Fields(key),
        shard_tokens=ONE_SHARD,
        append_eod=arguments.append_eod,
        keep_empty=True,
        dtype="uint16" if tokenizer.vocab_size < SIXTEEN_BITS else "int32",
    )
    shutil.rmtree(folder, ignore_errors=True)  # whole, and killed before its files got their names
    with shown(f"tokenizing {key}") as progress:
        made = tokenize(
            [arguments.input],
            tokenizer,
            folder,
            prefix.name,
            prefix.name,
            options,
            workers=arguments.workers,
            backend=arguments.backend,
            on_error=arguments.on_error,
            restart=arguments.restart,
            progress=progress,
        )
    (shard,) = made.manifest.shards
    give_names(prefix, bin_path(folder / shard.prefix), None, idx_path(folder / shard.prefix))
    if made.bad:
        os.replace(folder / "quarantine.jsonl", prefix.with_name(f"{prefix.name}.quarantine.jsonl"))
    shutil.rmtree(folder)
    return made


if __name__ == "__main__":
    sys.exit(main())
