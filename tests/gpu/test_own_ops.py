"""Training with this package's ops, all at once, on a GPU's kernels."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.gpu
SCRIPT = Path(__file__).parents[2] / "benchmarks" / "ops_on_off.py"


def test_200_steps_with_all_ops_have_the_losses_of_those_without(tmp_path):
    out = tmp_path / "figures.json"
    command = [sys.executable, str(SCRIPT), "--device", "cuda", "--only", "all", "--json", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert 0 < found["figures"]["worst_loss_difference"] < 1e-5, found["figures"]
    assert found["peer"]["way"].split()[0] in ("ahead_of_time", "run_time")
