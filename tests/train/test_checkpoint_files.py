"""What a checkpoint folder promises: whole or not there, and never trusted unverified."""

import errno
import json
import os

import pytest

from megatron_davinci.errors import CheckpointError, EnvironmentProblem
from megatron_davinci.train import checkpoint_files as cf


def write(checkpoints, step=3, content=b"weights"):
    temporary = cf.begin(checkpoints, step)
    with cf.DigestFile(str(temporary / "state" / "a.distcp"), "wb") as file:
        file.write(content)
    (temporary / "state" / "common.pt").write_bytes(b"common")
    return cf.commit(
        temporary,
        cf.step_folder(checkpoints, step),
        {"step": step, "consumed_samples": step * 8, "model": {}},
    )


def test_a_checkpoint_is_read_back_verified(tmp_path):
    write(tmp_path)
    found = cf.read(tmp_path / "step-00000003")
    assert (found.step, found.consumed_samples) == (3, 24)
    assert set(found.manifest["files"]) == {"state/a.distcp", "state/common.pt"}
    assert (tmp_path / "LATEST").read_text() == "step-00000003\n"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["LATEST", "step-00000003"]


def test_the_digest_is_of_the_bytes_handed_to_write(tmp_path):
    temporary = cf.begin(tmp_path, 1)
    path = temporary / "state" / "a.distcp"
    with cf.DigestFile(str(path), "wb") as file:
        file.write(b"meant")
        file.write(memoryview(bytearray(b" and meant")))
    path.write_bytes(b"meant and bent!")  # what a bad disk or cable would leave
    cf.commit(temporary, cf.step_folder(tmp_path, 1), {"step": 1, "consumed_samples": 8, "model": {}})
    with pytest.raises(CheckpointError, match="damaged"):
        cf.read(cf.step_folder(tmp_path, 1))


def damage_flip(folder):
    content = bytearray((folder / "state" / "a.distcp").read_bytes())
    content[3] ^= 0x10
    (folder / "state" / "a.distcp").write_bytes(content)
    return "a.distcp"


def damage_truncate(folder):
    os.truncate(folder / "state" / "a.distcp", 4)
    return "a.distcp"


def damage_missing(folder):
    (folder / "state" / "common.pt").unlink()
    return "state/common.pt"


def damage_extra(folder):
    (folder / "state" / "b.distcp").write_bytes(b"?")
    return "state/b.distcp"


def damage_no_manifest(folder):
    (folder / "manifest.json").unlink()
    return "manifest.json"


def damage_manifest_json(folder):
    (folder / "manifest.json").write_text('{"format": 1, "step":')
    return "manifest.json"


def damage_manifest_field(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["consumed_samples"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return "consumed_samples"


def damage_format(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "format": 99}))
    return "99"


@pytest.mark.parametrize(
    "damage",
    [
        damage_flip,
        damage_truncate,
        damage_missing,
        damage_extra,
        damage_no_manifest,
        damage_manifest_json,
        damage_manifest_field,
        damage_format,
    ],
)
def test_every_damage_is_named_and_the_older_one_is_taken(tmp_path, damage):
    write(tmp_path, 3)
    write(tmp_path, 5)
    named = damage(tmp_path / "step-00000005")
    with pytest.raises(CheckpointError) as error:
        cf.read(tmp_path / "step-00000005")
    assert named in str(error.value)
    found, problems = cf.newest_good(tmp_path)
    assert found.step == 3
    assert len(problems) == 1


def test_a_crash_before_the_rename_leaves_nothing_that_is_looked_at(tmp_path):
    write(tmp_path, 3)
    temporary = cf.begin(tmp_path, 5)
    (temporary / "state" / "a.distcp").write_bytes(b"half")
    assert cf.newest_good(tmp_path)[0].step == 3
    cf.begin(tmp_path, 7)
    assert not temporary.exists()  # the next save sweeps


def test_a_full_disk_says_so_and_keeps_what_was_there(tmp_path, monkeypatch):
    write(tmp_path, 3)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    temporary = cf.begin(tmp_path, 5)
    monkeypatch.setattr(os, "rename", full)
    with pytest.raises(EnvironmentProblem, match="disk is full"):
        cf.commit(temporary, cf.step_folder(tmp_path, 5), {"step": 5, "consumed_samples": 1, "model": {}})
    monkeypatch.undo()
    assert cf.newest_good(tmp_path)[0].step == 3


def test_saving_a_step_again_replaces_it(tmp_path):
    write(tmp_path, 3, b"old")
    write(tmp_path, 3, b"new")
    assert (cf.read(tmp_path / "step-00000003").state / "a.distcp").read_bytes() == b"new"


def test_only_the_newest_are_kept(tmp_path):
    for step in (2, 4, 6, 100_000_000):
        write(tmp_path, step)
    cf.prune(tmp_path, 2, newest=100_000_000)
    assert [path.name for path in cf.steps(tmp_path)] == ["step-100000000", "step-00000006"]


def test_a_damaged_newer_one_takes_no_place_among_those_kept(tmp_path):
    for step in (2, 4, 6, 16):
        write(tmp_path, step)
    cf.prune(tmp_path, 2, newest=6)
    assert [path.name for path in cf.steps(tmp_path)] == ["step-00000016", "step-00000006", "step-00000004"]


def test_no_checkpoints_is_not_an_error(tmp_path):
    assert cf.newest_good(tmp_path / "never") == (None, [])
