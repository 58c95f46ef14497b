"""The end of a tokenising job: its source has its name, and its folder goes.

Until that is gone, `finished.json` in it says what was made, and by which command. A job that is killed in between is
found finished by the same command, however much of its folder is left; to another the place is taken.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_davinci.data import manifest as manifests
from megatron_davinci.data.job_plan import Plan
from megatron_davinci.data.manifest import Manifest
from megatron_davinci.files import file_digest, write_json

FILE_NAME = "finished.json"


@dataclass(frozen=True)
class Tokenized:
    """What a job has made.

    Attributes:
        manifest: The source's.
        encoder: Library and version that made the ids.
        empty: Records whose text is empty.
        bad: Records that could not be read; they are in `quarantine.jsonl` in the source's folder.
        cut: Files, or row groups, that end early, so that nobody knows what records are missing; they are there too.
    """

    manifest: Manifest
    encoder: str
    empty: int
    bad: int
    cut: int


def note(folder: Path, plan: Plan, made: Tokenized) -> None:
    """Say in a job's folder what its source will be; called before that gets its name.

    Raises:
        EnvironmentProblem: The disk is full or failing.
    """
    counts = {"encoder": made.encoder, "empty": made.empty, "bad": made.bad, "cut": made.cut}
    asked = _asked(made.manifest.name, made.manifest.domain, plan)
    sha256 = file_digest(folder / "out" / manifests.FILE_NAME)
    write_json(folder / FILE_NAME, {"asked": asked, "manifest_sha256": sha256, "counts": counts})


def found(folder: Path, out_folder: Path, name: str, domain: str, plan: Plan) -> Tokenized | None:
    """What a job has made that was killed between its last rename and the end; None if there is no such job.

    Args:
        folder: The job's.
        out_folder: The source's.
        name: The source's name, as it is asked for now.
        domain: Its domain, likewise.
        plan: The plan, likewise; by whatever encoder.

    Raises:
        DataError: The source's manifest is damaged.
    """
    try:
        said = json.loads((folder / FILE_NAME).read_bytes())
        if (said["asked"], said["manifest_sha256"]) != (
            _asked(name, domain, plan),
            file_digest(out_folder / manifests.FILE_NAME),
        ):
            return None
        counts = said["counts"]
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return Tokenized(Manifest.load(out_folder), **counts)


def remove(folder: Path) -> None:
    """Do away with a job's folder; `finished.json` and the lock, which the caller holds, go last."""
    for path in folder.iterdir():
        if path.name not in (FILE_NAME, "lock"):
            shutil.rmtree(path) if path.is_dir() else os.unlink(path)
    shutil.rmtree(folder)


def _asked(name: str, domain: str, plan: Plan) -> dict[str, Any]:
    """A command, as JSON has it."""
    content: dict[str, Any] = json.loads(json.dumps(asdict(plan) | {"name": name, "domain": domain}))
    del content["encoder"]
    return content
