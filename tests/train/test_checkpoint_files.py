"""What a checkpoint folder promises: whole or not there, and never trusted unverified."""

import errno
import json
import os
import stat

import pytest

from megatron_davinci import files
from megatron_davinci.errors import CheckpointError, EnvironmentProblem
from megatron_davinci.train import checkpoint_files as cf
from megatron_davinci.train.new_files import NewFiles


def write(checkpoints, step=3, content=b"weights"):
    temporary = cf.begin(checkpoints, step)
    files = NewFiles(temporary)
    files.write(temporary / "state" / "a.distcp", content)
    (temporary / "state" / "common.pt").write_bytes(b"common")
    return cf.commit(
        temporary,
        cf.step_folder(checkpoints, step),
        {"step": step, "consumed_samples": step * 8, "model": {"norm_epsilon": 1e-05}},
        files.entries,
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
    files = NewFiles(temporary)
    with files.open(path) as file:
        file.write(b"meant")
        file.write(memoryview(bytearray(b" and meant")))
    path.write_bytes(b"meant and bent!")  # what a bad disk or cable would leave
    with pytest.raises(EnvironmentProblem, match="does not hold what was written"):
        files.read_back()
    description = {"step": 1, "consumed_samples": 8, "model": {}}
    cf.commit(temporary, cf.step_folder(tmp_path, 1), description, files.entries)
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


def damage_manifest_value(folder):
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace('"consumed_samples": 40', '"consumed_samples": 48'))
    return "manifest is damaged"


def damage_of_no_meaning(folder):
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace("1e-05", "1E-05"))
    return "in other characters"


def damage_format_before_digests(folder):
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace('"format": 2', '"format": 1'))
    return "manifest is damaged"


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
        damage_manifest_value,
        damage_of_no_meaning,
        damage_format_before_digests,
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


def test_a_damaged_one_is_set_aside_under_another_name(tmp_path):
    write(tmp_path, 3)
    renamed = cf.set_aside(tmp_path / "step-00000003")
    assert renamed.name.startswith("step-00000003.damaged-2") and (renamed / "state" / "a.distcp").exists()
    assert cf.steps(tmp_path) == []
    write(tmp_path, 3)
    assert cf.set_aside(tmp_path / "step-00000003") not in (None, renamed)


def test_where_the_run_has_turned_back_from_all_of_them_none_is_left_to_go_on_from(tmp_path):
    from megatron_davinci.train import checkpoint

    checkpoints = tmp_path / "checkpoints"
    for step in (3, 5):
        write(checkpoints, step)
    found, said = checkpoint.find(checkpoints, lambda one: f"it has trained on sample {one.step}")
    assert (
        found is None and [line.splitlines()[-1].split(".")[-1][:11] for line in said] == ["turned-back"] * 2
    )
    assert cf.steps(checkpoints) == [] and checkpoint.find(checkpoints) == (None, [])


def test_the_old_one_is_there_until_the_new_one_is(tmp_path, monkeypatch):
    write(tmp_path, 3, b"old")
    exchange, seen = cf.exchange, []

    def watched(one, other):
        exchange(one, other)
        seen.append((cf.read(other).state / "a.distcp").read_bytes())
        assert (one / "state" / "a.distcp").read_bytes() == b"old"

    monkeypatch.setattr(cf, "exchange", watched)
    write(tmp_path, 3, b"new")
    assert seen == [b"new"]


@pytest.mark.parametrize("system_can", [True, False])
def test_two_folders_exchange_names(tmp_path, monkeypatch, system_can):
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    if not system_can:
        monkeypatch.setattr(files.ctypes, "CDLL", lambda *_, **__: object())
    files.exchange(tmp_path / "one", tmp_path / "other")
    assert (tmp_path / "one" / "other").exists() and (tmp_path / "other" / "one").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "other"]


def test_nobody_looks_into_a_checkpoint_while_it_is_written_and_none_but_the_group_after(tmp_path):
    temporary = cf.begin(tmp_path / "checkpoints", 3)
    modes = [stat.S_IMODE(path.stat().st_mode) for path in (temporary, temporary / "state")]
    assert modes == [0o700, 0o700]
    assert stat.S_IMODE((tmp_path / "checkpoints").stat().st_mode) & 0o007 == 0
    folder = write(tmp_path / "checkpoints", 5).folder
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700 | (folder.parent.stat().st_mode & 0o070)


def test_nothing_is_written_through_a_link_that_lies_in_wait(tmp_path):
    victim = tmp_path / "victim"
    victim.write_bytes(b"dear")
    temporary = cf.begin(tmp_path / "checkpoints", 3)
    (temporary / "state" / "a.distcp").symlink_to(victim)
    (temporary / "state" / "b.distcp").symlink_to(tmp_path / "made")
    for name in ("a", "b"):
        with pytest.raises(FileExistsError):
            NewFiles(temporary).write(temporary / "state" / f"{name}.distcp", b"bad")
    assert victim.read_bytes() == b"dear" and not (tmp_path / "made").exists()


def test_a_left_over_that_is_a_link_is_removed_and_not_followed(tmp_path):
    (tmp_path / "dear").mkdir()
    (tmp_path / "dear" / "file").touch()
    (tmp_path / "checkpoints").mkdir()
    link = tmp_path / "checkpoints" / ".step-00000003.tmp-0a"
    link.symlink_to(tmp_path / "dear")
    cf.begin(tmp_path / "checkpoints", 3)
    assert not link.is_symlink() and (tmp_path / "dear" / "file").exists()


def test_a_file_of_a_checkpoint_that_is_a_link_is_refused(tmp_path):
    folder = write(tmp_path / "checkpoints").folder
    (folder / "state" / "a.distcp").rename(tmp_path / "elsewhere")
    (folder / "state" / "a.distcp").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="is a link"):
        cf.read(folder)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_anothers_checkpoint_is_refused_where_everybody_may_write(tmp_path):
    folder = write(tmp_path / "checkpoints").folder
    os.chown(folder, 12345, 12345)
    assert cf.read(folder).step == 3  # its owner chose who may write there
    os.chmod(folder.parent, 0o1777)
    with pytest.raises(CheckpointError, match="another user's"):
        cf.read(folder)
    assert cf.newest_good(folder.parent)[0] is None


def test_a_checkpoint_from_before_manifests_had_digests_is_read(tmp_path):
    folder = write(tmp_path).folder
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["digest"]
    (folder / "manifest.json").write_text(json.dumps({**manifest, "format": 1}))
    assert cf.read(folder).step == 3


def test_the_form_in_which_branches_once_wrote_a_manifest_is_read(tmp_path):
    folder = write(tmp_path).folder
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")
    assert cf.read(folder).step == 3


def test_a_folder_whose_name_is_not_utf_8_may_be_named_in_a_manifest(tmp_path):
    temporary = cf.begin(tmp_path, 3)
    about = {"step": 3, "consumed_samples": 24, "model": {}, "from": {"folder": "/data/\udcff é"}}
    cf.commit(temporary, cf.step_folder(tmp_path, 3), about)
    assert cf.read(tmp_path / "step-00000003").manifest["from"] == about["from"]


def test_no_checkpoints_is_not_an_error(tmp_path):
    assert cf.newest_good(tmp_path / "never") == (None, [])
