"""Six domains of clearly different difficulty, out of what is on the machine, as token sources.

`general`, `code`, `science` and `qa` are the quickstart's. Beside them stand an easy domain and a hopeless one:

- `tables`: the character maps of Python's `encodings`, one line like the next. A small model learns them at once.
- `digests`: the RECORD files of the installed packages, which list paths with SHA-256 digests. Nobody can learn a
  digest: after the form, every further token of this domain is wasted, although its loss stays the highest of all.

Each is split by file into text to train on and text to measure on.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "quickstart"))

import corpus
from documents import digest

from megatron_davinci.data.manifest import Manifest
from megatron_davinci.data.tokenize import tokenize_jsonl
from megatron_davinci.data.tokenizer import Tokenizer, train_bpe
from megatron_davinci.errors import DataError
from megatron_davinci.files import write_atomically

DOMAINS = ("general", "code", "science", "qa", "tables", "digests")
SIDES = ("train", "valid")
BUDGET = {"general": 6_000_000, "code": 9_000_000, "science": 5_000_000, "qa": 4_000_000}
HELD_OUT = 0.15
"""Part of the files of `tables` and `digests` that is held out."""
RECORD_BYTES = 100_000
"""At most so much of one package's RECORD: a single one has as much as all others."""


def prepare(
    folder: Path,
    vocabulary: int,
    say: Callable[[str], None] = print,
    write: Callable[[Path], None] | None = None,
) -> dict[str, int]:
    """Texts, tokenizer and sources; what is whole already is kept.

    Args:
        folder: Where they are to be.
        vocabulary: Tokens of the tokenizer.
        say: Told what was made.
        write: Writes `DOMAIN.SIDE.jsonl` files into a folder; by default `write_texts`.

    Returns:
        Tokens to train on, by domain.
    """
    texts = folder / "text"
    files = {(domain, side): texts / f"{domain}.{side}.jsonl" for domain in DOMAINS for side in SIDES}
    if not all(path.exists() for path in files.values()):
        say("gathering text from this machine")
        (write or write_texts)(texts)
    if not (folder / "tokenizer" / "tokenizer.json").exists():
        say(f"training a tokenizer of {vocabulary:,} tokens")
        train_bpe([files[domain, "train"] for domain in DOMAINS], vocabulary, folder / "tokenizer")
    tokenizer = Tokenizer.load(folder / "tokenizer")
    pools = {}
    for (domain, side), path in files.items():
        source = folder / f"{domain}.{side}"
        if (source / "manifest.json").exists():
            manifest = Manifest.load(source)
        else:
            manifest = tokenize_jsonl([path], tokenizer, source, domain, domain)
        if side == "train":
            pools[domain] = manifest.tokens
    return pools


def write_texts(folder: Path) -> None:
    """Write `DOMAIN.SIDE.jsonl` for all six domains.

    Raises:
        DataError: A domain came out empty.
    """
    corpus.build_corpus(folder, BUDGET)
    for domain, documents in (("tables", character_maps()), ("digests", package_records())):
        write_split(folder, domain, documents)


def write_split(folder: Path, domain: str, documents: Iterable[tuple[str, list[str]]]) -> None:
    """Split a domain by file, and write both sides.

    Args:
        folder: Where to.
        domain: Its name.
        documents: `(name of the file, its texts)`.

    Raises:
        DataError: There are fewer than two files.
    """
    ordered = sorted(documents, key=lambda document: digest(0, domain, document[0]))
    held_out = max(1, round(HELD_OUT * len(ordered)))
    sides = {"valid": ordered[:held_out], "train": ordered[held_out:]}
    if not sides["train"]:
        raise DataError(
            f"There is too little text for the domain {domain!r}.",
            where=folder,
            found=f"{len(ordered)} files on this machine",
            expected="at least two, one to train on and one to measure on",
            do="use a Python with its whole standard library, and packages that pip installed",
        )
    for side, members in sides.items():
        lines = [
            json.dumps({"text": text, "domain": domain, "source": name}, ensure_ascii=False) + "\n"
            for name, texts in members
            for text in texts
        ]
        write_atomically(folder / f"{domain}.{side}.jsonl", "".join(lines))


def character_maps() -> Iterator[tuple[str, list[str]]]:
    """The modules of `encodings` that are tables, line for line."""
    folder = Path(sysconfig.get_path("stdlib")) / "encodings"
    for path in sorted(folder.glob("*.py")):
        text = path.read_text(encoding="utf-8", errors="replace")
        if text.count("->") >= 100:
            yield path.name, [text]


def package_records() -> Iterator[tuple[str, list[str]]]:
    """The file lists of the installed packages, a hundred files a text; only files that have a digest."""
    for distribution in sorted(importlib.metadata.distributions(), key=lambda d: d.metadata["Name"].lower()):
        record = (distribution.read_text("RECORD") or "")[:RECORD_BYTES]
        lines = [line for line in record.splitlines()[:-1] if "sha256=" in line]
        texts = ["\n".join(lines[start : start + 100]) + "\n" for start in range(0, len(lines), 100)]
        if lines:
            yield distribution.metadata["Name"], texts
