"""Which files a corpus is made of, and how they are dealt out to tasks. Written down at the first start, and kept."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

from megatron_davinci.darwin.holdings import dataset_files, read_repositories
from megatron_davinci.darwin.recipe import LoadedRecipe, SourceRecipe
from megatron_davinci.data.patterns import matching
from megatron_davinci.errors import ConfigError
from megatron_davinci.files import in_utf8

_ENDINGS = {
    **dict.fromkeys((".jsonl", ".json", ".ndjson"), "jsonl"),
    ".parquet": "parquet",
    ".arrow": "arrow",
    **dict.fromkeys((".html", ".htm", ".xhtml"), "html"),
    ".pdf": "pdf",
    ".ipynb": "notebook",
    **dict.fromkeys((".tex", ".ltx"), "latex"),
    **dict.fromkeys((".warc", ".wet"), "warc"),
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
        name: The path from the recipe's folder, where it lies in that, else without the leading slash; of a file of a
            repository, the repository's name and the path in it.
        format: Of `recipe.Format`, decided.
        size: Bytes on disk when the inventory was made.
        about: What its documents carry: `licence`, and `fields` of its repository.
        changed: Nanoseconds of its last change then; None in plans of versions that did not ask.
    """

    source: str
    path: str
    name: str
    format: str
    size: int
    about: dict[str, Any] | None = None
    changed: int | None = None

    def is_as_it_was(self) -> bool:
        """Whether the file is there still, with the size and the time of its last change that are written here."""
        try:
            status = os.stat(self.path)
        except OSError:
            return False
        return (status.st_size, status.st_mtime_ns) == (self.size, self.changed or status.st_mtime_ns)


def take_inventory(loaded: LoadedRecipe) -> list[InputFile]:
    """Every input file, source by source in the recipe's order, each source's by path.

    Raises:
        ConfigError: A pattern of a source names no file, or there is no such dataset.
        DataError: A list of repositories is not one.
    """
    found: list[InputFile] = []
    for index, source in enumerate(loaded.recipe.sources):
        where = f"{loaded.path}: sources.{index}"
        if source.dataset is not None:
            files, about = dataset_files(source.dataset, loaded.base, f"{where}.dataset")
            names = [f"{source.dataset.split}/{Path(path).name}" for path in files]
            found += [
                _file(source, path, name, about or None, "arrow")
                for path, name in zip(files, names, strict=True)
            ]
        elif source.repositories is not None:
            found += _of_repositories(source, loaded, where)
        else:
            paths = sorted(set(_files(source, loaded.base, where)))
            found += [_file(source, path, _name(path, loaded.path)) for path in paths]
    return found


def _file(
    source: SourceRecipe,
    path: str,
    name: str,
    about: dict[str, Any] | None = None,
    format_: str | None = None,
) -> InputFile:
    status = os.stat(path)
    # Documents are named by it, so bytes of the name that are no UTF-8 are written out.
    name = in_utf8(name)
    format_ = format_ or _format(source, path)
    return InputFile(source.name, path, name, format_, status.st_size, about, status.st_mtime_ns)


def _of_repositories(source: SourceRecipe, loaded: LoadedRecipe, where: str) -> list[InputFile]:
    """Files of each repository, repository by repository in the list's order."""
    found: list[InputFile] = []
    for repository in read_repositories(loaded.base / str(source.repositories)):
        folder = os.path.abspath(repository.folder)
        paths = {path for pattern in source.paths for path in _matching(source, folder, pattern)}
        about: dict[str, Any] = {"fields": repository.fields}
        if repository.licence:
            about["licence"] = repository.licence
        for path in sorted(paths):
            within = os.path.relpath(path, folder)
            if not within.startswith((".git" + os.sep, "..")):
                found.append(_file(source, path, f"{repository.name}/{within}", about))
    if not found:
        raise _no_file(source, f"{where}.paths", ", ".join(source.paths))
    return found


def _files(source: SourceRecipe, base: Path, where: str) -> Iterator[str]:
    for number, pattern in enumerate(source.paths):
        folder, pattern = os.path.abspath(base), os.path.expanduser(pattern)
        files = _matching(source, folder, pattern)
        if not files:
            raise _no_file(source, f"{where}.paths.{number}", os.path.join(folder, pattern))
        yield from files


def _matching(source: SourceRecipe, folder: str, pattern: str) -> list[str]:
    """Files that a pattern names, which counts from a folder; brackets in the folder's own name are no pattern."""
    file = os.path.join(folder, pattern)
    named = os.path.join(glob.escape(folder), pattern)
    paths = [file] if os.path.isfile(file) else matching(named)
    return [
        os.path.normpath(path)
        for path in paths
        if os.path.isfile(path) and not any(fnmatch(path, f"*{ending}") for ending in source.exclude)
    ]


def _no_file(source: SourceRecipe, where: str, found: str) -> ConfigError:
    return ConfigError(
        f"The source {source.name!r} has a path that names no file.",
        where=where,
        found=found,
        expected="a file, or a pattern like folder/**/*.html",
    )


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
