"""Damage of checkpoints and datasets is found before a wrong value is used; what is whole is taken."""

import json
import shutil
from pathlib import Path

from benchmarks import corruption
from megatron_davinci.train import checkpoint_files
from tests.cases import is_long
from tests.ranks import run_ranks


def measure(folder: str) -> dict[str, float]:
    return corruption.measure(3000 if is_long() else 96, 1, Path(folder))


def test_all_damage_is_found_and_nothing_else(tmp_path):
    [figures] = run_ranks(1, measure, str(tmp_path), timeout=900)
    assert figures["corruption_detected_fraction"] == figures["clean_accepted_fraction"] == 1.0
    assert sum(name.startswith("detected_") for name in figures) == 16


def without_digests(folder: str) -> dict[str, float]:
    """As a loader that believes what is written."""
    read = checkpoint_files.read
    checkpoint_files.read = lambda folder, *, verify=True: read(folder, verify=False)
    corruption.source_found = lambda folder: False
    return corruption.measure(64, 1, Path(folder))


def test_a_loader_that_verifies_nothing_would_be_seen(tmp_path):
    [figures] = run_ranks(1, without_digests, str(tmp_path))
    assert figures["corruption_detected_fraction"] < 0.5
    assert figures["detected_checkpoint_bit_flip"] < 1.0


def test_a_flip_anywhere_in_a_manifest_is_found(tmp_path):
    run_ranks(1, corruption.make_checkpoints, tmp_path / "checkpoints", 0)
    folder = tmp_path / "checkpoints" / "step-00000020"
    path = folder / "manifest.json"
    whole, said = path.read_bytes(), json.loads(path.read_bytes())
    shutil.rmtree(tmp_path / "checkpoints" / "step-00000010")
    accepted = []
    for bit in range(0, 8 * len(whole), 1 if is_long() else 13):
        content = bytearray(whole)
        content[bit // 8] ^= 1 << bit % 8
        path.write_bytes(content)
        if checkpoint_files.newest_good(tmp_path / "checkpoints")[0] is not None:
            accepted.append(bit)
    assert accepted == [] and said["format"] == 2
