"""One save, from a snapshot on each rank to a checkpoint that is visible: what a rank does of it by itself.

Ranks tell each other by the store that they met in, not by collectives, so that a job may run beside training. Each
rank writes its file, syncs it, reads it back, and posts where everything lies. Rank 0 waits for all posts, makes the
checkpoint visible or removes what there is of it, and posts the outcome, which every rank reads.
"""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event
from typing import Any

import torch.distributed as dist

from megatron_davinci.errors import DavinciError, EnvironmentProblem
from megatron_davinci.files import disk_errors
from megatron_davinci.platform.distributed import shared_store
from megatron_davinci.train import checkpoint_files
from megatron_davinci.train.new_files import NewFiles
from megatron_davinci.train.snapshot import Snapshot

_LONGEST_PAUSE = 0.25
_GRACE_SECONDS = 10.0
"""How long rank 0 waits for the others when the run has failed: they may have died."""


@dataclass(frozen=True)
class Outcome:
    """How a save ended.

    Attributes:
        step: Steps taken at that moment.
        seconds: From the beginning of the save until it was on the disk, or had failed.
        waited: Of them, how long training waited on rank 0.
        bytes: That the checkpoint takes.
        failure: Why there is no checkpoint; None where there is one.
        failures: How many saves in a row have failed, with this one.
    """

    step: int
    seconds: float
    waited: float
    bytes: int = 0
    failure: DavinciError | None = None
    failures: int = 0


class Bug(RuntimeError):
    """A save failed by no fault of the disk; the text has the traceback."""


@dataclass
class SaveJob:
    """A rank's part of one save.

    Args:
        number: Of the save, the same on every rank and no other save's.
        snapshot: The state.
        temporary: The folder from `checkpoint_files.begin`.
        target: The checkpoint's final name.
        description: Manifest fields.
        began: `time.perf_counter` when the save began.
        after: Called by rank 0 when the checkpoint is there, before it is said to be.
        closing: Set when the run ends by an error.
        waited: Seconds that training waited for it; None where it waits for all of it.
    """

    number: int
    snapshot: Snapshot | None
    temporary: Path
    target: Path
    description: dict[str, Any]
    began: float
    after: Callable[[], None] = lambda: None
    closing: Event = field(default_factory=Event)
    waited: float | None = None

    @property
    def step(self) -> int:
        """Steps taken when it was begun."""
        return int(self.description["step"])

    def run(self) -> None:
        """Do this rank's part. Whatever goes wrong is posted; nothing is raised."""
        said: dict[str, Any] = {}
        files = NewFiles(self.temporary)
        assert self.snapshot is not None
        try:
            with disk_errors(self.target.parent, f"saving the checkpoint of step {self.step}"):
                places = self.snapshot.write(files)
            said = {"places": places, "files": files.entries}
        except DavinciError as error:
            said = {"failure": _described(error)}
        except BaseException:
            said = {"bug": traceback.format_exc()}
        _post(self._key(dist.get_rank()), said)
        if dist.get_rank() == 0:
            self._gather(files)
        # The state that it holds is not needed any more.
        self.snapshot = None

    def outcome(self) -> Outcome:
        """How it ended, on every rank; waits for that.

        Raises:
            Bug: By an error that is no file system's.
        """
        [said] = _wait([self._key("outcome")])
        if "bug" in said:
            raise Bug(said["bug"])
        failure = None if said["failure"] is None else _rebuilt(said["failure"])
        waited = said["seconds"] if self.waited is None else self.waited
        return Outcome(self.step, said["seconds"], waited, said["bytes"], failure)

    def forget(self) -> None:
        """Take the outcome from the store; on rank 0, once no rank asks for it any more."""
        shared_store().delete_key(self._key("outcome"))

    def _gather(self, files: NewFiles) -> None:
        """Rank 0's part once it has written: wait for the others, then make the checkpoint visible."""
        said: dict[str, Any] = {"failure": None, "bytes": 0}
        keys = [self._key(rank) for rank in range(dist.get_world_size())]
        try:
            posts = _wait(keys, self.closing)
            for key in keys:
                shared_store().delete_key(key)
            said |= next(({"bug": post["bug"]} for post in posts if "bug" in post), {})
            said["failure"] = next((post["failure"] for post in posts if "failure" in post), None)
            if "bug" not in said and said["failure"] is None:
                said["bytes"] = self._commit(files, posts)
        except DavinciError as error:
            said["failure"] = _described(error)
        except BaseException:
            said["bug"] = traceback.format_exc()
        finally:
            if "bug" in said or said["failure"] is not None:
                checkpoint_files.discard(self.temporary)
            # Every rank waits for this, so it comes whatever has happened.
            said["seconds"] = time.perf_counter() - self.began
            _post(self._key("outcome"), said)

    def _commit(self, files: NewFiles, posts: list[dict[str, Any]]) -> int:
        assert self.snapshot is not None
        with disk_errors(self.target.parent, f"saving the checkpoint of step {self.step}"):
            self.snapshot.finish(files, [post["places"] for post in posts])
            files.read_back()
        entries = {name: entry for post in posts[1:] for name, entry in post["files"].items()}
        saved = checkpoint_files.commit(
            self.temporary, self.target, self.description, {**files.entries, **entries}
        )
        self.after()
        return sum(entry["bytes"] for entry in saved.manifest["files"].values())

    def _key(self, who: int | str) -> str:
        return f"megatron_davinci/save/{self.number}/{who}"


def _post(key: str, said: dict[str, Any]) -> None:
    shared_store().set(key, json.dumps(said))


def _wait(keys: list[str], closing: Event | None = None) -> list[dict[str, Any]]:
    """What was posted under some keys, once all of it is there.

    Args:
        keys: Which.
        closing: When this is set, what does not come within `_GRACE_SECONDS` does not come.
    """
    store, pause, since = shared_store(), 0.001, None
    # Asked again and again: a client of the store that waits keeps all others of its process from asking.
    while not store.check(keys):
        if closing is not None and closing.is_set():
            since = time.monotonic() if since is None else since
            if time.monotonic() - since > _GRACE_SECONDS:
                raise EnvironmentProblem(
                    "The run ended while a checkpoint was being saved, and not every rank has written its part.",
                    found=f"{sum(store.check([key]) for key in keys)} of {len(keys)} ranks",
                )
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE)
    return [json.loads(store.get(key)) for key in keys]


def _described(error: DavinciError) -> dict[str, str | None]:
    parts = {"where": error.where, "found": error.found, "expected": error.expected, "do": error.do}
    return {"what": error.what, **{name: None if part is None else str(part) for name, part in parts.items()}}


def _rebuilt(said: dict[str, Any]) -> EnvironmentProblem:
    return EnvironmentProblem(said.pop("what"), **said)
