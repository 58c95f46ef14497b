"""A conversion is held against transformers' own layers, and what is wrong with one is named."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from megatron_davinci.cli.convert_from_hf import import_model
from megatron_davinci.cli.convert_to_hf import export
from megatron_davinci.cli.convert_verify import verified
from megatron_davinci.convert.families import FAMILIES
from megatron_davinci.convert.rules import GroupedQKV
from megatron_davinci.convert.rules import Stacked as GateUp
from megatron_davinci.errors import CheckpointError, EnvironmentProblem
from megatron_davinci.train import checkpoint_files
from tests.cases import cases
from tests.convert import hf_models
from tests.convert.test_hf_model import sizes


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> tuple[Path, Path]:
    """A model with its QK-norm, and the checkpoint of it."""
    folder = tmp_path_factory.mktemp("pair")
    hf_models.save(folder / "hf", "qwen3")
    import_model(folder / "hf", folder / "ours", verify=False)
    return folder / "hf", folder / "ours"


def held(hf: Path, ours: Path) -> Any:
    checkpoint = checkpoint_files.read(ours)
    return verified(hf, checkpoint.state, FAMILIES["qwen3"], checkpoint.manifest["model"])


@cases(6)
@given(drawn=st.composite(sizes)())
def test_every_model_of_every_family_computes_the_same_here_and_there(tmp_path_factory, drawn):
    kind, changes = drawn
    folder = tmp_path_factory.mktemp("model")
    hf_models.save(folder / "hf", kind, changes)
    import_model(folder / "hf", folder / "ours", verify=False)
    checkpoint = checkpoint_files.read(folder / "ours")
    family = FAMILIES[hf_models.KINDS[kind][0]]
    found = verified(folder / "hf", checkpoint.state, family, checkpoint.manifest["model"])
    assert found.layers == changes["num_hidden_layers"]
    # A norm behind a layer divides by how much came out of it, which is little where the layer is narrow: rounding
    # then grows by up to 1 / sqrt(epsilon).
    limit = 1e-3 if checkpoint.manifest["model"].get("norm_placement") == "post" else 1e-5
    assert found.max_layer_difference <= limit
    assert found.max_logit_difference <= limit * max(1, found.max_logit)
    shutil.rmtree(folder)


def test_a_good_conversion_says_how_good(pair):
    found = held(*pair)
    assert found.tensors == len(hf_models.weights(pair[0])) and found.layers == 2
    assert 0 < found.max_logit_difference < 1e-5 < found.max_logit
    assert "25 tensors equal to the bit" in str(found)


@pytest.mark.parametrize(
    "name",
    ["model.layers.1.self_attn.k_proj.weight", "model.layers.0.self_attn.q_norm.weight", "lm_head.weight"],
)
def test_the_first_tensor_that_differs_is_named(pair, tmp_path, name):
    copy = Path(shutil.copytree(pair[0], tmp_path / "copy"))
    tensors = load_file(copy / "model.safetensors")
    tensors[name].view(-1)[0] += 1e-3
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"{name}: .* not the checkpoint's"):
        held(copy, pair[1])


def test_a_rule_that_is_wrong_both_ways_shows_in_what_is_computed(tmp_path, monkeypatch):
    hf_models.save(tmp_path / "hf", "qwen3")
    split, merge = GateUp.split, GateUp.merge
    monkeypatch.setattr(GateUp, "split", lambda self, whole, heads: split(self, whole, heads)[::-1])
    monkeypatch.setattr(GateUp, "merge", lambda self, parts, heads: merge(self, parts[::-1], heads))
    with pytest.raises(CheckpointError, match=r"model\.layers\.0\.mlp\.down_proj\.weight: what is computed"):
        import_model(tmp_path / "hf", tmp_path / "ours")
    assert not (tmp_path / "ours").exists() and not list(tmp_path.glob(".*"))


def test_heads_that_go_to_the_wrong_group_show_too(tmp_path, monkeypatch):
    hf_models.save(tmp_path / "hf", "llama2", {"num_key_value_heads": 2, "tie_word_embeddings": True})

    def merge(self: Any, parts: Any, heads: Any) -> torch.Tensor:
        return torch.cat(list(parts))

    def split(self: Any, whole: torch.Tensor, heads: Any) -> Any:
        return whole.split([heads.heads * heads.dim, heads.groups * heads.dim, heads.groups * heads.dim])

    monkeypatch.setattr(GroupedQKV, "merge", merge)
    monkeypatch.setattr(GroupedQKV, "split", split)
    with pytest.raises(CheckpointError, match=r"self_attn\.o_proj\.weight: what is computed"):
        import_model(tmp_path / "hf", tmp_path / "ours")


def test_an_export_that_is_wrong_does_not_appear(pair, tmp_path, monkeypatch, capsys):
    export(str(pair[1]), tmp_path / "good", dtype="bfloat16")
    assert "verified: 25 tensors equal to the bit" in capsys.readouterr().err
    from megatron_davinci.convert import export as exporting

    real = exporting.to_hf

    def turned(*given: Any) -> dict[str, torch.Tensor]:
        return {name: t.roll(1, 0) if "down" in name else t for name, t in real(*given).items()}

    monkeypatch.setattr(exporting, "to_hf", turned)
    with pytest.raises(CheckpointError, match=r"model\.layers\.0\.mlp\.down_proj\.weight"):
        export(str(pair[1]), tmp_path / "bad")
    assert not (tmp_path / "bad").exists() and not list(tmp_path.glob(".*"))
    export(str(pair[1]), tmp_path / "unseen", verify=False)


def test_without_transformers_it_is_said_what_to_do(pair, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(EnvironmentProblem, match="--skip-verify"):
        held(*pair)
