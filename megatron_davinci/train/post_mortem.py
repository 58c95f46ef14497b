"""Why a run is where it is: read from what it, its ranks and their launchers have left in the run directory.

Nothing is changed, so it may be asked of a run at work too.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_davinci.config import RunConfig, load_config
from megatron_davinci.data.journal import Journal
from megatron_davinci.errors import AGAIN, CORRUPT, HANG, LOST_PEER, MEND, UNHEALTHY, DavinciError
from megatron_davinci.files import free_bytes
from megatron_davinci.optim.schedule import Schedule
from megatron_davinci.train import checkpoint_files
from megatron_davinci.train.health_records import turned_back
from megatron_davinci.train.last_words import FOLDER, is_alive, is_held
from megatron_davinci.train.left import steps_left
from megatron_davinci.train.run_directory import RunDirectory, last_lines
from megatron_davinci.train.snapshots_here import HeldHere, held_here

# What tells most of why a run ended comes first; a rank that lost another, or was ended with it, tells least.
_TELLING = (CORRUPT, UNHEALTHY, HANG, MEND, 1)
_NO_CAUSE = (LOST_PEER, 128 + 3)


@dataclass(frozen=True)
class RankEnd:
    """How a rank of the last start is or has ended.

    Attributes:
        rank: Its number.
        host: Its node; empty where it left nothing.
        pid: Its process.
        state: `at work`, `ended`, `gone` (without a word) or `unknown` (nothing on record of this start).
        code: What it ended with; below 0 where its launcher says that a signal ended it. None where nobody knows.
        kind: The error's class.
        reason: In its own words.
        time: When.
    """

    rank: int
    host: str
    pid: int
    state: str
    code: int | None = None
    kind: str = ""
    reason: str = ""
    time: str = ""


@dataclass
class PostMortem:
    """What is known of a run.

    Attributes:
        run: The run directory.
        state: `complete`, `at work`, `asked to end`, `died`, `hung`, `in trouble`, `computes wrong`, `refused`,
            `not begun` or `unknown`.
        cause: Why, in a few lines.
        step: Of the last line of `metrics.jsonl`; 0 for none.
        last: That line.
        age: Seconds since it was written; None without one.
        steps: Steps of the whole run; None where the configuration cannot be read.
        until: The step at which the last start was to end.
        is_done: Whether no step is left of it behind the newest good checkpoint: the journal may pass over some.
        start: The last entry of `starts` in `manifest.json`.
        starts: How many there are.
        is_branch: Whether the run's past is another run's.
        ranks: How the ranks of the last start have ended.
        newest_good: The newest checkpoint that the next start will go on from.
        verified: Whether its bytes have been compared with their digests.
        in_memory: The newest snapshot that this machine's memory holds, where it is newer; None for none.
        damaged: What is wrong with newer ones, and with files of the run.
        left_over: Folders that an unfinished save has left, with their bytes.
        aside: Checkpoints that were put aside.
        events: The latest lines of `health.jsonl`.
        passed_over: How many skips the journal has.
        failed_saves: The saves that failed since one went well.
        killed_for_memory: The nodes whose launcher saw the kernel kill for want of memory in the last start.
        do: What to do, in order.
        code: 0 where nothing is to be done, 75 where the run can be started again as it is, 2 where something is to
            be mended first.
    """

    run: Path
    state: str = "unknown"
    cause: list[str] = field(default_factory=list)
    step: int = 0
    last: dict[str, Any] = field(default_factory=dict)
    age: float | None = None
    steps: int | None = None
    until: int | None = None
    is_done: bool = False
    start: dict[str, Any] = field(default_factory=dict)
    starts: int = 0
    is_branch: bool = False
    ranks: list[RankEnd] = field(default_factory=list)
    newest_good: checkpoint_files.Checkpoint | None = None
    verified: bool = True
    in_memory: HeldHere | None = None
    damaged: list[str] = field(default_factory=list)
    left_over: list[tuple[str, int]] = field(default_factory=list)
    aside: list[str] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)
    passed_over: int = 0
    failed_saves: list[dict[str, Any]] = field(default_factory=list)
    killed_for_memory: list[str] = field(default_factory=list)
    do: list[str] = field(default_factory=list)
    code: int = 0


def examine(run: Path, *, verify: bool = True) -> PostMortem:
    """Read a run directory.

    Args:
        run: The run directory.
        verify: Compare every byte of the newest checkpoint with its digest, as a start would.

    Raises:
        DavinciError: There is no run in it.
    """
    if not run.is_dir():
        raise DavinciError(
            "There is no run to look at.",
            where=run,
            found="no such folder" if not run.exists() else "a file",
            expected="a run directory: `run.directory` of a configuration that was trained",
        )
    directory = RunDirectory(run)
    found = PostMortem(run, verified=verify)
    config = _config(found)
    _record(found, directory, config)
    journal = _checkpoints(found, directory, verify)
    if (good := found.newest_good) is not None and config is not None and found.until is not None:
        schedule = Schedule(config.curriculum, config.data.sequence_length)
        left = steps_left(schedule, journal, good.step, good.consumed_samples, found.until)
        found.is_done = next(left, None) is None
    if config is not None and config.snapshots.every_steps is not None:
        newest = next(iter(held_here(run, config.snapshots)), None)
        if newest is not None and newest.step > (found.newest_good.step if found.newest_good else 0):
            found.in_memory = newest
    found.ranks = list(_ranks(found))
    _conclude(found)
    _advise(found, directory)
    return found


# ---- what is there ---------------------------------------------------------------------------------------


def _config(found: PostMortem) -> RunConfig | None:
    path = found.run / "config.yaml"
    try:
        return load_config(path)
    except DavinciError as error:
        if path.exists():
            found.damaged.append(f"config.yaml cannot be read: {error.what}")
        return None


def _record(found: PostMortem, directory: RunDirectory, config: RunConfig | None) -> None:
    try:
        manifest = json.loads((found.run / "manifest.json").read_bytes())
        starts = list(manifest["starts"])
        found.starts, found.start = len(starts), dict(starts[-1]) if starts else {}
        found.is_branch = "branched_from" in manifest
    except FileNotFoundError:
        pass
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        found.damaged.append(f"manifest.json cannot be read: {error}")
    if config is not None:
        found.steps = Schedule(config.curriculum, config.data.sequence_length).total_steps
        found.until = min(found.steps, config.train.stop_after_steps or found.steps)
    lines = last_lines(directory.metrics, 1)
    if lines:
        found.last, found.step = lines[0], int(lines[0].get("step", 0))
        with suppress(OSError):
            found.age = max(0.0, time.time() - directory.metrics.stat().st_mtime)
    found.events = last_lines(directory.health, 5)
    for line in reversed(last_lines(directory.saves, 8)):
        if line.get("saved"):
            break
        found.failed_saves.insert(0, line)


def _checkpoints(found: PostMortem, directory: RunDirectory, verify: bool) -> Journal:
    """Look at checkpoints, and at the journal, which is returned."""
    journal, is_whole = Journal.in_memory(), False
    try:
        journal, is_whole = Journal.open(directory.journal), True
    except DavinciError as error:
        found.damaged.append(f"{error.what} {error.where}: {error.found}")
    found.passed_over = len(journal.skips)
    why_not = turned_back(journal)
    for folder in checkpoint_files.steps(directory.checkpoints):
        try:
            checkpoint = checkpoint_files.read(folder, verify=verify)
        except DavinciError as error:
            # A digest tells a reader nothing that the file's name does not.
            what = "" if str(error.found).startswith("sha256") else f" {error.found}"
            found.damaged.append(f"{folder.name}: {error.what}{what} ({error.where})")
            continue
        if (why := why_not(checkpoint)) is None:
            found.newest_good = checkpoint
            rests_on = checkpoint.manifest.get("journal") or {}
            if is_whole and not journal.extends(rests_on.get("records", -1), rests_on.get("digest", "")):
                found.damaged.append(f"journal.jsonl is not the one that {folder.name} was saved with")
            break
        found.aside.append(f"{folder.name}: {why}")
    if directory.checkpoints.is_dir():
        for path in sorted(directory.checkpoints.iterdir()):
            if path.name.startswith(".step-") and ".tmp-" in path.name:
                found.left_over.append((path.name, _size(path)))
            elif path.name.startswith("step-") and (".damaged-" in path.name or ".turned-back-" in path.name):
                found.aside.append(path.name)
    return journal


def _size(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        with suppress(OSError):  # a save at work moves its files
            total += path.stat().st_size if path.is_file() else 0
    return total


def _ranks(found: PostMortem) -> Iterator[RankEnd]:
    """The ranks of the last start, and those of one that did not come so far as to be on record."""
    folder = found.run / FOLDER
    left: dict[int, dict[str, Any]] = {}
    for path in sorted(folder.glob("rank-*.json")) if folder.is_dir() else []:
        if path.name.endswith(".hang.json"):
            continue
        with suppress(OSError, ValueError):
            said = json.loads(path.read_bytes())
            if isinstance(said, dict) and isinstance(said.get("rank"), int):
                left[said["rank"]] = said
    if not left:
        return
    # A start that ended before its first step has no number yet; its ranks say so.
    later = [said for said in left.values() if said.get("start") is None and _after(said, found.start)]
    world = later[0]["ranks"] if later else int(found.start.get("ranks", len(left)))
    of_start = later or [said for said in left.values() if said.get("start") == found.starts]
    codes = _launchers(found, min(str(said.get("began", "")) for said in of_start or left.values()))
    # Of processes on other nodes only this can be seen from here.
    fresh = is_held(found.run) and not any(said["ended"] for said in of_start)
    for rank in range(world):
        said = left.get(rank)
        if said is None or said not in of_start:
            yield RankEnd(rank, "", 0, "unknown", codes.get(rank))
            continue
        common = rank, str(said.get("host", "")), int(said.get("pid", 0))
        if said.get("ended"):
            end = said["ended"]
            yield RankEnd(*common, "ended", end["code"], end.get("kind", ""), end["reason"], end["time"])
        elif is_alive(common[1], common[2]) or (fresh and common[1] != socket.gethostname()):
            yield RankEnd(*common, "at work")
        else:
            yield RankEnd(*common, "gone", codes.get(rank))


def _after(said: dict[str, Any], start: dict[str, Any]) -> bool:
    return str(said.get("began", "")) >= str(start.get("time", ""))


def _launchers(found: PostMortem, since: str) -> dict[int, int]:
    """What the launchers of the last start saw ranks end with, by rank. They overwrite what those of a node said
    before; a node that was in an earlier start only has left its word for good.
    """
    codes: dict[int, int] = {}
    for path in sorted((found.run / FOLDER).glob("launcher-*.json")):
        with suppress(OSError, ValueError, KeyError, TypeError):
            said = json.loads(path.read_bytes())
            if said["time"] >= since:
                codes |= {int(rank): int(code) for rank, code in said["failures"].items()}
                if said["killed_for_memory"]:
                    found.killed_for_memory.append(str(said["host"]))
    return codes


# ---- what follows from it --------------------------------------------------------------------------------


def _conclude(found: PostMortem) -> None:
    """The state and its cause."""
    if found.is_done and not any(rank.state == "at work" for rank in found.ranks):
        found.state = "complete"
        saved = found.newest_good.step if found.newest_good else 0
        found.cause = [
            f"Step {saved:,} is saved, and those behind it, up to {found.until:,}, are passed over."
            if found.until is not None and saved < found.until
            else f"All {found.steps:,} steps are taken and saved."
            if found.until == found.steps
            else f"train.stop_after_steps is reached: step {found.until:,} is saved."
        ]
        return
    if not found.starts and (not found.step or (found.is_branch and not found.ranks)):
        what = "the branch" if found.is_branch else "a run"
        found.state, found.cause = "not begun", [f"No start of {what} is on record here."]
        return
    if any(rank.state == "at work" for rank in found.ranks):
        found.state = "at work"
        found.cause = ["Its ranks are at work."]
        return
    root = _root(found.ranks)
    if root is None:
        # Of a release that left no words, or on nodes that cannot be seen from here.
        fresh = is_held(found.run)
        found.state = "at work" if fresh else "died"
        found.cause = [
            "Its last step is recent."
            if fresh
            else "Its ranks have left no word: they were killed, or their node went."
        ]
        return
    if root.state == "ended" and root.code == 0:
        # What it has saved is gone since, or damaged.
        found.state = "complete"
        newest = (
            "none of its checkpoints is there"
            if (good := found.newest_good) is None
            else (f"the newest whole checkpoint is of step {good.step:,}")
        )
        found.cause = [f"It ended well after step {found.step:,}; now {newest}."]
        return
    states = {
        CORRUPT: "computes wrong",
        UNHEALTHY: "in trouble",
        HANG: "hung",
        MEND: "refused",
        AGAIN: "asked to end",
    }
    found.state = states.get(root.code or 0, "died") if root.state == "ended" else "died"
    found.cause = _told(root, found)


def _root(ranks: list[RankEnd]) -> RankEnd | None:
    """The rank whose end explains the others'."""
    ended = [rank for rank in ranks if rank.state == "ended"]
    for code in _TELLING:
        first = sorted((rank for rank in ended if rank.code == code), key=lambda rank: rank.time)
        if first:
            return first[0]
    gone = [rank for rank in ranks if rank.state == "gone"]
    killed = [rank for rank in gone if rank.code is not None]
    if killed or gone:
        return (killed or gone)[0]
    for rank in sorted(ended, key=lambda rank: (rank.code in _NO_CAUSE, rank.time)):
        return rank
    return None


