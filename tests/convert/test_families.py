"""Each family from Hugging Face and back: the same bits, the same logits, the same loss, whatever the layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_davinci.cli.convert_from_hf import import_model
from megatron_davinci.cli.convert_to_hf import export
from megatron_davinci.train import checkpoint_files
from tests.convert import hf_models
from tests.ranks import run_ranks

BATCH = torch.randint(0, 101, (2, 24), generator=torch.Generator().manual_seed(0)).tolist()
KINDS = list(hf_models.KINDS)


def imported(source: Path, out: Path, **options: Any) -> tuple[Path, dict[str, Any]]:
    import_model(source, out, verify=False, **options)
    return out, checkpoint_files.read(out).manifest["model"]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, tuple[Path, Any]]:
    """By kind: the folder, and what transformers says."""
    found = {}
    for kind in KINDS:
        folder = tmp_path_factory.mktemp(kind)
        model = hf_models.save(folder, kind)
        with torch.no_grad():
            found[kind] = (folder, model(torch.tensor(BATCH)).logits)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_there_and_back_is_the_same_to_the_bit(tmp_path, models, kind):
    source, logits = models[kind]
    out, model = imported(source, tmp_path / "ours")
    assert model["vocab_size"] == 128 and model["vocab_padding"] == 27
    back = export(str(out), tmp_path / "back", verify=False)
    expected, found = hf_models.weights(source), hf_models.weights(back)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    theirs = json.loads((source / "config.json").read_text())
    ours = json.loads((back / "config.json").read_text())
    for key in (
        "architectures",
        "model_type",
        "vocab_size",
        "tie_word_embeddings",
        "rms_norm_eps",
        "head_dim",
    ):
        assert ours[key] == theirs[key], key
    with torch.no_grad():
        again = load(back)(torch.tensor(BATCH)).logits
    assert torch.equal(again, logits)


@pytest.mark.parametrize("kind", KINDS)
def test_our_model_says_what_theirs_says(tmp_path, models, kind):
    source, logits = models[kind]
    assert logits.std() > 0.3, "logits that differ, so that a wrong one shows"
    out, model = imported(source, tmp_path / "ours")
    (ours,) = run_ranks(1, hf_models.logits, out, model, (1, 1), BATCH)
    assert hf_models.apart(torch.from_numpy(ours)[..., :101], logits) <= 1e-5


LAYOUTS = [(2, 1), (1, 2), (2, 2)]


@pytest.mark.parametrize(
    ("kind", "layout"),
    [
        pytest.param(
            kind,
            layout,
            marks=()
            if (kind, layout) in (("qwen3", (2, 2)), ("llama3", (2, 1)), ("olmo2", (2, 1)))
            else pytest.mark.long,
            id=f"{kind}-TP{layout[0]}xPP{layout[1]}",
        )
        for kind in KINDS
        for layout in LAYOUTS
    ],
)
def test_from_every_layout(tmp_path, models, kind, layout):
    source, logits = models[kind]
    out, model = imported(source, tmp_path / "ours")
    ranks = layout[0] * layout[1]
    ours = run_ranks(ranks, hf_models.logits, out, model, layout, BATCH)[-1]
    assert hf_models.apart(torch.from_numpy(ours)[..., :101], logits) <= 1e-5
    run_ranks(ranks, hf_models.resave, out, tmp_path / "cut", model, layout)
    back = export(str(tmp_path / "cut" / "step-00000000"), tmp_path / "back", verify=False)
    expected, found = hf_models.weights(source), hf_models.weights(back)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def load(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto", trust_remote_code=False).eval()
