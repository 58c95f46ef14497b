"""The mean of checkpoints is the mean of their numbers, whatever layouts and dtypes they are of."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from megatron_davinci.cli.convert_average import average, shares_of
from megatron_davinci.cli.convert_to_hf import export
from megatron_davinci.cli.main import main
from megatron_davinci.convert.families import family_of
from megatron_davinci.convert.stored import StoredTensors
from megatron_davinci.convert.write_state import Source, write_state
from megatron_davinci.errors import CheckpointError, ConfigError
from megatron_davinci.train import checkpoint_files
from tests.convert import ranks
from tests.ranks import run_ranks
from tests.tiny import tiny_settings, train_each

UNTIED = {"tie_embeddings": False}


def model_of(**changes: Any) -> dict[str, Any]:
    return ranks.configuration({**UNTIED, **changes}).model.model_dump(mode="json")


def written(
    out: Path, seed: int = 0, dtype: torch.dtype = torch.float32, step: int = 7, **changes: Any
) -> Path:
    """A checkpoint of random weights; `changes` are the model's."""
    model = model_of(**changes)
    generator = torch.Generator().manual_seed(seed)
    drawn = {
        rule.stored: torch.randn(rule.stored_shape(model), generator=generator).to(dtype)
        for rule in family_of(model).rules_of(model)
    }
    return holding(out, drawn, model, step)


def holding(out: Path, weights: dict[str, Tensor], model: dict[str, Any], step: int) -> Path:
    temporary = checkpoint_files.begin(out.parent, step)
    sources = {key: Source(one.dtype, tuple(one.shape), lambda one=one: one) for key, one in weights.items()}
    write_state(temporary / "state", sources)
    description = {"step": step, "consumed_samples": 10 * step, "model": model}
    checkpoint_files.commit(temporary, out, description, latest=False)
    return out


def weights(folder: Path) -> dict[str, Tensor]:
    stored = StoredTensors(checkpoint_files.read(folder).state)
    return {key: stored.read(key) for key in sorted(stored.keys())}


