"""The run that a CPU computes, on CUDA."""

import json
import subprocess
import sys

import pytest
import yaml

from tests.gpu.steady import steady_settings

pytestmark = pytest.mark.gpu


def losses(root, name, device, precision):
    settings = steady_settings(root, run={"directory": str(root / name), "seed": 7})
    settings["parallel"] = {"device": device}
    settings["train"] = {"micro_batch_size": 2, "precision": precision}
    # Head dimension 64, so that attention takes the kernels that real models take.
    settings["model"] |= {"hidden_size": 256, "ffn_hidden_size": 512}
    settings["backends"] = {"layers": "local"}
    path = root / f"{name}.yaml"
    path.write_text(yaml.safe_dump(settings))
    command = [sys.executable, "-m", "megatron_davinci.cli.main", "train", str(path), "--ranks", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return [json.loads(line)["loss"] for line in (root / name / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory):
    root = tmp_path_factory.mktemp("gpu")
    return root, losses(root, "cpu", "cpu", "fp32")


def test_fp32_on_cuda_follows_the_cpu(on_cpu):
    root, expected = on_cpu
    found = losses(root, "cuda", "cuda", "fp32")
    assert max(abs(a - b) / b for a, b in zip(found, expected, strict=True)) <= 1e-4


def test_bf16_on_cuda_follows_fp32(on_cpu):
    root, expected = on_cpu
    found = losses(root, "bf16", "cuda", "bf16")
    assert max(abs(a - b) / b for a, b in zip(found, expected, strict=True)) <= 0.03


def test_transformer_engine_layers_follow_ours(on_cpu):
    pytest.importorskip("transformer_engine.pytorch", reason="needs transformer-engine")
    root, expected = on_cpu
    settings = yaml.safe_load((root / "cpu.yaml").read_text())
    settings["run"]["directory"] = str(root / "te")
    settings["parallel"] = {"device": "cuda"}
    settings["train"]["precision"] = "bf16"
    settings["backends"]["layers"] = "transformer_engine"
    (root / "te.yaml").write_text(yaml.safe_dump(settings))
    command = [
        sys.executable,
        "-m",
        "megatron_davinci.cli.main",
        "train",
        str(root / "te.yaml"),
        "--ranks",
        "1",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line)["loss"] for line in (root / "te" / "metrics.jsonl").read_text().splitlines()]
    assert max(abs(a - b) / b for a, b in zip(found, expected, strict=True)) <= 0.03
