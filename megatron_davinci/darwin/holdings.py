"""Files of sources that are more than patterns: datasets of Hugging Face, repositories with what is known of them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from megatron_davinci.darwin.recipe import Dataset
from megatron_davinci.errors import ConfigError, DataError, DavinciError, EnvironmentProblem


class Repository(NamedTuple):
    """A repository of source code in a local folder.

    Attributes:
        folder: Where it lies.
        name: What it is called.
        licence: Of its files that do not name their own.
        fields: What its documents carry: `repository`, `stars`, `url`, `commit`.
    """

    folder: Path
    name: str
    licence: str | None
    fields: dict[str, Any]


def read_repositories(path: Path) -> Iterator[Repository]:
    """The repositories that a file of JSON lines names.

    Raises:
        DataError: The file cannot be read, or a line names no folder; with the line.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError("A list of repositories cannot be read.", where=path, found=error) from error
    seen: dict[str, int] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            given = json.loads(line)
            if not isinstance(given, dict) or not isinstance(given.get("path"), str):
                raise ValueError("no `path`")
            repository = _repository(given, path.parent)
        except (ValueError, TypeError) as error:
            raise DataError(
                "A line of a list of repositories is not understood.",
                where=f"{path}: line {number}",
                found=error,
                expected='an object like {"path": "owner/name", "name": "owner/name", "licence": "MIT", "stars": 12}',
            ) from error
        if not repository.folder.is_dir():
            raise DataError(
                "A repository is not there.",
                where=f"{path}: line {number}",
                found=repository.folder,
                expected="a folder",
            )
        if repository.name in seen:
            raise DataError(
                "Two repositories have one name, and their files would have the same identifiers.",
                where=f"{path}: lines {seen[repository.name]} and {number}",
                found=repository.name,
            )
        seen[repository.name] = number
        yield repository


def _repository(given: dict[str, Any], base: Path) -> Repository:
    """By our fields, or those that GitHub answers with (https://docs.github.com/rest/repos)."""
    licence = given.get("licence", given.get("license"))
    if isinstance(licence, dict):
        licence = licence.get("spdx_id")
    if licence in ("NOASSERTION", "NONE", ""):
        licence = None
    stars = given.get("stars", given.get("stargazers_count"))
    if stars is not None and (isinstance(stars, bool) or not isinstance(stars, int) or stars < 0):
        raise ValueError(f"stars: {stars!r}")
    if licence is not None and not isinstance(licence, str):
        raise ValueError(f"licence: {licence!r}")
    name = given.get("full_name") or given.get("name") or given["path"]
    known = {"repository": name, "stars": stars, "url": given.get("html_url", given.get("url"))}
    known["commit"] = given.get("commit")
    fields = {key: value for key, value in known.items() if value is not None}
    return Repository(base / given["path"], str(name).strip("/"), licence, fields)


def dataset_files(dataset: Dataset, base: Path, where: str) -> tuple[list[str], dict[str, Any]]:
    """The Arrow files of a dataset, fetched and prepared by `datasets` where they are not there yet.

    Args:
        dataset: What the recipe says of it.
        base: The folder that a relative path counts from.
        where: The place in the recipe, for errors.

    Returns:
        Absolute paths, in the dataset's order; and the licence, where the dataset names one, by `licence`.

    Raises:
        ConfigError: There is no such dataset, configuration or split.
        EnvironmentProblem: The library is not installed.
    """
    try:
        import datasets
    except ImportError as error:
        raise EnvironmentProblem(
            "A source is a dataset of Hugging Face, and the library that reads these is not installed.",
            where=where,
            do="pip install datasets",
        ) from error
    local = base / dataset.path
    place = str(local) if local.is_dir() else dataset.path
    if not local.is_dir() and dataset.path.startswith((".", "/")):
        raise ConfigError(
            "A dataset is not there.",
            where=where,
            found=local,
            expected="a folder, or a dataset's name on the hub",
        )
    try:
        if local.is_dir() and any((local / name).exists() for name in ("state.json", "dataset_dict.json")):
            saved = datasets.load_from_disk(place)
            found = saved[dataset.split] if isinstance(saved, datasets.DatasetDict) else saved
        else:
            found = datasets.load_dataset(place, dataset.name, split=dataset.split, revision=dataset.revision)
    except DavinciError:
        raise
    except Exception as error:  # the library raises what its parsers and its transport raise
        raise ConfigError(
            "A dataset cannot be loaded.",
            where=where,
            found=f"{place}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
            expected="a dataset of the hub or a local folder, and a split that it has",
        ) from error
    files = list(dict.fromkeys(str(Path(file["filename"]).absolute()) for file in found.cache_files))
    rows = sum(_rows(path) for path in files)
    if rows != len(found):
        raise ConfigError(
            "A dataset is a selection of rows, and its files hold others too.",
            where=where,
            found=f"{len(found):,} of {rows:,} rows",
            do="save the selection by `save_to_disk`, and name that folder",
        )
    licence = found.info.license or None
    return files, {"licence": licence} if licence else {}


def _rows(path: str) -> int:
    import pyarrow

    with pyarrow.memory_map(path) as file, pyarrow.ipc.open_stream(file) as reader:
        return sum(batch.num_rows for batch in reader)
