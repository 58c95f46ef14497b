"""Kills at random, one after the other, until a run is done; and what it is then held against."""

from __future__ import annotations

import contextlib
import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.faults import trials
from tests.faults.kills import (
    BY_THEMSELVES_SECONDS,
    FORKED,
    LAUNCHED,
    RANKS,
    SURVIVORS_SECONDS,
    Attempt,
    an_export,
    evaluations_of,
    expected_digests,
    runs,
    settings_of,
    starts_of,
    state_of,
    steps_of,
    weights_of,
)
from tests.ranks import run_ranks, start_ranks
from tests.tiny import train_here


@dataclass
class Kill:
    """A kill.

    Attributes:
        kind: What was aimed at.
        place: Where rank 0 was, as far as is known.
        at: When, by the monotonic clock.
        steps: Steps on record then.
        noticed: Whether what was left of the run ended by itself, before it was told to.
        ended: Whether it ended without being killed.
        seconds: From it to the first new step of the next start, less the time until that start's program began;
            None where the next start did not come to a step.
    """

    kind: str
    place: str
    at: float
    steps: int
    noticed: bool = True
    ended: bool = True
    seconds: float | None = None


@dataclass
class Chain:
    """A run that was killed again and again until it was done, and what came of it.

    Attributes:
        layout: Of its ranks.
        kills: In order.
        equal: Whether it is, to the bit, the undisturbed run.
        samples_lost: Samples that no step on record has trained on.
        samples_repeated: Samples that were trained on again.
        damaged: Steps of checkpoints that were damaged before a start.
        damaged_loaded: Starts that went on from one of them.
        older_loaded: Starts that went on from a checkpoint though a newer whole one was there.
        problem: What was found first; empty where all is well.
    """

    layout: str
    kills: list[Kill] = field(default_factory=list)
    equal: bool = False
    samples_lost: int = 0
    samples_repeated: int = 0
    damaged: list[int] = field(default_factory=list)
    damaged_loaded: int = 0
    older_loaded: int = 0
    problem: str = ""


def send(process: psutil.Process) -> None:
    """SIGKILL."""
    with contextlib.suppress(psutil.Error):
        process.send_signal(signal.SIGKILL)


def kill_once(attempt: Attempt, kind: str, chance: random.Random) -> Kill | None:
    """Wait for the moment and kill; None where the run was over before that."""
    run = attempt.run
    if kind == "recovery":
        time.sleep(chance.uniform(0, 2.5))
    elif kind == "import":
        # Or at its first step, where it comes to that sooner.
        attempt.wait(lambda: attempt.step is not None, seconds=chance.uniform(0, 10))
    elif kind == "save":
        folder = run / "checkpoints"
        ready = lambda: attempt.step is not None and any(folder.glob(".step-*.tmp-*"))  # noqa: E731
        if not attempt.wait(ready):
            return None
        time.sleep(chance.uniform(0, 0.03))
    elif kind == "evaluation":
        if not attempt.wait(lambda: attempt.board.read(0)[2] == "evaluation"):
            return None
        time.sleep(chance.uniform(0, 0.03))
    else:
        more = chance.randint(1, 9)
        ready = lambda: (attempt.step or 0) >= starts_of(run)[-1] + more if attempt.step else False  # noqa: E731
        if not attempt.wait(ready):
            return None
        time.sleep(chance.uniform(0, 0.06))
    if not attempt.look() and kind != "import":
        return None
    ranks = attempt.ranks()
    victims: list[psutil.Process]
    if kind == "launcher" or (kind == "import" and (not ranks or chance.random() < 0.5)):
        assert attempt.launcher is not None
        victims = [psutil.Process(attempt.launcher.pid)] if attempt.launcher.poll() is None else []
    elif kind == "loader worker":
        victims = _workers(list(ranks.values()))[:1]
    else:
        among = {"rank 0": [[0]], "last rank": [[RANKS - 1]], "all ranks": [list(range(RANKS))]}
        chosen = among.get(kind, [[0], [RANKS - 1], list(range(RANKS))])
        victims = [ranks[rank] for rank in chance.choice(chosen) if rank in ranks]
    if not victims:
        return None
    place = attempt.board.read(0)[2] if attempt.launcher is None else ("step" if attempt.step else "start")
    # Since the board was read last the run may have ended: then nothing was killed.
    if not all(runs(one) for one in victims):
        return None
    kill = Kill(kind, place, time.monotonic(), len(steps_of(run)))
    for one in victims:
        send(one)
    return kill


