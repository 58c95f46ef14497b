"""A run that begins with a Hugging Face model goes on where that model was, and comes out as one again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_davinci.cli.convert_from_hf import import_model
from megatron_davinci.cli.convert_to_hf import export
from megatron_davinci.config import RunConfig, validate
from megatron_davinci.data.batches import Batches
from megatron_davinci.optim.schedule import Schedule
from megatron_davinci.train import checkpoint_files
from megatron_davinci.train.order import DataOrder, verified_sources
from megatron_davinci.train.run_directory import RunDirectory
from tests import tiny
from tests.convert import hf_models
from tests.ranks import run_ranks

# One more than the data's: no multiple of anything, so that one of two tensor ranks has padding too.
VOCABULARY = tiny.VOCABULARY + 1


def settings(root: Path, kind: str, tensor: int, steps: int) -> dict[str, Any]:
    out = root / "weights"
    if not out.exists():
        hf_models.save(root / "hf", kind, {"vocab_size": VOCABULARY})
        import_model(root / "hf", out)
    made = tiny.tiny_settings(
        root,
        parallel={"tensor": tensor},
        train={"stop_after_steps": steps},
        checkpoint={"initial_weights": str(out)},
        evaluation={"sequences": 1},
    )
    return made | {"model": checkpoint_files.read(out).manifest["model"]}


def tokens_of(config: RunConfig, step: int) -> torch.Tensor:
    """[batch, length + 1], as the run reads them."""
    schedule = Schedule(config.curriculum, config.data.sequence_length)
    sources = verified_sources(config)
    order = DataOrder(config, schedule, sources, RunDirectory(config.run.directory))
    sample = 0
    while (plan := schedule.at(sample)).step < step:
        sample += plan.batch
    return torch.from_numpy(
        Batches(order.curriculum, sources)
        .read(np.arange(sample, sample + plan.batch))
        .tokens.astype(np.int64)
    )


def recorded(config: RunConfig, step: int) -> float:
    lines = (Path(config.run.directory) / "metrics.jsonl").read_text().splitlines()
    return next(line["loss"] for line in map(json.loads, lines) if line["step"] == step)


def loss_of(folder: Path, tokens: torch.Tensor) -> float:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return float(model(input_ids=tokens, labels=tokens).loss)


@pytest.mark.parametrize(
    ("kind", "tensor"),
    [
        ("llama3", 2),
        pytest.param("qwen2", 1, marks=pytest.mark.long),
        pytest.param("qwen3", 2, marks=pytest.mark.long),
        pytest.param("mistral", 2, marks=pytest.mark.long),
        pytest.param("olmo2", 2, marks=pytest.mark.long),
    ],
)
def test_the_loss_is_the_one_that_transformers_computes_before_and_after(tmp_path, kind, tensor):
    (last,) = set(run_ranks(tensor, tiny.train_here, settings(tmp_path, kind, tensor, 3)))
    config = validate(settings(tmp_path, kind, tensor, 4), "test")
    assert last == 3 and config.model.vocab_padding == 127
    assert recorded(config, 1) == pytest.approx(loss_of(tmp_path / "hf", tokens_of(config, 1)), rel=1e-5)
    out = export(f"{tmp_path / 'run'}@3", tmp_path / "after")
    run_ranks(tensor, tiny.train_here, settings(tmp_path, kind, tensor, 4))
    assert recorded(config, 4) == pytest.approx(loss_of(out, tokens_of(config, 4)), rel=1e-5)
    assert recorded(config, 4) != pytest.approx(loss_of(tmp_path / "hf", tokens_of(config, 4)), rel=1e-3), (
        "three steps have moved it"
    )
