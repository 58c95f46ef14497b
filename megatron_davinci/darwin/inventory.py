"""Which files a corpus is made of, and how they are dealt out to tasks. Written down at the first start, and kept."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

from megatron_davinci.darwin.recipe import LoadedRecipe, SourceRecipe
from megatron_davinci.errors import ConfigError

_ENDINGS = {
    **dict.fromkeys((".jsonl", ".json", ".ndjson"), "jsonl"),
    ".parquet": "parquet",
    **dict.fromkeys((".html", ".htm", ".xhtml"), "html"),
    **dict.fromkeys(
        ".py .pyi .c .h .cc .cpp .hpp .cu .rs .go .java .js .ts .rb .pl .pm .sh .sql .lua .scala .jl .r".split(),
        "code",
    ),
}
_COMPRESSED = (".gz", ".zst")


class InputFile(NamedTuple):
    """One file.

    Attributes:
        source: The source's name.
        path: Absolute.
        name: The path from the recipe's folder, where it lies in that, else without the leading slash.
        format: Of `recipe.Format`, decided.
        size: Bytes on disk when the inventory was made.
    """

    source: str
    path: str
    name: str
    format: str
    size: int


def take_inventory(loaded: LoadedRecipe) -> list[InputFile]:
    """Every input file, source by source in the recipe's order, each source's by path.

    Raises:
        ConfigError: A pattern of a source names no file.
    """
    found: list[InputFile] = []
    for index, source in enumerate(loaded.recipe.sources):
        files = sorted(set(_files(source, loaded.path, index)))
        found += [
            InputFile(
                source.name, path, _name(path, loaded.path), _format(source, path), os.path.getsize(path)
            )
            for path in files
        ]
    return found


def _files(source: SourceRecipe, recipe: Path, index: int) -> Iterator[str]:
    for number, pattern in enumerate(source.paths):
        absolute = os.path.join(os.path.abspath(recipe.parent), os.path.expanduser(pattern))
        paths = [absolute] if os.path.isfile(absolute) else glob.glob(absolute, recursive=True)
        files = [
            os.path.normpath(path)
            for path in paths
            if os.path.isfile(path) and not any(fnmatch(path, f"*{ending}") for ending in source.exclude)
        ]
        if not files:
            raise ConfigError(
                f"The source {source.name!r} has a path that names no file.",
                where=f"{recipe}: sources.{index}.paths.{number}",
                found=absolute,
                expected="a file, or a pattern like folder/**/*.html",
            )
        yield from files


def _name(path: str, recipe: Path) -> str:
    base = os.path.abspath(recipe.parent) + os.sep
    return path.removeprefix(base).lstrip(os.sep)


def _format(source: SourceRecipe, path: str) -> str:
    if source.format != "auto":
        return source.format
    base, ending = os.path.splitext(path.lower())
    if ending in _COMPRESSED:
        ending = os.path.splitext(base)[1]
    return _ENDINGS.get(ending, "text")


def deal(files: list[InputFile], task_bytes: int) -> list[int]:
    """Where each task begins: positions in `files`, with the end as the last. Tasks are runs, so order is kept."""
    begins, have = [0], 0
    for position, file in enumerate(files):
        if have and have + file.size > task_bytes:
            begins.append(position)
            have = 0
        have += file.size
    return [*begins, len(files)]