def _workers(ranks: list[psutil.Process]) -> list[psutil.Process]:
    found = []
    for rank in ranks:
        with contextlib.suppress(psutil.Error):
            found += [child for child in rank.children() if "data.workers" in " ".join(child.cmdline())]
    return found


def damage(run: Path, chance: random.Random) -> int | None:
    """Flip a bit of a file of the newest checkpoint, where an older one is whole too; which step's it was."""
    there = trials.good_steps(run / "checkpoints") if (run / "checkpoints").is_dir() else []
    if len(there) < 2:
        return None
    folder = run / "checkpoints" / f"step-{there[0]:08d}"
    path = chance.choice(sorted(path for path in folder.rglob("*") if path.is_file()))
    content = bytearray(path.read_bytes())
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    path.write_bytes(content)
    return there[0]


# ---- a chain --------------------------------------------------------------------------------------------------


class Undisturbed:
    """The run that nothing happens to, on one layout.

    Args:
        root: A folder for it and the runs that are held against it.
        layout: Of its ranks.
        short: Whether it and the others are short.
    """

    def __init__(self, root: Path, layout: str, *, short: bool = False) -> None:
        self.root, self.layout, self.short = root, layout, short
        settings = settings_of(root, "undisturbed", layout, short=short)
        run_ranks(RANKS, train_here, settings, parents=True)
        run = root / "undisturbed"
        self.steps, self.evaluations, self.state = steps_of(run), evaluations_of(run), state_of(run)
        self.journal = (run / "journal.jsonl").read_bytes()
        self.samples = expected_digests(settings)
        export(run, root / "undisturbed-hf")
        self.exported = weights_of(root / "undisturbed-hf")
        if [digest for *_, digest in self.samples] != [step[-1] for step in self.steps]:
            raise AssertionError("the undisturbed run did not train on the samples that its order says")

    def problem(self, run: Path, *, whole: bool) -> str:
        """What tells a run from this one; nothing where it is this one as far as it is on record.

        Args:
            run: Its directory.
            whole: Whether it has ended.
        """
        steps = steps_of(run)
        for mine, theirs in zip(self.steps, steps, strict=False):
            if mine != theirs:
                return f"step {mine[0]}: {theirs} instead of {mine}"
        if not whole:
            return ""
        if len(steps) != len(self.steps):
            return f"{len(steps)} steps on record instead of {len(self.steps)}"
        if evaluations_of(run) != self.evaluations:
            return "other evaluations"
        if (run / "journal.jsonl").read_bytes() != self.journal:
            return "another journal"
        if state_of(run) != self.state:
            return "other weights or moments in the last checkpoint"
        return ""

    def lost_and_repeated(self, run: Path) -> tuple[int, int]:
        """Samples that no step on record has, and samples that more than one has."""
        found: Counter[int] = Counter()
        steps = {step[0]: step for step in steps_of(run)}
        counted = Counter(step[0] for step in steps_of(run))
        lost = 0
        for number, (first, size, digest) in enumerate(self.samples, start=1):
            step = steps.get(number)
            if step is None or step[1] != first + size or step[-1] != digest:
                lost += size
            found[number] += (counted[number] - 1) * size if counted[number] > 1 else 0
        return lost, sum(found.values())


