"""The run directory: the record from which a run can be understood, resumed and replayed."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform as python_platform
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from megatron_davinci.config import RunConfig, dump_config
from megatron_davinci.errors import DataError
from megatron_davinci.files import (
    disk_errors,
    lines_from_the_end,
    make_private_folder,
    write_atomically,
    write_json,
)
from megatron_davinci.version import __version__

_PACKAGES = (
    "torch",
    "megatron-core",
    "numpy",
    "transformers",
    "tokenizers",
    "safetensors",
    "transformer-engine",
)


class RunDirectory:
    """Names and files of one run. Only rank 0 writes."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def checkpoints(self) -> Path:
        """Folder of `step-XXXXXXXX` checkpoints."""
        return self.path / "checkpoints"

    @property
    def journal(self) -> Path:
        """The mixture journal."""
        return self.path / "journal.jsonl"

    @property
    def edits(self) -> Path:
        """Changes of the mixture that were asked for."""
        return self.path / "edits.jsonl"

    @property
    def metrics(self) -> Path:
        """One line a step."""
        return self.path / "metrics.jsonl"

    @property
    def evaluations(self) -> Path:
        """One line an evaluation."""
        return self.path / "evals.jsonl"

    @property
    def proposals(self) -> Path:
        """One line a decision of the controller."""
        return self.path / "proposals.jsonl"

    @property
    def health(self) -> Path:
        """One line a step that was not applied, or spiked."""
        return self.path / "health.jsonl"

    @property
    def saves(self) -> Path:
        """One line a save, when it is on the disk or has failed."""
        return self.path / "saves.jsonl"

    @property
    def exports(self) -> Path:
        """One line an export that was made beside training, or was not."""
        return self.path / "exports.jsonl"

    @property
    def tensorboard(self) -> Path:
        """Event files."""
        return self.path / "tensorboard"

    def record_start(self, config: RunConfig, facts: dict[str, Any], start: dict[str, Any]) -> int:
        """Write `config.yaml` and `manifest.json`; a resumed run adds to `starts`.

        Args:
            config: The resolved configuration of this start.
            facts: What decides the data order (`seed`, `data_fingerprints`, ...); `Past.check` has compared them.
            start: What may differ between starts (layout, device, step).

        Returns:
            The number of this start, from 1.
        """
        with disk_errors(self.path, "making the run directory"):
            make_private_folder(self.path)
        path = self.path / "manifest.json"
        manifest: dict[str, Any] = {"name": self.path.name, "created": _now(), "starts": []}
        if path.exists():
            manifest = json.loads(path.read_text(encoding="utf-8"))
            manifest.setdefault("created", _now())  # a branch begins with a manifest of its past
        manifest.update(facts)
        manifest["davinci_version"] = __version__
        manifest["packages"] = _versions()
        manifest["platform"] = start
        manifest["starts"] = [*manifest["starts"], {"time": _now(), **start}]
        write_atomically(self.path / "config.yaml", dump_config(config))
        write_json(
            self.path / "domains.json", {name: config.data.domain(name) for name in config.data.sources}
        )
        write_json(path, manifest)
        return len(manifest["starts"])

    def truncate_after(self, step: int) -> None:
        """Drop metrics, evaluations and proposals of steps after `step`: a resumed run takes these steps again."""
        for path in (self.metrics, self.evaluations, self.proposals):
            if path.exists():
                content = path.read_bytes()
                kept = b"".join(line + b"\n" for line in content.splitlines() if _step_of(line, step))
                if kept != content:
                    write_atomically(path, kept)


def append_line(path: Path, record: dict[str, Any]) -> None:
    """Append one JSON line."""
    with disk_errors(path, f"writing {path.name}"), open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON lines of a file that `append_line` wrote; none where there is no file.

    A last line that a crash cut short is left out; a resumed run drops it before it adds another.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return []
    found = []
    for number, line in enumerate(lines := content.splitlines(), start=1):
        try:
            found.append(_record(line))
        except ValueError as error:
            if number == len(lines) and not content.endswith(b"\n"):
                break
            raise DataError(
                "A record is damaged.",
                where=f"{path}, line {number}",
                found=error,
                do="restore the line from a copy of the run directory, or take it out",
            ) from error
    return found


def last_lines(path: Path, count: int) -> list[dict[str, Any]]:
    """The last lines of a file that `append_line` wrote, however long it is; without those that are damaged, and one
    that is being written. None where the file cannot be read.
    """
    found: list[dict[str, Any]] = []
    try:
        for line in lines_from_the_end(path):
            with suppress(ValueError):
                found.append(_record(line))
            if len(found) >= count:
                break
    except OSError:
        return []
    return found[::-1]


def _record(line: bytes) -> dict[str, Any]:
    value = json.loads(line)
    if not isinstance(value, dict):
        raise ValueError(f"{type(value).__name__}, where an object belongs")
    return value


def _step_of(line: bytes, last: int) -> bool:
    try:
        return int(json.loads(line)["step"]) <= last
    except (ValueError, KeyError, TypeError):
        return False  # the line that a crash cut short


def _versions() -> dict[str, str]:
    found = {"python": python_platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def command_line() -> list[str]:
    """How this process was started, for the record."""
    return [os.path.basename(sys.argv[0]), *sys.argv[1:]]
