"""A disk that fills up: said on one screen, older checkpoints whole, and the same command goes on later."""

import errno
import json

import pytest

from megatron_davinci.errors import EnvironmentProblem
from tests.ranks import run_ranks
from tests.tiny import tiny_settings, train_here


def train_on_a_disk_that_fills(settings, after_bytes, rank):
    """Train; on one rank the file system takes `after_bytes` of the second checkpoint's shard and no more."""
    import torch.distributed as dist

    from megatron_davinci.train import checkpoint_files

    written = {"files": 0, "bytes": 0}
    begin, write = checkpoint_files.DigestFile.__init__, checkpoint_files.DigestFile._write_all

    def counting_begin(self, *args):
        written["files"] += 1
        written["bytes"] = 0
        begin(self, *args)

    def filling_write(self, view):
        if dist.get_rank() == rank and written["files"] == 2:
            written["bytes"] += len(view)
            if written["bytes"] > after_bytes:
                raise OSError(errno.ENOSPC, "No space left on device")
        write(self, view)

    checkpoint_files.DigestFile.__init__ = counting_begin
    checkpoint_files.DigestFile._write_all = filling_write
    return train_here(settings)


@pytest.mark.parametrize("rank", [0, 1])
def test_no_space_in_the_middle_of_a_shard(tmp_path, rank):
    settings = tiny_settings(
        tmp_path,
        checkpoint={"every_steps": 20},
        parallel={"device": "cpu", "tensor": 2, "timeout_seconds": 60},
    )
    with pytest.raises(EnvironmentProblem) as error:
        run_ranks(2, train_on_a_disk_that_fills, settings, 10_000, rank)
    assert "disk is full" in str(error.value) and "step 40" in str(error.value)
    checkpoints = tmp_path / "run" / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["LATEST", "step-00000020"]
    run_ranks(2, train_here, settings)
    starts = json.loads((tmp_path / "run" / "manifest.json").read_text())["starts"]
    assert [start["step"] for start in starts] == [0, 20]


def train_on_a_small_disk(settings):
    """Train where there are 100 kB left."""
    from megatron_davinci.train import checkpoint

    checkpoint.free_bytes = lambda path: 100_000
    return train_here(settings)


def test_a_checkpoint_that_cannot_fit_is_not_begun(tmp_path):
    with pytest.raises(EnvironmentProblem) as error:
        run_ranks(1, train_on_a_small_disk, tiny_settings(tmp_path, checkpoint={"every_steps": 5}))
    assert "no space for a checkpoint" in str(error.value)
    assert not (tmp_path / "run" / "checkpoints").exists()