def _told(root: RankEnd, found: PostMortem) -> list[str]:
    """The cause, in lines."""
    if root.state == "gone":
        where = f"rank {root.rank} on {root.host} (process {root.pid})"
        others = sum(rank.state == "gone" for rank in found.ranks) - 1
        also = f", and {others} other{'s' if others > 1 else ''}" if others else ""
        lines = [f"{where}{also} left without a word, as after SIGKILL or the loss of a node."]
        if root.code is not None and root.code < 0:
            lines = [f"{where}{also}: ended by signal {-root.code}, says its launcher."]
        if found.killed_for_memory:
            lines.append(f"The kernel killed for want of memory on {', '.join(found.killed_for_memory)}.")
        return lines
    words = [line for line in root.reason.strip().splitlines() if line.strip()]
    # What is to be done is said below.
    words = [line for line in words if not line.startswith("  do: ")]
    if root.code == 1:
        words = words[-1:]  # of a traceback, the error itself
    if root.code in (AGAIN, HANG):
        return words
    return [f"rank {root.rank} on {root.host}: {words[0] if words else f'code {root.code}'}", *words[1:]]


def _advise(found: PostMortem, directory: RunDirectory) -> None:
    """What to do, and the exit code."""
    again = "start the same command again"
    good = found.newest_good
    back = (
        f"it goes on after step {good.step:,}"
        if good is not None
        else "it begins anew, since nothing was saved"
    )
    if found.in_memory is not None:
        step = f"step {found.in_memory.step:,}"
        back = f"it goes on after {step}, from memory, if its ranks begin where they were; otherwise {back}"
    if found.is_done or found.state == "at work" or (found.state == "complete" and not found.damaged):
        found.code = 0
        return
    if found.state == "not begun":
        found.do, found.code = ["Start it: davinci train CONFIG.yaml"], AGAIN
        return
    found.code = AGAIN
    mend: list[str] = []
    if found.state == "refused":
        mend.append("Mend what the error names.")
    if found.state == "in trouble":
        mend.append(
            "Look at the steps that were passed over (health.jsonl): are they of one source, or of one rank?"
        )
    if found.state == "computes wrong":
        mend.append("Leave out the node that is named, and have it tested.")
    if good is None and any(line.startswith("step-") for line in found.damaged):
        mend.append(
            "Restore a checkpoint: none of those that are there is whole, and a start would be refused."
        )
    if any(line.startswith(("manifest", "A journal", "journal")) for line in found.damaged):
        mend.append("Restore the damaged file from a copy of the run directory; a start would be refused.")
    if good is not None:
        need, free = sum(entry["bytes"] for entry in good.manifest["files"].values()), free_bytes(found.run)
        if free < need:
            mend.append(
                f"Free space: a checkpoint takes {need / 1e9:.3g} GB, and {free / 1e9:.3g} GB are free at "
                f"{directory.checkpoints}."
            )
    if mend:
        found.code = MEND
    hint = ""
    if found.state == "hung":
        hint = "; where it hangs again, without the node that is named"
    if found.killed_for_memory and found.state == "died":
        hint = "; where it happens again, with fewer sequences a micro-batch or activations recomputed"
    found.do = [*mend, f"{'Then s' if mend else 'S'}{again[1:]}: {back}{hint}."]