def kinds(chance: random.Random, launched_every: int) -> Iterator[str]:
    """What to aim at, kill by kill; each `launched_every`-th is of a run that `davinci train` started."""
    number = 0
    while True:
        number += 1
        if launched_every and number % launched_every == 0:
            yield LAUNCHED[(number // launched_every) % 2]
        else:
            yield chance.choice(FORKED)


def chain(
    undisturbed: Undisturbed,
    aims: Iterator[str],
    most: int,
    chance: random.Random,
    *,
    name: str = "killed",
    snapshots: bool = False,
    mutant: str = "",
) -> Chain:
    """Kill a run again and again, at most so many times, then let it end, and hold it against the undisturbed one."""
    settings = settings_of(
        undisturbed.root, name, undisturbed.layout, snapshots=snapshots, short=undisturbed.short
    )
    run, result = undisturbed.root / name, Chain(undisturbed.layout)
    shutil.rmtree(run, ignore_errors=True)
    waiting: Kill | None = None
    while True:
        kind = next(aims) if len(result.kills) < most else None
        good = trials.good_steps(run / "checkpoints") if (run / "checkpoints").is_dir() else []
        attempt = Attempt(undisturbed.root, settings, launched=kind in LAUNCHED, mutant=mutant)
        kill = kill_once(attempt, kind, chance) if kind is not None else None
        # An attempt that nothing hit goes on to its end.
        if kill is None:
            noticed, ended = attempt.end(240.0)
        else:
            noticed, ended = attempt.end(SURVIVORS_SECONDS, alone=BY_THEMSELVES_SECONDS)
        _check_start(run, attempt, good, result, snapshots)
        if waiting is not None and attempt.first_step_at is not None and attempt.launcher is None:
            waiting.seconds = attempt.first_step_at - waiting.at - (attempt.board.read(0)[0] - attempt.began)
        if kill is None:
            if attempt.code() != 0 and not result.problem:
                said = Path(f"{attempt.board.path}.log")
                result.problem = (
                    f"ended with {attempt.code()}: {said.read_text()[-600:] if said.exists() else ''}"
                )
            break
        kill.noticed, kill.ended, waiting = noticed, ended, kill
        result.kills.append(kill)
        result.problem = result.problem or undisturbed.problem(run, whole=False)
        if not snapshots and chance.random() < 0.15 and (step := damage(run, chance)) is not None:
            result.damaged.append(step)
    result.problem = result.problem or undisturbed.problem(run, whole=True)
    result.equal = not result.problem
    result.samples_lost, result.samples_repeated = undisturbed.lost_and_repeated(run)
    return result


def _check_start(run: Path, attempt: Attempt, good: list[int], result: Chain, snapshots: bool) -> None:
    starts = starts_of(run)
    if len(starts) == len(attempt.before):
        return  # it never came so far
    newest = good[0] if good else 0
    if not snapshots and starts[-1] != newest:
        result.damaged_loaded += starts[-1] in result.damaged
        result.older_loaded += starts[-1] < newest
    elif snapshots:
        result.older_loaded += starts[-1] < newest


def export(run: Path, out: Path) -> None:
    """Export a run's newest checkpoint, in a process of its own."""
    [(process, connection)] = start_ranks(1, an_export, str(run), str(out))
    process.join(120)
    connection.close()
    if process.exitcode != 0:
        raise AssertionError(f"the export ended with {process.exitcode}")


def killed_exports(
    undisturbed: Undisturbed, run: Path, count: int, chance: random.Random
) -> tuple[int, bool]:
    """Kill an export again and again, then let it end; how many were killed, and whether the weights are right.

    At no moment may there be a folder under the export's name that does not hold all of it.
    """
    out, kills, whole = undisturbed.root / f"{run.name}-hf", 0, True
    shutil.rmtree(out, ignore_errors=True)
    for _ in range(count):
        [(process, connection)] = start_ranks(1, an_export, str(run), str(out))
        process.join(chance.uniform(0, 1.0))
        if process.exitcode is None:
            process.kill()
            kills += 1
        process.join()
        connection.close()
        if out.exists():
            whole = whole and weights_of(out) == undisturbed.exported
            shutil.rmtree(out)
    export(run, out)
    return kills, whole and weights_of(out) == undisturbed.exported
