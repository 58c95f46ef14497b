"""What is packed up has all that a machine needs on which nothing else of this repository is."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def packed(kind: str, folder: Path, where: Path) -> Path:
    """Have setuptools make a distribution of what is in `folder`, in `where`; its file."""
    command = [sys.executable, "setup.py", "--quiet", kind, "--dist-dir", str(where)]
    environment = os.environ | {"DAVINCI_BUILD_CUDA": "0"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (file,) = where.iterdir()
    return file


def tracked(*patterns: str) -> set[str]:
    listed = subprocess.run(
        ["git", "ls-files", *patterns], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    return set(listed.stdout.split())


@pytest.mark.long
def test_a_wheel_made_from_the_source_distribution_has_everything(tmp_path):
    package = tracked("megatron_davinci/*")
    kernels = tracked("csrc/kernels/*")
    checkout = tmp_path / "checkout"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(checkout)], check=True)
    source = packed("sdist", checkout, tmp_path / "sdist")
    with tarfile.open(source) as archive:
        archive.extractall(tmp_path, filter="data")
    (unpacked,) = tmp_path.glob("megatron_davinci-*")
    wheel = packed("bdist_wheel", unpacked, tmp_path / "wheel")
    found = set(zipfile.ZipFile(wheel).namelist())
    assert len(package) > 300 and package - found == set()
    assert {f"megatron_davinci/kernels/csrc/{Path(name).name}" for name in kernels} - found == set()
    assert any(name.startswith("megatron_davinci/data/_cpu.") for name in found), "the reader in C++"
