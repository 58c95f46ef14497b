"""A disk that fills up: said, older checkpoints whole, training goes on, and what is due next is tried."""

import errno
import json

import pytest

from megatron_davinci.errors import EnvironmentProblem
from tests.ranks import run_ranks
from tests.tiny import tiny_settings, train_here


def train_on_a_disk_that_fills(settings, after_bytes, rank, saves):
    """Train; on one rank the file system takes `after_bytes` of these saves' files and no more."""
    import torch.distributed as dist

    from megatron_davinci.train.new_files import DigestFile
    from megatron_davinci.train.snapshot import Snapshot

    written = {"save": 0, "bytes": 0}
    begin, write = Snapshot.write, DigestFile._write_all

    def counting_begin(self, files):
        written["save"] += 1
        written["bytes"] = 0
        return begin(self, files)

    def filling_write(self, view):
        if dist.get_rank() == rank and written["save"] in saves:
            written["bytes"] += len(view)
            if written["bytes"] > after_bytes:
                raise OSError(errno.ENOSPC, "No space left on device")
        write(self, view)

    Snapshot.write = counting_begin
    DigestFile._write_all = filling_write
    return train_here(settings)


def saves(run):
    return [json.loads(line) for line in (run / "saves.jsonl").read_text().splitlines()]


def names(run):
    return sorted(path.name for path in (run / "checkpoints").iterdir())


@pytest.mark.parametrize(
    ("rank", "background"),
    [
        (1, True),
        pytest.param(0, True, marks=pytest.mark.long),
        pytest.param(1, False, marks=pytest.mark.long),
    ],
)
def test_no_space_in_the_middle_of_a_shard(tmp_path, rank, background):
    settings = tiny_settings(
        tmp_path,
        checkpoint={"every_steps": 4, "async_save": background},
        train={"stop_after_steps": 12},
        parallel={"device": "cpu", "tensor": 2, "timeout_seconds": 60},
    )
    assert run_ranks(2, train_on_a_disk_that_fills, settings, 10_000, rank, [2]) == [12, 12]
    run = tmp_path / "run"
    assert [(line["step"], line["saved"]) for line in saves(run)] == [(4, True), (8, False), (12, True)]
    assert "disk is full" in saves(run)[1]["error"] and "step 8" in saves(run)[1]["error"]
    assert names(run) == ["LATEST", "step-00000004", "step-00000012"]


def test_a_disk_that_stays_full_stops_the_run_with_what_happened(tmp_path):
    settings = tiny_settings(
        tmp_path, checkpoint={"every_steps": 5, "stop_after_failures": 3}, parallel={"timeout_seconds": 60}
    )
    with pytest.raises(EnvironmentProblem) as error:
        run_ranks(2, train_on_a_disk_that_fills, settings, 10_000, 0, range(2, 99))
    assert "3 checkpoints in a row" in str(error.value)
    assert all(f"step {step}: The disk is full" in str(error.value) for step in (10, 15, 20))
    run = tmp_path / "run"
    # The last chance was waited for: no step was taken in vain.
    assert json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 20
    assert names(run) == ["LATEST", "step-00000005"]
    run_ranks(2, train_here, {**settings, "train": {**settings["train"], "stop_after_steps": 8}})
    starts = json.loads((run / "manifest.json").read_text())["starts"]
    assert [start["step"] for start in starts] == [0, 5]


def test_the_last_save_has_no_next_one_and_is_an_error(tmp_path):
    settings = tiny_settings(tmp_path, train={"stop_after_steps": 4})
    with pytest.raises(EnvironmentProblem, match="disk is full"):
        run_ranks(1, train_on_a_disk_that_fills, settings, 10_000, 0, [1])


def train_on_a_small_disk(settings):
    """Train where there are 100 kB left."""
    from megatron_davinci.train import saver

    saver.free_bytes = lambda path: 100_000
    return train_here(settings)


def test_a_checkpoint_that_cannot_fit_is_not_begun(tmp_path):
    settings = tiny_settings(tmp_path, checkpoint={"every_steps": 5, "stop_after_failures": 2})
    with pytest.raises(EnvironmentProblem) as error:
        run_ranks(1, train_on_a_small_disk, settings)
    assert "no space for a checkpoint" in str(error.value)
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert [line["saved"] for line in saves(tmp_path / "run")] == [False, False]
