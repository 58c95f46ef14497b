"""The files of a tokenizer, beside a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_davinci.errors import DataError
from megatron_davinci.files import write_atomically, write_json

FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy a tokenizer's files, and nothing else that lies beside them.

    Code that its configuration names is not copied, and no longer named.

    Args:
        source: Their folder, or its `tokenizer.json`.
        target: The folder of the model.
    """
    source = source if source.is_dir() else source.parent
    for name in FILES:
        if not (source / name).is_file():
            continue
        if name == "tokenizer_config.json":
            said = _parsed(source / name)
            if isinstance(said, dict) and said.pop("auto_map", None) is not None:
                write_json(target / name, said)
                continue
        write_atomically(target / name, _read(source / name))


def ids_of(folder: Path) -> int | None:
    """One more than the largest id of the tokenizer in a folder; None where there is no `tokenizer.json`.

    Raises:
        DataError: The file is damaged.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        return None
    said = _parsed(path)
    try:
        vocabulary: Any = said.get("model", {}).get("vocab", {})
        ids = list(vocabulary.values()) if isinstance(vocabulary, dict) else [len(vocabulary) - 1]
        ids += [one["id"] for one in said.get("added_tokens") or []]
        return max(ids, default=-1) + 1
    except (AttributeError, KeyError, TypeError) as error:
        raise DataError(
            "The tokenizer cannot be read.", where=path, found=error, do="download it again"
        ) from error


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(
            "A file of the tokenizer cannot be read.", where=path, found=error, do="see that it may be read"
        ) from error


def _parsed(path: Path) -> Any:
    try:
        return json.loads(_read(path))
    except ValueError as error:
        raise DataError(
            "A file of the tokenizer cannot be read.", where=path, found=error, do="download it again"
        ) from error
