"""One short trial for every mistake in `mutants.py`: without the mistake it finds nothing, with it something.

A trial is a function of a folder and a mutant's name. It returns what was noticed, in words; nothing where all is
well.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from tests.faults import kills, trials
from tests.faults.mutants import MUTANTS, apply
from tests.ranks import RankFailed, run_ranks, start_ranks
from tests.tiny import VOCABULARY, tiny_settings, train_here, write_source

PAUSE, END = 8, 16
RATES = {"first": 1e-2, "second": 1e-3}

Trial = Callable[[Path, str], str]


def settings_of(root: Path, name: str, until: int, **parallel: Any) -> dict[str, Any]:
    """A run with dropout, of two stages with a learning rate each, the first of which warms up."""
    settings = tiny_settings(
        root,
        run={"directory": str(root / name)},
        model={"dropout": 0.1},
        parallel={**parallel, "timeout_seconds": 15},
        train={"stop_after_steps": until},
        checkpoint={"every_steps": 4, "async_save": False},
        logging={"token_digest": True},
    )
    first, second = settings["curriculum"]
    first["learning_rate"] = {"peak": RATES["first"], "warmup_steps": 12}
    second["learning_rate"] = {"peak": RATES["second"]}
    return settings


def train_as(settings: dict[str, Any], mutant: str, blind: bool = False) -> int:
    """Train with a mistake.

    Args:
        settings: Of the run.
        mutant: The mistake's name.
        blind: Rank 1 reads another content of the newest checkpoint than there is.
    """
    apply(mutant)
    if blind and os.environ["RANK"] == "1":
        from megatron_davinci.train import checkpoint_files

        digest = checkpoint_files.file_digest
        checkpoint_files.file_digest = lambda path, **how: (
            "0" * 64 if f"step-{PAUSE:08d}" in str(path) else digest(path, **how)
        )
    return train_here(settings)


def _difference(one: list[Any], other: list[Any]) -> str:
    for mine, theirs in zip(one, other, strict=False):
        if mine != theirs:
            return f"step {mine[0]}: {theirs} instead of {mine}"
    return "" if len(one) == len(other) else f"{len(other)} steps instead of {len(one)}"


def resume(root: Path, mutant: str) -> str:
    """A run that was stopped and started again is the same run that was not."""
    run_ranks(1, train_as, settings_of(root, "whole", END), mutant)
    for until in (PAUSE, END):
        run_ranks(1, train_as, settings_of(root, "parts", until), mutant)
    return _difference(kills.steps_of(root / "whole"), kills.steps_of(root / "parts"))


def stage(root: Path, mutant: str) -> str:
    """Each step is of the stage that the configuration says, with its learning rate."""
    run_ranks(1, train_as, settings_of(root, "run", 14), mutant)
    expected = [("first", RATES["first"] * min(1.0, step / 12)) for step in range(1, 15)]
    for line, (name, rate) in zip(kills.lines(root / "run" / "metrics.jsonl"), expected, strict=True):
        if line["stage"] != name or abs(line["learning_rate"] - rate) > 1e-9:
            return (
                f"step {line['step']}: stage {line['stage']} at {line['learning_rate']}, not {name} at {rate}"
            )
    return ""


def layout(root: Path, mutant: str) -> str:
    """A run trains on the samples that its order says, with two data-parallel ranks and then with one."""
    run_ranks(2, train_as, settings_of(root, "run", PAUSE), mutant)
    run_ranks(1, train_as, settings_of(root, "run", END), mutant)
    expected = kills.expected_digests(settings_of(root, "run", END))[:END]
    found = kills.steps_of(root / "run")
    return _difference(
        [(number, first + size, digest) for number, (first, size, digest) in enumerate(expected, 1)],
        [(step[0], step[1], step[-1]) for step in found],
    )


def one_choice(root: Path, mutant: str) -> str:
    """Ranks go on from one checkpoint, also where one of them reads it differently."""
    run_ranks(2, train_as, settings_of(root, "whole", END), "")
    run_ranks(2, train_as, settings_of(root, "parts", PAUSE), "")
    try:
        run_ranks(2, train_as, settings_of(root, "parts", END), mutant, True, timeout=60)
    except AssertionError as error:
        return str(error)[-200:]
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return _difference(kills.steps_of(root / "whole"), kills.steps_of(root / "parts"))


def crash_points(root: Path, mutant: str) -> str:
    """Whatever call a save dies at, the newest good checkpoint is there and is the one that is chosen."""
    try:
        run_ranks(1, trials.saves, str(root), 30, 0, 9, True, mutant)
    except RankFailed as error:
        return str(error).strip().splitlines()[-1]
    return ""


def sync_order(root: Path, mutant: str) -> str:
    """What is visible is on the disk."""
    return "; ".join(run_ranks(1, trials.order, str(root), mutant)[0][:2])


def _load_damaged(root: str, mutant: str) -> str:
    from megatron_davinci.train import checkpoint_files

    state = trials.State(Path(root))
    for step in (10, 20):
        state.save(step)
    apply(mutant)
    shard = next((state.checkpoints / "step-00000020" / "state").glob("*.distcp"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    found, _ = checkpoint_files.newest_good(state.checkpoints)
    return "" if found is not None and found.step == 10 else f"chose {found and found.step}, which is damaged"


def damaged(root: Path, mutant: str) -> str:
    """A checkpoint with another bit is passed over."""
    return str(run_ranks(1, _load_damaged, str(root), mutant)[0])


def _read_shortened(root: str, mutant: str) -> str:
    import numpy as np

    from megatron_davinci.data.reader import Rows, WindowReader
    from megatron_davinci.data.source import Source
    from megatron_davinci.errors import DataError

    apply(mutant)
    source = Source.open("s", write_source(Path(root) / "s", "s", 1), 32)
    reader, count = WindowReader([source]), source.num_windows
    tokens = np.full((count, 33), VOCABULARY - 2, np.uint16)
    memory = [memoryview(row).cast("B") for row in tokens]
    rows = Rows(np.zeros(count, np.int64), np.arange(count), tokens, memory, None)
    reader.begin(rows).finish()  # it is open, and was as long as its manifest says
    path = Path(root) / "s" / "shard-00000.bin"
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size // 2)
    try:
        reader.begin(rows).finish()
    except DataError:
        return ""
    return "half of a file was read as if all of it were there"


def shortened(root: Path, mutant: str) -> str:
    """A file that is cut short while it is open is an error, and no tokens."""
    return str(run_ranks(1, _read_shortened, str(root), mutant)[0])


def _begin(root: Path, settings: dict[str, Any], mutant: str) -> Any:
    (root / "config.yaml").write_text(yaml.safe_dump(settings))
    board = kills.Board(root / "board", make=True)
    return start_ranks(1, kills.a_rank, str(root / "config.yaml"), str(board.path), mutant, parents=True)[0]


def failing(root: Path, mutant: str) -> str:
    """A run that cannot begin ends with a code that says so."""
    settings = settings_of(root, "run", END)
    settings["data"]["sources"]["a"]["path"] = str(root / "nowhere")
    process, connection = _begin(root, settings, mutant)
    process.join(60)
    connection.close()
    return "" if process.exitcode == 2 else f"ended with {process.exitcode}"


def asked_to_end(root: Path, mutant: str) -> str:
    """SIGTERM is a checkpoint and code 75."""
    settings = settings_of(root, "run", 50)
    settings["checkpoint"]["every_steps"] = None
    process, connection = _begin(root, settings, mutant)
    end = time.monotonic() + 60
    while not kills.steps_of(root / "run") and time.monotonic() < end and process.is_alive():
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGTERM)
    process.join(60)
    connection.close()
    last = len(kills.steps_of(root / "run"))
    if process.exitcode != 75:
        return f"ended with {process.exitcode} after step {last}"
    return "" if trials.good_steps(root / "run" / "checkpoints") == [last] else "no checkpoint"


TRIALS: dict[str, Trial] = {
    "the random numbers are not restored": resume,
    "numbers are drawn after they are restored": resume,
    "the sampler begins anew": resume,
    "the optimizer begins anew": resume,
    "the learning rate begins anew": resume,
    "the last stage is always the one": stage,
    "each rank has a part of the data": layout,
    "each rank chooses its checkpoint": one_choice,
    "visible before it is whole": crash_points,
    "files are not synced": sync_order,
    "folders are not synced": sync_order,
    "old ones are removed first": crash_points,
    "a failure is not said": crash_points,
    "digests are not looked at": damaged,
    "short reads are taken": shortened,
    "code 0 for a failure": failing,
    "SIGTERM is not heard": asked_to_end,
}
assert TRIALS.keys() == MUTANTS.keys()
