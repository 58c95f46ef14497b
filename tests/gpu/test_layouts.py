"""Layouts with what gloo and a CPU do not have: NCCL's messages, Transformer Engine's grouped experts."""

import json
import subprocess
import sys

import pytest
import yaml

from tests.gpu.steady import steady_settings

pytestmark = pytest.mark.gpu

EXPERTS = {"number": 4, "top_k": 2, "balance_coefficient": 0.05, "router_z_loss": 0.01}
SEQUENCE = {"tensor": 2, "sequence": True}
LAYOUTS = {
    "PP2xVP2": (2, {"pipeline": 2, "virtual_pipeline": 2}, None),
    "PP2xVP2, uneven": (2, {"pipeline": 2, "virtual_pipeline": 2, "pipeline_layers": [0, 2, 1, 1]}, None),
    "TP4, more than key/value heads": (4, {"tensor": 4}, None),
    "EP2xTP2+SP": (2, {"expert": 2, **SEQUENCE}, EXPERTS),
    # Parts of unequal sizes are gathered and scattered here; on gloo ours stand for NCCL's.
    "EP2xETP2xTP2+SP": (4, {"expert": 2, "expert_tensor": 2, **SEQUENCE}, EXPERTS),
    "EP4xTP2+SPxPP2xCP2": (8, {"expert": 4, **SEQUENCE, "pipeline": 2, "context": 2}, EXPERTS),
}


def losses(root, name, ranks, parallel, experts, *, layers="local", precision="fp32"):
    settings = steady_settings(root, parallel=parallel, run={"directory": str(root / name), "seed": 7})
    settings["model"] |= {
        "num_layers": 4,
        "hidden_size": 256,
        "ffn_hidden_size": 128 if experts else 512,
        "experts": experts,
    }
    settings["backends"] = {"layers": layers}
    settings["train"] |= {"micro_batch_size": 1, "precision": precision, "stop_after_steps": 30}
    path = root / f"{name.replace(' ', '')}.yaml"
    path.write_text(yaml.safe_dump(settings))
    command = [sys.executable, "-m", "megatron_davinci.cli.main", "train", str(path), "--ranks", str(ranks)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return [json.loads(line)["loss"] for line in (root / name / "metrics.jsonl").read_text().splitlines()]


def deviation(found, expected):
    return max(abs(a - b) / b for a, b in zip(found, expected, strict=True))


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory):
    root = tmp_path_factory.mktemp("layouts")
    runs = {
        kind: losses(root, f"{kind} on a CPU", 1, {"device": "cpu"}, experts)
        for kind, experts in (("dense", None), ("sparse", EXPERTS))
    }
    return root, runs


@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_one_gpu_follows_the_cpu(kind, one_rank):
    root, expected = one_rank
    experts = EXPERTS if kind == "sparse" else None
    found = losses(root, f"{kind} on a GPU", 1, {"device": "cuda"}, experts)
    assert deviation(found, expected[kind]) <= 1e-5


@pytest.mark.parametrize("name", LAYOUTS)
def test_several_gpus_follow_one_rank(name, one_rank):
    import torch

    ranks, parallel, experts = LAYOUTS[name]
    if torch.cuda.device_count() < ranks:
        pytest.skip(f"needs {ranks} GPUs")
    root, expected = one_rank
    found = losses(root, name, ranks, {"device": "cuda", **parallel}, experts)
    assert deviation(found, expected["sparse" if experts else "dense"]) <= 1e-5


def test_experts_in_one_kernel_follow_those_one_after_the_other(one_rank):
    pytest.importorskip("transformer_engine.pytorch", reason="needs transformer-engine")
    root, expected = one_rank
    found = losses(
        root, "grouped", 1, {"device": "cuda"}, EXPERTS, layers="transformer_engine", precision="bf16"
    )
    assert deviation(found, expected["sparse"]) <= 0.1