def by_hand(parts: dict[Path, float], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    held = {folder: weights(folder) for folder in parts}
    total = sum(parts.values())
    return {
        key: (sum(held[folder][key].double() * share for folder, share in parts.items()) / total).to(dtype)
        for key in next(iter(held.values()))
    }


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for key, one in expected.items():
        assert found[key].dtype == one.dtype
        torch.testing.assert_close(found[key], one, rtol=torch.finfo(one.dtype).eps, atol=1e-7, msg=key)


@pytest.mark.parametrize(
    ("how", "shares", "dtype"),
    [
        ("equal", (1, 1, 1), "float32"),
        ("linear", (1, 2, 3), "bfloat16"),
        ("0.5", (0.25, 0.5, 1), "float32"),
        ("3,0,1", (3, 0, 1), "float16"),
    ],
)
def test_it_is_the_mean_by_hand(tmp_path, capsys, how, shares, dtype):
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    names = [written(tmp_path / f"{n}", n, kind, step=n + 1) for n, kind in enumerate(dtypes)]
    assert (
        main(
            [
                "convert",
                "average",
                *map(str, names),
                str(tmp_path / "mean"),
                "--weights",
                how,
                "--dtype",
                dtype,
            ]
        )
        == 0
    )
    assert_same(
        weights(tmp_path / "mean"), by_hand(dict(zip(names, shares, strict=True)), getattr(torch, dtype))
    )
    said = checkpoint_files.read(tmp_path / "mean").manifest
    assert (said["step"], said["consumed_samples"], said["weights_only"]) == (3, 30, True)
    of = said["from"]["mean_of"]
    assert [one["folder"] for one in of] == [str(name.resolve()) for name in names]
    assert [one["share"] * sum(shares) for one in of] == pytest.approx(shares)
    printed = capsys.readouterr().out
    assert yaml.safe_load(printed[printed.index("checkpoint:") :]) == {
        "checkpoint": {"initial_weights": str(tmp_path / "mean")}
    }
    assert not list(tmp_path.glob(".step-*")) and not (tmp_path / "LATEST").exists()


def test_what_another_command_is_writing_beside_it_is_left_alone(tmp_path):
    names = [str(written(tmp_path / f"{n}", n)) for n in range(2)]
    other = checkpoint_files.begin(tmp_path, 3)
    average(names, tmp_path / "mean")
    assert (other / "state").is_dir()
    assert not list(tmp_path.glob(".mean*"))


def test_a_mean_of_what_is_equal_is_that_to_the_bit(tmp_path):
    names = [str(written(tmp_path / f"{n}", 5)) for n in range(3)]
    average(names, tmp_path / "mean")
    for key, one in weights(tmp_path / "mean").items():
        assert torch.equal(one, weights(tmp_path / "0")[key])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with a checkpoint after each two of its first 10 steps."""
    root = tmp_path_factory.mktemp("run")
    settings = tiny_settings(root, checkpoint={"every_steps": 2, "keep": 9}, parallel={"tensor": 2})
    settings["train"]["stop_after_steps"] = 10
    assert run_ranks(2, train_each, [settings])[0] == [10]
    return root / "run"


def test_the_last_ones_of_a_run_as_a_model_that_begins_another_and_is_exported(run, tmp_path):
    average([str(run)], tmp_path / "last", last=3, weights="linear")
    average([f"{run}@6,8", f"{run}@10"], tmp_path / "named", weights="1,2,3")
    folders = [run / "checkpoints" / f"step-{step:08d}" for step in (6, 8, 10)]
    expected = by_hand({folder: n + 1.0 for n, folder in enumerate(folders)})
    for name in ("last", "named"):
        assert_same(weights(tmp_path / name), expected)
    manifest = checkpoint_files.read(tmp_path / "last").manifest
    newest = checkpoint_files.read(folders[-1]).manifest
    assert manifest["consumed_tokens"] == newest["consumed_tokens"] > 0

    settings = tiny_settings(
        tmp_path,
        checkpoint={"initial_weights": str(tmp_path / "last")},
        parallel={"tensor": 2},
    )
    settings["curriculum"] = [{**settings["curriculum"][0], "tokens": 4 * 32, "global_batch_size": 4}]
    settings["curriculum"][0]["learning_rate"] = {"peak": 1e-30}
    run_ranks(2, train_each, [settings])
    (begun,) = (tmp_path / "run" / "checkpoints").glob("step-*")
    assert_same(weights(begun), expected)

    from safetensors.torch import load_file

    hf = export(str(tmp_path / "last"), tmp_path / "hf", of_run=run, verify=False)
    assert "the mean of 3 checkpoints, of steps 6, 8, 10" in (hf / "README.md").read_text()
    embedding = load_file(hf / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(embedding, weights(tmp_path / "last")["embedding.word_embeddings.weight"])


def test_the_weights_of_experts(tmp_path):
    experts = {"experts": {"number": 4, "top_k": 2}}
    for name in ("a", "b"):
        run_ranks(1, ranks.save, tmp_path / name, experts, 1, 1, 1)
    folders = [checkpoint_files.step_folder(tmp_path / name, 0) for name in ("a", "b")]
    average(list(map(str, folders)), tmp_path / "mean")
    found = weights(tmp_path / "mean")
    assert any("experts" in key for key in found)
    assert_same(found, by_hand(dict.fromkeys(folders, 1.0)))


def refusal(tmp_path: Path, names: list[str], kind: type[Exception], **options: Any) -> str:
    with pytest.raises(kind) as caught:
        average(names, tmp_path / "mean", **options)
    assert not (tmp_path / "mean").exists() and not list(tmp_path.glob(".step-*"))
    assert not list(tmp_path.glob(".mean*"))
    return str(caught.value)


def test_what_has_no_mean(tmp_path):
    a, b = (str(written(tmp_path / name, n)) for n, name in enumerate("ab"))
    other = str(written(tmp_path / "other", ffn_hidden_size=64))
    said = refusal(tmp_path, [a, other], CheckpointError)
    assert "found:    model.ffn_hidden_size: 64" in said and "expected: model.ffn_hidden_size: 48" in said
    assert "two checkpoints or more" in refusal(tmp_path, [a], ConfigError)
    assert "named twice" in refusal(tmp_path, [a, b, f"{tmp_path}/../{tmp_path.name}/a"], ConfigError)
    assert "--last" in refusal(tmp_path, [a, b], ConfigError, last=2)
    for how in ("1,2,3", "half", "0,0", "-1,2", "inf,1", "nan,1", "1.5", "0"):
        assert f"found:    {how}" in refusal(tmp_path, [a, b], ConfigError, weights=how), how
    (tmp_path / "mean").mkdir()
    with pytest.raises(ConfigError, match="there already"):
        average([a, b], tmp_path / "mean")


def test_numbers_that_are_not_finite_or_too_large_are_named(tmp_path):
    a = written(tmp_path / "a", 0)
    spoilt = weights(a)
    key = "decoder.layers.mlp.linear_fc1.weight"
    spoilt[key][2, 3, 4] = math.nan
    b = holding(tmp_path / "b", spoilt, model_of(), 8)
    said = refusal(tmp_path, [str(a), str(b)], CheckpointError)
    assert str(b) in said and f"{key}, layer 2: 1 of " in said
    spoilt[key][2, 3, 4] = 1e6
    c = holding(tmp_path / "c", spoilt, model_of(), 9)
    said = refusal(tmp_path, [str(a), str(c)], CheckpointError, dtype="float16")
    assert f"{key}, layer 2: 1 values" in said and "at most 6.55e+04" in said
    average([str(a), str(c)], tmp_path / "mean", dtype="bfloat16")


def test_tensors_that_are_not_those_of_the_others_are_named(tmp_path):
    a = written(tmp_path / "a", 0)
    held = weights(a)
    held["decoder.more.weight"] = held.pop("decoder.final_layernorm.weight")
    held["output_layer.weight"] = held["output_layer.weight"][:-1]
    b = holding(tmp_path / "b", held, model_of(), 8)
    said = refusal(tmp_path, [str(a), str(b)], CheckpointError)
    for line in (
        "missing: decoder.final_layernorm.weight",
        "only here: decoder.more.weight",
        "output_layer.weight: shape ",
    ):
        assert line in said


def test_a_run_with_fewer_checkpoints_and_a_damaged_one(run, tmp_path):
    said = refusal(tmp_path, [f"{run}@6,7"], CheckpointError)
    assert "found:    steps 2, 4, 6, 8, 10" in said
    said = refusal(tmp_path, [str(run)], CheckpointError, last=9)
    assert "step-00000002, step-00000004, step-00000006, step-00000008, step-00000010" in said
    assert "1 or more" in refusal(tmp_path, [str(run)], ConfigError, last=0)
    a, b = written(tmp_path / "a", 0), written(tmp_path / "b", 1)
    (data,) = (b / "state").glob("*.distcp")
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    assert str(data) in refusal(tmp_path, [str(a), str(b)], CheckpointError)
    manifest = json.loads((a / "manifest.json").read_text())
    assert manifest["step"] == 7


@given(
    st.one_of(
        st.sampled_from(["equal", "linear"]),
        st.floats(0.01, 0.99).map(str),
        st.lists(st.floats(0, 1e6), min_size=4, max_size=4)
        .filter(any)
        .map(lambda raw: ",".join(map(str, raw))),
    )
)
def test_shares_sum_to_one(how):
    shares = shares_of(how, 4)
    assert math.fsum(shares) == pytest.approx(1) and min(shares) >= 0 and len(shares) == 4
    if "," not in how:
        assert shares == sorted(shares)
